"""Traces: what is found in them, what scenarios they serve, and files that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dsdlab.decoding import Sampling
from dsdlab.scenario import Scenario
from dsdlab.sim.trace import Trace, TracedText, TracedWindow, TraceError, load_trace, save_trace
from dsdlab.sweep.plan import Job, plan_jobs
from dsdlab.sweep.workload import Prompt

RAW: dict[str, Any] = {
    "name": "s",
    "models": {"target": "big", "drafter": "small", "precision": "bf16"},
    "workload": {"max_new_tokens": 5},
    "sampling": {"temperature": [0.0, 0.8]},
    "grid": {"mode": ["cloud-ar", "dsd-sync"], "gamma": [2, 3], "rtt_ms": [50]},
    "run": {"repeats": 2, "seed": 1},
}
PROMPTS = [Prompt("p", "x"), Prompt("q", "y")]
PROMPT_IDS = [[11, 12], [21, 22, 23]]


def planned(**changes: dict[str, Any]) -> tuple[Scenario, list[Job]]:
    raw = {k: dict(v) if isinstance(v, dict) else v for k, v in RAW.items()}
    for part, values in changes.items():
        raw[part].update(values)
    scenario = Scenario.model_validate(raw)
    return scenario, plan_jobs(scenario, PROMPTS, PROMPT_IDS)


def traced(job: Job, ids: tuple[int, ...], gamma: int) -> TracedText:
    n = len(job.prompt_ids)
    return TracedText(
        key=job.reference,
        prompt=job.prompt.key,
        prompt_ids=job.prompt_ids,
        temperature=job.sampling.temperature,
        top_k=job.sampling.top_k,
        top_p=job.sampling.top_p,
        seed=job.sampling.seed,
        ids=ids,
        windows=tuple(TracedWindow(n + k, (7,) * gamma, (True,) * gamma) for k in range(1, len(ids))),
    )


def trace_for(jobs: list[Job], ids: tuple[int, ...] = (1, 2, 3, 4, 5), **changes: Any) -> Trace:
    gamma = changes.get("gamma", 3)
    texts = {j.reference: traced(j, ids, gamma) for j in jobs}
    fields: dict[str, Any] = {
        "target": "big",
        "drafter": "small",
        "precision": "bf16",
        "tokenizer": "t",
        "vocab_size": 100,
        "eos_ids": (0,),
        "max_context": 64,
        "gamma": gamma,
        "texts": tuple(texts.values()),
    }
    return Trace(**(fields | changes))


def test_it_serves_its_scenario() -> None:
    scenario, jobs = planned()
    trace = trace_for(jobs)
    assert len(trace.texts) == 4  # two greedy, two sampled
    trace.check(scenario, jobs)
    for job in jobs:
        found = trace.find([*job.prompt_ids, 1, 2], job.sampling)
        assert (found.prompt, found.temperature) == (job.prompt.key, job.sampling.temperature)


def test_a_text_to_its_end_is_long_enough() -> None:
    scenario, jobs = planned()
    trace_for(jobs, (1, 2, 0)).check(scenario, jobs)
    on, jobs = planned(workload={"stop_at_eos": False})
    with pytest.raises(TraceError, match="has 3 tokens of prompt p under greedy; the scenario asks for 5"):
        trace_for(jobs, (1, 2, 0)).check(on, [j for j in jobs if j.prompt.key == "p"][::-1])


@pytest.mark.parametrize(
    ("trace", "scenario", "reason"),
    [
        ({"target": "other"}, {}, "the trace is of target other; the scenario's is big"),
        ({"precision": "fp32"}, {}, "the trace is of precision fp32; the scenario's is bf16"),
        ({"drafter": "other"}, {}, "the trace is of drafter other; the scenario's is small"),
        ({"gamma": 2}, {}, "the trace has windows of 2 tokens; the scenario asks for 3"),
        (
            {"gamma": 0},
            {"grid": {"mode": ["dsd-stream"]}},
            "windows of 0 tokens; the scenario asks for 1",
        ),
        ({"drafter": "other"}, {"grid": {"mode": ["dsd-stream"]}}, "the trace is of drafter other"),
        (
            {"gamma": 3},
            {"grid": {"mode": ["dsd-stream"], "free_run": [True], "beside": [4]}},
            "has windows of 3 tokens; the scenario asks for 4",
        ),
        ({"ids": (1, 2, 3, 4)}, {}, "the trace has 4 tokens of prompt "),
        ({}, {"workload": {"max_new_tokens": 6}}, "5 tokens of prompt "),
        ({}, {"run": {"seed": 2}}, "has no text of prompt . under temperature 0.8, seed 20000"),
        ({}, {"sampling": {"top_k": 4}}, "under temperature 0.8, top_k 4, seed "),
        ({"texts": ()}, {}, "the trace has no text of prompt "),
    ],
)
def test_what_it_cannot_serve(trace: dict[str, Any], scenario: dict[str, Any], reason: str) -> None:
    ours = trace_for(planned()[1], **trace)
    asked, jobs = planned(**scenario)
    with pytest.raises(TraceError, match=reason) as error:
        ours.check(asked, jobs)
    assert "\n" not in str(error.value)


def test_streaming_needs_no_drafter() -> None:
    scenario, jobs = planned(grid={"mode": ["cloud-ar"]}, models={"drafter": "another"})
    trace_for(jobs, gamma=0, texts=tuple(traced(j, (1, 2, 3, 4, 5), 0) for j in jobs)).check(scenario, jobs)


# files -------------------------------------------------------------------------------------------


def test_there_and_back(tmp_path: Path) -> None:
    trace = trace_for(planned()[1], provenance={"who": "me"})
    trace.find([11, 12], Sampling())  # what it remembers is not part of it
    save_trace(tmp_path / "t.json", trace)
    again = load_trace(tmp_path / "t.json")
    assert again == trace
    assert msgspec.json.encode(again) == msgspec.json.encode(trace)
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


def broken(change: str) -> bytes:
    """A trace's JSON with one thing wrong."""
    raw = json.loads(msgspec.json.encode(trace_for(planned()[1])))
    text = raw["texts"][1]
    match change:
        case "version":
            raw = {"version": 7, "anything": "else"}
        case "no version":
            del raw["version"]
        case "field":
            raw["colour"] = "red"
        case "type":
            raw["gamma"] = "three"
        case "empty":
            text["ids"] = []
        case "vocabulary":
            text["ids"][0] = 100
        case "window missing":
            del text["windows"][1]
        case "window long":
            text["windows"][1][1].append(4)
            text["windows"][1][2].append(True)
        case "window uneven":
            text["windows"][1][2].pop()
        case "sampling":
            text["temperature"] = -1
        case "cut":
            return json.dumps(raw).encode()[:200]
        case "bytes":
            return b"\xff\xfe"
        case "list":
            return b"[1]"
    return json.dumps(raw).encode()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("version", "has version 7; this dsdlab reads 1"),
        ("no version", "cannot be used: .*version"),
        ("field", "cannot be used: .*colour"),
        ("type", "cannot be used: Expected `int`, got `str`.*gamma"),
        ("empty", r"texts\[1\] is empty"),
        ("vocabulary", r"texts\[1\] has a token outside the vocabulary of 100"),
        ("window missing", r"texts\[1\] has no window for each of its positions"),
        ("window long", r"texts\[1\]: the window at [45] is no window of 3 tokens"),
        ("window uneven", r"texts\[1\]: the window at [45] is no window of 3 tokens"),
        ("sampling", "cannot be used: temperature is -1"),
        ("cut", "cannot be used: "),
        ("bytes", "cannot be used: "),
        ("list", "cannot be used: "),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, change: str, reason: str) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(broken(change))
    with pytest.raises(TraceError, match=reason) as error:
        load_trace(path)
    assert str(error.value).startswith(f"trace {path}")
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"trace .*/t\.json: No such file or directory"):
        load_trace(tmp_path / "t.json")
    with pytest.raises(TraceError, match="Is a directory"):
        load_trace(tmp_path)
