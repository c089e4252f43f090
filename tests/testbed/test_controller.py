"""The controller: two nodes and a link as one thing, through work, faults and its own sudden death."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from bed_tools import HERE, descendants_and_orphans, run

from dsdlab.sim.profile import LinkProfile
from testbed.controller import CpuSplit, Testbed
from testbed.ledger import Ledger
from testbed.links.base import LinkError
from testbed.runtimes.base import NodeDied, NodeError, RuntimeFailed

ROOT = HERE.parents[1]
STANDIN = str(HERE / "standin_node.py")


def bed(run_dir: Path, target: str = "plain", **options: Any) -> Testbed:
    return Testbed(run_dir, target=target, drafter="none", command=(STANDIN,), **options)


def test_default_split() -> None:
    assert CpuSplit.default([3]) == CpuSplit((3,), (3,))
    assert CpuSplit.default([0, 1]) == CpuSplit((0,), (1,))
    assert CpuSplit.default([0, 1, 2, 4, 6]) == CpuSplit((0, 1), (2, 4, 6))
    split = CpuSplit.default()
    assert split.verifier
    assert split.drafter


def test_drafter_may_be_first(tmp_path: Path) -> None:
    """The verifier comes up after the drafter has dialled: the link holds the call."""

    async def body() -> None:
        async with bed(tmp_path, "slow") as testbed:
            assert len(await testbed.ping(1)) == 1

    run(body())


def test_work_link_and_faults(tmp_path: Path) -> None:
    async def body() -> None:
        async with bed(tmp_path, profiles=[LinkProfile(rtt_ms=20)]) as testbed:
            split = CpuSplit.default()
            assert testbed.verifier.info["info"]["cpus"] == list(split.verifier)
            assert testbed.edge().info["info"]["cpus"] == list(split.drafter)
            rtts_ms = await testbed.ping(5)
            assert len(rtts_ms) == 5
            assert min(rtts_ms) >= 19.8
            assert sorted(rtts_ms)[2] < 24
            await testbed.set_link(LinkProfile(rtt_ms=2))
            assert 1.8 <= sorted(await testbed.ping(9))[4] < 5
            record = await testbed.generate({"max_new_tokens": 5}, timeout_s=5)
            assert record == {"ids": [1, 2, 3, 4, 5], "reconnects": 0}
            await testbed.reconnect()

            job = asyncio.create_task(testbed.generate({"max_new_tokens": 300}, timeout_s=20))
            await asyncio.sleep(0.2)
            port = testbed.verifier.info["port"]
            old = testbed.verifier.info["info"]["pid"]
            with pytest.raises(RuntimeFailed, match="still running"):
                await testbed.restart_verifier()
            await testbed.kill_verifier()
            assert not psutil.pid_exists(old)
            ready = await testbed.restart_verifier()
            assert ready["port"] == port
            await asyncio.sleep(0.15)
            assert not job.done()
            assert await testbed.drop_connections() == 1
            record = await job
            assert record["ids"] == list(range(1, 301))
            assert record["reconnects"] >= 2
            with pytest.raises(NodeError, match="not finished") as caught:
                await testbed.kill_verifier()
                await testbed.generate({"max_new_tokens": 5}, timeout_s=0.3)
            assert caught.value.code == "timeout"
            with pytest.raises(NodeDied, match="verifier was killed by SIGKILL"):
                await testbed.check_verifier()
        assert Ledger(tmp_path / "objects.jsonl", "x").left() == []
        with pytest.raises(RuntimeFailed, match="not started"):
            await testbed.ping()

    run(body())


def test_failed_starts_leave_nothing_and_say_why(tmp_path: Path) -> None:
    async def body() -> None:
        with pytest.raises(NodeDied, match=r"verifier: no such model: missing"):
            async with bed(tmp_path, "missing"):
                raise AssertionError("started")
        assert descendants_and_orphans("?") == []
        with pytest.raises(NodeDied, match=r"verifier was not ready within 1 s"):
            async with bed(tmp_path, "mute", start_timeout_s=1.0):
                raise AssertionError("started")
        with pytest.raises(RuntimeFailed, match=r"runtime: 'cloud' is unknown \(allowed: process"):
            bed(tmp_path, runtime="cloud")
        with pytest.raises(LinkError, match=r"link: 'string' is unknown \(allowed: modelled"):
            bed(tmp_path, link="string")

    run(body())


def test_a_node_that_dies_in_mid_run_is_reported(tmp_path: Path) -> None:
    async def body() -> None:
        async with bed(tmp_path, "fragile") as testbed:
            with pytest.raises(NodeDied, match=r"edge0 ended with exit status 9; .*out of memory"):
                await testbed.generate({"max_new_tokens": 5}, timeout_s=5)

    run(body())


def test_an_error_inside_the_block_stops_everything(tmp_path: Path) -> None:
    async def body() -> None:
        with pytest.raises(KeyError):
            async with bed(tmp_path):
                raise KeyError("user code")
        assert descendants_and_orphans("?") == []

    run(body())


CONTROLLER = """
import asyncio, sys
from pathlib import Path
from testbed.controller import Testbed

