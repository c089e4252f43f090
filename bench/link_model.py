"""The link model against real netem: `make bench-link-model`.

Emulated nodes exchange their own frames over netem, in namespaces; then the same frames, with the computing
times that were recorded, cross the model in virtual time. Two patterns:

- turns (dsd-sync): a window goes up, its verdict comes back; what is compared is that round trip without the
  computing in it. Here tail losses count: nothing follows a lost frame.
- stream (cloud-ar): commits come one after another; what is compared is the time between their arrivals.

Printed side by side are quantiles, the share of late frames (more than `LATE_MS` above the measured median),
the greatest distance of the two distributions (Kolmogorov–Smirnov, at steps of `LATE_MS` about that median:
the nodes' own unrest of tenths of a millisecond is no matter of the link), and the signed error of the mean
with twice its standard error. What the nodes themselves take per round trip is read off the loss-free point
of 1 ms; nothing else is taken from the measurements.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import random
import statistics
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsdlab.protocol import AnyFrame, Channel, Commit, Draft, Ping, Verdict, pack_ids
from dsdlab.sim import loop
from dsdlab.sim.channel import SimLink
from dsdlab.sim.profile import LinkProfile
from testbed.controller import Testbed
from testbed.host import choose

TARGET, DRAFTER = "emulated:base_s=0.0015", "emulated:base_s={draft_s},alpha=0.8"
GAMMA = 4
WINDOWS = 60  # of one generation, about
LATE_MS = 10.0
QUANTILES = (0.5, 0.9, 0.95, 0.99)
SIMULATED = 20  # times as many frames as were measured
Span = tuple[float, float]
"""What happens before a frame is sent up, and then before its answer is sent down, s."""


@dataclass(slots=True)
class Point:
    """A link, how many edges measure it at the same time, and what came out (ms)."""

    profile: LinkProfile
    edges: int = 1
    measured: list[float] = field(default_factory=list)
    spans: list[list[Span]] = field(default_factory=list)  # of each generation

    @property
    def label(self) -> str:
        p = self.profile
        words = [f"RTT {p.rtt_ms:g}", f"loss {p.loss_pct:g} %"]
        words += [f"bursts of {p.loss_burst:g}"] if p.loss_burst > 1 else []
        words += [f"jitter {p.jitter_ms:g}"] if p.jitter_ms else []
        words += [f"{p.rate_up_mbit:g} Mbit/s"] if p.rate_up_mbit else []
        return ", ".join(words)


def points() -> list[list[Point]]:
    """What is measured; the points of one list at the same time."""

    def grid(rtt_ms: float, *edges: int) -> list[Point]:
        losses = (0.0, 1.0, 3.0)
        return [
            Point(LinkProfile(rtt_ms=rtt_ms, loss_pct=loss), n) for loss, n in zip(losses, edges, strict=True)
        ]

    narrow = LinkProfile(rtt_ms=20.0, loss_pct=1.0, rate_up_mbit=5.0, rate_down_mbit=5.0)
    bursts = LinkProfile(rtt_ms=20.0, loss_pct=2.0, loss_burst=1.5)
    # ten edges at a time: more, and their start is too much for two cores and a router
    return [
        [*grid(1.0, 1, 2, 2), *grid(20.0, 1, 2, 2)],
        [*grid(60.0, 1, 3, 3), Point(narrow, 3)],
        [*grid(200.0, 1, 4, 4), Point(LinkProfile(rtt_ms=20.0, jitter_ms=5.0), 1)],
        [Point(bursts, 9)],
    ]


# measuring ------------------------------------------------------------------------------------------


def turns_of(record: dict[str, Any]) -> tuple[list[float], list[Span]]:
    """Round trips in ms of a dsd-sync record, and what was computed around them."""
    drafts = [event for event in record["events"] if event[0] == "draft"]
    verdicts = [event for event in record["events"] if event[0] == "flight_down"]
    skip = len(record["t_verify_s"]) - len(drafts)
    late = len(verdicts) - len(drafts)
    out, spans = [], []
    for k, (_, begun_s, sent_s) in enumerate(drafts):
        cloud_s = record["t_verify_s"][skip + k] + record["t_queue_s"][skip + k]
        out.append(1e3 * (verdicts[late + k][2] - sent_s - cloud_s))
        spans.append((sent_s - begun_s, cloud_s))
    return out, spans


def stream_of(record: dict[str, Any]) -> tuple[list[float], list[Span]]:
    """Gaps in ms between the arrivals of a cloud-ar record, and between what was sent."""
    times = [when for when, _ in record["commits"]]
    gaps = [1e3 * (b - a) for a, b in itertools.pairwise(times)]
    sent = [q + c for q, c in zip(record["t_queue_s"], record["t_verify_s"], strict=True)]
    return gaps, [(0.0, s) for s in sent[len(sent) - len(gaps) :]]


async def measure(
    group: list[Point], pattern: str, runtime: str, link: str, wall_s: float, draft_s: float
) -> None:
    """Generate for `wall_s` over every link of the group, all at the same time."""
    owners = [point for point in group for _ in range(point.edges)]
    with tempfile.TemporaryDirectory(prefix="dsdlab-bench-") as folder:
        bed = Testbed(
            Path(folder), target=TARGET, drafter=DRAFTER.format(draft_s=draft_s), runtime=runtime, link=link,
            profiles=[point.profile for point in owners], node_args=("--max-context", "20000"),
        )  # fmt: skip
        async with bed:
            await asyncio.gather(*(_load(bed, i, point, pattern, wall_s) for i, point in enumerate(owners)))


async def _load(bed: Testbed, edge: int, point: Point, pattern: str, wall_s: float) -> None:
    clock = asyncio.get_running_loop()
    end_s = clock.time() + wall_s
    tokens = WINDOWS * (3 if pattern == "turns" else 2)
    job = {
        "mode": "dsd-sync" if pattern == "turns" else "cloud-ar", "gamma": GAMMA,
        "prompt_ids": [1, 2, 3], "max_new_tokens": tokens, "stop_at_eos": False,
    }  # fmt: skip
    while clock.time() < end_s:
        await bed.reconnect(edge)
        record = await bed.generate(job, 300.0, edge)
        values, spans = (turns_of if pattern == "turns" else stream_of)(record)
        point.measured += values
        point.spans.append(spans)


# modelling ------------------------------------------------------------------------------------------


async def _expect(channel: Channel, kind: type[AnyFrame]) -> None:
    frame = await channel.recv()
    assert isinstance(frame, kind)


async def _open(edge: Channel, cloud: Channel) -> None:
    """What a generation begins with: Hello, Welcome, Open. It makes the edge's TCP an interactive one."""
    for sender, receiver in ((edge, cloud), (cloud, edge), (edge, cloud)):
        await sender.send(Ping(1, 0.0))
        await _expect(receiver, Ping)


