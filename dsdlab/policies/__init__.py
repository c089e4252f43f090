"""Policies: who decides how much to draft. Found by entry point `dsdlab.window_policies`."""

from dsdlab.policies.base import Decision, Outcome, PolicyError, WindowPolicy
from dsdlab.policies.registry import load_window_policy, window_policy_names
from dsdlab.policies.static import StaticWindow

__all__ = [
    "Decision",
    "Outcome",
    "PolicyError",
    "StaticWindow",
    "WindowPolicy",
    "load_window_policy",
    "window_policy_names",
]
