"""The simulator beside SimPy: the same model, windows per second of real time, interleaved in one run.

The model: one verifier, N drafters. A drafter drafts for `DRAFT_S`, sends, the window travels half an RTT,
waits for the verifier, is verified, and the verdict travels back; then the next. The verifier's time is such
that it is busy four fifths of the time whatever N is.

- `loop`: the model in a few lines on the virtual loop, as it is in a few lines of SimPy. Frames travel while
  their sender goes on: in SimPy by the `Cable` of its documentation ("Event Latency"), a process a frame.
- `nodes`: the real nodes: drafters and verifier, frames, codec, policy, records, links, emulated models.

Also: memory a session, how much faster than real time it is, and a grid of 1,000 cells by `dsdlab simulate`.
Prints "NAME: R x SimPy (ours …, theirs …)" and writes results/bench/sim.json. Ratios are medians of rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import simpy

from dsdlab.decoding import Sampling
from dsdlab.models.emulated import EmulatedEngine, EmulatedProfile
from dsdlab.nodes import DrafterNode, GenerationRequest, VerifierNode
from dsdlab.protocol.channel import Channel
from dsdlab.sim.channel import SimLink
from dsdlab.sim.compute import SimCompute
from dsdlab.sim.loop import VirtualLoop, run
from dsdlab.sim.profile import LinkProfile
from dsdlab.sim.synthetic import SyntheticDrafter
from dsdlab.sweep.provenance import cpu_name

GAMMA, DRAFTED_S = 4, 0.005
DRAFT_S, HALF_RTT_S = GAMMA * DRAFTED_S, 0.010
LOAD = 0.8
WINDOWS = {10: 20_000, 1_000: 40_000, 100_000: 300_000}  # in all, at each N
ALPHA, TOKENS_A_WINDOW = 0.8, 3.36
TARGET_S = 0.050
TEXT = 512  # tokens of a generation; a drafter with more to do asks again


def verify_s(n: int) -> float:
    """The verifier's time for a window, so that N drafters keep it busy `LOAD` of the time."""
    cycle_s = DRAFT_S + 2 * HALF_RTT_S
    return LOAD * cycle_s / (n - LOAD) if n > 1 else TARGET_S


# the same few lines, in SimPy and on the virtual loop --------------------------------------------


class Cable:
    """A link of SimPy's "Event Latency" example."""

    def __init__(self, env: Any) -> None:
        self.env = env
        self.store: Any = simpy.Store(env)

    def latency(self, value: Any) -> Any:
        yield self.env.timeout(HALF_RTT_S)
        self.store.put(value)

    def put(self, value: Any) -> None:
        self.env.process(self.latency(value))

    def get(self) -> Any:
        return self.store.get()


def with_simpy(n: int, each: int) -> int:
    """SimPy: windows that were verified."""
    env = simpy.Environment()
    up = Cable(env)
    done = 0

    def drafter() -> Any:
        down = Cable(env)
        for _ in range(each):
            yield env.timeout(DRAFT_S)
            up.put(down)
            yield down.get()

    def verifier(t_s: float) -> Any:
        nonlocal done
        while True:
            down = yield up.get()
            yield env.timeout(t_s)
            done += 1
            down.put(done)

    drafters = [env.process(drafter()) for _ in range(n)]
    env.process(verifier(verify_s(n)))
    env.run(until=simpy.AllOf(env, drafters))
    return done


class Mailbox:
    """What a `Cable` is there: one reader has what anybody puts, half an RTT later."""

    __slots__ = ("_items", "_loop", "parked")

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._items: deque[tuple[float, Any]] = deque()  # (when it is had in s, item)
        self.parked: Any = None  # the reader, while it waits and nothing is on its way

    def put(self, item: Any) -> None:
        when_s = self._loop.time() + HALF_RTT_S
        self._items.append((when_s, item))
        if self.parked is not None:
            self.parked.resume_at(when_s)
            self.parked = None

    async def get(self) -> Any:
        if not self._items:
            await self._loop.park(self)
        elif self._items[0][0] > self._loop.time():
            await self._loop.sleep_until(self._items[0][0])
        return self._items.popleft()[1]


def on_the_loop(n: int, each: int) -> int:
    """The virtual loop: windows that were verified."""
    done = 0

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        sleep = loop.sleep
        inbox = Mailbox(loop)

        async def drafter() -> None:
            verdicts = Mailbox(loop)
            for _ in range(each):
                await sleep(DRAFT_S)
                inbox.put(verdicts)
                await verdicts.get()

        async def verifier(t_s: float) -> None:
            nonlocal done
            while True:
                verdicts = await inbox.get()
                await sleep(t_s)
                done += 1
                verdicts.put(done)

        drafters = [loop.create_task(drafter()) for _ in range(n)]
        serving = loop.create_task(verifier(verify_s(n)))
        for task in drafters:
            await task
        serving.cancel()

    run(main())
    return done


# the nodes themselves ----------------------------------------------------------------------------


