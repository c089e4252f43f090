"""The price list of docs/wire.md: its page, its rows, and its judge, which can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import wire, wire_law, wire_page
from dsdlab.decoding import Sampling, probabilities
from dsdlab.nodes import GenerationRecord, GenerationRequest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "wire.md").read_text(encoding="utf-8")
HEAT = Sampling(wire.HEAT)


def found() -> dict[str, Any]:
    """What a run of two generations would have written."""
    jobs = [wire.Job("a", [1, 2], 1), wire.Job("b", [3], 1)]
    truth = wire.Truth(drafter_ids=100)
    records: wire.Records = {}
    for scheme in wire.SCHEMES:
        up = {"DraftQ" if scheme.rejects else "Draft": 60, "Open": 1000}
        for job in jobs:
            truth.alone[job.prompt, job.seed, scheme.temperature] = [4, 5, 6, 7]
        for rate in wire.RATES_MBIT:
            records[scheme.key, rate] = [
                GenerationRecord(
                    ids=[4, 5, 6, 7],
                    commits=[(0.1, 1), (0.1 + 1 / rate, 3)],
                    windows=[(0, 0), (4, 2)],
                    t_draft_s=[0.01],
                    t_verify_s=[0.05, 0.02],
                    bytes_up=up,
                    bytes_down={"Commit": 12, "Verdict": 8},
                )
                for _ in jobs
            ]
        if scheme.rejects:
            truth.laws[scheme.key] = wire.Law(0.75, 20.0, 0.4, 1e-30)
    rows = [wire.row_of(scheme, records, jobs, truth) for scheme in wire.SCHEMES]
    return {
        "target": "t", "drafter": "d", "precision": "bf16", "drafter_ids": 100,
        "gamma": 4, "rtt_ms": 20.0, "generations": 2,
        "rates_mbit": list(wire.RATES_MBIT), "max_new_tokens": 4, "runtime": "process", "link": "modelled",
        "cpu": "a cpu", "load": 0.5, "cores": 2, "rows": rows,
    }  # fmt: skip


def test_a_row_says_what_was_recorded() -> None:
    rows = {row["key"]: row for row in found()["rows"]}
    q8 = rows["q8"]
    assert (q8["up"], q8["down"], q8["tau"], q8["alpha"]) == (15.0, 5.0, 3.0, [2 / 3, 2 / 3, 2 / 3])
    assert q8["tpot_ms"] == {"1": pytest.approx(1000 / 3), "10": pytest.approx(100 / 3)}
    assert q8["beside_coupled"] == {"1": 1.0, "10": 1.0}
    assert rows["greedy"]["exact"] == "same ids as the target alone, 4 of 4"
    assert all(row["good"] for row in rows.values())


@pytest.mark.parametrize(("p_value", "control"), [(1e-4, 1e-30), (0.5, 0.01)])
def test_a_scheme_that_is_not_exact_fails(p_value: float, control: float) -> None:
    truth = wire.Truth(laws={"q8": wire.Law(0.75, 8.0, p_value, control)})
    record = GenerationRecord(ids=[4, 5], commits=[(0.1, 1), (0.2, 1)], t_verify_s=[0.1, 0.1])
    records: wire.Records = {(key, rate): [record] for key in ("q8", wire.BASE) for rate in wire.RATES_MBIT}
    [scheme] = [s for s in wire.SCHEMES if s.key == "q8"]
    assert not wire.row_of(scheme, records, [wire.Job("a", [1], 1)], truth)["good"]


def test_the_block_can_be_written_again() -> None:
    block = wire_page.table(found())
    once = wire_page.replaced(PAGE, block)
    assert wire_page.replaced(once, block) == once
    outside = [part.split(wire_page.END)[-1] for part in PAGE.split(wire_page.BEGIN)]
    assert all(part in once for part in outside)
    assert max(len(line) for line in block.splitlines() if not line.startswith("|")) <= wire_page.WIDTH
    with pytest.raises(ValueError, match="both marks"):
        wire_page.replaced(PAGE.replace(wire_page.END, ""), block)


def test_the_page_has_every_scheme_and_column() -> None:
    block = PAGE.split(wire_page.BEGIN)[1].split(wire_page.END)[0]
    shipped, made = block.strip().splitlines(), wire_page.table(found()).splitlines()
    assert shipped[:2] == made[:2]
    n = len(wire.SCHEMES)
    assert [line.split(" | ")[0] for line in shipped[2 : 2 + n]] == [f"| {s.label}" for s in wire.SCHEMES]
    assert "make bench-wire" in PAGE


def test_what_is_asked_can_be_asked() -> None:
    job = wire.Job("a", [1, 2], 7)
    for scheme in wire.SCHEMES:
        ask = wire._ask(scheme, job, 4, 8)
        request = GenerationRequest(
            ask["prompt_ids"], ask["mode"], gamma=ask["gamma"], sampling=Sampling(**ask["sampling"]),
            acceptance=ask["acceptance"], top_q=ask["top_q"],
        )  # fmt: skip
        assert request.sampling.seed == 7
        assert (request.acceptance == "rejection") == scheme.rejects


def places(n: int) -> list[wire_law.Place]:
    rng = np.random.default_rng(5)
    out = []
    for position in range(n):
        logits = rng.normal(0, 1.5, 50).astype(np.float32)
        near = (logits + rng.normal(0, 0.7, 50)).astype(np.float32)
        p, q = (probabilities(row, HEAT, 50) for row in (logits, near))
        out.append(wire_law.Place(position, logits, p, q))
    return out


def test_the_judge_lets_the_honest_pass_and_catches_the_lie() -> None:
    at = places(4)
    for top_q in (8, 0):
        assert wire_law.p_value(at, top_q, HEAT, 300) > wire.LEVEL
    assert wire_law.p_value(at, 0, HEAT, 300, lie=True) < wire.LEVEL**2


def test_cutting_q_to_fewer_ids_costs_acceptance() -> None:
    at = places(20)
    cut, more, whole = (wire_law.overlap(at, top_q) for top_q in (2, 8, 0))
    assert cut < more < whole < 1.0
    assert [wire_law.kept_ids(at, top_q) for top_q in (2, 8, 0)] == [2.0, 8.0, pytest.approx(50.0, abs=1.0)]
