"""The docker runtime, with real containers: limits, errors, and nothing that outlives it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bed_tools import HERE, run
from docker_tools import containers, engine_or_skip, runtime_in, unique_run_id

from testbed.image import image_name
from testbed.ledger import process_start
from testbed.links.base import LinkError
from testbed.runtimes.base import NodeDied, NodeError, NodeSpec, RuntimeFailed
from testbed.runtimes.docker import DockerNode, DockerRuntime, model_paths, quota_us, reap_containers

pytestmark = pytest.mark.docker

STANDIN = str(HERE / "standin_node.py")
RUN_IDS = unique_run_id()
READY = 'import json, sys, time, os; print(\'{"op":"ready"}\', flush=True)\n'
BURN = (
    READY
    + """
for line in sys.stdin:
    message = json.loads(line)
    if message["op"] == "stop":
        break
    t0_s, last_s, gap_s = time.perf_counter(), time.perf_counter(), 0.0
    cpu0_s = time.process_time()
    while time.process_time() - cpu0_s < 0.3:
        now_s = time.perf_counter()
        gap_s, last_s = max(gap_s, now_s - last_s), now_s
    print(json.dumps({"op": "burnt", "id": message["id"], "s": time.perf_counter() - t0_s, "gap_s": gap_s}))
    sys.stdout.flush()
"""
)


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    client = engine_or_skip(image=True)
    yield client
    client.close()


@pytest.fixture
def run_id(engine: Any) -> Iterator[str]:
    """A run's name; in the end none of its containers may be left."""
    name = next(RUN_IDS)
    yield name
    assert containers(engine, name) == []


def spec(target: str = "plain", cpus: tuple[int, ...] | None = None, name: str = "verifier") -> NodeSpec:
    args = (STANDIN, "verifier", "--target", target, "--host", "{host}", "--port", "0")
    return NodeSpec(
        name=name, args=(*args, "--token-file", "{dir}/token"), files={"token": "secret"}, cpus=cpus
    )


