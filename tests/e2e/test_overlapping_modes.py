"""The overlapping modes in real processes: from a scenario and from options, one edge or two at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from e2e_tools import DRAFTER, TARGET, alone, dsdlab, rows_of

pytestmark = pytest.mark.e2e

SCENARIO = f"""
name = "overlap"
[models]
target = "{TARGET}"
drafter = "{DRAFTER}"
edge_target = "emulated:base_s=0.03,per_token_s=0.0015"
[workload]
n_prompts = 2
max_new_tokens = 24
[grid]
mode = ["cloud-ar", "edge-sd", "dsd-pipelined", "dsd-stream", "dsd-adaptive"]
gamma = [3]
run_ahead = [16]
free_run = [false, true]
beside = [0, 2]
edges = [1, 2]
rtt_ms = [15]
[run]
repeats = 2
"""
WAYS = 1 + 1 + 1 + 3 + 2  # of each mode; a free run with and without a drafter beside the target


def test_a_sweep_of_all_of_them(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(SCENARIO)
    done = dsdlab("sweep", "s.toml", "--out", "out", "--json", cwd=tmp_path, timeout_s=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["exact"] == f"exact: {2 * 2 * WAYS} of {2 * 2 * WAYS} generations"
    (folder,) = (tmp_path / "out").iterdir()
    rows = rows_of(folder)
    assert len({(r["cell"], r["rep"]) for r in rows}) == 2 * 2 * WAYS
    texts = {(r["rep"], tuple(r["ids"])) for r in rows}
    assert len(texts) == 2, "modes disagree on the text"
    by_way = {(r["mode"], r["free_run"], r["beside"], r["edges"], r["rep"]): r for r in rows}
    stream, free = by_way["dsd-stream", False, 0, 1, 0], by_way["dsd-stream", True, 0, 1, 0]
    assert stream["run_ahead"] == 16 and by_way["cloud-ar", False, 0, 1, 0]["run_ahead"] == 32
    for row in (stream, free, by_way["dsd-pipelined", False, 0, 1, 0]):
        assert row["drafted"] >= row["wasted"] >= 0 and row["target_s"] > 0
    assert all(drafted for drafted, _ in stream["windows"][1:]), "it decoded alone without a free run"
    assert any(not drafted for drafted, _ in free["windows"][1:])
    assert by_way["dsd-stream", True, 2, 1, 0]["beside_s"] > 0
    assert by_way["dsd-adaptive", False, 0, 1, 0]["policy"] == "adaptive"
    slow = by_way["edge-sd", False, 0, 1, 0]["t_verify_s"][1:]
    assert min(slow) >= 0.03 + 0.0015, "the edge computed with the cloud's target"
    together = [by_way["cloud-ar", False, 0, 2, rep] for rep in (0, 1)]
    lone = [by_way["cloud-ar", False, 0, 1, rep] for rep in (0, 1)]
    for row, one in zip(together, lone, strict=True):
        assert row["tpot_ms"] > 1.4 * one["tpot_ms"], "two edges did not wait for each other"
    report = (folder / "report.html").read_text()
    for words in ("dsd-stream + free run (run-ahead 16, 2 beside)", "2 edges at once", "What a token takes"):
        assert words in report
    assert {c["edges"] for c in json.loads((folder / "run.json").read_text())["cells"]} == {1, 2}


@pytest.mark.parametrize(
    "options",
    [
        ("--mode", "dsd-pipelined", "--gamma", "3", "--run-ahead", "6"),
        ("--mode", "dsd-stream", "--no-free-run"),
        ("--mode", "dsd-stream", "--free-run", "--beside", "2"),
        ("--mode", "dsd-adaptive"),
    ],
)
def test_one_generation_from_options(tmp_path: Path, options: tuple[str, ...]) -> None:
    done = dsdlab(
        "run", "one two three", "--target", TARGET, "--drafter", DRAFTER, "--rtt-ms", "10", "--seed", "5",
        "--max-new-tokens", "24", *options, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    prompt_ids = [1 + len(word) % 7 for word in ("one", "two", "three")]
    assert [int(word) for word in done.stdout.split()] == alone(prompt_ids, 5, 24)
    summary = done.stderr.splitlines()[-1]
    assert summary.startswith(f"{options[1]}; 24 tokens")
    assert "drafts wasted" in summary and "ms of the target a token" in summary


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ("--mode", "dsd-pipelined", "--gamma", "0"),
            "gamma is 0; allowed with dsd-pipelined: 1 to run_ahead",
        ),
        (("--mode", "dsd-pipelined", "--gamma", "9", "--run-ahead", "8"), "gamma is 9; allowed with dsd-"),
        (("--mode", "dsd-sync", "--beside", "2"), "beside is 2 in mode dsd-sync; needs dsd-stream with"),
        (("--mode", "dsd-sync", "--policy", "nosuch"), "unknown window policy 'nosuch'; installed: "),
        (("--mode", "dsd-flow"), "mode is 'dsd-flow'; allowed: cloud-ar"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    done = dsdlab("run", "hello", "--target", TARGET, "--drafter", DRAFTER, *options, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
