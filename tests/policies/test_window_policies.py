"""Window policies: found by name, checked, and static ones constant."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint

import pytest

from dsdlab.policies import (
    Decision,
    Outcome,
    PolicyError,
    StaticWindow,
    WindowPolicy,
    load_window_policy,
    registry,
    window_policy_names,
)
from dsdlab.protocol.frames import MAX_WINDOW


@pytest.mark.parametrize("gamma", [0, 1, 7, MAX_WINDOW])
def test_static_never_changes_its_mind(gamma: int) -> None:
    policy = load_window_policy("static", gamma)
    assert isinstance(policy, StaticWindow)
    for accepted in range(min(gamma, 3) + 1):
        assert policy.decide() == Decision(gamma)
        policy.observe(Outcome(gamma, accepted, 0.01, 0.05, 0.0, 0.1))
    assert policy.decide() == Decision(gamma)


def test_each_generation_has_its_own_policy() -> None:
    assert load_window_policy("static", 3) is not load_window_policy("static", 3)


@pytest.mark.parametrize("gamma", [-1, MAX_WINDOW + 1])
def test_gamma_out_of_range(gamma: int) -> None:
    with pytest.raises(PolicyError, match=f"gamma is {gamma}; allowed: 0 to {MAX_WINDOW}"):
        load_window_policy("static", gamma)


def test_unknown_name_lists_what_there_is() -> None:
    assert "static" in window_policy_names()
    with pytest.raises(PolicyError, match=r"unknown window policy 'magic'; installed: .*\bstatic\b") as e:
        load_window_policy("magic", 4)
    assert "\n" not in str(e.value)


class Halving(WindowPolicy):
    """A user's own: half the window after a rejection."""

    def __init__(self, gamma: int) -> None:
        self._gamma = gamma

    def decide(self) -> Decision:
        return Decision(self._gamma)

    def observe(self, outcome: Outcome) -> None:
        if outcome.accepted < outcome.drafted:
            self._gamma //= 2


class NoPolicy:
    def __init__(self, gamma: int) -> None:
        self.gamma = gamma


@pytest.fixture
def other_packages() -> Iterator[None]:
    """What is installed is looked up once a process: forget it before and after."""
    registry._installed.cache_clear()
    yield
    registry._installed.cache_clear()


@pytest.mark.usefixtures("other_packages")
def test_users_add_their_own_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("halving", f"{__name__}:Halving", registry.GROUP),
        EntryPoint("nothing", f"{__name__}:NoPolicy", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == registry.GROUP else [])
    policy = load_window_policy("halving", 8)
    policy.observe(Outcome(8, 2, 0.0, 0.0, 0.0, 0.0))
    assert policy.decide() == Decision(4)
    assert window_policy_names() == ["halving", "nothing"]
    with pytest.raises(PolicyError, match="window policy 'nothing' is no"):
        load_window_policy("nothing", 8)
