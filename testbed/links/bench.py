"""Asked and measured, side by side: `python -m testbed.links.bench` for the `modelled` link.

RTT: echoes of 200 bytes through the box, one after the other. "peers" is the same echo without a box, at the
same pace (a processor that has slept wakes slowly), and "box" what is left: the error that the box makes.
Rate: 2 MB through the box one way. Loss: echoes at 1 % in each direction, beside what TCP does by the model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dsdlab.sim.profile import HEADER_BYTES, MSS_BYTES, LinkProfile
from testbed.links.base import EchoServer, Endpoint, echo_rtts_ms, percentile
from testbed.links.modelled import ModelledLink

N_BYTES = 200


def paced_rtts_ms(endpoint: Endpoint, n: int, gap_s: float) -> list[float]:
    """Echoes with a pause before each, so that the peers are as cold as behind a link of that RTT."""
    rtts_ms = []
    with socket.create_connection((endpoint.host, endpoint.port), 10) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(n):
            time.sleep(gap_s)
            t0_s = time.perf_counter()
            sock.sendall(b"\x5a" * N_BYTES)
            left = N_BYTES
            while left:
                left -= len(sock.recv(left))
            rtts_ms.append((time.perf_counter() - t0_s) * 1e3)
    return rtts_ms


async def bench_rtt(link: ModelledLink, echo: Endpoint, edge: Endpoint, rtt_ms: float) -> dict[str, Any]:
    """Median and tail at one RTT, and the processor time of the box."""
    n = int(min(1000, max(50, 6000 / max(rtt_ms, 1e-3))))
    await link.apply(LinkProfile(rtt_ms=rtt_ms))
    peers = await asyncio.to_thread(paced_rtts_ms, echo, max(20, n // 4), rtt_ms / 1e3)
    before, t0_s = await link.stats(), time.monotonic()
    rtts = await asyncio.to_thread(echo_rtts_ms, edge, n, N_BYTES)
    wall_s, after = time.monotonic() - t0_s, await link.stats()
    p50 = percentile(rtts, 0.5)
    return {
        "rtt_ms": rtt_ms,
        "n": n,
        "p50_ms": p50,
        "p99_ms": percentile(rtts, 0.99),
        "peers_ms": percentile(peers, 0.5),
        "box_ms": p50 - rtt_ms - percentile(peers, 0.5),
        "cpu_pct": 100 * (after["cpu_s"] - before["cpu_s"]) / wall_s,
    }


async def bench_rate(link: ModelledLink, edge: Endpoint, rate_mbit: float) -> dict[str, Any]:
    """Goodput of a bulk transfer upwards, as a rate on the wire. A first transfer fills the buffers."""
    n_bytes = int(rate_mbit * 1e6 / 8 * 1.5)
    await link.apply(LinkProfile(rate_up_mbit=rate_mbit))
    t0_s = time.perf_counter()
    await asyncio.to_thread(echo_rtts_ms, edge, 0, n_bytes)
    goodput = n_bytes * 8 / (time.perf_counter() - t0_s) / 1e6
    return {
        "rate_mbit": rate_mbit,
        "goodput_mbit": goodput,
        "wire_mbit": goodput * (MSS_BYTES + HEADER_BYTES) / MSS_BYTES,
    }


async def bench_loss(link: ModelledLink, edge: Endpoint, loss_pct: float, n: int) -> dict[str, Any]:
    """Latency of echoes at RTT 20 ms with loss in both directions."""
    await link.apply(LinkProfile(rtt_ms=20, loss_pct=loss_pct))
    before = await link.stats()
    lanes = 20  # connections at once, so that it does not take a minute
    calls = (asyncio.to_thread(echo_rtts_ms, edge, n // lanes, N_BYTES) for _ in range(lanes))
    rtts = [rtt for lane in await asyncio.gather(*calls) for rtt in lane]
    after = await link.stats()
    lost = sum(after[way]["lost"] - before[way]["lost"] for way in ("up", "down"))
    sent = sum(after[way]["segments"] - before[way]["segments"] for way in ("up", "down"))
    quantiles = {f"p{100 * q:g}_ms": percentile(rtts, q) for q in (0.5, 0.95, 0.99, 0.999)}
    mean_ms = sum(rtts) / len(rtts)
    return {"loss_pct": loss_pct, "n": len(rtts), "lost": lost, "sent": sent, "mean_ms": mean_ms, **quantiles}


async def bench(rtts_ms: list[float], rates_mbit: list[float], losses_pct: list[float]) -> dict[str, Any]:
    """All of it."""
    echo, link = EchoServer(), ModelledLink(seed=1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            edge = await link.start(Path(folder))
            await link.set_target(echo.endpoint)
            return {
                "granted": link.granted,
                "rtt": [await bench_rtt(link, echo.endpoint, edge, rtt) for rtt in rtts_ms],
                "rate": [await bench_rate(link, edge, rate) for rate in rates_mbit],
                "loss": [await bench_loss(link, edge, loss, 4000) for loss in losses_pct],
            }
        finally:
            await link.stop()
            await asyncio.to_thread(echo.close)


def main(argv: list[str] | None = None) -> int:
    """Print one table per question, or one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m testbed.links.bench", description=__doc__)
    parser.add_argument("--rtt", default="0,1,5,20,50,100,200", help="ms, comma-separated; may be empty")
    parser.add_argument("--rate", default="1,10,50", help="Mbit/s")
    parser.add_argument("--loss", default="1", help="per cent")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    asked = [[float(word) for word in text.split(",") if word] for text in (args.rtt, args.rate, args.loss)]
    result = asyncio.run(bench(*asked))
    if args.json:
        sys.stdout.write(json.dumps(result) + "\n")
        return 0
    for name in ("rtt", "rate", "loss"):
        if rows := result[name]:
            sys.stdout.write("".join(f"{key:>13}" for key in rows[0]) + "\n")
            for row in rows:
                cells = (f"{v:13.3f}" if isinstance(v, float) else f"{v:13}" for v in row.values())
                sys.stdout.write("".join(cells) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
