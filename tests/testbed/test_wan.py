"""The WAN as a link: nothing to shape, a verifier that is not ours, and what is told of the path to it."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bed_tools import run

from dsdlab import probe
from dsdlab.probe import ProbeError, Reflector
from dsdlab.sim.profile import LinkProfile, TcpRegime
from dsdlab.sweep.calibration import DirectionMeasure, LinkMeasure
from testbed import probe_report
from testbed.controller import CpuSplit, Testbed
from testbed.host import choose
from testbed.lab import make_lab
from testbed.links.base import Endpoint, LinkError
from testbed.links.wan import WanLink, tcp_problem
from testbed.probe_report import PathReport, is_local
from testbed.runtimes.base import NodeDied, RuntimeFailed

TARGET, DRAFTER = "emulated:base_s=0.002", "emulated:base_s=0.0005,alpha=0.8"
JOB: dict[str, Any] = {
    "mode": "dsd-sync", "policy": "static", "gamma": 3, "prompt_ids": [3, 1, 4],
    "sampling": {"temperature": 0.0, "seed": 7}, "max_new_tokens": 12,
}  # fmt: skip


@contextlib.contextmanager
def verifier_by_hand(folder: Path, *options: str) -> Iterator[Endpoint]:
    """A verifier on a port of loopback, as somebody would start it."""
    command = (sys.executable, "-m", "dsdlab", "node", "verifier", "--target", TARGET, "--drafter", DRAFTER)
    with (
        (folder / "verifier.log").open("w") as log,
        subprocess.Popen(
            [*command, "--port", "0", "--control", "stdio", *options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        ) as node,
    ):  # fmt: skip
        assert node.stdout is not None
        try:
            yield Endpoint("127.0.0.1", json.loads(node.stdout.readline())["port"])
        finally:
            node.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def bed(folder: Path, verifier: Endpoint, **options: Any) -> Testbed:
    return Testbed(
        folder / "bed", target=TARGET, drafter=DRAFTER, link="wan", external=verifier, **options
    )  # fmt: skip


def test_the_link_is_there_when_the_verifier_is(tmp_path: Path) -> None:
    async def body(port: int) -> None:
        link = WanLink(Endpoint("localhost", port))
        assert await link.start(tmp_path) == Endpoint("localhost", port)
        await link.apply(LinkProfile(rtt_ms=50))
        assert (await link.drop(), await link.stats(), link.alive) == (0, {}, True)
        await link.set_target(Endpoint("localhost", port))
        with pytest.raises(LinkError, match="the verifier is at localhost"):
            await link.set_target(Endpoint("elsewhere", port))
        await link.stop()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        run(body(listener.getsockname()[1]))
    with pytest.raises(
        LinkError, match=r"no verifier at ws://127\.0\.0\.1:\d+/ \(connection refused\); start"
    ):
        run(WanLink(Endpoint("127.0.0.1", free_port())).start(tmp_path))
    assert run(tcp_problem(Endpoint("nowhere.invalid", 1))) == "host name not found"


def test_what_goes_together() -> None:
    far = Endpoint("far", 1)
    lab = make_lab("process", "wan", verifier=far)
    assert (lab.links[0].name, lab.links[0].label, lab.boxes, lab.fabric, lab.alive) == (
        "wan", "wan", None, None, True
    )  # fmt: skip
    for runtime, link, verifier, says in (
        ("process", "wan", None, "need each other"),
        ("process", "modelled", far, "need each other"),
        ("netns", "wan", far, "needs runtime process"),
    ):
        with pytest.raises(LinkError, match=says):
            make_lab(runtime, link, verifier=verifier)
    assert (choose("auto", "wan").runtime, choose("auto", "wan").reasons) == ("process", [])
    assert CpuSplit.edge_alone().verifier == ()
    assert set(CpuSplit.edge_alone().drafter) == {*CpuSplit.default().drafter, *CpuSplit.default().verifier}


def test_a_bed_with_somebody_else_s_verifier(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("sesame")

    async def body(verifier: Endpoint) -> None:
        async with bed(tmp_path, verifier, token="sesame") as testbed:
            assert testbed.packets
            measure = await testbed.calibrate()
            assert (measure.instrument, measure.up.sent) == ("packets", 40)
            assert len((await testbed.generate(JOB, 30))["ids"]) == 12
            await testbed.set_tcp(TcpRegime())
            await testbed.check_verifier()
            assert (await testbed.tcp_state(), await testbed.counters()) == ({}, {})
            with pytest.raises(RuntimeFailed, match="started by hand"):
                _ = testbed.verifier
            with pytest.raises(RuntimeFailed, match="started by hand"):
                await testbed.kill_verifier()
            with pytest.raises(RuntimeFailed, match="started by hand"):
                await testbed.restart_verifier()
            with pytest.raises(RuntimeFailed, match="nobody can cut it"):
                await testbed.drop_connections()
            with pytest.raises(RuntimeFailed, match=r"tcp: .*is external"):
                await testbed.set_tcp(TcpRegime(nodelay=False))

    with verifier_by_hand(tmp_path, "--token-file", str(tmp_path / "secret")) as verifier:
        run(body(verifier))
        with pytest.raises(NodeDied, match="wrong token"):
            run(body_with(tmp_path, verifier, "open up"))
        with pytest.raises(NodeDied, match="no token given"):
            run(body_with(tmp_path, verifier, ""))


async def body_with(tmp_path: Path, verifier: Endpoint, token: str) -> None:
    async with bed(tmp_path, verifier, token=token):
        pass


def test_where_udp_is_filtered_frames_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verifier finds its UDP port taken, as good as filtered; probes get no answer, pings do."""
    monkeypatch.delenv("DSDLAB_TOKEN", raising=False)

    async def body(verifier: Endpoint) -> None:
        async with bed(tmp_path, verifier) as testbed:
            assert not testbed.packets
            measure = await testbed.calibrate()
            assert (measure.instrument, measure.n, measure.up.sent) == ("frames", 9, 0)

    port = free_port()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as deaf:
        deaf.bind(("127.0.0.1", port))
        with verifier_by_hand(tmp_path, "--port", str(port)) as verifier:
            assert verifier.port == port
            run(body(verifier))
            with pytest.raises(ProbeError, match="a firewall closes its UDP port, or its token is another"):
                probe_report.probe(f"ws://{verifier}/", "", 3, 0.001)


