"""A plan's trace: each text once, only what is missing, kept when the recording process fails."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tiny_models import write_tiny_drafter, write_tiny_llama

from dsdlab.models.base import ModelError
from dsdlab.models.drafters import load_drafter
from dsdlab.models.loading import EngineOptions
from dsdlab.models.tracing import record_windows
from dsdlab.scenario import Scenario
from dsdlab.sim.trace import Trace, load_trace
from dsdlab.sweep.plan import Job, plan_jobs
from dsdlab.sweep.references import ensure_references
from dsdlab.sweep.traces import FILE, ensure_trace
from dsdlab.sweep.workload import Prompt

PROMPTS = [Prompt("p", "x"), Prompt("q", "y")]
PROMPT_IDS = [[5, 9, 30, 21, 9, 30], [7, 7, 100]]
CPU = sorted(os.sched_getaffinity(0))[-1:]
References = dict[str, list[int]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny target and drafter on disk, as scenarios name them."""
    folder = tmp_path_factory.mktemp("pair")
    target = write_tiny_llama(folder / "target", num_hidden_layers=1)
    drafter = write_tiny_drafter(folder / "d.safetensors")
    return {"target": str(target), "drafter": f"lookup+{drafter}", "precision": "fp32"}


def planned(models: dict[str, str], *, gamma: list[int], repeats: int = 2) -> tuple[Scenario, list[Job]]:
    raw: dict[str, Any] = {
        "name": "s",
        "models": models,
        "workload": {"max_new_tokens": 9},
        "sampling": {"temperature": [0.0, 0.8]},
        "grid": {"mode": ["cloud-ar", "dsd-sync"], "gamma": gamma, "rtt_ms": [5, 50]},
        "run": {"repeats": repeats},
    }
    scenario = Scenario.model_validate(raw)
    return scenario, plan_jobs(scenario, PROMPTS, PROMPT_IDS)


class Recorder:
    """Calls ensure_trace and counts the texts that it recorded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.references: References = {}
        self.progress: list[tuple[int, int]] = []

    def __call__(self, scenario: Scenario, jobs: list[Job]) -> Trace:
        self.progress.clear()
        trace = asyncio.run(
            ensure_trace(
                scenario, jobs, self.references, self.folder, CPU, lambda *n: self.progress.append(n)
            )
        )
        trace.check(scenario, jobs)
        assert load_trace(self.folder / FILE) == trace
        return trace


def test_each_text_once_and_only_what_is_missing(pair: dict[str, str], tmp_path: Path) -> None:
    record = Recorder(tmp_path)
    scenario, jobs = planned(pair, gamma=[1, 3])
    trace = record(scenario, jobs)
    # greedy: one a prompt; sampled: one a repetition
    assert record.progress == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert {t.key for t in trace.texts} == {j.reference for j in jobs}
    assert trace.gamma == 3
    assert trace.vocab_size == 384
    assert trace.eos_ids == (2,)
    assert trace.tokenizer
    assert trace.provenance["drafter_digest"]

    drafter = load_drafter(scenario.models.drafter, EngineOptions("fp32", device="cpu"))
    for text in trace.texts:
        assert text.windows == record_windows(drafter, text.prompt_ids, text.ids, text.sampling, 3)

    assert record(scenario, jobs) == trace
    assert record.progress == []
    more = record(*planned(pair, gamma=[1, 3], repeats=3))
    assert record.progress == [(0, 1), (1, 1)]
    assert more.texts[:4] == trace.texts
    longer = record(*planned(pair, gamma=[5], repeats=3))
    assert record.progress[0] == (0, 5)
    assert longer.gamma == 5
    assert [t.ids for t in longer.texts] == [t.ids for t in _in_order(more, longer)]
    for mine, before in zip(longer.texts, _in_order(more, longer), strict=True):
        assert [w.ids[:3] for w in mine.windows] == [w.ids for w in before.windows]
    assert record(*planned(pair, gamma=[2])) == longer, "a longer window serves a shorter one"
    assert record.progress == []


def _in_order(trace: Trace, like: Trace) -> list[Any]:
    return [next(t for t in trace.texts if t.key == text.key) for text in like.texts]


def test_the_references_are_the_text(pair: dict[str, str], tmp_path: Path) -> None:
    """Given the target's ids, the target itself is not needed: it need not even be there."""
    scenario, jobs = planned(pair, gamma=[3])
    record = Recorder(tmp_path)
    record.references, _ = asyncio.run(ensure_references(scenario, jobs, tmp_path, CPU, lambda *_: None))
    trace = record(scenario, jobs)
    assert {t.key: list(t.ids) for t in trace.texts} == record.references
    elsewhere, jobs = planned(pair | {"target": "/nowhere/target"}, gamma=[3])
    record.references = {j.reference: [3, 4, 5, 6, 7, 8, 9, 10, 11] for j in jobs}
    (tmp_path / FILE).unlink()
    assert {t.ids for t in record(elsewhere, jobs).texts} == {(3, 4, 5, 6, 7, 8, 9, 10, 11)}
    record.references = {j.reference: [3, 4, 5, 6, 7, 8, 9, 10, 12] for j in jobs}
    assert {t.ids[-1] for t in record(elsewhere, jobs).texts} == {12}, "another text than before"
    assert record.progress[0] == (0, 4)


