"""A whole sweep in real processes: exact, resumable after SIGKILL, reported; a full disk loses nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from e2e_tools import SCENARIO, children_of_run, dsdlab, rows_of

from dsdlab.sweep.rows import Row
from dsdlab.sweep.store import Store, StoreError

pytestmark = pytest.mark.e2e

CELLS = 2 * 2 * (1 + 3 * 2)  # temperatures × RTTs × (cloud-ar + three drafting modes × two windows)


def the_folder(out: Path) -> Path:
    [folder] = [p for p in out.iterdir() if p.name.startswith("small-")]
    return folder


def wait_for_rows(out: Path, n: int) -> None:
    """Until a running sweep has written n rows, a minute at most."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.05)
        rows = list(out.glob("small-*/rows.jsonl"))
        if rows and rows[0].read_bytes().count(b"\n") >= n:
            break


def test_kill_resume_report(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(SCENARIO)
    out = tmp_path / "results"
    command = [sys.executable, "-m", "dsdlab", "sweep", "s.toml", "--out", str(out)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_rows(out, 7)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    folder = the_folder(out)
    kept = (folder / "rows.jsonl").read_bytes()
    before = kept.count(b"\n")
    assert 7 <= before < 2 * CELLS, "the kill came too late to mean anything"
    with (folder / "rows.jsonl").open("ab") as f:  # as if the kill had come in mid-write
        f.write(b'{"cell":"half a li')
    deadline = time.monotonic() + 10
    while children_of_run(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert children_of_run(folder) == [], "nodes or the link outlived their controller"

    done = dsdlab("sweep", "s.toml", "--out", str(out), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    good = sum(not json.loads(line)["excluded"] for line in kept.splitlines())  # a busy machine delays pings
    assert f"{good} of {2 * CELLS} generations are already there" in done.stderr
    assert f"exact: {2 * CELLS} of {2 * CELLS} generations" in done.stdout
    assert re.search(r"^measuring \d+ % of wall time; \d+\.\d\d s between generations", done.stdout, re.M)
    assert (folder / "rows.jsonl").read_bytes().startswith(kept), "finished rows were not kept as they were"
    assert (folder / "rows.corrupt.jsonl").read_bytes() == b'{"cell":"half a li\n'
    rows = rows_of(folder)
    counts = Counter((r["cell"], r["rep"]) for r in rows)
    again = Counter((r["cell"], r["rep"]) for r in rows[:before] if r["excluded"])
    assert len(counts) == 2 * CELLS and set((counts - again).values()) == {1}, "one is missing or doubled"
    assert {r["exact"] for r in rows} == {True}
    assert {r["link"] for r in rows} == {"modelled"}
    by_pair: dict[tuple[float, int], set[tuple[int, ...]]] = {}
    for r in rows:
        by_pair.setdefault((r["temperature"], r["rep"]), set()).add(tuple(r["ids"]))
    assert all(len(texts) == 1 for texts in by_pair.values()), "modes or windows disagree on the text"
    for r in rows:
        for when in () if r["excluded"] else ("link_before", "link_after"):
            assert r[when]["rtt_p50_ms"] == pytest.approx(r["rtt_ms"], abs=5.0)
        assert 0 < r["generate_s"] < r["wall_s"] == pytest.approx(r["generate_s"] + r["overhead_s"])

    last = dsdlab("sweep", "s.toml", "--out", str(out), "--json", cwd=tmp_path)
    assert last.returncode == 0
    result = json.loads(last.stdout)
    assert len(result["cells"]) == CELLS
    wanted = {
        "mode", "policy", "gamma", "runtime", "link", "rtt_ms", "rate_mbit", "loss_pct", "tpot_ms", "ttft_ms",
        "alpha", "tau", "tokens", "exact", "jitter_ms", "loss_burst", "tcp", "excluded",
    }  # fmt: skip
    assert all(wanted <= set(cell) for cell in result["cells"])
    html = (folder / "report.html").read_text()
    assert "modelled" in html and result["verdict"].split("(")[0].strip()[:20] in html
    assert dsdlab("report", str(folder), cwd=tmp_path).returncode == 0


def test_ctrl_c_is_clean(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(SCENARIO)
    command = [sys.executable, "-m", "dsdlab", "sweep", "s.toml", "--out", str(tmp_path / "results")]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for_rows(tmp_path / "results", 3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in said and "interrupted" in said
    assert children_of_run(the_folder(tmp_path / "results")) == []


def test_two_sweeps_do_not_mix(tmp_path: Path) -> None:
    with Store(tmp_path / "run"), pytest.raises(StoreError, match="another sweep"), Store(tmp_path / "run"):
        pass


def row(rep: int) -> Row:
    return Row(
        cell="c", rep=rep, status="ok", mode="cloud-ar", policy="static", gamma=0, runtime="process",
        link="modelled", rtt_ms=1.0, ids=list(range(2000)),
    )  # fmt: skip


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        if os.environ.get("CI") == "true":
            pytest.fail("mounting a small file system needs root")
        pytest.skip("mounting a small file system needs root")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], check=True)
    try:
        with Store(small / "run") as store:
            with pytest.raises(StoreError, match="No space left"):
                for rep in range(100):
                    store.append(row(rep))
            n = len(store.rows)
            assert n > 0
        with Store(small / "run") as store:
            assert len(store.rows) == n and store.problems == []
        (tmp_path / "s.toml").write_text(SCENARIO)
        done = dsdlab("sweep", "s.toml", "--out", str(small / "deep"), cwd=tmp_path)
        assert done.returncode == 2 and "No space left" in done.stderr and "Traceback" not in done.stderr
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_link_that_changes_in_mid_generation(tmp_path: Path) -> None:
    """The changes happen when they should, the text is the same, and the link is back at once afterwards."""
    step = "[[link.steps]]\nat_s = 0.1\nfor_s = 0.15\nrtt_ms = 120\n[run]\nrepeats = 1\n"
    text = SCENARIO.replace("[run]\nrepeats = 2\n", step).replace("rtt_ms = [1, 15]", "rtt_ms = [15]")
    assert step in text
    (tmp_path / "s.toml").write_text(text.replace("max_new_tokens = 16", "max_new_tokens = 48"))
    done = dsdlab("sweep", "s.toml", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "RTT 120 ms from 0.1 s for 0.15 s" in done.stdout
    rows = rows_of(the_folder(tmp_path / "out"))
    for r in rows:
        assert r["exact"] is True
        assert r["link_steps"] == "RTT 120 ms from 0.1 s for 0.15 s"
        assert [what for _, what in r["link_changes"]] in (
            [], ["RTT 120 ms"], ["RTT 120 ms", "end of RTT 120 ms"]  # as far as the generation went
        )  # fmt: skip
        for (at_s, _), asked_s in zip(r["link_changes"], (0.1, 0.25), strict=False):
            assert asked_s <= at_s < asked_s + 0.1
        if not r["excluded"]:
            assert r["link_after"]["rtt_p50_ms"] == pytest.approx(15, abs=2.5)
    assert max(len(r["link_changes"]) for r in rows) == 2