def test_a_report_of_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    reflector = Reflector("127.0.0.1", 0, "sesame")
    url = f"ws://127.0.0.1:{reflector.port}/"
    try:
        found = probe_report.probe(url, "sesame", 50, 0.001, rate_mbit=20)
        said = "\n".join(found.lines())
        assert said.startswith(f"{url}: 50 probes, 1 ms apart, in ")
        for words in (
            "RTT         p50 0.", "(50 came back)", "lost        up 0 % [0, 7.1], 0 of 50; down 0 %",
            "reordered   up 0; down 0", "rate        up ", "Mbit/s",
        ):  # fmt: skip
            assert words in said
        assert "burst" not in said
        assert "two clocks" not in said
        out = json.loads(json.dumps(found.as_json(), allow_nan=False))
        assert (out["verifier"], out["one_clock"], out["up"]["lost"], out["n"]) == (url, True, 0, 50)
        assert out["down"]["loss_pct_interval"] == pytest.approx([0, 7.11], abs=0.01)
        monkeypatch.setattr(probe, "ASK_FOR_S", 0.2)
        with pytest.raises(
            ProbeError, match=r"came back .*: no verifier takes calls there either \(TCP: conn"
        ):
            probe_report.probe(url, "another", 3, 0.001)
    finally:
        reflector.close()
    with pytest.raises(ProbeError, match=r"host name 'nowhere\.invalid' not found"):
        probe_report.probe("ws://nowhere.invalid:1/", "", 3, 0.001)
    with pytest.raises(ProbeError, match=r"allowed: ws://HOST:PORT/"):
        probe_report.probe("ws://h/", "", 3, 0.001)


def test_a_report_of_a_bad_path() -> None:
    up = DirectionMeasure(sent=100, lost=6, bursts=[4, 2], reordered=3, delay_p50_ms=-912.5, rate_mbit=2345.6)
    down = DirectionMeasure(sent=94, lost=0, delay_p50_ms=950.5)
    measure = LinkMeasure(instrument="packets", rtt_p50_ms=38, rtt_p99_ms=52, n=94, up=up, down=down)
    said = PathReport(Endpoint("far", 1), measure, 5.0, False).lines()
    assert said[2:] == [
        "one way     up -912.50 ms, down 950.50 ms, p50 (two clocks: only the sum is a delay)",
        "lost        up 6 % [2.2, 13], 6 of 100; down 0 % [0, 3.8], 0 of 94",
        "burst       up 3 packets on average [1.3, 23]; down none",
        "reordered   up 3; down 0",
        "rate        up 2,346 Mbit/s; down unknown: the train was lost",
    ]
    nothing = LinkMeasure(instrument="packets", rtt_p50_ms=0, rtt_p99_ms=0, n=0, up=DirectionMeasure(sent=9))
    said = PathReport(Endpoint("far", 1), nothing, 5.0, False).lines()
    assert said[1] == "RTT         unknown: no probe came back, only the verifier's count of them"
    assert "down unknown: none was sent" in said[2]


def test_whose_clock_it_is() -> None:
    assert is_local("localhost")
    assert is_local("127.0.0.1")
    assert not is_local("192.0.2.1")
    assert not is_local("nowhere.invalid")
