"""A generation under way at the edge: its text, its record, and what every frame adds to them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dsdlab.nodes.record import GenerationRecord
from dsdlab.nodes.request import GenerationRequest
from dsdlab.nodes.text import Text
from dsdlab.protocol.channel import Channel
from dsdlab.protocol.errors import ProtocolError
from dsdlab.protocol.frames import AnyFrame, Commit, Error, Pong, Verdict, Welcome, unpack_ids

OnCommit = Callable[[list[int], int], None]
"""Called with (new ids, how many of them were drafted) as the text grows."""


class GenerationFailed(Exception):
    """A generation was refused or could not be finished; `code` is the protocol's, the message one line."""

    def __init__(self, code: str, message: str, retry_after_ms: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_ms = retry_after_ms


class Generation:
    """One generation. `session` is its number on the wire; 0 where there is none."""

    __slots__ = (
        "epoch", "gaps", "on_commit", "opened", "record", "reopened", "request", "session", "start_s", "text",
    )  # fmt: skip

    def __init__(
        self, request: GenerationRequest, session: int, text: Text, start_s: float, on_commit: OnCommit | None
    ) -> None:
        self.request = request
        self.session = session
        self.text = text
        self.record = GenerationRecord()
        self.start_s = start_s
        self.on_commit = on_commit
        self.opened = False
        self.reopened = 0
        self.gaps = 0
        self.epoch = 0

    def since(self, t_s: float) -> float:
        return t_s - self.start_s

    def committed(self, new: list[int], drafted: int, now_s: float) -> None:
        """Note tokens that have just entered the text."""
        if not new:
            return
        self.reopened = self.gaps = 0
        record = self.record
        if not record.commits:
            record.ttft_s = self.since(now_s)
        record.commits.append((self.since(now_s), len(new)))
        record.ids += new
        if self.on_commit is not None:
            self.on_commit(new, min(drafted, len(new)))

    def event(self, kind: str, begun_s: float, ended_s: float) -> None:
        """Note what took its time. Placed by a round trip that has changed, it is cut where this began."""
        start_s = self.start_s
        self.record.events.append((kind, max(begun_s - start_s, 0.0), max(ended_s - start_s, 0.0)))

    def finished(self) -> GenerationRecord:
        """The record, complete: what was still under way is cut at the end."""
        record, end_s = self.record, self.since(asyncio.get_running_loop().time())
        record.finish = self.text.finish or ""
        record.events = [(kind, begun, min(ended, end_s)) for kind, begun, ended in record.events]
        return record

    async def next(self, channel: Channel) -> Verdict | Commit | Pong:
        """The next frame that concerns this generation. Raises GenerationFailed for an Error frame."""
        record = self.record
        while True:
            frame: AnyFrame = await channel.recv()
            match frame:
                case Error(session=session) if session in (0, self.session):
                    raise GenerationFailed(frame.code, frame.message, frame.retry_after_ms)
                case Verdict() | Commit() if frame.session == self.session:
                    return frame
                case Pong():
                    return frame
                case Verdict() | Commit() | Error() | Welcome():
                    record.stale_frames += 1
                case _:
                    name = type(frame).__name__
                    raise ProtocolError("bad-frame", f"{name} is no frame for a drafter")

    def take(self, frame: Commit, rtt_s: float) -> list[int]:
        """Put a Commit's tokens into the text; returns those that were new. Raises Gap.

        rtt_s: places the target's step on the timeline: its end lies half a round trip back.
        """
        now_s = asyncio.get_running_loop().time()
        new = self.text.merge(frame.base, unpack_ids(frame.ids))
        record = self.record
        if not new:
            if frame.ids:
                record.stale_frames += 1
            return new
        self.committed(new, frame.accepted, now_s)
        if frame.compute_us or frame.drafted:  # a step of the target; catching up costs nothing
            compute_s, draft_s = frame.compute_us / 1e6, frame.draft_us / 1e6
            record.t_verify_s.append(compute_s)
            record.t_queue_s.append(frame.queue_us / 1e6)
            record.windows.append((frame.drafted, frame.accepted))
            sent_s = now_s - rtt_s / 2
            begun_s = sent_s - compute_s
            if frame.beside:
                record.beside_s += draft_s
                if self.request.mode == "cloud-sd":  # elsewhere it is the edge that drafts
                    record.t_draft_s.append(draft_s)
                self.event("draft", begun_s - draft_s, begun_s)
            self.event("verify" if frame.drafted else "decode", begun_s, sent_s)
            self.event("flight_down", sent_s, now_s)
        return new
