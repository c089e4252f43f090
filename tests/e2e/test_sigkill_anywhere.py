"""SIGKILL the controller at any moment: after `dsdlab clean` the host is as it was before the first start."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from e2e_tools import SCENARIO, dsdlab, rows_of
from needs import need, need_uml

from testbed.engine import connect
from testbed.host import docker_problem
from testbed.runtimes.base import RuntimeFailed

MOMENTS = 10
ALL_MODES = 'mode = ["cloud-ar", "cloud-sd", "edge-sd", "dsd-sync"]'
SMALL = (
    SCENARIO.replace("repeats = 2", "repeats = 1")
    .replace(ALL_MODES, 'mode = ["dsd-sync"]')
    .replace("gamma = [1, 4]", "gamma = [4]")
)

pytestmark = [pytest.mark.e2e, pytest.mark.netem]


def our_processes(tag: str) -> set[str]:
    """Processes that have the tag of this test in their environment, and routers whoever started them."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()  # empty for zombies
                tagged = f"DSDLAB_TEST={tag}".encode() in (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if line and (tagged or b"linux.uml" in line):
                found.add(f"{entry.name} {line.replace(bytes(1), b' ').decode(errors='replace')}")
    return found


def output(*command: str) -> set[str]:
    return set(subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines())


def host_state(tag: str) -> dict[str, set[str]]:
    """Everything that a controller could leave behind."""
    containers: set[str] = set()
    try:
        client = connect()
        containers = {c["Names"][0] for c in client.api.containers(all=True)}
        client.close()
    except RuntimeFailed:
        pass
    folders = (os.environ["TMPDIR"], "/dev/shm", "/run", str(Path.home() / ".uml"))
    return {
        "containers": {name for name in containers if name.startswith("/dsdlab-")},
        "namespaces": output("ip", "netns"),
        "interfaces": {line.split(":")[1] for line in output("ip", "-o", "link")},
        "qdiscs": output("tc", "qdisc"),
        "processes": our_processes(tag),
        "files": {str(p) for f in folders if Path(f).is_dir() for p in Path(f).iterdir()},
    }


def left(tag: str, before: dict[str, set[str]]) -> dict[str, set[str]]:
    """What is there now and was not before."""
    return {kind: new for kind, now in host_state(tag).items() if (new := now - before[kind])}


def start(runtime: str, cwd: Path) -> subprocess.Popen[bytes]:
    command = ["-m", "dsdlab", "sweep", "small.toml", "--runtime", runtime, "--link", "netem-uml"]
    return subprocess.Popen(
        [sys.executable, *command], cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


@pytest.mark.parametrize("runtime", ["netns", pytest.param("docker", marks=pytest.mark.docker)])
def test_sigkill_at_any_moment(tmp_path: Path, runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tag = f"{os.getpid()}-{runtime}"
    monkeypatch.setenv("DSDLAB_TEST", tag)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    need_uml()
    if runtime == "docker":
        need(docker_problem())
    (tmp_path / "small.toml").write_text(SMALL)
    before = host_state(tag)
    t0_s = time.monotonic()
    assert start(runtime, tmp_path).wait(120) == 0
    whole_s = time.monotonic() - t0_s
    assert left(tag, before) == {}

    rng = random.Random(whole_s)
    moments = MOMENTS if runtime == "docker" else MOMENTS // 2
    for k in range(moments):
        for rows in (tmp_path / "results").glob("*/rows.jsonl"):
            rows.unlink()  # so that there is work again
        at_s = whole_s * (k + rng.random()) / moments
        controller = start(runtime, tmp_path)
        time.sleep(at_s)
        controller.kill()
        controller.wait()
        cleaned = dsdlab("clean", cwd=tmp_path)
        assert cleaned.returncode == 0, cleaned.stderr
        end_s = time.monotonic() + 15.0
        while (rest := left(tag, before)) and time.monotonic() < end_s:
            time.sleep(0.2)  # an engine takes a moment to remove what has ended
        assert rest == {}, f"killed after {at_s:.2f} of {whole_s:.2f} s"
    # and what was measured before the last kill is there, and can be gone on with
    assert start(runtime, tmp_path).wait(120) == 0
    (folder,) = (tmp_path / "results").iterdir()
    rows = [row for row in rows_of(folder) if row["status"] == "ok"]
    assert len({(row["cell"], row["rep"]) for row in rows}) == len(rows) == 4
    assert all(row["exact"] for row in rows)