async def model_turns(link: SimLink, spans: Sequence[Span], node_s: float) -> list[float]:
    """The round trips of a generation through the model, ms."""
    clock = asyncio.get_running_loop()
    edge, cloud = link.pair(edge=(node_s / 4, node_s / 4), cloud=(node_s / 4, node_s / 4))
    await _open(edge, cloud)
    draft, verdict = Draft(1, 0, 500, pack_ids(range(GAMMA))), Verdict(1, 0, 500, 3, 7, 100, 1500)

    async def serve() -> None:
        for _, cloud_s in spans:
            await _expect(cloud, Draft)
            await asyncio.sleep(cloud_s)
            await cloud.send(verdict)

    serving = asyncio.create_task(serve())
    out = []
    for edge_s, cloud_s in spans:
        await asyncio.sleep(edge_s)
        sent_s = clock.time()
        await edge.send(draft)
        await _expect(edge, Verdict)
        out.append(1e3 * (clock.time() - sent_s - cloud_s))
    await serving
    return out


async def model_stream(link: SimLink, spans: Sequence[Span], node_s: float) -> list[float]:
    """The gaps between arrivals of a stream through the model, ms."""
    clock = asyncio.get_running_loop()
    edge, cloud = link.pair(edge=(node_s / 4, node_s / 4), cloud=(node_s / 4, node_s / 4))
    await _open(edge, cloud)
    commit = Commit(1, 500, pack_ids([7]), 0, 0, 0, 22500, 1500)

    async def serve() -> None:
        await cloud.send(commit)
        for _, cloud_s in spans:
            await asyncio.sleep(cloud_s)
            await cloud.send(commit)

    serving = asyncio.create_task(serve())
    times = []
    for _ in range(len(spans) + 1):
        await _expect(edge, Commit)
        times.append(clock.time())
    await serving
    return [1e3 * (b - a) for a, b in itertools.pairwise(times)]


def model(point: Point, pattern: str, node_s: float) -> list[float]:
    """The same generations through the model, several times."""
    run = model_turns if pattern == "turns" else model_stream
    seeds = random.Random(f"{pattern} {point.label}")
    out: list[float] = []
    for spans in point.spans * SIMULATED:
        out += loop.run(run(SimLink(point.profile, seeds.getrandbits(63)), spans, node_s))
    return out


