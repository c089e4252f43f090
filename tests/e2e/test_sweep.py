"""A whole sweep in real processes: exact, resumable after SIGKILL, reported; a full disk loses nothing."""

from __future__ import annotations

import json
import os
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
    assert f"{before} of {2 * CELLS} generations are already there" in done.stderr
    assert f"exact: {2 * CELLS} of {2 * CELLS} generations" in done.stdout
    assert (folder / "rows.jsonl").read_bytes().startswith(kept), "finished rows were not kept as they were"
    assert (folder / "rows.corrupt.jsonl").read_bytes() == b'{"cell":"half a li\n'
    rows = rows_of(folder)
    counts = Counter((r["cell"], r["rep"]) for r in rows)
    assert len(counts) == 2 * CELLS and set(counts.values()) == {1}, "a generation is missing or doubled"
    assert {r["exact"] for r in rows} == {True}
    assert {r["link"] for r in rows} == {"modelled"}
    by_pair: dict[tuple[float, int], set[tuple[int, ...]]] = {}
    for r in rows:
        by_pair.setdefault((r["temperature"], r["rep"]), set()).add(tuple(r["ids"]))
    assert all(len(texts) == 1 for texts in by_pair.values()), "modes or windows disagree on the text"
    for r in rows:
        for when in ("link_before", "link_after"):
            assert r[when]["rtt_p50_ms"] == pytest.approx(r["rtt_ms"], abs=5.0)
        assert 0 < r["generate_s"] < r["wall_s"] == pytest.approx(r["generate_s"] + r["overhead_s"])

    again = dsdlab("sweep", "s.toml", "--out", str(out), "--json", cwd=tmp_path)
    assert again.returncode == 0
    result = json.loads(again.stdout)
    assert len(result["cells"]) == CELLS
    wanted = {
        "mode", "policy", "gamma", "runtime", "link", "rtt_ms", "rate_mbit", "loss_pct", "tpot_ms", "ttft_ms",
        "alpha", "tau", "tokens", "exact",
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
