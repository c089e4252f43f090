"""The backoff window: its schedule, its bounds, and what teaches it nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from window_sessions import judged

from dsdlab.policies import PolicyError, WindowPolicy, load_window_policy
from dsdlab.policies.backoff import LARGEST
from dsdlab.protocol.frames import MAX_WINDOW


def windows(policy: WindowPolicy, verdicts: list[str]) -> list[int]:
    """The window before and after each verdict: all, none or some of it accepted."""
    out = [policy.decide().gamma]
    for verdict in verdicts:
        gamma = out[-1]
        accepted = {"all": gamma, "none": 0, "some": max(gamma - 1, 0)}[verdict]
        policy.observe(judged(gamma, accepted))
        out.append(policy.decide().gamma)
    return out


def test_the_schedule() -> None:
    """Two more after a full acceptance, half after none, one less after some."""
    grown = windows(load_window_policy("backoff", 4), ["all"] * 8)
    assert grown == [4, 6, 8, 10, 12, 14, 16, 16, 16]
    assert windows(load_window_policy("backoff", 13), ["none"] * 5) == [13, 6, 3, 1, 1, 1]
    assert windows(load_window_policy("backoff", 4), ["some"] * 2) == [4, 3, 2]
    assert windows(load_window_policy("backoff", 4), ["all", "some", "none", "all"]) == [4, 6, 5, 2, 4]


def test_a_short_window_says_nothing_about_longer_ones() -> None:
    """The text's end cut it; and a token that the target decided alone judged nothing."""
    policy = load_window_policy("backoff", 6)
    policy.observe(judged(3, 3))
    policy.observe(judged(0, 0))
    assert policy.decide().gamma == 6
    policy.observe(judged(3, 2))  # a rejection counts in any window
    assert policy.decide().gamma == 5


def test_frames_judged_together_count_as_a_full_window() -> None:
    policy = load_window_policy("backoff", 2)
    policy.observe(judged(6, 6))
    assert policy.decide().gamma == 4


@given(
    st.integers(0, MAX_WINDOW),
    st.lists(st.tuples(st.integers(0, MAX_WINDOW), st.integers(0, MAX_WINDOW)), max_size=60),
)
def test_any_sequence_stays_within_bounds(gamma: int, verdicts: list[tuple[int, int]]) -> None:
    """… and is a function of what was observed."""
    one, other = load_window_policy("backoff", gamma), load_window_policy("backoff", gamma)
    for drafted, accepted in verdicts:
        assert one.decide() == one.decide() == other.decide()
        assert 1 <= one.decide().gamma <= max(LARGEST, gamma)
        for policy in (one, other):
            policy.observe(judged(drafted, min(accepted, drafted)))


@pytest.mark.parametrize("gamma", [-1, MAX_WINDOW + 1])
def test_gamma_out_of_range(gamma: int) -> None:
    with pytest.raises(PolicyError, match=f"gamma is {gamma}; allowed: 0 to {MAX_WINDOW}"):
        load_window_policy("backoff", gamma)
