"""The controller against what would have been best, by hand."""

from __future__ import annotations

import pytest

from dsdlab.sweep.keys import Condition, Variant
from dsdlab.sweep.regret import regret_lines, regrets_of

HERE = Condition("netns", "netem", None, 0.0, 0.0)
AR, SD = Variant("cloud-ar", "static", 0), Variant("cloud-sd", "static", 4)
SYNC, FREE = Variant("dsd-sync", "static", 4), Variant("dsd-stream", "static", 0, free_run=True)
EDGE, HELPED = Variant("edge-sd", "static", 4), FREE._replace(beside=4)
CONTROLLER = Variant("dsd-adaptive", "adaptive", 0)
PAIRS = [("p", 1, 0), ("q", 2, 1), ("r", 3, 2)]


def tpots(
    *cells: tuple[Variant, float, float],
) -> dict[tuple[Variant, Condition, float], dict[tuple[str, int, int], float]]:
    """(variant, RTT, TPOT): three pairs each, the second 10 % and the third 20 % slower."""
    return {
        (variant, HERE, rtt): {pair: ms * (1 + k / 10) for k, pair in enumerate(PAIRS)}
        for variant, rtt, ms in cells
    }


def test_the_best_is_taken_for_each_cell_among_what_the_controller_had() -> None:
    found = regrets_of(
        tpots(
            (AR, 10, 50), (SD, 10, 21), (SYNC, 10, 25), (FREE, 10, 24), (HELPED, 10, 20), (EDGE, 10, 5),
            (CONTROLLER, 10, 24.6),
            (AR, 300, 50), (SD, 300, 21), (SYNC, 300, 90), (FREE, 300, 51), (CONTROLLER, 300, 50.5),
        )
    )  # fmt: skip
    assert [(r.rtt_ms, r.best) for r in found] == [(10, FREE), (300, AR)]
    assert [r.best_ms for r in found] == [pytest.approx(26.4), pytest.approx(55)]
    assert [r.pct for r in found] == [pytest.approx(2.5), pytest.approx(1.0)]
    assert found[0].ratio.n == 3
    assert [r.of_alone.value for r in found if r.of_alone] == [pytest.approx(0.492), pytest.approx(1.01)]
    assert regret_lines(found) == [
        "dsd-adaptive: +2.5 % against the best static setting in its worst of 2 cells (dsd-stream + free run "
        "at 10 ms), +1.8 % on average; +1.0 % against cloud-ar at worst"
    ]


def test_with_a_drafter_beside_the_target_it_has_to_be_as_good_as_that() -> None:
    helped = CONTROLLER._replace(beside=4)
    found = regrets_of(tpots((AR, 10, 50), (SD, 10, 21), (HELPED, 10, 20), (helped, 10, 22)))
    assert [(r.best, r.pct) for r in found] == [(HELPED, pytest.approx(10.0))]


def test_without_a_rival_or_a_controller_there_is_none() -> None:
    assert regrets_of(tpots((CONTROLLER, 10, 20), (EDGE, 10, 5))) == []
    assert regrets_of(tpots((AR, 10, 20), (CONTROLLER, 20, 5))) == []
    assert regret_lines([]) == []


def test_the_best_is_best_in_all_and_not_on_most_texts() -> None:
    cells = tpots((FREE, 10, 20), (SYNC, 10, 20), (CONTROLLER, 10, 20))
    cells[FREE, HERE, 10] = dict(zip(PAIRS, (9.0, 9.0, 42.0), strict=True))  # least median, most in all
    cells[SYNC, HERE, 10] = dict(zip(PAIRS, (10.0, 10.0, 20.0), strict=True))
    cells[CONTROLLER, HERE, 10] = dict(zip(PAIRS, (11.0, 11.0, 22.0), strict=True))
    (found,) = regrets_of(cells)
    assert (found.best, found.pct) == (SYNC, pytest.approx(10.0))
    assert (found.tpot_ms, found.best_ms) == (pytest.approx(44 / 3), pytest.approx(40 / 3))


def test_only_shared_generations_are_paired() -> None:
    cells = tpots((FREE, 10, 20), (CONTROLLER, 10, 22))
    cells[CONTROLLER, HERE, 10] = {PAIRS[2]: 30.0}
    (found,) = regrets_of(cells)
    assert (found.pct, found.ratio.n, found.of_alone) == (pytest.approx(25.0), 1, None)
