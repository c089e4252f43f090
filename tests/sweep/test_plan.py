"""Scenario to cells to jobs: content-hashed, paired, in randomised blocks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from dsdlab.scenario import Scenario, ScenarioError, load_scenario
from dsdlab.sweep.plan import batches_of, estimate_s, plan_jobs, remaining
from dsdlab.sweep.rows import Row
from dsdlab.sweep.workload import Prompt, load_prompts

ROOT = Path(__file__).parents[2]
TEXT = """
name = "s"
[sampling]
temperature = [0.0, 0.7]
[grid]
mode = ["cloud-ar", "dsd-sync"]
gamma = [2, 4]
rtt_ms = [1, 50]
rate_mbit = [5, "unlimited"]
[run]
repeats = 3
"""
PROMPTS = [Prompt("a", "one"), Prompt("b", "two")]


def scenario(tmp_path: Path, text: str = TEXT) -> Scenario:
    (tmp_path / "s.toml").write_text(text)
    return load_scenario(tmp_path / "s.toml")[0]


def test_grid_counts_gamma_only_where_there_is_drafting(tmp_path: Path) -> None:
    cells = scenario(tmp_path).cells()
    assert len(cells) == 2 * 2 * 2 * (1 + 2)
    assert {c.gamma for c in cells if c.mode == "cloud-ar"} == {0}
    assert {c.rate_mbit for c in cells} == {5.0, None}


def test_ids_follow_content_and_nothing_else(tmp_path: Path) -> None:
    one = scenario(tmp_path)
    ids = [one.cell_id(c) for c in one.cells()]
    assert len(set(ids)) == len(ids)
    renamed = scenario(tmp_path, TEXT.replace('"s"', '"other"').replace("[1, 50]", "[50, 1, 7]"))
    assert set(ids) < {renamed.cell_id(c) for c in renamed.cells()}
    longer = scenario(tmp_path, TEXT + "\n[workload]\nmax_new_tokens = 9\n")
    assert not set(ids) & {longer.cell_id(c) for c in longer.cells()}
    more = scenario(tmp_path, TEXT.replace("repeats = 3", "repeats = 9"))
    assert more.digest() == one.digest(), "more repeats go on in the same folder"


def test_blocks_cover_the_grid_and_pair_prompts_and_seeds(tmp_path: Path) -> None:
    s = scenario(tmp_path)
    jobs = plan_jobs(s, PROMPTS, [[1], [2]])
    size = len(s.cells())
    assert len(jobs) == 3 * size
    orders = []
    for rep in range(3):
        block = jobs[rep * size : (rep + 1) * size]
        assert {j.rep for j in block} == {rep}
        assert Counter(j.cell_id for j in block).most_common(1)[0][1] == 1
        assert {j.prompt.key for j in block} == {"ab"[rep % 2]}
        assert len({j.sampling.seed for j in block}) == 1
        orders.append([j.cell_id for j in block])
    assert orders[0] != orders[1], "each block has an order of its own"
    assert [j.key for j in jobs] == [j.key for j in plan_jobs(s, PROMPTS, [[1], [2]])]


def test_remaining_keeps_good_rows_and_retries_failed_ones(tmp_path: Path) -> None:
    jobs = plan_jobs(scenario(tmp_path), PROMPTS, [[1], [2]])

    def row(i: int, status: str) -> Row:
        job = jobs[i]
        return Row(
            cell=job.cell_id, rep=job.rep, status=status, mode=job.cell.mode, policy="static", gamma=0,
            runtime="process", link="modelled", rtt_ms=1.0,
        )  # type: ignore[arg-type] # fmt: skip

    left = remaining(jobs, [row(0, "ok"), row(1, "failed"), row(2, "timeout")])
    assert [j.key for j in left] == [j.key for j in jobs[1:]]
    assert 0 < estimate_s(left, 40) < 3600


def test_edges_run_as_many_repetitions_at_once() -> None:
    s = Scenario.model_validate(
        {
            "name": "s",
            "grid": {"mode": ["cloud-ar", "dsd-sync"], "rtt_ms": [5], "edges": [1, 2]},
            "run": {"repeats": 4},
        }
    )
    jobs = plan_jobs(s, PROMPTS, [[1], [2]])
    assert len(jobs) == len({j.key for j in jobs}) == 4 * 4
    batches = batches_of(jobs)
    assert sorted(len(b) for b in batches) == [1] * 8 + [2] * 4
    for batch in batches:
        assert len({j.cell_id for j in batch}) == 1
        assert len(batch) == batch[0].cell.edges
        assert len({j.sampling.seed for j in batch}) == len({j.prompt.key for j in batch}) == len(batch)
        assert [j.rep for j in batch] == list(range(batch[0].rep, batch[0].rep + len(batch)))
    alone = {j.rep: j for j in jobs if j.cell.edges == 1 and j.cell.mode == "dsd-sync"}
    for job in (j for j in jobs if j.cell.edges == 2 and j.cell.mode == "dsd-sync"):
        assert (job.prompt, job.sampling) == (alone[job.rep].prompt, alone[job.rep].sampling), "paired"

    rows = [
        Row(
            cell=job.cell_id, rep=job.rep, status="ok", mode=job.cell.mode, policy="static", gamma=0,
            runtime="process", link="modelled", rtt_ms=5.0,
        )
        for job in jobs
    ]  # fmt: skip
    two = next(k for k, job in enumerate(jobs) if job.cell.edges == 2)
    rows[two + 1].status = "failed"
    left = remaining(jobs, rows)
    assert left == jobs[two : two + 2], "both run again, for a load must be whole"


def test_builtin_prompts_and_shipped_scenarios() -> None:
    for path in sorted((ROOT / "scenarios").glob("*.toml")):
        shipped, _ = load_scenario(path)
        prompts = load_prompts(shipped.workload, path)
        assert len(prompts) == shipped.workload.n_prompts
        assert len({p.key for p in prompts}) == len(prompts)
        assert shipped.name == path.stem


def test_overrides_are_checked_like_the_file(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(TEXT)
    changed, _ = load_scenario(tmp_path / "s.toml", {"run.repeats": 1})
    assert changed.run.repeats == 1
    with pytest.raises(ScenarioError, match=r"run\.repeats is 0"):
        load_scenario(tmp_path / "s.toml", {"run.repeats": 0})
    with pytest.raises(ScenarioError, match=r"run\.runtime is 'moon'"):
        load_scenario(tmp_path / "s.toml", {"run.runtime": "moon"})
