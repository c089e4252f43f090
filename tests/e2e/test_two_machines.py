"""A verifier started by hand, as on another machine: probed, swept against, killed, started again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_tools import DRAFTER, SCENARIO, TARGET, dsdlab, rows_of

pytestmark = pytest.mark.e2e

PAIRS = 2 * (1 + 3 * 2)  # temperatures × (cloud-ar + three drafting modes × two windows)
EMULATED = ("--target", TARGET, "--drafter", DRAFTER)


class ByHand:
    """A verifier as a user starts it, with a token; `port` stays the same when it is started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, 0
        self.node: subprocess.Popen[str] | None = None
        (folder / "secret").write_text("sesame\n")
        self.start()

    def start(self) -> None:
        self.node = subprocess.Popen(
            [sys.executable, "-m", "dsdlab", "node", "verifier", *EMULATED, "--port", str(self.port),
             "--token-file", "secret", "--control", "stdio"],
            cwd=self.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip
        assert self.node.stdout is not None
        self.port = json.loads(self.node.stdout.readline())["port"]

    def kill(self) -> None:
        assert self.node is not None
        self.node.send_signal(signal.SIGKILL)
        self.node.communicate(timeout=10)

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/"


@pytest.fixture
def verifier(tmp_path: Path, request: pytest.FixtureRequest) -> ByHand:
    by_hand = ByHand(tmp_path)
    request.addfinalizer(by_hand.kill)
    return by_hand


def scenario(verifier: ByHand, repeats: int, timeout_s: float) -> str:
    far = f"""repeats = {repeats}
runtime = "auto"
link = "wan"
verifier = "{verifier.url}"
token_file = "secret"
timeout_s = {timeout_s}
"""
    return SCENARIO.replace("repeats = 2\n", far).replace("rtt_ms = [1, 15]", "rtt_ms = [1]")


def wait_until(true: Callable[[], bool], within_s: float = 120.0) -> None:
    end_s = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def test_probe(tmp_path: Path, verifier: ByHand) -> None:
    done = dsdlab(
        "probe", verifier.url, "--token-file", "secret", "--n", "100", "--gap-ms", "1", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{verifier.url}: 100 probes, 1 ms apart")
    assert "RTT         p50 " in done.stdout and "one way     up " in done.stdout
    args = ("probe", verifier.url, "--token-file", "secret", "--n", "50", "--rate-mbit", "50", "--json")
    out = json.loads(dsdlab(*args, cwd=tmp_path).stdout)
    assert out["up"]["sent"] == 50 and out["up"]["rate_mbit"] > 50 and out["instrument"] == "packets"
    (tmp_path / "wrong").write_text("open up")
    for args, says in (
        (
            (verifier.url, "--token-file", "wrong"),
            "a firewall closes its UDP port, or its token is another one",
        ),
        (("ws://127.0.0.1:9/",), "no verifier takes calls there either (TCP: connection refused)"),
        (("ws://127.0.0.1/",), "allowed: ws://HOST:PORT/"),
        ((verifier.url, "--token-file", "missing"), "missing: No such file"),
    ):
        done = dsdlab("probe", *args, cwd=tmp_path)
        assert done.returncode == 2 and done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("dsdlab: error: ") and says in line


def test_a_sweep_over_a_wan_is_exact(tmp_path: Path, verifier: ByHand) -> None:
    (tmp_path / "s.toml").write_text(scenario(verifier, 2, 60))
    plan = dsdlab("sweep", "s.toml", "--dry-run", cwd=tmp_path).stderr
    assert "runtime process, link wan" in plan and "unlimited" not in plan
    done = dsdlab("sweep", "s.toml", "--out", "out", cwd=tmp_path, timeout_s=280)
    assert done.returncode == 0, done.stderr
    assert f"exact: {2 * PAIRS} of {2 * PAIRS} generations" in done.stdout
    assert "(wan link, process runtime; greedy, unshaped; 1 more condition below)" in done.stdout
    [folder] = (tmp_path / "out").iterdir()
    for row in rows_of(folder):
        assert (row["runtime"], row["link"], row["exact"]) == ("process", "wan", True)
        assert row["link_before"]["instrument"] == row["link_after"]["instrument"] == "packets"
        assert row["link_before"]["rtt_p50_ms"] < 5
    run = json.loads((folder / "run.json").read_text())
    assert run["references"] == "cloud-ar on the verifier"
    assert (run["selftest"], run["models"]["target"]) == (None, {"model_id": "emulated"})
    assert "sesame" not in (folder / "run.json").read_text()
    kept = json.loads((folder / "references.json").read_text())["references"]
    assert {tuple(ids) for ids in kept.values()} == {tuple(row["ids"]) for row in rows_of(folder)}
    html = (folder / "report.html").read_text()
    assert "wan, process: unshaped" in html and "cloud-ar on the verifier" in html


def test_a_verifier_that_is_killed(tmp_path: Path, verifier: ByHand) -> None:
    (tmp_path / "s.toml").write_text(scenario(verifier, 6, 2))
    command = [sys.executable, "-m", "dsdlab", "sweep", "s.toml", "--out", "out"]
    sweep = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    rows = tmp_path / "out"
    wait_until(lambda: any(p.read_bytes().count(b"\n") >= 3 for p in rows.glob("small-*/rows.jsonl")))
    verifier.kill()
    _, said = sweep.communicate(timeout=120)
    assert sweep.returncode == 2 and "Traceback" not in said
    line = said.splitlines()[-1]
    assert line.startswith(
        f"dsdlab: error: no verifier at {verifier.url} (connection refused); start one there"
    )
    assert line.endswith("what is finished is kept, the same command goes on from there")
    [folder] = rows.iterdir()
    finished = {(r["cell"], r["rep"]) for r in rows_of(folder) if r["status"] == "ok" and not r["excluded"]}
    assert finished

    verifier.start()
    done = dsdlab("sweep", "s.toml", "--out", "out", cwd=tmp_path, timeout_s=280)
    assert done.returncode == 0, done.stderr
    assert f"{len(finished)} of {6 * PAIRS} generations are already there" in done.stderr
    assert f"exact: {6 * PAIRS} of {6 * PAIRS} generations" in done.stdout


def test_refusals(tmp_path: Path, verifier: ByHand) -> None:
    text = scenario(verifier, 1, 60)
    for change, says in (
        (('token_file = "secret"', 'token_file = "gone"'), "run.token_file: gone: No such file"),
        (('token_file = "secret"', 'token_file = "wrong"'), "wrong token"),
        (
            (f":{verifier.port}/", ":9/"),
            "no verifier at ws://127.0.0.1:9/ (connection refused); start one there",
        ),
        ((f'target = "{TARGET}"', 'target = "emulated:vocab_size=77"'), "tokenizer"),
    ):
        assert change[0] in text
        (tmp_path / "s.toml").write_text(text.replace(*change))
        (tmp_path / "wrong").write_text("open up")
        done = dsdlab("sweep", "s.toml", "--out", "out", cwd=tmp_path, timeout_s=280)
        assert done.returncode == 2 and "Traceback" not in done.stderr, change
        assert says in done.stderr.splitlines()[-1], change
