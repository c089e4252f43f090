"""The fabric: nodes alone in their namespaces, TCP as asked, and a host that knows nothing of it."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from bed_tools import HERE, run
from needs import need, need_netns, need_uml

from dsdlab.sim.profile import TcpRegime
from testbed import fabric as fabric_module
from testbed.fabric import VERIFIER, Fabric
from testbed.host import choose, host_turn
from testbed.lab import make_lab
from testbed.links.base import LinkError
from testbed.runtimes.base import NodeDied, NodeHandle, NodeSpec, RuntimeFailed
from testbed.runtimes.netns import NetnsRuntime

IDLE = 'import sys; print(\'{"op":"ready"}\', flush=True); sys.stdin.read()'


def interfaces() -> set[str]:
    return {p.name for p in Path("/sys/class/net").iterdir()}


@asynccontextmanager
async def wired(run_dir: Path) -> AsyncIterator[tuple[Fabric, NetnsRuntime, dict[str, NodeHandle]]]:
    """A fabric and two idle nodes on one bridge."""
    fabric = Fabric(flat=True)
    runtime = NetnsRuntime(fabric)
    try:
        await runtime.start(run_dir)
        await fabric.start(run_dir)
        nodes = {}
        for name in (VERIFIER, "edge0"):
            nodes[name] = await runtime.start_node(NodeSpec(name=name, args=("-c", IDLE)), 20)
        yield fabric, runtime, nodes
    finally:
        await runtime.stop()
        await fabric.stop()


def test_nodes_are_alone_and_reach_each_other(tmp_path: Path) -> None:
    need_netns()
    before = interfaces()

    async def body() -> None:
        async with wired(tmp_path) as (fabric, _, nodes):
            assert nodes["edge0"].endpoint(80).host == fabric.address("edge0")
            shown = json.loads((await fabric.run(["ip", "-j", "addr"], node="edge0"))[0])
            assert {link["ifname"] for link in shown} == {"lo", "eth0"}
            eth0 = next(link for link in shown if link["ifname"] == "eth0")
            assert [a["local"] for a in eth0["addr_info"]] == [fabric.address("edge0")]  # and no IPv6
            neighbours = json.loads((await fabric.run(["ip", "-j", "neigh"], node="edge0"))[0])
            assert [(n["dst"], n["state"]) for n in neighbours] == [(fabric.address(VERIFIER), ["PERMANENT"])]
            await fabric.run(["ping", "-c", "1", "-W", "2", fabric.address(VERIFIER)], node="edge0")
            assert (await fabric.tcp_state("edge0"))["offloads_on"] == []
            assert interfaces() == before

    run(body())
    assert interfaces() == before


def test_tcp_is_set_before_sockets_and_read_back(tmp_path: Path) -> None:
    need_netns()

    async def body() -> None:
        async with wired(tmp_path) as (fabric, _, _):
            assert (await fabric.tcp_state("edge0"))["slow_start_after_idle"] is True
            await fabric.set_tcp(TcpRegime(congestion="reno", slow_start_after_idle=False, rto_min_ms=20))
            for node in (VERIFIER, "edge0"):
                assert (await fabric.tcp_state(node))["slow_start_after_idle"] is False
                route = json.loads((await fabric.run(["ip", "-j", "route"], node=node))[0])[0]
                metrics = {k: v for part in route["metrics"] for k, v in part.items()}
                assert metrics["rto_min"] == 20
                assert metrics["congestion"] == "reno"
            with pytest.raises(
                LinkError, match=r"tcp\.congestion: 'magic' is not in this kernel \(available:"
            ):
                await fabric.set_tcp(TcpRegime(congestion="magic"))

    run(body())


def test_a_node_may_die_and_start_again(tmp_path: Path) -> None:
    need_netns()

    async def body() -> None:
        async with wired(tmp_path) as (fabric, runtime, nodes):
            await nodes["edge0"].kill()
            await runtime.start_node(NodeSpec(name="edge0", args=("-c", IDLE)), 20)
            await fabric.run(["ping", "-c", "1", "-W", "2", fabric.address(VERIFIER)], node="edge0")
            with pytest.raises(
                RuntimeFailed, match=r"memory_mb needs the docker runtime \(this one is netns\)"
            ):
                await runtime.start_node(NodeSpec(name="edge0", args=(), memory_mb=64))

    run(body())


def test_a_node_that_dies_before_it_is_wired_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_netns()

    async def body() -> None:
        async with wired(tmp_path) as (fabric, runtime, _):
            attach = fabric.attach

            async def too_late(node: str, pid: int) -> None:
                os.kill(pid, signal.SIGKILL)
                await asyncio.sleep(0.1)
                await attach(node, pid)

            monkeypatch.setattr(fabric, "attach", too_late)
            with pytest.raises(NodeDied, match="edge1 was killed by SIGKILL before it was ready"):
                await runtime.start_node(NodeSpec(name="edge1", args=("-c", IDLE)), 20)

    run(body())


def test_a_fabric_that_dies_says_so(tmp_path: Path) -> None:
    need_netns()

    async def body() -> None:
        async with wired(tmp_path) as (fabric, _, _):
            os.kill(fabric.pid, signal.SIGKILL)
            with pytest.raises(LinkError, match="fabric was killed by SIGKILL"):
                for _ in range(100):
                    await fabric.run(["true"])
            with pytest.raises(LinkError, match="fabric: not started"):
                _ = fabric.pid

    run(body())


def test_commands_that_fail_are_named(tmp_path: Path) -> None:
    need_netns()

    async def body() -> None:
        fabric = Fabric()
        try:
            with pytest.raises(LinkError, match="not started"):
                await fabric.run(["true"])
            await fabric.start(tmp_path)
            with pytest.raises(LinkError, match=r"ip link add core type bridge: .*exists"):
                await fabric.run(["ip", "link", "add", "core", "type", "bridge"])
            with pytest.raises(LinkError, match=r"no such-tool on this host \(apt install"):
                await fabric.run(["such-tool"])
            with pytest.raises(LinkError, match=r"edge0 is not wired \(nodes: none\)"):
                await fabric.run(["true"], node="edge0")
        finally:
            await fabric.stop()
        for edges in (0, 65):
            with pytest.raises(LinkError, match=r"out of range \(allowed: 1 to 64\)"):
                Fabric(edges)

    run(body())


def test_without_root(tmp_path: Path) -> None:
    """An ordinary user gets the whole testbed with real netem: namespaces inside a user namespace."""
    need_uml()
    if os.geteuid() != 0:
        command = []
    elif shutil.which("unshare") and "--map-user" in subprocess.run(
        ["unshare", "--help"], capture_output=True, text=True, check=False
    ).stdout:  # fmt: skip
        # a user namespace in which we are nobody special, but still own our files
        command = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
    else:
        need("unshare cannot map users here (util-linux before 2.38)")
        return
    done = subprocess.run(
        [*command, sys.executable, str(HERE / "rootless_bed.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE.parents[1],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["uid"] != 0
    assert said["reason"] == ""


def test_names_that_do_not_go_together() -> None:
    with pytest.raises(LinkError, match=r"link netem needs runtime netns or docker"):
        make_lab("process", "netem")
    with pytest.raises(
        RuntimeFailed, match=r"runtime: 'cloud' is unknown \(allowed: process, netns, docker\)"
    ):
        make_lab("cloud", "modelled")


def test_containers_need_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(RuntimeFailed, match="docker: containers get their links from root"):
        make_lab("docker", "netem-uml")


def test_auto_is_the_most_real_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    from testbed import host

    problems = {"docker": "no engine", "netns": "", "netem": "no module", "uml": ""}
    monkeypatch.setattr(host, "docker_problem", lambda: problems["docker"])
    monkeypatch.setattr(host, "netns_problem", lambda: problems["netns"])
    monkeypatch.setattr(host, "netem_problem", lambda: problems["netem"])
    monkeypatch.setattr(host, "uml_problem", lambda: problems["uml"])
    choice = choose("auto", "auto")
    assert (choice.runtime, choice.link) == ("netns", "netem-uml")
    assert choice.reasons == ["not docker: no engine", "not netem: no module"]
    problems["uml"] = "no linux.uml"
    assert choose("auto", "auto").link == "modelled"
    problems |= {"docker": "", "netem": ""}
    assert (choose("auto", "auto").runtime, choose("auto", "auto").link) == ("docker", "netem")
    problems |= {"docker": "no engine", "netns": "refused"}
    assert (choose("auto", "auto").runtime, choose("auto", "auto").link) == ("process", "modelled")
    with pytest.raises(LinkError, match=r"link netem needs runtime netns or docker; .*refused"):
        choose("auto", "netem")
    assert choose("docker", "netem").reasons == []  # what is named is not second-guessed


def test_controllers_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("testbed.host.TURN", f"\0dsdlab-test-{os.getpid()}")
    said: list[str] = []
    holding: list[str] = []

    async def controller(name: str, hold_s: float) -> None:
        async with host_turn(said.append):
            holding.append(name)
            await asyncio.sleep(hold_s)
            holding.append(name)

    async def body() -> None:
        first = asyncio.create_task(controller("first", 0.3))
        await asyncio.sleep(0.05)
        await asyncio.gather(first, controller("second", 0.0))

    run(body())
    assert holding == ["first", "first", "second", "second"]
    assert len(said) == 1
    assert "waiting for it to end" in said[0]


def test_without_abstract_sockets_there_are_no_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("testbed.host.TURN", str(tmp_path / "no" / "such" / "folder"))

    async def body() -> None:
        async with asyncio.timeout(5), host_turn(pytest.fail):
            pass

    run(body())


def test_a_killed_controller_gives_its_turn_back(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = f"\0dsdlab-test-{os.getpid()}"
    monkeypatch.setattr("testbed.host.TURN", turn)
    code = f"""
import asyncio
from testbed import host
host.TURN = {turn!r}
async def main():
    async with host.host_turn(print):
        print("mine", flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parents[1]) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "mine\n"
        holder.kill()

    async def body() -> None:
        async with asyncio.timeout(2.0), host_turn(print):
            pass

    run(body())


def test_addresses_are_distinct() -> None:
    fabric = Fabric(fabric_module.MAX_EDGES)
    assert len({fabric.address(node) for node in fabric.nodes}) == fabric_module.MAX_EDGES + 1
    assert Fabric.host not in {fabric.address(node) for node in fabric.nodes}
