"""The model window: the closed form's minimum, at estimates that come to be the truth."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from window_sessions import Costs, Session, expected_tpot_s, judged

from dsdlab.policies import PolicyError, load_window_policy
from dsdlab.policies.model import LARGEST, best_window
from dsdlab.protocol.frames import MAX_WINDOW
from dsdlab.sim.theory import sync_tpot_s

TIME = st.floats(1e-4, 0.5)


@given(st.floats(0.02, 0.98), TIME, TIME, st.floats(0.0, 0.05), TIME)
def test_best_window_is_the_least_of_the_closed_form(
    alpha: float, t_d_s: float, t_v_s: float, row_s: float, round_s: float
) -> None:
    best = best_window(alpha, t_d_s, t_v_s, row_s, round_s, LARGEST)
    tpots = [sync_tpot_s(alpha, g, t_d_s, t_v_s + g * row_s, round_s) for g in range(LARGEST + 1)]
    assert 0 <= best <= LARGEST
    assert tpots[best] <= min(tpots) * (1 + 1e-9)


def test_ties_and_ends() -> None:
    assert best_window(0.5, 0.0, 1.0, 0.0, 0.0, 5) == 5  # drafts cost nothing
    assert best_window(0.5, 10.0, 1.0, 0.0, 0.0, 5) == 0  # more than they save
    assert best_window(0.5, 0.5, 1.0, 0.0, 0.0, 1) == 0  # as much as they save: the smaller one
    assert best_window(0.9, 0.001, 1.0, 0.0, 0.0, 0) == 0


@pytest.mark.parametrize("alpha", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("rtt_s", [0.001, 0.030, 0.200])
def test_nearly_the_best_window(alpha: float, rtt_s: float) -> None:
    costs = Costs(rtt_s=rtt_s)
    best_s = min(expected_tpot_s(gamma, lambda _: alpha, costs) for gamma in range(LARGEST + 1))
    session = Session(load_window_policy("model", 4), costs)
    session.go(alpha, 60)
    windows = session.go(alpha, 300)
    total_s = sum(costs.window_s(g) for g, _ in windows)
    tokens = sum(costs.window_s(g) / expected_tpot_s(g, lambda _: alpha, costs) for g, _ in windows)
    assert total_s / tokens < 1.06 * best_s


def test_the_first_window_is_what_was_asked_for() -> None:
    for gamma in (1, 5, 40):
        policy = load_window_policy("model", gamma)
        assert policy.decide().gamma == gamma
        policy.observe(judged(0, 0))  # a token's time is not known yet
        assert policy.decide().gamma == gamma


def test_a_first_window_of_none_would_never_learn() -> None:
    policy = load_window_policy("model", 0)
    assert policy.decide().gamma == 1
    policy.observe(judged(1, 1))
    assert policy.decide().gamma > 1


def test_it_stops_where_drafts_cost_more_than_they_save() -> None:
    """… and does not look again where no drafter could pay."""
    session = Session(load_window_policy("model", 4), Costs(draft_s=0.2, rtt_s=0.001))
    windows = session.go(0.5, 400)
    assert {gamma for gamma, _ in windows[20:]} == {0}


def test_it_comes_back_when_the_text_becomes_easy() -> None:
    """Without a look now and then a window of none would be for ever."""
    session = Session(load_window_policy("model", 4), Costs(draft_s=0.020, rtt_s=0.001))
    hard = [gamma for gamma, _ in session.go(0.05, 400)[100:]]
    assert hard.count(0) > 0.9 * len(hard)
    easy = [gamma for gamma, _ in session.go(0.95, 400)[-100:]]
    assert min(easy) > 2


@given(
    st.sampled_from([0, 1, 4, 40]),
    st.lists(st.tuples(st.integers(0, 48), st.integers(0, 48)), max_size=40),
    st.sampled_from([Costs(), Costs(0.0, 0.0, 0.0, 0.0), Costs(1.0, 1e-9, 0.0, 1e-9), Costs(1e-9, 1.0, 1.0)]),
)
def test_any_sequence_stays_within_bounds(gamma: int, verdicts: list[tuple[int, int]], costs: Costs) -> None:
    one, other = load_window_policy("model", gamma), load_window_policy("model", gamma)
    for drafted, accepted in verdicts:
        assert one.decide() == one.decide() == other.decide()
        assert 0 <= one.decide().gamma <= max(LARGEST, gamma)
        for policy in (one, other):
            policy.observe(judged(drafted, min(accepted, drafted), costs))


@pytest.mark.parametrize("gamma", [-1, MAX_WINDOW + 1])
def test_gamma_out_of_range(gamma: int) -> None:
    with pytest.raises(PolicyError, match=f"gamma is {gamma}; allowed: 0 to {MAX_WINDOW}"):
        load_window_policy("model", gamma)
