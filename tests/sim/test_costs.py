"""The forms of cost: their arithmetic, what a rest adds, and which numbers are refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsdlab.sim.costs import ForwardCost, NodeCosts, UnfitProfile, Warmth

COST = ForwardCost(
    base_s=0.02,
    per_token_s=1e-3,
    per_token2_s=1e-6,
    per_session_s=5e-4,
    per_context_s=1e-5,
    by_rows=((1, 1e-3), (5, -1e-3), (9, 0.0)),
    per_drawn_s=2e-4,
    tokens=(1, 512),
    batch=(1, 4),
    context=(0, 400),
)


def test_sum_of_its_terms() -> None:
    assert COST.cost_s(9, 1, 0) == pytest.approx(0.02 + 9e-3 + 81e-6)
    assert COST.cost_s(9, 3, 100) == pytest.approx(0.02 + 9e-3 + 81e-6 + 1e-3 + 1e-3)
    assert COST.cost_s(9, 3, 100, drawn=5) == pytest.approx(COST.cost_s(9, 3, 100) + 1e-3)


def test_remainder_is_interpolated_and_ends() -> None:
    assert [COST.row_term_s(n) for n in (1, 5, 9)] == [1e-3, -1e-3, 0.0]
    assert COST.row_term_s(3) == pytest.approx(0.0)
    assert COST.row_term_s(4) == pytest.approx(-5e-4)
    assert COST.row_term_s(10) == 0.0
    assert ForwardCost(base_s=1.0).row_term_s(1) == 0.0


def test_far_outside_is_told() -> None:
    assert COST.outside(768, 6, 600) == ""
    assert COST.outside(769, 6, 600) == "rows 769 (calibrated to 512)"
    assert COST.outside(1, 7, 601) == "batch 7 (calibrated to 4), context 601 (calibrated to 400)"


def test_rest_is_interpolated_between_idle_times() -> None:
    cost = msgspec.structs.replace(COST, first_s=1e-3, after_idle=((0.01, 2e-4), (0.1, 2e-3)))
    assert cost.rested_s(0.0, False) == 0.0
    assert cost.rested_s(0.005, False) == pytest.approx(1e-4)
    assert cost.rested_s(0.055, False) == pytest.approx(1.1e-3)
    assert cost.rested_s(5.0, False) == 2e-3
    assert cost.rested_s(0.0, True) == 1e-3
    assert cost.rested_s(5.0, True) == 2e-3  # not both: it finds the same caches gone
    assert COST.rested_s(5.0, True) == 0.0


def test_extra_fades_from_one_forward_to_the_next() -> None:
    warmth = Warmth(msgspec.structs.replace(COST, first_s=1e-3, fade=0.5))
    extras = [warmth.extra_s(0.0, other) for other in (True, False, False, True, False)]
    assert extras == pytest.approx([1e-3, 5e-4, 2.5e-4, 1e-3, 5e-4])
    assert Warmth(COST).extra_s(9.0, True) == 0.0


@given(
    st.lists(st.tuples(st.floats(0.0, 1.0), st.booleans()), max_size=30),
    st.floats(0.0, 0.99),
    st.floats(0.0, 0.01),
)
def test_extra_is_bounded_by_a_full_rest(
    rests: list[tuple[float, bool]], fade: float, first_s: float
) -> None:
    cost = ForwardCost(base_s=1.0, first_s=first_s, after_idle=((0.5, 0.004),), fade=fade)
    warmth = Warmth(cost)
    for idle_s, other in rests:
        assert 0.0 <= cost.rested_s(idle_s, other) <= warmth.extra_s(idle_s, other) <= max(first_s, 0.004)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"base_s": -1e-9}, r"base_s is -1e-09; allowed: 0 to 3600"),
        ({"per_token_s": float("nan")}, "per_token_s is nan"),
        ({"per_context_s": float("inf")}, "per_context_s is inf"),
        ({"per_drawn_s": -1.0}, "per_drawn_s"),
        ({"first_s": 1e9}, "first_s"),
        ({"fade": 1.0}, "fade is 1.0; allowed: 0 to less than 1"),
        ({"after_idle": ((0.1, 0.0), (0.1, 1.0))}, "after_idle is not in rising order"),
        ({"after_idle": ((0.1, -1.0),)}, "after_idle holds a time"),
        ({"stages": 0}, "stages is 0"),
        ({"residuals": (1.0, float("nan"))}, "residuals are no ratios"),
        ({"residuals": (0.0,)}, "residuals are no ratios"),
        ({"by_rows": ((2, 0.0), (1, 0.0))}, "by_rows is not in rising order"),
        ({"by_rows": ((1, -1.0),)}, "by_rows has -1.0 s at 1 rows"),
        ({"by_rows": ((1, float("nan")),)}, "by_rows has nan s at 1 rows"),
        ({"tokens": (5, 1)}, "tokens is 5 to 1"),
        ({"context": (-1, 1)}, "context is -1 to 1"),
    ],
)
def test_impossible_numbers_are_refused(changes: dict[str, Any], word: str) -> None:
    cost = msgspec.structs.replace(COST, **changes)
    with pytest.raises(UnfitProfile, match=rf"cloud\.target\.?.*{word}"):
        NodeCosts(target=cost).check("cloud")


def test_impossible_nodes_are_refused() -> None:
    NodeCosts(target=COST, drafter=COST, hop_s=1e-4).check("edge")
    with pytest.raises(UnfitProfile, match=r"edge\.recv_s is nan; allowed: 0 to 3600 seconds"):
        NodeCosts(recv_s=float("nan")).check("edge")
