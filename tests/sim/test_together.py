"""Several edges at once against one verifier, and edges that are weaker than the cloud."""

from __future__ import annotations

import pytest

from dsdlab.decoding import Sampling
from dsdlab.nodes import GenerationRecord, GenerationRequest
from dsdlab.scenario import Scenario
from dsdlab.sim.predict import predict
from dsdlab.sim.profile import LinkProfile
from dsdlab.sim.simulate import Pair, simulate_generation, simulate_together
from dsdlab.sweep.compare import prediction_rows
from dsdlab.sweep.keys import condition_of
from dsdlab.sweep.plan import plan_jobs
from dsdlab.sweep.workload import Prompt

TARGET, DRAFTER = "emulated:base_s=0.024,per_token_s=0.001", "emulated:base_s=0.006,alpha=0.8"
PAIR = Pair(target=TARGET, drafter=DRAFTER)
LINK = LinkProfile(rtt_ms=10)
TOKENS = 64


def request(mode: str, seed: int, **more: object) -> GenerationRequest:
    return GenerationRequest(
        prompt_ids=(4, 2), mode=mode, sampling=Sampling(seed=seed), max_new_tokens=TOKENS, **more
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["cloud-ar", "cloud-sd", "dsd-sync", "dsd-pipelined", "dsd-stream"])
def test_one_edge_among_none_is_a_generation_alone(mode: str) -> None:
    alone = simulate_generation(PAIR, request(mode, 1), LINK, seed="a")
    assert simulate_together(PAIR, [request(mode, 1)], LINK, seed="a") == [alone]


@pytest.mark.parametrize("mode", ["cloud-ar", "cloud-sd"])
def test_who_shares_a_target_waits_for_it(mode: str) -> None:
    """All of their work is the target's: four take four times as long, and each says what it says alone."""
    requests = [request(mode, seed, gamma=4) for seed in range(4)]
    records = simulate_together(PAIR, requests, LINK, seed="a")
    for one, record in zip(requests, records, strict=True):
        alone = simulate_generation(PAIR, one, LINK, seed="a")
        assert record.ids == alone.ids
        assert record.tpot_s is not None and alone.tpot_s is not None
        assert record.tpot_s == pytest.approx(4 * alone.tpot_s, rel=0.12)


def test_drafting_at_the_edge_frees_the_target() -> None:
    def slowest_s(mode: str, n: int) -> float:
        records = simulate_together(PAIR, [request(mode, s, gamma=4) for s in range(n)], LINK, seed="a")
        return max(record.tpot_s or 0.0 for record in records)

    assert slowest_s("cloud-sd", 1) < slowest_s("dsd-sync", 1)
    assert slowest_s("dsd-sync", 6) < 0.7 * slowest_s("cloud-sd", 6)


def test_more_edges_than_an_engine_has_slots_by_itself() -> None:
    records = simulate_together(PAIR, [request("cloud-sd", s, gamma=2) for s in range(12)], LINK, seed="a")
    assert [len(record.ids) for record in records] == [TOKENS] * 12


def test_a_weaker_edge_is_slower_where_it_computes_and_nowhere_else() -> None:
    weak = Pair(
        target=TARGET,
        drafter=DRAFTER,
        edge_target="emulated:base_s=0.144,per_token_s=0.006",
        edge_drafter="emulated:base_s=0.012,alpha=0.8",
    )

    def both(mode: str) -> list[GenerationRecord]:
        return [simulate_generation(p, request(mode, 1, gamma=4), LINK, seed="a") for p in (weak, PAIR)]

    slow, fast = both("edge-sd")
    assert slow.ids == fast.ids
    assert sum(slow.t_verify_s) == pytest.approx(6 * sum(fast.t_verify_s))
    assert sum(slow.t_draft_s) == pytest.approx(2 * sum(fast.t_draft_s))
    slow, fast = both("dsd-sync")
    assert sum(slow.t_draft_s) == pytest.approx(2 * sum(fast.t_draft_s))
    assert slow.t_verify_s == fast.t_verify_s
    slow, fast = both("cloud-sd")
    assert slow == fast


def test_a_grid_of_edges_gives_a_row_for_each() -> None:
    scenario = Scenario.model_validate(
        {
            "name": "s",
            "models": {"target": TARGET, "drafter": DRAFTER},
            "grid": {"mode": ["cloud-sd", "dsd-sync"], "rtt_ms": [10], "edges": [1, 2]},
            "run": {"repeats": 4},
            "workload": {"max_new_tokens": 32},
        }
    )
    jobs = plan_jobs(scenario, [Prompt("p", "x"), Prompt("q", "y")], [[1], [2]])
    rows = prediction_rows(predict(scenario, jobs, PAIR, draws=1, workers=1), scenario)
    assert sorted((r.mode, r.edges, r.rep) for r in rows) == sorted(
        (mode, edges, rep) for mode in ("cloud-sd", "dsd-sync") for edges in (1, 2) for rep in range(4)
    )
    assert all(row.exact for row in rows)
    assert {condition_of(row).extra for row in rows} == {"", "2 edges at once"}
    slower = {(r.mode, r.rep): r.tpot_ms for r in rows if r.edges == 2}
    for row in rows:
        if row.edges == 1 and row.mode == "cloud-sd":
            assert slower[row.mode, row.rep] > 1.5 * row.tpot_ms  # type: ignore[operator]
