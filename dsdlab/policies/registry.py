"""Find window policies by name among the installed entry points."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from dsdlab.policies.base import PolicyError, WindowPolicy

GROUP = "dsdlab.window_policies"

_offered: dict[str, Callable[..., WindowPolicy]] = {}


@cache
def _installed() -> dict[str, EntryPoint]:
    """By name; reading all packages' metadata takes milliseconds, and they do not change in a process."""
    return {e.name: e for e in entry_points(group=GROUP)}


@cache
def _maker(name: str) -> Any:
    return _installed()[name].load()


def window_policy_names() -> list[str]:
    """Names of every installed window policy, sorted."""
    return sorted(_installed())


def offer(name: str, maker: Callable[..., WindowPolicy]) -> None:
    """Let this process alone know a policy by a name, beside what is installed; called with `gamma`."""
    _offered[name] = maker


def load_window_policy(name: str, gamma: int) -> WindowPolicy:
    """A new policy object; `gamma` is its (first or only) window. Raises PolicyError."""
    if name not in _installed() and name not in _offered:
        raise PolicyError(f"unknown window policy {name!r}; installed: {', '.join(window_policy_names())}")
    policy = (_offered.get(name) or _maker(name))(gamma=gamma)
    if not isinstance(policy, WindowPolicy):
        raise PolicyError(f"window policy {name!r} is no dsdlab.policies.WindowPolicy")
    return policy
