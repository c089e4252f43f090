"""Channels that misbehave more than any transport may: frames twice, late, overtaken; pongs that are lost."""

from __future__ import annotations

import asyncio
import random
from collections import deque

import msgspec

from dsdlab.protocol.channel import Channel
from dsdlab.protocol.errors import ChannelClosed
from dsdlab.protocol.frames import AnyFrame, Commit, Draft, Hello, Open, Pong, Welcome, unpack_ids
from dsdlab.sim.channel import SimChannel

__all__ = ["FrameLog", "RoughChannel", "Roughness", "described"]

MOST_IDS = 12  # of a frame, in the log


class Roughness(msgspec.Struct, frozen=True):
    """What one direction of a connection does to frames; what is not in seconds is a probability a frame.

    duplicate: it comes twice, the copy up to `late_s` later. hold: it comes up to `late_s` later, overtaken
    by what is sent meanwhile. swap: it comes right after the next one. lose_pong: a Pong never comes.
    slow: whoever sends it is held up for up to `slow_s` afterwards, as by a full socket.
    """

    duplicate: float = 0.0
    hold: float = 0.0
    swap: float = 0.0
    late_s: float = 0.0
    lose_pong: float = 0.0
    slow: float = 0.0
    slow_s: float = 0.0

    @property
    def reorders(self) -> bool:
        return self.hold > 0.0 or self.swap > 0.0


class FrameLog:
    """Who sent and got what, when. Keeps nothing unless asked to."""

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self.lines: deque[str] = deque(maxlen=20_000)

    def note(self, text: str) -> None:
        if self.keep:
            self.lines.append(f"{asyncio.get_running_loop().time():12.6f} s  {text}")


class RoughChannel(Channel):
    """One end of a simulated connection; what is sent here suffers. The handshake is spared: said twice, it
    would be a broken protocol, not a fault of the link.
    """

    def __init__(
        self, inner: SimChannel, rough: Roughness, rng: random.Random, log: FrameLog, name: str
    ) -> None:
        super().__init__(inner.peer)
        self.bytes_sent, self.bytes_received = inner.bytes_sent, inner.bytes_received
        self.inner = inner
        self._rough, self._rng, self._log, self._name = rough, rng, log, name
        self._swapped: list[AnyFrame] = []  # that wait for the next one

    async def send(self, frame: AnyFrame) -> None:
        rough, rng = self._rough, self._rng
        if isinstance(frame, Hello | Welcome):
            await self._now(frame)
            return
        if isinstance(frame, Pong) and rng.random() < rough.lose_pong:
            self._note("lost", frame)
            return
        fate = rng.random()
        if fate < rough.hold:
            self._later(frame, "held back")
        elif fate < rough.hold + rough.swap:
            self._swapped.append(frame)
            asyncio.get_running_loop().call_later(rough.late_s, self._unswap)
        else:
            await self._now(frame)
            self._unswap()
        if rng.random() < rough.duplicate:
            self._later(frame, "copied")
        if rough.slow and rng.random() < rough.slow:
            await asyncio.sleep(rough.slow_s * rng.random())

    async def _now(self, frame: AnyFrame) -> None:
        self._note("sends", frame)
        await self.inner.send(frame)

    def _later(self, frame: AnyFrame, why: str) -> None:
        self._note(why, frame)
        delay_s = self._rough.late_s * self._rng.random()
        asyncio.get_running_loop().call_later(delay_s, self._pass_on, frame)

    def _unswap(self) -> None:
        waiting, self._swapped = self._swapped, []
        for frame in waiting:
            self._pass_on(frame)

    def _pass_on(self, frame: AnyFrame) -> None:
        """Send what was kept, if there is still a connection."""
        self._note("sends late", frame)
        try:
            self.inner.send(frame).send(None)  # a simulated channel never waits
        except (StopIteration, ChannelClosed):
            return
        raise AssertionError("a simulated channel waits in send")

    async def recv(self) -> AnyFrame:
        frame = await self.inner.recv()
        self._note("gets", frame)
        return frame

    async def close(self) -> None:
        self._log.note(f"{self._name} closes")
        await self.inner.close()

    def _note(self, what: str, frame: AnyFrame) -> None:
        if self._log.keep:
            self._log.note(f"{self._name} {what} {described(frame)}")


def described(frame: AnyFrame) -> str:
    """A frame in one line, its ids as numbers."""
    match frame:
        case Hello() | Welcome():  # whose random names no seed tells
            return f"{type(frame).__name__}(version {frame.version})"
        case Draft():
            return f"Draft(epoch {frame.epoch}, at {frame.base}: {_ids(frame.ids)})"
        case Commit():
            beside = f", {frame.beside} beside" if frame.beside else ""
            return f"Commit(at {frame.base}: {_ids(frame.ids)}; {frame.accepted} of {frame.drafted}{beside})"
        case Open():
            return f"Open({frame.mode}, {_ids(frame.prompt)} then {_ids(frame.committed)})"
        case _:
            return repr(frame)


def _ids(packed: bytes) -> str:
    ids = unpack_ids(packed)
    shown = " ".join(map(str, ids[:MOST_IDS]))
    return f"[{shown} … {len(ids)} in all]" if len(ids) > MOST_IDS else f"[{shown}]"