# comparing ------------------------------------------------------------------------------------------


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def ks_distance(one: Sequence[float], two: Sequence[float], middle: float, step: float) -> float:
    """Greatest distance between two distribution functions at middle + (k + 1/2) step for whole k."""
    a, b = sorted(one), sorted(two)
    first = math.floor((min(a[0], b[0]) - middle) / step)
    last = math.ceil((max(a[-1], b[-1]) - middle) / step)
    marks = (middle + (k + 0.5) * step for k in range(first, last))
    return max(abs(bisect_right(a, m) / len(a) - bisect_right(b, m) / len(b)) for m in marks)


def compare(point: Point, pattern: str, modelled: list[float]) -> dict[str, Any]:
    """One line of the table."""
    measured = point.measured
    base = statistics.median(measured)
    mean, expected = statistics.fmean(measured), statistics.fmean(modelled)
    noise = 2 * math.sqrt(
        statistics.variance(measured) / len(measured) + statistics.variance(modelled) / len(modelled)
    )
    return {
        "pattern": pattern, "point": point.label, "profile": point.profile.to_dict(), "n": len(measured),
        "measured_ms": {f"p{100 * q:g}": quantile(measured, q) for q in QUANTILES} | {"mean": mean},
        "modelled_ms": {f"p{100 * q:g}": quantile(modelled, q) for q in QUANTILES} | {"mean": expected},
        "late_measured_pct": 100 * statistics.fmean(x > base + LATE_MS for x in measured),
        "late_modelled_pct": 100 * statistics.fmean(x > base + LATE_MS for x in modelled),
        "ks": ks_distance(measured, modelled, base, LATE_MS),
        "mean_error_ms": expected - mean, "noise_ms": noise,
    }  # fmt: skip


def show(row: dict[str, Any]) -> None:
    print(f"{row['pattern']:<7} {row['point']:<36} n {row['n']:<6} late {row['late_measured_pct']:5.2f} | "
          f"{row['late_modelled_pct']:5.2f} %  KS {row['ks']:.3f}  mean off by {row['mean_error_ms']:+.2f} "
          f"± {row['noise_ms']:.2f} ms")  # fmt: skip
    for name in ("measured", "modelled"):
        print(
            f"        {name:<9}" + "".join(f" {k} {v:8.1f}" for k, v in row[f"{name}_ms"].items()), flush=True
        )


async def bench(
    runtime: str, link: str, patterns: tuple[str, ...], wall_s: float, draft_s: float, raw: Path | None
) -> list[dict[str, Any]]:
    """Everything."""
    rows: list[dict[str, Any]] = []
    kept: list[dict[str, Any]] = []
    for pattern in patterns:
        groups = points()
        for group in groups:
            await measure(group, pattern, runtime, link, wall_s, draft_s)
            kept += [{"pattern": pattern, **asdict(point)} for point in group]
        if raw is not None:
            await asyncio.to_thread(raw.write_text, json.dumps(kept))
        rows += await asyncio.to_thread(judge, groups, pattern)
    return rows


def judge(groups: list[list[Point]], pattern: str) -> list[dict[str, Any]]:
    """The model beside what was measured."""
    rows = []
    first = groups[0][0]
    node_s = 0.0
    if pattern == "turns":
        node_s = (
            max(0.0, statistics.median(first.measured) - statistics.median(model(first, pattern, 0.0))) / 1e3
        )
    for point in (p for group in groups for p in group):
        rows.append(compare(point, pattern, model(point, pattern, node_s)))
        show(rows[-1])
    return rows


def main() -> int:
    """Print the table, write results/bench/link_model.json."""
    parser = argparse.ArgumentParser(prog="python -m bench.link_model", description=__doc__)
    parser.add_argument("--runtime", default="netns", choices=("netns", "docker"))
    parser.add_argument("--link", default="auto", choices=("auto", "netem", "netem-uml"))
    parser.add_argument("--wall-s", type=float, default=60.0, help="measuring time of each group of links")
    parser.add_argument("--draft-s", type=float, default=0.005, help="what drafting a token takes")
    parser.add_argument("--pattern", choices=("turns", "stream"), help="only this one")
    parser.add_argument("--raw", type=Path, help="also keep every measured value here")
    args = parser.parse_args()
    link = choose(args.runtime, args.link).link
    if link == "modelled":
        print("no netem on this host: dsdlab doctor says how to get it", file=sys.stderr)
        return 2
    patterns = (args.pattern,) if args.pattern else ("turns", "stream")
    rows = asyncio.run(bench(args.runtime, link, patterns, args.wall_s, args.draft_s, args.raw))
    out = Path("results/bench/link_model.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"runtime": args.runtime, "link": link, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
