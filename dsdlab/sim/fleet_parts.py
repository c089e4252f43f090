"""What a simulated fleet is watched with: computes that count, channels that log, a tally, a router."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from dsdlab.models.compute import Timing
from dsdlab.nodes import GenerationRecord
from dsdlab.protocol.channel import Channel
from dsdlab.protocol.codec import encode
from dsdlab.protocol.frames import AnyFrame, Hello, Welcome
from dsdlab.sim.compute import SimCompute

__all__ = ["Log", "LoggedChannel", "MeasuredCompute", "Router", "Tally", "Window", "quantile"]

T = TypeVar("T")
Log = Callable[[str], None]
"""Takes the event log, line by line, in the order of virtual time."""
Clock = Callable[[], float]


class Window:
    """The stretch of virtual time that counts: from the end of the warm-up to the last beginning, s."""

    __slots__ = ("begin_s", "end_s")

    def __init__(self, begin_s: float, end_s: float) -> None:
        self.begin_s, self.end_s = begin_s, end_s

    def __contains__(self, t_s: float) -> bool:
        return self.begin_s <= t_s <= self.end_s

    def overlap_s(self, begin_s: float, end_s: float) -> float:
        """Seconds that an interval has in common with the window."""
        return max(0.0, min(end_s, self.end_s) - max(begin_s, self.begin_s))


class MeasuredCompute(SimCompute):
    """A verifier's compute that adds up waiting and work within a window. Work that takes no time is no
    work."""

    def __init__(
        self,
        name: str,
        clock: Clock,
        window: Window,
        log: Log | None,
        *,
        hop_s: float,
        stages: int,
        stage_hop_s: float,
    ) -> None:
        super().__init__(hop_s=hop_s, stages=stages, stage_hop_s=stage_hop_s)
        self._name, self._clock, self._window, self._log = name, clock, window, log
        self.works = 0  # begun in the window
        self.wait_s = 0.0  # of those
        self.waiting_s = 0.0  # integral over the window of the number that wait
        self.busy_s = 0.0  # integral over the window of the number in work

    async def run(self, work: Callable[[], T]) -> tuple[T, Timing]:
        asked_s = self._clock()
        result, timing = await super().run(work)
        if timing.compute_s > 0.0:
            begun_s = asked_s + timing.queue_s
            self.waiting_s += self._window.overlap_s(asked_s, begun_s)
            self.busy_s += self._window.overlap_s(begun_s, begun_s + timing.compute_s)
            if begun_s in self._window:
                self.works += 1
                self.wait_s += timing.queue_s
            if self._log is not None:
                self._log(f"{self._clock():.9f} {self._name} worked {begun_s:.9f} {timing.compute_s:.9f}")
        return result, timing


class LoggedChannel(Channel):
    """A channel whose frames are written down as they are sent and received, each with its number."""

    def __init__(self, inner: Channel, name: str, clock: Clock, log: Log) -> None:
        super().__init__(inner.peer)
        self._inner, self._name, self._clock, self._log = inner, name, clock, log
        self.bytes_sent, self.bytes_received = inner.bytes_sent, inner.bytes_received
        self._sent = self._received = 0

    def _write(self, what: str, n: int, frame: AnyFrame) -> None:
        self._log(f"{self._clock():.9f} {self._name} {what} {n} {described(frame)}")

    async def send(self, frame: AnyFrame) -> None:
        self._sent += 1
        self._write("sent", self._sent, frame)
        await self._inner.send(frame)

    async def recv(self) -> AnyFrame:
        frame = await self._inner.recv()
        self._received += 1
        self._write("received", self._received, frame)
        return frame

    async def close(self) -> None:
        await self._inner.close()


def described(frame: AnyFrame) -> str:
    """A frame as one word of its name, its size in bytes and its numbers; greetings hold random ids."""
    head = f"{type(frame).__name__} {len(encode(frame))}"
    if isinstance(frame, Hello | Welcome):
        return head
    fields = msgspec.structs.asdict(frame).items()
    return " ".join(
        [
            head,
            *(
                f"{k}={len(v) // 3 if isinstance(v, bytes) else v}"
                for k, v in fields
                if not isinstance(v, str)
            ),
        ]
    )


class Router:
    """Gives each new session a verifier."""

    def __init__(self, policy: str, verifiers: int, rng: random.Random) -> None:
        self._policy, self._rng = policy, rng
        self.sessions = [0] * verifiers  # under way at each
        self._next = 0

    def enter(self) -> int:
        """The verifier of a session that begins now; `leave` it when the session is over."""
        if self._policy == "random":
            at = self._rng.randrange(len(self.sessions))
        elif self._policy == "jsq":
            at = min(range(len(self.sessions)), key=self.sessions.__getitem__)
        else:
            at, self._next = self._next, (self._next + 1) % len(self.sessions)
        self.sessions[at] += 1
        return at

    def leave(self, at: int) -> None:
        self.sessions[at] -= 1


class Tally:
    """Adds up generations; keeps two numbers of each. streamed: drafts are not judged window by window."""

    def __init__(self, window: Window, *, streamed: bool = False) -> None:
        self._window, self._streamed = window, streamed
        self.tpot_s, self.ttft_s = array("d"), array("d")
        self.generations = 0  # begun in the window, and finished
        self.refused = 0
        self.inexact = 0
        self.tokens = 0  # committed in the window, by whatever generation
        self.tokens_all = 0  # by all generations that were finished
        self.windows = self.drafted = self.accepted = self.bytes_up = self.bytes_down = 0  # of `generations`
        self.tokens_counted = 0  # of `generations`

    def committed(self, n: int, now_s: float) -> None:
        if now_s in self._window:
            self.tokens += n

    def finished(self, record: GenerationRecord, begun_s: float, exact: bool) -> None:
        self.tokens_all += len(record.ids)
        self.inexact += not exact
        if begun_s not in self._window:
            return
        self.generations += 1
        self.tokens_counted += len(record.ids)
        self.ttft_s.append(record.ttft_s)
        if record.tpot_s is not None:
            self.tpot_s.append(record.tpot_s)
        self.windows += len(record.windows)
        if self._streamed:
            self.drafted += record.drafted
            self.accepted += record.drafts_committed
        else:
            self.drafted += sum(drafted for drafted, _ in record.windows)
            self.accepted += sum(accepted for _, accepted in record.windows)
        self.bytes_up += sum(record.bytes_up.values())
        self.bytes_down += sum(record.bytes_down.values())


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile of sorted values (nearest rank); NaN of none."""
    return values[min(len(values) - 1, max(0, math.ceil(q * len(values)) - 1))] if values else math.nan