class Fleet:
    """N drafter nodes and one verifier node on a virtual loop."""

    def __init__(self, n: int, tokens: int, t_verify_s: float) -> None:
        self.n, self.tokens, self.t_verify_s = n, tokens, t_verify_s
        self.windows = 0
        self.virtual_s = 0.0
        self.bytes_a_session = 0.0

    def run(self) -> int:
        """Windows that were verified."""
        run(self._main())
        return self.windows

    async def _main(self) -> None:
        compute = SimCompute()
        target = EmulatedEngine(EmulatedProfile(base_s=self.t_verify_s), slots=self.n, wait=compute.spend)
        verifier = VerifierNode(target, compute)
        link = LinkProfile(rtt_ms=2e3 * HALF_RTT_S)
        before = resident_bytes()
        tasks = [asyncio.create_task(self._session(verifier, link, i)) for i in range(self.n)]
        half = asyncio.create_task(self._weigh(before))
        for task in tasks:
            await task
        half.cancel()
        self.virtual_s = asyncio.get_running_loop().time()

    async def _weigh(self, before: int) -> None:
        """Memory when every session has begun and drafts."""
        await asyncio.sleep(DRAFT_S + 4 * HALF_RTT_S)
        self.bytes_a_session = (resident_bytes() - before) / self.n

    async def _session(self, verifier: VerifierNode, link: LinkProfile, seed: int) -> None:
        here, there = SimLink(link, seed).pair()
        compute = SimCompute()
        engine = EmulatedEngine(EmulatedProfile(base_s=DRAFTED_S, alpha=ALPHA), slots=1, wait=compute.spend)

        async def dial() -> Channel:
            return here

        node = DrafterNode(dial, compute, drafter=SyntheticDrafter(engine))
        serving = asyncio.create_task(verifier.serve(there))
        for first in range(0, self.tokens, TEXT):
            request = GenerationRequest(
                (5, 3, 9),
                "dsd-sync",
                gamma=GAMMA,
                sampling=Sampling(seed=seed + first),
                max_new_tokens=min(TEXT, self.tokens - first),
            )
            record = await node.generate(request)
            self.windows += sum(drafted > 0 for drafted, _ in record.windows)
        await node.disconnect()
        await asyncio.wait([serving])
        if not serving.cancelled():
            serving.exception()  # the client's goodbye


def resident_bytes() -> int:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


# measuring ---------------------------------------------------------------------------------------


def rate(work: Callable[[], int]) -> float:
    """Windows per second of this process's CPU time."""
    gc.collect()
    begun_s = time.process_time()
    done = work()
    return done / (time.process_time() - begun_s)


def compare(n: int, rounds: int) -> dict[str, Any]:
    """Rates of all three at one N, and the medians of the rounds' ratios."""
    each = max(WINDOWS[n] // n, 3)
    tokens = round(each * TOKENS_A_WINDOW)
    rates: dict[str, list[float]] = {"simpy": [], "loop": [], "nodes": []}
    memory = 0.0
    for _ in range(rounds):
        rates["simpy"].append(rate(lambda: with_simpy(n, each)))
        rates["loop"].append(rate(lambda: on_the_loop(n, each)))
        fleet = Fleet(n, tokens, verify_s(n))
        rates["nodes"].append(rate(fleet.run))
        memory = max(memory, fleet.bytes_a_session)
    out: dict[str, Any] = {"n": n, "bytes_a_session": memory}
    for name, values in rates.items():
        out[f"{name}_per_s"] = statistics.median(values)
        out[f"{name}_ratio"] = statistics.median(v / s for v, s in zip(values, rates["simpy"], strict=True))
    return out


def faster_than_real_time(n: int) -> float:
    """Virtual over real time of n sessions with a target of 50 ms."""
    fleet = Fleet(n, max(2000 // n, 40), TARGET_S)
    begun_s = time.perf_counter()
    fleet.run()
    return fleet.virtual_s / (time.perf_counter() - begun_s)


GRID = """
name = "thousand"
[models]
target = "emulated:base_s=0.023,per_token_s=0.0006"
drafter = "emulated:base_s=0.002,alpha=0.6"
[workload]
n_prompts = 4
max_new_tokens = 40
[grid]
mode = ["cloud-ar", "dsd-sync"]
gamma = [1, 2, 4, 8]
rtt_ms = {rtts}
loss_pct = [0, 0.5, 1, 2]
[run]
repeats = 4
"""


def grid_s() -> float:
    """Seconds that `dsdlab simulate` takes for 1,000 cells × 4 generations × 8 draws, report included."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "thousand.toml"
        path.write_text(GRID.format(rtts=[1 + 4 * k for k in range(50)]))
        begun_s = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "dsdlab", "simulate", str(path), "--out", folder],
            check=True,
            capture_output=True,
        )
        return time.perf_counter() - begun_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--n", type=int, nargs="+", default=sorted(WINDOWS), choices=sorted(WINDOWS))
    parser.add_argument("--no-grid", action="store_true")
    args = parser.parse_args()
    results: dict[str, Any] = {"cpu": cpu_name(), "sizes": []}
    for n in args.n:
        found = compare(n, args.rounds if n < 100_000 else 1)
        results["sizes"].append(found)
        for name in ("loop", "nodes"):
            print(
                f"{name}, {n:,} drafters: {found[f'{name}_ratio']:.2f} x SimPy "
                f"(ours {found[f'{name}_per_s']:,.0f} windows/s, theirs {found['simpy_per_s']:,.0f})"
            )
        print(f"nodes, {n:,} drafters: {found['bytes_a_session'] / 1024:.1f} KB a session", flush=True)
    for n in (1, 100):
        results[f"real_time_{n}"] = factor = faster_than_real_time(n)
        print(f"{n} session{'s' * (n > 1)}, target 50 ms: {factor:,.0f} x real time")
    if not args.no_grid:
        results["grid_1000_s"] = took_s = grid_s()
        print(f"dsdlab simulate, 1,000 cells × 4 generations × 8 draws: {took_s:.1f} s")
    path = Path("results/bench/sim.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
