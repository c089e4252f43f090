"""What a test needs of the host. Without it the test is skipped, but on CI it fails."""

from __future__ import annotations

import os

import pytest

from testbed.host import netns_problem
from testbed.links.uml import uml_problem


def need(problem: str) -> None:
    """Skip the test for this reason, or fail it on CI; no reason, no skip."""
    if not problem:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(problem)
    pytest.skip(problem)


def need_netns() -> None:
    need(netns_problem())


def need_uml() -> None:
    need(netns_problem() or uml_problem())
