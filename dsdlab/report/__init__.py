"""The HTML report of a sweep: one self-contained file."""

from dsdlab.report.render import render

__all__ = ["render"]
