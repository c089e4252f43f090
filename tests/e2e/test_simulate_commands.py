"""The simulator's commands, from the command line: predictions, comparisons, and what is refused."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
from e2e_tools import SCENARIO, dsdlab, rows_of

from dsdlab.sim.costs import ForwardCost, NodeCosts, SystemProfile
from dsdlab.sim.prediction import load_prediction
from dsdlab.sim.trace import Trace, TracedText, TracedWindow, save_trace

pytestmark = pytest.mark.e2e

NODE = NodeCosts(
    target=ForwardCost(base_s=0.01, per_token_s=0.0005),
    drafter=ForwardCost(base_s=0.001),
    hop_s=0.0003,
    send_s=0.0001,
    recv_s=0.0001,
)
PROFILE = SystemProfile(name="made-up", origin="published", source="a test", edge=NODE, cloud=NODE)
TEXT = TracedText(
    key="k",
    prompt="p",
    prompt_ids=(1, 2),
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    seed=0,
    ids=(3, 4),
    windows=(TracedWindow(3, (4,), (True,)),),
)
TRACE = Trace(
    target="smollm2-135m-instruct",
    drafter="lookup+smollm2-drafter",
    precision="bf16",
    tokenizer="t",
    vocab_size=49152,
    eos_ids=(2,),
    max_context=2048,
    gamma=8,
    texts=(TEXT,),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "small.toml").write_text(SCENARIO)
    (tmp_path / "profile.json").write_bytes(msgspec.json.encode(PROFILE))
    return tmp_path


def good(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


def test_simulate_says_the_same_twice(folder: Path) -> None:
    said: dict[str, Any] = json.loads(good(dsdlab("simulate", "small.toml", "--json", cwd=folder)))
    where = Path(said["folder"])
    first = load_prediction(folder / where / "simulation.json")
    assert (
        said["exact"] == f"exact: {len(said['cells']) * 2} of {len(said['cells']) * 2} simulated generations"
    )
    wanted = {"mode", "policy", "gamma", "runtime", "link", "rtt_ms", "rate_mbit", "loss_pct", "tpot_ms",
              "ttft_ms", "alpha", "tau", "tokens", "exact"}  # fmt: skip
    for cell in said["cells"]:
        assert wanted <= cell.keys()
        assert (cell["runtime"], cell["link"], cell["exact"]) == ("simulated", "modelled", True)
        assert cell["tpot_ms"] > 0
    assert "simulated" in (folder / said["report"]).read_text()

    text = good(dsdlab("simulate", "small.toml", "--workers", "1", cwd=folder))
    assert "In simulation, " in text and "TPOT, ms" in text
    again = load_prediction(folder / where / "simulation.json")
    assert again.cells == first.cells
    assert not (folder / where / "rows.jsonl").exists()


def test_predicted_measured_compared(folder: Path) -> None:
    args = ("sweep", "small.toml", "--predict", "--profile", "profile.json")
    text = good(dsdlab(*args, cwd=folder, timeout_s=240))
    assert "the simulator was" in text and "predicted before the measurements" in text
    where = next((folder / "results").glob("small-*"))
    prediction = (where / "prediction.json").read_bytes()
    made = load_prediction(where / "prediction.json")
    rows = rows_of(where)
    assert made.created_at < min(row["started_at"] for row in rows)
    assert made.profile["name"] == "made-up"

    found = json.loads(good(dsdlab("compare", str(where), "--json", cwd=folder)))
    assert len(found["cells"]) == len(made.cells)
    n = len(rows)
    assert f"replay: {n} of {n} generations have the same accepted count" in json.dumps(
        found, ensure_ascii=False
    )
    table = good(dsdlab("compare", str(where), cwd=folder))
    assert "the simulator's error" in table and f"replay: {n} of {n}" in table
    report = (where / "report.html").read_text()
    assert "Simulator against measurement" in report and made.sha256()[:12] in report

    # nothing is predicted again, and nothing measured again
    assert good(dsdlab(*args, cwd=folder)).startswith("With this pair")
    assert (where / "prediction.json").read_bytes() == prediction

    # without it, it is too late for a prediction, and a simulation says that it came after
    (where / "prediction.json").unlink()
    (where / "rows.jsonl").write_bytes(
        b"\n".join((where / "rows.jsonl").read_bytes().split(b"\n")[:-2]) + b"\n"
    )
    done = dsdlab(*args, cwd=folder)
    assert done.returncode == 2
    assert "holds measurements and no prediction" in done.stderr.splitlines()[-1]
    good(dsdlab("simulate", "small.toml", "--profile", "profile.json", cwd=folder))
    assert "before the measurements" not in good(dsdlab("report", str(where), cwd=folder))


def refused(cwd: Path, *args: str) -> str:
    """The one line of a command that is refused and writes nothing."""
    before = sorted(p.name for p in cwd.rglob("*"))
    done = dsdlab(*args, cwd=cwd)
    said = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert sorted(p.name for p in cwd.rglob("*")) == before
    return said[-1]


REAL = """
name = "real"
[models]
precision = "bf16"
[workload]
n_prompts = 1
max_new_tokens = 8
[grid]
gamma = [4]
rtt_ms = [10]
[run]
repeats = 1
"""


@pytest.mark.model
def test_feeds_that_do_not_fit(folder: Path) -> None:
    (folder / "real.toml").write_text(REAL)
    (folder / "broken.json").write_text("{")
    other = msgspec.structs.replace(PROFILE, target="another", drafter="d", precision="bf16")
    (folder / "other.json").write_bytes(msgspec.json.encode(other))
    nan = msgspec.json.encode(PROFILE).replace(b'"base_s":0.01', b'"base_s":-0.01')
    (folder / "negative.json").write_bytes(nan)
    (folder / "old.json").write_bytes(msgspec.json.encode(PROFILE).replace(b'"version":1', b'"version":0'))
    for name, says in (
        ("nowhere", "profile nowhere: No such file"),
        ("broken.json", "broken.json is no JSON"),
        ("negative.json", "base_s is -0.01; allowed: 0 to 3600 seconds"),
        ("old.json", "is of version 0; allowed: 1"),
    ):
        assert says in refused(folder, "simulate", "small.toml", "--profile", name)
    assert "another" in refused(folder, "simulate", "real.toml", "--profile", "other.json")

    save_trace(folder / "trace.json", TRACE)
    (folder / "cut.json").write_text((folder / "trace.json").read_text()[:100])
    fed = ("simulate", "real.toml", "--profile", "profile.json", "--trace")
    assert "has no text of prompt" in refused(folder, *fed, "trace.json")
    assert "cut.json" in refused(folder, *fed, "cut.json")
    save_trace(folder / "fp32.json", msgspec.structs.replace(TRACE, precision="fp32"))
    assert "precision fp32; the scenario's is bf16" in refused(folder, *fed, "fp32.json")
    save_trace(folder / "narrow.json", msgspec.structs.replace(TRACE, gamma=2))
    assert "windows of 2 tokens; the scenario asks for 4" in refused(folder, *fed, "narrow.json")


def test_questions_without_an_answer(folder: Path) -> None:
    assert "simulate.persist is 3 without simulate.alpha" in refused(
        folder, "simulate", "small.toml", "--persist", "3"
    )
    assert "nothing to record" in refused(folder, "trace", "small.toml")
    empty = folder / "small.toml"
    empty.write_text(SCENARIO.replace("rtt_ms = [1, 15]", "rtt_ms = []"))
    assert "grid.rtt_ms is []" in refused(folder, "simulate", "small.toml")
    assert "holds no measurements" in refused(folder, "compare", ".")