def test_what_a_failed_recording_has_done_is_kept(pair: dict[str, str], tmp_path: Path) -> None:
    """Here the last prompt is longer than the target's context."""
    scenario, jobs = planned(pair, gamma=[3])
    record = Recorder(tmp_path)
    bad = Job("c", jobs[0].cell, 9, Prompt("bad", "z"), (5,) * 3000, jobs[0].sampling, "bad")
    with pytest.raises(ModelError, match=r"^prompt bad: 3000 positions; .* is loaded for 2048$"):
        record(scenario, [*jobs, bad])
    assert {t.key for t in load_trace(tmp_path / FILE).texts} == {j.reference for j in jobs}
    record(scenario, jobs)
    assert record.progress == []


def test_an_interrupted_recording_goes_on(tmp_path: Path) -> None:
    scenario, jobs = planned({"target": "emulated:vocab_size=200", "drafter": "prompt-lookup"}, gamma=[2])

    def stop(done: int, _: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(ensure_trace(scenario, jobs, {}, tmp_path, CPU, stop))
    assert len(load_trace(tmp_path / FILE).texts) == 3
    record = Recorder(tmp_path)
    assert len(record(scenario, jobs).texts) == 4
    assert record.progress == [(0, 1), (1, 1)]


@pytest.mark.parametrize("content", ["{", '{"version": 9}', "other models"])
def test_a_useless_file_is_replaced(tmp_path: Path, content: str) -> None:
    models = {"target": "emulated:vocab_size=200", "drafter": "prompt-lookup"}
    scenario, jobs = planned(models, gamma=[1], repeats=1)
    record = Recorder(tmp_path)
    if content == "other models":
        trace = record(scenario, jobs)
        content = msgspec.json.encode(msgspec.structs.replace(trace, drafter="other")).decode()
    (tmp_path / FILE).write_text(content)
    assert record(scenario, jobs).drafter == scenario.models.drafter
    assert record.progress[-1] == (2, 2)


@pytest.mark.parametrize("drafter", ["emulated:alpha=0.7", "prompt-lookup", "lookup+emulated:alpha=0.7"])
def test_emulated_pairs(tmp_path: Path, drafter: str) -> None:
    """Nothing that a sweep runs is refused. Emulated time is not spent here; the seed decides every text."""
    models = {
        "target": "emulated:base_s=30,vocab_size=200",
        "drafter": drafter.replace("0.7", "0.7,base_s=30,vocab_size=200"),
    }
    scenario, jobs = planned(models, gamma=[4])
    trace = Recorder(tmp_path)(scenario, jobs)
    assert len(trace.texts) == 4
    assert {len(t.ids) for t in trace.texts} == {9}
    for job in jobs:
        assert trace.find(job.prompt_ids, job.sampling).seed == job.sampling.seed


def test_streaming_alone_needs_no_drafter(pair: dict[str, str], tmp_path: Path) -> None:
    scenario, _ = planned(pair | {"drafter": "/nowhere/d.safetensors"}, gamma=[4])
    raw = scenario.model_dump()
    raw["grid"]["mode"] = ["cloud-ar"]
    scenario = Scenario.model_validate(raw)
    trace = Recorder(tmp_path)(scenario, plan_jobs(scenario, PROMPTS, PROMPT_IDS))
    assert trace.gamma == 0
    assert {t.windows for t in trace.texts} == {()}


@pytest.mark.parametrize(
    ("models", "reason"),
    [
        ({"target": "/nowhere/target"}, "unknown model '/nowhere/target'"),
        ({"drafter": "lookup+/nowhere/d.safetensors"}, "model file /nowhere/d.safetensors does not exist"),
    ],
)
def test_models_that_cannot_be_loaded(
    pair: dict[str, str], tmp_path: Path, models: dict[str, str], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason) as error:
        Recorder(tmp_path)(*planned(pair | models, gamma=[2]))
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
