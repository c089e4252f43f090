"""Find window policies by name among the installed entry points."""

from __future__ import annotations

from importlib.metadata import entry_points

from dsdlab.policies.base import PolicyError, WindowPolicy

GROUP = "dsdlab.window_policies"


def window_policy_names() -> list[str]:
    """Names of every installed window policy, sorted."""
    return sorted({e.name for e in entry_points(group=GROUP)})


def load_window_policy(name: str, gamma: int) -> WindowPolicy:
    """A new policy object; `gamma` is its (first or only) window. Raises PolicyError."""
    found = [e for e in entry_points(group=GROUP) if e.name == name]
    if not found:
        raise PolicyError(f"unknown window policy {name!r}; installed: {', '.join(window_policy_names())}")
    policy = found[0].load()(gamma=gamma)
    if not isinstance(policy, WindowPolicy):
        raise PolicyError(f"window policy {name!r} is no dsdlab.policies.WindowPolicy")
    return policy
