"""Asked and measured, side by side, with three instruments: `make bench-links`.

Our own probe (`dsdlab.probe`), ping and iperf3, all inside the nodes' namespaces, over the nodes' own path.
Bars: RTT within 0.5 ms or 2 %; rate within 5 %; loss inside its 95 % interval over 5,000 packets or more (by
its nature one in twenty such intervals misses by chance: run it again); mean burst of Gilbert–Elliott loss
within 20 %. Exit status 1 when one is missed.

ping and the probe measure packets; iperf3 measures TCP goodput, given here as the rate on the wire (1514
bytes for 1448 of payload), and the losses of a UDP stream.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from dsdlab.sim.profile import HEADER_BYTES, MSS_BYTES, LinkProfile
from dsdlab.sweep.calibration import binomial_interval, burst_interval
from testbed.controller import Testbed
from testbed.fabric import VERIFIER, edge_name
from testbed.host import choose

TARGET, DRAFTER = "emulated:base_s=0.01", "emulated:base_s=0.001,alpha=0.8"
RTTS_MS = (1.0, 5.0, 20.0, 50.0, 100.0, 200.0, 400.0)
BUSY_RTT_MS = 20.0
RATES_MBIT = (1.0, 10.0, 50.0)
LOSSES_PCT = (0.1, 1.0, 5.0)
BURSTS = ((5.0, 4.0), (5.0, 8.0))  # (loss in per cent, mean burst)
PROBES = 6000
IPERF_S, IPERF_TRIES = 5, 3
UDP_BYTES, UDP_MBIT = 500, 5.0


@dataclass(frozen=True, slots=True)
class Result:
    """One comparison."""

    asked: str
    instrument: str
    measured: str
    allowed: str
    ok: bool


class Bench:
    """The instruments, on one testbed."""

    def __init__(self, bed: Testbed) -> None:
        assert bed.lab.fabric is not None
        self.bed = bed
        self.fabric = bed.lab.fabric
        self.verifier = self.fabric.address(VERIFIER)
        self.results: list[Result] = []

    def note(self, asked: str, instrument: str, measured: str, allowed: str, ok: bool) -> None:
        self.results.append(Result(asked, instrument, measured, allowed, ok))
        print(
            f"{asked:<28} {instrument:<14} {measured:<34} {allowed:<26} {'ok' if ok else 'MISSED'}",
            flush=True,
        )

    async def in_node(self, node: str, *command: str, check: bool = True) -> str:
        """Run a program in a node's namespace; its output. Raises SystemExit with what it said."""
        process = await asyncio.create_subprocess_exec(
            *self.fabric.enter(node),
            *command,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            out = (await process.communicate())[0].decode()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if check and process.returncode:
            raise SystemExit(f"{' '.join(command)} failed: {out.strip()}")
        return out

    async def iperf3(self, *arguments: str) -> dict[str, float]:
        """A run from the edge to the verifier; the receiver's numbers. Raises SystemExit in the end.

        Its own control connection crosses the link as well, and may give up on a lossy one.
        """
        for _ in range(IPERF_TRIES):
            server = asyncio.create_task(self.in_node(VERIFIER, "iperf3", "-s", "-1", check=False))
            await asyncio.sleep(0.3)
            command = ("iperf3", "-c", self.verifier, "-J", *arguments)
            said = json.loads(await self.in_node(edge_name(0), *command, check=False))
            if "error" in said:  # then the server may not have ended
                server.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await server
            end: dict[str, dict[str, float]] = said.get("end", {})
            if received := end.get("sum_received") or end.get("sum"):
                return {**end.get("sum", {}), **received}
        raise SystemExit(f"iperf3 {' '.join(arguments)} failed {IPERF_TRIES} times: {said.get('error')}")

    async def rtt(self, rtt_ms: float) -> None:
        await self.bed.set_link(LinkProfile(rtt_ms=rtt_ms))
        allowed_ms = max(0.5, 0.02 * rtt_ms)
        measure = await self.bed.calibrate(n=200)
        count = ("-c", "40", "-i", "0.02", "-q", self.verifier)
        text = await self.in_node(edge_name(0), "ping", *count)
        found = re.search(r"= ([\d.]+)/([\d.]+)/", text)
        ping_ms = float(found[2]) if found else float("nan")
        for name, value, more in (
            ("probe", measure.rtt_p50_ms, f" (p99 {measure.rtt_p99_ms:.2f})"),
            ("ping", ping_ms, ""),
        ):
            ok = abs(value - rtt_ms) <= allowed_ms
            self.note(f"RTT {rtt_ms:g} ms", name, f"{value:.2f} ms{more}", f"± {allowed_ms:.2f} ms", ok)

    async def busy(self, rtt_ms: float) -> None:
        """The same with every core computing at ordinary priority, as they do during a generation."""
        spin = [sys.executable, "-I", "-S", "-c", "while True: pass"]
        spinners = [await asyncio.create_subprocess_exec(*spin) for _ in range(os.cpu_count() or 1)]
        try:
            await self.bed.set_link(LinkProfile(rtt_ms=rtt_ms))
            measure = await self.bed.calibrate(n=200)
        finally:
            for spinner in spinners:
                spinner.kill()
                await spinner.wait()
        text = f"{measure.rtt_p50_ms:.2f} ms (p99 {measure.rtt_p99_ms:.2f})"
        ok = abs(measure.rtt_p50_ms - rtt_ms) <= max(0.5, 0.02 * rtt_ms)
        self.note(f"RTT {rtt_ms:g} ms, cores busy", "probe", text, "± 0.50 ms", ok)

    async def rate(self, rate_mbit: float) -> None:
        await self.bed.set_link(LinkProfile(rtt_ms=20, rate_up_mbit=rate_mbit, rate_down_mbit=rate_mbit))
        measure = await self.bed.calibrate()
        wire = (MSS_BYTES + HEADER_BYTES) / MSS_BYTES / 1e6
        up = (await self.iperf3("-t", str(IPERF_S)))["bits_per_second"] * wire
        down = (await self.iperf3("-t", str(IPERF_S), "-R"))["bits_per_second"] * wire
        for name, way, value in (
            ("probe", "up", measure.up.rate_mbit or 0.0),
            ("probe", "down", measure.down.rate_mbit or 0.0),
            ("iperf3 TCP", "up", up),
            ("iperf3 TCP", "down", down),
        ):
            ok = abs(value - rate_mbit) <= 0.05 * rate_mbit
            self.note(f"rate {rate_mbit:g} Mbit/s {way}", name, f"{value:.3f} Mbit/s", "± 5 %", ok)

    async def loss(self, loss_pct: float) -> None:
        await self.bed.set_link(LinkProfile(rtt_ms=20, loss_pct=loss_pct))
        measure = await self.bed.calibrate(n=PROBES)
        udp = await self.iperf3("-u", "-l", str(UDP_BYTES), "-b", f"{UDP_MBIT}M", "-t", str(IPERF_S))
        counts = (
            ("probe", "up", measure.up.lost, measure.up.sent),
            ("probe", "down", measure.down.lost, measure.down.sent),
            ("iperf3 UDP", "up", int(udp["lost_packets"]), int(udp["packets"])),
        )
        for name, way, lost, sent in counts:
            low, high = binomial_interval(lost, sent)
            ok = sent >= 5000 and 100 * low <= loss_pct <= 100 * high
            allowed = f"interval {100 * low:.3f} to {100 * high:.3f} %"
            self.note(
                f"loss {loss_pct:g} % {way}",
                name,
                f"{lost} of {sent}: {100 * lost / sent:.3f} %",
                allowed,
                ok,
            )

    async def burst(self, loss_pct: float, burst: float) -> None:
        await self.bed.set_link(LinkProfile(rtt_ms=20, loss_pct=loss_pct, loss_burst=burst))
        measures = [await self.bed.calibrate(n=PROBES) for _ in range(2)]
        bursts = [n for m in measures for way in (m.up, m.down) for n in way.bursts]
        mean = sum(bursts) / max(1, len(bursts))
        low, high = burst_interval(bursts)
        text = f"{mean:.2f} over {len(bursts)} bursts [{low:.2f}, {high:.2f}]"
        self.note(
            f"bursts of {burst:g} at {loss_pct:g} %",
            "probe",
            text,
            "± 20 %",
            abs(mean - burst) <= 0.2 * burst,
        )


async def bench(runtime: str, link: str) -> list[Result]:
    """All of it."""
    with tempfile.TemporaryDirectory(prefix="dsdlab-bench-") as folder:
        bed = Testbed(Path(folder), target=TARGET, drafter=DRAFTER, runtime=runtime, link=link)
        async with bed:
            offset = bed.lab.boxes.offset_ms if bed.lab.boxes else {}
            print(
                f"{runtime} runtime, {link} link; the box takes",
                {k: round(v, 3) for k, v in offset.items()},
                "ms",
            )
            one = Bench(bed)
            for rtt_ms in RTTS_MS:
                await one.rtt(rtt_ms)
            await one.busy(BUSY_RTT_MS)
            for rate_mbit in RATES_MBIT:
                await one.rate(rate_mbit)
            for loss_pct in LOSSES_PCT:
                await one.loss(loss_pct)
            for loss_pct, burst in BURSTS:
                await one.burst(loss_pct, burst)
            return one.results


def main() -> int:
    """Print the table, write results/bench/links.json."""
    parser = argparse.ArgumentParser(prog="python -m bench.links", description=__doc__)
    parser.add_argument("--runtime", default="netns", choices=("netns", "docker"))
    parser.add_argument("--link", default="auto", choices=("auto", "netem", "netem-uml"))
    args = parser.parse_args()
    link = choose(args.runtime, args.link).link
    if link == "modelled":
        print("no netem on this host: dsdlab doctor says how to get it", file=sys.stderr)
        return 2
    results = asyncio.run(bench(args.runtime, link))
    missed = [r for r in results if not r.ok]
    out = Path("results/bench/links.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        json.dumps({"runtime": args.runtime, "link": link, "results": [asdict(r) for r in results]})
    )
    print(f"{len(results) - len(missed)} of {len(results)} within their bars; {out}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
