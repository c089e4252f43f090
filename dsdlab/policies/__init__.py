"""Policies: who decides how much to draft. Found by entry point `dsdlab.window_policies`."""

from dsdlab.policies.base import FOREVER_S, RUN_AHEAD, Decision, Outcome, Pace, PolicyError, WindowPolicy
from dsdlab.policies.registry import load_window_policy, window_policy_names
from dsdlab.policies.static import StaticWindow

__all__ = [
    "FOREVER_S",
    "RUN_AHEAD",
    "Decision",
    "Outcome",
    "Pace",
    "PolicyError",
    "StaticWindow",
    "WindowPolicy",
    "load_window_policy",
    "window_policy_names",
]
