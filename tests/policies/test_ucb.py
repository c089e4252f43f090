"""The UCB window: it finds the window that costs least a token, position by position, and keeps looking."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from window_sessions import Costs, Session, expected_tpot_s, judged, tpot_s

from dsdlab.policies import PolicyError, load_window_policy
from dsdlab.policies.ucb import LARGEST
from dsdlab.protocol.frames import MAX_WINDOW

LOSS = 1.06  # against the best window of all, what exploring may cost


def losses(alpha: float, costs: Costs, seed: int, *, learn: int, windows: int) -> float:
    """Time a token against that of the best window, by what is expected of each window, not by its luck."""
    session = Session(load_window_policy("ucb", 4), costs, seed)
    session.go(alpha, learn)
    gammas = [gamma for gamma, _ in session.go(alpha, windows)]
    tpots_s = [expected_tpot_s(gamma, lambda _: alpha, costs) for gamma in range(LARGEST + 1)]
    tokens = sum(costs.window_s(g) / tpots_s[g] for g in gammas)
    return sum(costs.window_s(g) for g in gammas) / tokens / min(tpots_s)


@pytest.mark.parametrize("alpha", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("rtt_s", [0.001, 0.030, 0.200])
def test_nearly_the_best_window(alpha: float, rtt_s: float) -> None:
    lost = [losses(alpha, Costs(rtt_s=rtt_s), seed, learn=60, windows=300) for seed in range(4)]
    assert sum(lost) / len(lost) < LOSS


@pytest.mark.parametrize("rtt_s", [0.002, 0.030, 0.100])
def test_a_text_is_too_short_to_explore_for_long(rtt_s: float) -> None:
    """Forty windows in all, the first included: a window that luck made long is not held to for the rest."""
    lost = sorted(losses(0.7, Costs(rtt_s=rtt_s), seed, learn=0, windows=40) for seed in range(60))
    assert sum(lost) / len(lost) < 1.04
    assert lost[57] < 1.09  # 19 of 20 texts


def test_it_learns_positions_not_a_mean() -> None:
    """Three positions always stand and the fourth never: windows of three, whatever the average says."""
    session = Session(load_window_policy("ucb", 8), Costs(rtt_s=0.100))
    session.go(lambda k: float(k < 3), 60)
    late = [gamma for gamma, _ in session.go(lambda k: float(k < 3), 200)]
    assert set(late) <= {3, 4}  # the fourth is looked at again: a row is cheap
    assert late.count(3) > 60


def test_it_notices_a_change() -> None:
    session = Session(load_window_policy("ucb", 4), Costs(rtt_s=0.150))
    poor = session.go(0.2, 150)[-40:]
    good = session.go(0.95, 150)[-40:]
    again = session.go(0.2, 260)[-40:]
    mean = [sum(g for g, _ in windows) / 40 for windows in (poor, good, again)]
    assert mean[1] > 2 * mean[0]
    assert mean[1] > 2 * mean[2]


def test_unreached_positions_are_tried() -> None:
    """It begins with windows of one, so that longer ones are only a hope: they are tried all the same."""
    session = Session(load_window_policy("ucb", 1), Costs(rtt_s=0.200))
    assert max(gamma for gamma, _ in session.go(0.9, 80)) > 6


def test_the_first_window_is_what_was_asked_for() -> None:
    for gamma in (1, 5, 40):
        policy = load_window_policy("ucb", gamma)
        assert policy.decide().gamma == gamma
        policy.observe(judged(0, 0))  # nothing was judged: nothing is known
        assert policy.decide().gamma == gamma


def test_a_window_of_none_would_never_learn() -> None:
    """Asked for 0, it begins with 1; a drafter that is too slow and always wrong is still looked at."""
    policy = load_window_policy("ucb", 0)
    assert policy.decide().gamma == 1
    slow = Session(load_window_policy("ucb", 4), Costs(draft_s=0.2, rtt_s=0.001))
    assert {gamma for gamma, _ in slow.go(0.02, 100)[50:]} == {1}
    quick = Session(load_window_policy("ucb", 4), Costs(rtt_s=0.2))
    assert tpot_s(quick.go(0.9, 200), quick.costs) < tpot_s(slow.go(0.02, 200), slow.costs)


@given(
    st.sampled_from([0, 1, 4, 40]),
    st.lists(st.tuples(st.integers(0, 48), st.integers(0, 48)), max_size=40),
    st.sampled_from([Costs(), Costs(0.0, 0.0, 0.0, 0.0), Costs(1.0, 1e-9, 0.0, 1e-9), Costs(1e-9, 1.0, 1.0)]),
)
def test_any_sequence_stays_within_bounds(gamma: int, verdicts: list[tuple[int, int]], costs: Costs) -> None:
    one, other = load_window_policy("ucb", gamma), load_window_policy("ucb", gamma)
    for drafted, accepted in verdicts:
        assert one.decide() == one.decide() == other.decide()
        assert 1 <= one.decide().gamma <= max(LARGEST, gamma)
        for policy in (one, other):
            policy.observe(judged(drafted, min(accepted, drafted), costs))


@pytest.mark.parametrize("gamma", [-1, MAX_WINDOW + 1])
def test_gamma_out_of_range(gamma: int) -> None:
    with pytest.raises(PolicyError, match=f"gamma is {gamma}; allowed: 0 to {MAX_WINDOW}"):
        load_window_policy("ucb", gamma)