async def main():
    testbed = Testbed(Path(sys.argv[1]), target=sys.argv[3], drafter="none", command=(sys.argv[2],))
    print("starting", flush=True)
    async with testbed:
        print("up", flush=True)
        await testbed.generate({"max_new_tokens": 10**9}, timeout_s=60)

asyncio.run(main())
"""


@pytest.mark.parametrize("moment", ["up", "starting"])
@pytest.mark.parametrize("target", ["plain", "stubborn"])
def test_sigkill_of_the_controller_takes_everything_with_it(
    tmp_path: Path, nothing_left: str, moment: str, target: str
) -> None:
    """Even nodes that ignore the end of their input and SIGTERM; the box too."""
    controller = subprocess.Popen(
        [sys.executable, "-c", CONTROLLER, str(tmp_path), STANDIN, target],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert controller.stdout is not None
    with controller.stdout as lines:
        while lines.readline().strip() != moment:
            assert controller.poll() is None
    time.sleep(0.2)
    before = descendants_and_orphans(nothing_left)
    controller.send_signal(signal.SIGKILL)
    controller.wait()
    if moment == "up":
        assert len(before) == 4  # controller, verifier, drafter, box
        assert any("testbed.links.modelled" in line for line in before)
    end_s = time.monotonic() + 2.0
    while (left := descendants_and_orphans(nothing_left)) and time.monotonic() < end_s:
        time.sleep(0.01)
    assert left == []

    async def again() -> None:  # and the same folder serves the next run
        async with bed(tmp_path) as testbed:
            assert len(await testbed.ping(1)) == 1

    run(again())


JOB = {
    "mode": "dsd-sync",
    "policy": "static",
    "gamma": 4,
    "prompt_ids": [1, 2, 3],
    "sampling": {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 1},
    "max_new_tokens": 24,
    "stop_at_eos": False,
}


@pytest.mark.e2e
def test_real_nodes_with_an_emulated_engine(tmp_path: Path) -> None:
    """`dsdlab node` over the modelled link: the same ids in any mode, at any RTT, after a crash."""
    options: dict[str, Any] = {
        "target": "emulated:base_s=0.004,per_token_s=0.0005",
        "drafter": "emulated:base_s=0.001,alpha=0.7",
    }

    async def body() -> None:
        async with Testbed(tmp_path, **options) as testbed:
            alone = (await testbed.generate({**JOB, "mode": "cloud-ar"}, timeout_s=20))["ids"]
            assert len(alone) == 24
            await testbed.set_link(LinkProfile(rtt_ms=20))
            assert 19.8 <= sorted(await testbed.ping(5))[2] <= 26
            assert (await testbed.generate(JOB, timeout_s=20))["ids"] == alone
            job = asyncio.create_task(testbed.generate({**JOB, "gamma": 1}, timeout_s=30))
            await asyncio.sleep(0.15)
            await testbed.kill_verifier()
            await testbed.restart_verifier()
            record = await job
            assert record["ids"] == alone
            assert record["reconnects"] >= 1
            json.dumps(record)

    run(body())
