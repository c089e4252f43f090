"""The process runtime: cores, logs, errors, and nothing that outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from bed_tools import HERE, run

from testbed.ledger import Ledger, process_start
from testbed.runtimes.base import NodeDied, NodeError, NodeSpec, RuntimeFailed
from testbed.runtimes.process import ProcessNode, ProcessRuntime

STANDIN = str(HERE / "standin_node.py")


def spec(target: str = "plain", cpus: tuple[int, ...] | None = None, name: str = "verifier") -> NodeSpec:
    args = (STANDIN, "verifier", "--target", target, "--host", "{host}", "--port", "0")
    return NodeSpec(
        name=name, args=(*args, "--token-file", "{dir}/token"), files={"token": "secret"}, cpus=cpus
    )


@asynccontextmanager
async def runtime_in(run_dir: Path) -> AsyncIterator[ProcessRuntime]:
    runtime = ProcessRuntime()
    await runtime.start(run_dir)
    try:
        yield runtime
    finally:
        await runtime.stop()


def test_node_has_its_cores_its_threads_and_its_secret(tmp_path: Path) -> None:
    cpus = tuple(sorted(os.sched_getaffinity(0))[-1:])

    async def body() -> None:
        async with runtime_in(tmp_path) as runtime:
            node = await runtime.start_node(spec("chatty", cpus))
            assert isinstance(node, ProcessNode)
            info = node.info["info"]
            assert info["cpus"] == list(cpus)
            assert (info["omp"], info["gomp"]) == ("1", str(cpus[0]))
            assert info["pid"] == node.pid  # the launcher became the node
            assert str(node.endpoint(node.info["port"])) == f"127.0.0.1:{node.info['port']}"
            token = tmp_path / "nodes" / "verifier" / "token"
            assert token.stat().st_mode & 0o777 == 0o600
            with pytest.raises(RuntimeFailed, match="running already"):
                await runtime.start_node(spec())
            assert await node.stop() == 0
            assert await node.stop() == 0
            assert node.returncode == 0
            log = node.log_path.read_text()
            assert "verifier with chatty" in log
            assert "stdout: a library says hello" in log  # no control line, not lost either
        assert not (tmp_path / "nodes").exists()
        assert Ledger(tmp_path / "objects.jsonl", "x").left() == []

    run(body())


def test_death_at_start_and_in_mid_run_is_one_line_with_the_log(tmp_path: Path) -> None:
    async def body() -> None:
        async with runtime_in(tmp_path) as runtime:
            with pytest.raises(NodeDied) as caught:
                await runtime.start_node(spec("missing"))
            assert str(caught.value) == "verifier: no such model: missing"
            node = await runtime.start_node(spec("fragile"))
            with pytest.raises(NodeDied) as caught:
                await node.request({"op": "generate"})
            assert str(caught.value).startswith("verifier ended with exit status 9; ")
            assert str(caught.value).endswith("verifier with fragile | out of memory, giving up")
            assert "missing" not in str(caught.value)  # an earlier node's log is not blamed
            with pytest.raises(NodeDied):
                await node.request({"op": "ping"})
            assert node.returncode == 9

    run(body())


def test_late_unknown_and_crashed(tmp_path: Path) -> None:
    async def body() -> None:
        async with runtime_in(tmp_path) as runtime:
            with pytest.raises(NodeDied, match=r"was not ready within 0\.5 s; .*: .*verifier with mute"):
                await runtime.start_node(spec("mute"), timeout_s=0.5)
            node = await runtime.start_node(spec(name="other"))
            with pytest.raises(TimeoutError, match=r"other: no answer to 'ping' within 0\.1 s"):
                await node.request({"op": "ping"}, timeout_s=0.1)  # a verifier stand-in answers nothing
            await node.kill()
            assert node.returncode == -signal.SIGKILL

    run(body())


def test_error_instead_of_ready(tmp_path: Path) -> None:
    code = 'print(\'{"op":"error","code":"model","message":"no such\\\\nmodel"}\', flush=True)'

    async def body() -> None:
        async with runtime_in(tmp_path) as runtime:
            with pytest.raises(NodeError, match="no such model") as caught:
                await runtime.start_node(NodeSpec(name="n", args=("-c", code)))
            assert caught.value.code == "model"

    run(body())


def test_what_a_process_cannot_do_is_refused(tmp_path: Path) -> None:
    async def body() -> None:
        with pytest.raises(RuntimeFailed, match="not started"):
            await ProcessRuntime().start_node(spec())
        async with runtime_in(tmp_path) as runtime:
            with pytest.raises(RuntimeFailed, match=r"cpus \[4095\] not available \(usable: "):
                await runtime.start_node(spec(cpus=(4095,)))
            with pytest.raises(RuntimeFailed, match="memory_mb needs the docker runtime"):
                await runtime.start_node(NodeSpec(name="n", args=(), memory_mb=100))
            with pytest.raises(RuntimeFailed, match="cpu_quota needs the docker runtime"):
                await runtime.start_node(NodeSpec(name="n", args=(), cpu_quota=0.5))

    run(body())


def test_a_node_that_ignores_everything_is_killed(tmp_path: Path) -> None:
    async def body() -> None:
        async with runtime_in(tmp_path) as runtime:
            node = await runtime.start_node(spec("stubborn"))
            t0_s = time.monotonic()
            assert await node.stop(grace_s=0.2) == -signal.SIGKILL
            assert time.monotonic() - t0_s < 2.0

    run(body())


def test_what_a_crash_left_is_reaped_and_only_that(tmp_path: Path) -> None:
    """A ledger with a live process, one whose id was taken over by another, and a torn last line."""
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        ledger = Ledger(tmp_path / "objects.jsonl", "old")
        ledger.made("process", left.pid, name="verifier", start=process_start(left.pid))
        ledger.made("process", stranger.pid, name="drafter", start=12345)
        with ledger.path.open("a") as file:
            file.write('{"run": "old", "made": "proc')

        async def body() -> None:
            async with runtime_in(tmp_path):
                pass

        run(body())
        assert left.wait(2) == -signal.SIGKILL
        assert stranger.poll() is None
        assert process_start(left.pid) is None
    finally:
        for process in (left, stranger):
            process.kill()
            process.wait()


def test_launcher_refuses_an_orphan() -> None:
    """Its parent is not who it should be: the parent died before the signal was armed."""
    from testbed import launch

    command = [sys.executable, "-I", "-S", str(launch.__file__), "--parent", "1", "--", "/bin/echo", "alive"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    command[5] = str(os.getpid())
    command[7] = "/no/such/program"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 127
    assert "cannot run /no/such/program" in done.stderr