class VethWiring:
    """A virtual cable from each node to this host."""

    def address(self, node: str) -> str:
        return f"10.213.{ord(node[0])}.2"

    async def attach(self, node: str, pid: int) -> None:
        subnet, port = f"10.213.{ord(node[0])}", f"dt{pid}"
        enter = ["nsenter", "-t", str(pid), "-n"]
        for command in (
            ["ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(pid)],
            ["ip", "addr", "add", f"{subnet}.1/24", "dev", port],
            ["ip", "link", "set", port, "up"],
            [*enter, "ip", "addr", "add", f"{subnet}.2/24", "dev", "eth0"],
            [*enter, "ip", "link", "set", "eth0", "up"],
        ):
            process = await asyncio.create_subprocess_exec(*command)
            if await process.wait() != 0:
                raise LinkError(f"{' '.join(command)} failed")


def test_a_node_from_start_to_end(
    tmp_path: Path, run_id: str, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cores, secret, network, labels, health, log; killed, started again, stopped."""
    cpus = tuple(sorted(os.sched_getaffinity(0))[-1:])
    wiring = VethWiring() if os.geteuid() == 0 else None
    monkeypatch.setattr(DockerRuntime, "health_interval_s", 1.0)

    def ask(host: str, port: int) -> str:
        with socket.create_connection((host, port), 10) as sock, sock.makefile("rw") as lines:
            lines.write("secret\n41\n")
            lines.flush()
            return lines.readline()

    async def body() -> None:
        async with runtime_in(tmp_path, run_id, wiring) as runtime:
            node = await runtime.start_node(spec("chatty", cpus))
            assert isinstance(node, DockerNode)
            info = node.info["info"]
            assert info["cpus"] == list(cpus)
            assert (info["omp"], info["gomp"]) == ("1", str(cpus[0]))
            assert info["pid"] == 1
            assert process_start(node.pid) is not None
            endpoint = node.endpoint(node.info["port"])
            if wiring is not None:
                assert await asyncio.to_thread(ask, endpoint.host, endpoint.port) == "42\n"
            facts = engine.api.inspect_container(f"dsdlab-{run_id}-verifier")
            labels = facts["Config"]["Labels"]
            assert (labels["dsdlab.run"], labels["dsdlab.node"]) == (run_id, "verifier")
            assert labels["dsdlab.owner"].startswith(f"{os.getpid()}:{process_start(os.getpid())}:")
            assert facts["Config"]["StdinOnce"]
            assert all(not mount["RW"] for mount in facts["Mounts"])
            with pytest.raises(RuntimeFailed, match="running already"):
                await runtime.start_node(spec())
            for _ in range(100):
                health = engine.api.inspect_container(facts["Id"])["State"]["Health"]
                if health["Status"] == "healthy":
                    break
                await asyncio.sleep(0.1)
            assert health["Status"] == "healthy", health

            await node.kill()
            assert node.returncode == -signal.SIGKILL
            assert containers(engine, run_id) == []
            with pytest.raises(NodeDied, match=r"was killed by SIGKILL \(asked to\)"):
                await node.request({"op": "ping"})

            node = await runtime.start_node(spec("chatty", cpus))
            assert await node.stop() == 0
            assert await node.stop() == 0
            assert node.returncode == 0
            log = node.log_path.read_text()
            assert "verifier with chatty" in log
            assert "stdout: a library says hello" in log
        await runtime.stop()
        assert not (tmp_path / "nodes").exists()

    run(body())


def test_nodes_start_together_and_answer(tmp_path: Path, run_id: str) -> None:
    """Also answers that do not fit into one frame of the engine's stream."""
    code = READY + (
        "for line in sys.stdin:\n"
        "    message = json.loads(line)\n"
        "    if message['op'] == 'stop': break\n"
        "    print(json.dumps({'op': 'long', 'id': message['id'], 'x': 'x' * message['n']}), flush=True)\n"
    )

    async def body() -> None:
        async with runtime_in(tmp_path, run_id) as runtime:
            nodes = await asyncio.gather(
                *(runtime.start_node(NodeSpec(name=f"edge{i}", args=("-c", code))) for i in range(4))
            )
            sizes = (0, 100_000, 3_000_000, 20_000_000)
            answers = await asyncio.gather(
                *(node.request({"op": "long", "n": n}) for node, n in zip(nodes, sizes, strict=True))
            )
            assert [len(answer["x"]) for answer in answers] == list(sizes)

    run(body())


def test_a_share_of_a_core_slows_smoothly(tmp_path: Path, run_id: str) -> None:
    """A quarter of a core takes four times as long, and is never halted for long."""
    cpus = (min(os.sched_getaffinity(0)),)

    async def body() -> None:
        async with runtime_in(tmp_path, run_id) as runtime:
            quarter = NodeSpec(name="slow", args=("-c", BURN), cpus=cpus, cpu_quota=0.25)
            node = await runtime.start_node(quarter)
            for _ in range(4):  # a busy host halts it as well
                burnt = await node.request({"op": "burn"})
                print(f"0.3 s of work took {burnt['s']:.2f} s, longest halt {1e3 * burnt['gap_s']:.0f} ms")
                assert burnt["s"] / 0.3 > 3.0
                if burnt["s"] / 0.3 < 6.0 and burnt["gap_s"] < 0.05:
                    break
            assert burnt["s"] / 0.3 < 6.0
            assert burnt["gap_s"] < 0.05  # with the kernel's own period it would be 0.075
            with pytest.raises(RuntimeFailed, match=r"cpu_quota 1.5 \(allowed"):
                await runtime.start_node(NodeSpec(name="n2", args=("-c", ""), cpu_quota=1.5))
            with pytest.raises(RuntimeFailed, match=r"cpus \[4095\] not available"):
                await runtime.start_node(spec(cpus=(4095,), name="n3"))

    run(body())


def test_out_of_memory_is_said(tmp_path: Path, run_id: str) -> None:
    code = (
        READY + "sys.stdin.readline(); sys.stderr.write('growing\\n'); x = bytearray(os.urandom(1) * 10**9)"
    )

    async def body() -> None:
        async with runtime_in(tmp_path, run_id) as runtime:
            node = await runtime.start_node(NodeSpec(name="verifier", args=("-c", code), memory_mb=64))
            with pytest.raises(NodeDied) as caught:
                await node.request({"op": "grow"})
            words = str(caught.value)
            assert words.startswith("verifier was killed: out of memory (limit 64 MB); ")
            assert words.endswith("growing")
            assert node.returncode == -signal.SIGKILL

    run(body())


def test_death_at_start_is_one_line_with_the_log(tmp_path: Path, run_id: str, engine: Any) -> None:
    error = 'print(\'{"op":"error","code":"model","message":"no such\\\\nmodel"}\', flush=True)'

    async def body() -> None:
        async with runtime_in(tmp_path, run_id) as runtime:
            with pytest.raises(NodeDied) as caught:
                await runtime.start_node(spec("missing"))
            assert str(caught.value) == "verifier: no such model: missing"
            with pytest.raises(
                NodeDied, match=r"ended with exit status 3 before it was ready; .*: one \| two"
            ):
                code = "import sys; sys.stderr.write('one\\ntwo\\n'); sys.exit(3)"
                await runtime.start_node(NodeSpec(name="verifier", args=("-c", code)))
            with pytest.raises(NodeError, match="no such model"):
                await runtime.start_node(NodeSpec(name="verifier", args=("-c", error)))
            with pytest.raises(NodeDied, match=r"was not ready within 0\.5 s; .*: verifier with mute"):
                await runtime.start_node(spec("mute"), timeout_s=0.5)
            assert containers(engine, run_id) == []
            node = await runtime.start_node(spec("fragile"))
            with pytest.raises(NodeDied, match=r"verifier ended with exit status 9; .*giving up"):
                await node.request({"op": "generate"})
            assert node.returncode == 9

    run(body())


def test_wiring_that_fails_and_a_name_that_is_taken(tmp_path: Path, run_id: str, engine: Any) -> None:
    class Broken(VethWiring):
        async def attach(self, node: str, pid: int) -> None:
            raise LinkError(f"{node}: no cable for {pid}")

    async def body() -> None:
        async with runtime_in(tmp_path, run_id, Broken()) as runtime:
            with pytest.raises(LinkError, match=r"verifier: no cable for [1-9]"):
                await runtime.start_node(spec())
            assert containers(engine, run_id) == []
            name = f"dsdlab-{run_id}-other"
            engine.api.create_container(image_name(), ["true"], name=name)
            try:
                with pytest.raises(RuntimeFailed, match=f"there is a container {name} already: docker rm"):
                    await runtime.start_node(spec(name="other"))
                engine.api.inspect_container(name)  # not ours: still there
            finally:
                engine.api.remove_container(name, force=True)

    run(body())


def test_a_death_before_the_wiring_is_the_reason(tmp_path: Path, run_id: str) -> None:
    class Slow(VethWiring):
        async def attach(self, node: str, pid: int) -> None:
            os.kill(pid, signal.SIGKILL)
            raise LinkError(f"{node}: no cable for {pid}")

    async def body() -> None:
        async with runtime_in(tmp_path, run_id, Slow()) as runtime:
            with pytest.raises(NodeDied, match="verifier was killed by SIGKILL before it was ready"):
                await runtime.start_node(spec())

    run(body())


def test_a_cancelled_start_leaves_nothing(tmp_path: Path, run_id: str, engine: Any) -> None:
    async def body() -> None:
        async with runtime_in(tmp_path, run_id) as runtime:
            for delay_s in (0.0, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.5):
                task = asyncio.create_task(runtime.start_node(spec("mute")))
                await asyncio.sleep(delay_s)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert containers(engine, run_id) == [], delay_s

    run(body())


def test_a_node_that_ignores_everything_is_killed(tmp_path: Path, run_id: str) -> None:
    async def body() -> None:
        async with runtime_in(tmp_path, run_id) as runtime:
            node = await runtime.start_node(spec("stubborn"))
            assert await node.stop(grace_s=0.2) == -signal.SIGKILL

    run(body())


CONTROLLER = """
import asyncio, sys
sys.path[:0] = {paths!r}
from docker_tools import runtime_in
from test_docker_runtime import Path, spec

async def main():
    async with runtime_in(Path({run_dir!r}), {run_id!r}) as runtime:
        await runtime.start_node(spec())
        print("started", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


def test_a_controller_killed_leaves_no_container(tmp_path: Path, run_id: str, engine: Any) -> None:
    paths = [str(HERE), str(HERE.parents[1])]
    code = CONTROLLER.format(paths=paths, run_dir=str(tmp_path), run_id=run_id)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as controller:
        try:
            assert controller.stdout is not None
            assert controller.stdout.readline() == "started\n"
            assert containers(engine, run_id) == [f"dsdlab-{run_id}-verifier"]
        finally:
            controller.kill()
    t0_s = time.monotonic()
    while containers(engine, run_id) and time.monotonic() < t0_s + 10.0:
        time.sleep(0.05)
    print(f"gone {time.monotonic() - t0_s:.1f} s after its controller")
    assert containers(engine, run_id) == []


def test_only_containers_of_dead_owners_are_reaped(run_id: str, engine: Any) -> None:
    me, start = os.getpid(), process_start(os.getpid())
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    owners = {
        "alive": f"{me}:{start}:{boot}",
        "other-start": f"{me}:{start + 1 if start else 1}:{boot}",
        "other-boot": f"{me}:{start}:00000000-0000-0000-0000-000000000000",
        "no-owner": "somebody",
    }
    made = {}
    for name, owner in owners.items():
        labels = {"dsdlab.run": run_id, "dsdlab.owner": owner}
        full = f"dsdlab-{run_id}-{name}"
        made[full] = engine.api.create_container(image_name(), ["true"], name=full, labels=labels)["Id"]
    try:
        reaped = [name for name in reap_containers(engine) if name in made]
        assert sorted(reaped) == [f"dsdlab-{run_id}-other-{what}" for what in ("boot", "start")]
        assert sorted(containers(engine, run_id)) == [f"dsdlab-{run_id}-{x}" for x in ("alive", "no-owner")]
    finally:
        for name in containers(engine, run_id):
            engine.api.remove_container(name, force=True)


def test_the_mounted_source_runs_with_the_images_torch(tmp_path: Path, run_id: str) -> None:
    """The image has what dsdlab imports, and the mounted source is what runs."""
    code = READY + (
        "import dsdlab, torch\n"
        "sys.stdin.readline()\n"
        "print(json.dumps({'op': 'facts', 'id': 1, 'file': dsdlab.__file__, 'torch': torch.__version__}))\n"
        "sys.stdout.flush(); sys.stdin.read()"
    )

    async def body() -> None:
        async with runtime_in(tmp_path, run_id) as runtime:
            node = await runtime.start_node(NodeSpec(name="verifier", args=("-c", code)))
            facts = await node.request({"op": "facts"}, timeout_s=60.0)
            assert facts["file"] == "/opt/dsdlab/dsdlab/__init__.py"
            assert facts["torch"].endswith("+cpu")

    run(body())


# -- without an engine -------------------------------------------------------------------------------------


def test_no_engine_no_permission_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def start() -> None:
        async with runtime_in(tmp_path, "unused"):
            pass

    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    with pytest.raises(RuntimeFailed, match=r"no engine runs .*scripts/docker\.sh start"):
        run(start())
    monkeypatch.setenv("DOCKER_HOST", "tcp://192.0.2.1:2375")
    with pytest.raises(RuntimeFailed, match="needs an engine on this host"):
        run(start())
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "dead.sock"))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/dead.sock")
    with pytest.raises(RuntimeFailed, match="no engine answers at"):
        run(start())
    with pytest.raises(RuntimeFailed, match="not started"):
        run(DockerRuntime(VethWiring(), run_id="unused").start_node(spec()))


def test_paths_in_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs, model, gguf = tmp_path / "blobs", tmp_path / "model", tmp_path / "m.gguf"
    for folder in (blobs, model):
        folder.mkdir()
    gguf.touch()
    (blobs / "abc").touch()
    (model / "model.safetensors").symlink_to(blobs / "abc")
    (tmp_path / "dsdlab").mkdir()
    monkeypatch.chdir(tmp_path)

    def found(*args: str) -> list[str]:
        return [str(path) for path in model_paths(args)]

    assert found("-m", "dsdlab", "node", "--target", "smollm2", "--threads", "2") == []
    assert found("--target", str(gguf)) == [str(gguf)]
    assert found("--target", "m.gguf", "--drafter=lookup+m.gguf") == [str(gguf)] * 2
    assert found("--target", "hf:./model") == [str(model), str(blobs)]
    assert found("--target", "/", "--drafter", "/usr", "-c", "x" * 5000, "y" * 5000, "{dir}/token") == []


def test_quota_keeps_to_what_the_kernel_takes() -> None:
    assert quota_us(0.5, 2) == (10_000, 10_000)
    assert quota_us(0.25, 1) == (10_000, 2_500)
    assert quota_us(0.01, 1) == (100_000, 1_000)
