"""The verifier: holds the target, serves sessions. A coroutine per session, one engine for all.

INVARIANT V2: a session's tokens are a function of prompt, sampling and the target alone; frames that
come late, twice or not at all change when tokens appear, never which. With rejection sampling it is their
distribution that is the target's alone, and frames that come late or twice that change nothing.
INVARIANT V3: engine slots are opened, used and closed in the compute's order, so a slot is never given
away while work on it is under way.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from itertools import count

import msgspec

from dsdlab.decoding import Sampling, SparseQ
from dsdlab.models.base import ContextFull, Engine, NoFreeSlot
from dsdlab.models.compute import Compute, Timing
from dsdlab.models.drafters import Drafter
from dsdlab.nodes.mailbox import Mailbox
from dsdlab.nodes.request import MAX_RUN_AHEAD, SYNC_Q
from dsdlab.nodes.slack import Slack
from dsdlab.nodes.step import Step, decode, judge, judge_drawn, propose, read_ahead, slot_of
from dsdlab.nodes.target_stream import TargetStream
from dsdlab.nodes.text import Text
from dsdlab.protocol.channel import Channel
from dsdlab.protocol.errors import ChannelClosed, ProtocolError
from dsdlab.protocol.frames import (
    AnyFrame,
    Close,
    Commit,
    Draft,
    DraftQ,
    Hello,
    Open,
    Ping,
    Pong,
    Resume,
    Steer,
    Verdict,
    digest_ids,
    microseconds,
    pack_ids,
    refusal,
    unpack_ids,
)
from dsdlab.protocol.handshake import HandshakePolicy, new_node_id, server_handshake
from dsdlab.protocol.q_rows import unpack_q

log = logging.getLogger("dsdlab.verifier")

LINGER_S = 60.0
BUSY_RETRY_MS = 250
MAX_WAITING_DRAFTS = {Draft: 64, DraftQ: 8}  # per session, for a DraftQ may be as long as a frame
_REMEMBERED_CLOSES = 4096
STREAM = "dsd-stream"
TAKES_DRAFTS: dict[str, type[Draft | DraftQ]] = {"dsd-sync": Draft, SYNC_Q: DraftQ}  # one window at a time

SessionKey = tuple[str, int]  # (client's node id, session)


class _Session:
    """One session's state, kept across connections."""

    __slots__ = (
        "before", "channel", "connection", "drafts", "epoch", "key", "losses", "opened", "sending",
        "stale_frames", "stream", "task", "text",
    )  # fmt: skip

    def __init__(
        self,
        key: SessionKey,
        opened: Open,
        text: Text,
        channel: Channel,
        connection: int,
        stream: TargetStream | None,
    ) -> None:
        self.key = key
        self.before: asyncio.Task[None] | None = None  # of a session that this one took the place of
        self.opened = opened
        self.text = text
        self.channel: Channel | None = channel
        self.connection = connection  # number of the latest one that it was reached by
        self.drafts: Mailbox[Draft | DraftQ] = Mailbox()  # `dsd-sync`
        self.stream = stream  # `dsd-stream`
        self.sending = asyncio.Lock()
        self.task: asyncio.Task[None] | None = None
        self.epoch = 0
        self.stale_frames = 0
        self.losses = 0  # connections lost so far

    @property
    def number(self) -> int:
        return self.key[1]

    def began_with(self, frame: Open) -> bool:
        """Whether `frame` opens this very session somewhere along its text."""
        if msgspec.structs.replace(frame, committed=self.opened.committed) != self.opened:
            return False
        held = frame.prompt + frame.committed
        return len(held) % 3 == 0 and pack_ids(self.text.ids).startswith(held)

    async def send(self, frame: AnyFrame) -> None:
        """Send if there is a connection; without one the client catches up when it resumes."""
        async with self.sending:
            if self.channel is not None:
                with suppress(ChannelClosed):  # `serve` hears of it too, and sets the linger time going
                    await self.channel.send(frame)

    async def catch_up(self, channel: Channel, connection: int, base: int) -> None:
        """Send everything from `base` on over `channel`, ahead of whatever is decided next.

        Not over a connection that was lost before the present one began: what is read from it late is no
        sign of life.
        """
        if connection >= self.connection:
            self.losses += 1  # found again: who waits to forget it waits for something else
        async with self.sending:
            if connection < self.connection:
                return
            self.channel, self.connection = channel, connection
            await channel.send(self.commit_from(base))

    def commit_from(self, base: int) -> Commit:
        return Commit(self.number, base, pack_ids(self.text.ids[base:]), 0, 0, 0, 0, 0)


class VerifierNode:
    """Serves any number of connections over one engine.

    drafter: stands beside the target, for `cloud-sd`; without one that mode is refused.
    token: shared secret; "" asks for none. linger_s: how long a session outlives its connection.
    """

    def __init__(
        self,
        target: Engine,
        compute: Compute,
        *,
        drafter: Drafter | None = None,
        token: str = "",
        linger_s: float = LINGER_S,
    ) -> None:
        self._engine, self._compute, self._drafter = target, compute, drafter
        self._linger_s = linger_s
        info = target.info
        self._vocab_size = info.vocab_size
        self.modes = ("cloud-ar", *TAKES_DRAFTS, STREAM, *(("cloud-sd",) if drafter is not None else ()))
        self._policy = HandshakePolicy(
            node_id=new_node_id(),
            target=info.model_id,
            target_digest=info.digest,
            tokenizer=info.tokenizer,
            vocab_size=info.vocab_size,
            max_context=info.max_context,
            eos_ids=info.eos_ids,
            modes=self.modes,
            token=token,
        )
        self._slack = Slack()
        self._sessions: dict[SessionKey, _Session] = {}
        self._of_node: dict[str, dict[_Session, None]] = {}  # the same, by client
        self._closed: OrderedDict[SessionKey, None] = OrderedDict()
        self._reapers: set[asyncio.Task[None]] = set()
        self._connections = count()

    @property
    def n_sessions(self) -> int:
        return len(self._sessions)

    async def serve(self, channel: Channel) -> None:
        """One connection from its Hello to its end. Raises ChannelClosed, Refused or ProtocolError."""
        hello = await server_handshake(channel, self._policy)
        log.info("peer=%s node=%s connected", channel.peer, hello.node_id)
        connection = next(self._connections)
        try:
            while True:
                await self._on_frame(channel, connection, hello.node_id, await channel.recv())
        finally:
            for session in self._of_node.get(hello.node_id, ()):
                if session.channel is channel:
                    session.channel = None
                    self._reap_later(session)

    async def close(self) -> None:
        """End every session and give all slots back."""
        for task in list(self._reapers):
            task.cancel()
        for session in list(self._sessions.values()):
            await self._end(session)

    async def _on_frame(self, channel: Channel, connection: int, node_id: str, frame: AnyFrame) -> None:
        if type(frame) is Draft:  # by far the most frequent
            await self._on_draft(channel, (node_id, frame.session), frame)
            return
        match frame:
            case DraftQ():
                await self._on_draft(channel, (node_id, frame.session), frame)
            case Ping():
                await channel.send(Pong(frame.nonce, asyncio.get_running_loop().time()))
            case Open():
                await self._on_open(channel, connection, (node_id, frame.session), frame)
            case Resume():
                await self._on_resume(channel, connection, (node_id, frame.session), frame)
            case Close():
                key = (node_id, frame.session)
                self._remember_close(key)
                if session := self._sessions.get(key):
                    await self._end(session)
            case Steer():
                session = self._sessions.get((node_id, frame.session))
                if session is not None and session.stream is not None:
                    session.stream.steer(frame)
            case Hello():
                pass  # a duplicate: the handshake is over
            case _:
                name = type(frame).__name__
                raise ProtocolError("bad-frame", f"{name} is no frame for a verifier")

    # opening -------------------------------------------------------------------------------------

    async def _on_open(self, channel: Channel, connection: int, key: SessionKey, frame: Open) -> None:
        known = self._sessions.get(key)
        if key in self._closed or (known is not None and connection < known.connection):
            return  # a late duplicate, or late over a connection that was lost since
        if known is not None and known.channel is channel:
            if known.opened == frame:
                return
            if known.began_with(frame):  # a late copy of an earlier Open, or its sender missed a Commit
                at = (len(frame.prompt) + len(frame.committed)) // 3
                await self._catch_up(known, channel, connection, at)
                return
        try:
            text = self._checked_text(frame)
        except ProtocolError as e:
            await channel.send(refusal(e.code, str(e), session=key[1]))
            return
        stream = TargetStream(self._slack) if frame.mode == STREAM else None
        session = _Session(key, frame, text, channel, connection, stream)
        if known is not None and known.task is not None:  # it ends on its own: another Open may come first
            self._forget(known)
            known.task.cancel()
            session.before = known.task
        self._sessions[key] = session
        self._of_node.setdefault(key[0], {})[session] = None
        session.task = asyncio.create_task(self._run(session), name=f"session {key}")

    def _checked_text(self, frame: Open) -> Text:
        """The session's text, or ProtocolError with the reason for a refusal."""
        info = self._engine.info
        if frame.mode not in self.modes:
            raise ProtocolError("mode", f"mode {frame.mode!r}; allowed here: {', '.join(self.modes)}")
        prompt, committed = unpack_ids(frame.prompt), unpack_ids(frame.committed)
        if not prompt:
            raise ProtocolError("prompt", "the prompt is empty; allowed: at least one token")
        if max(max(prompt), max(committed, default=0)) >= info.vocab_size:
            raise ProtocolError("prompt", f"a token id is outside the vocabulary of {info.vocab_size}")
        if frame.max_new_tokens < 1:
            raise ProtocolError("sampling", f"max_new_tokens is {frame.max_new_tokens}; allowed: 1 or more")
        total = len(prompt) + frame.max_new_tokens
        if total > info.max_context:
            raise ProtocolError(
                "context",
                f"{len(prompt)} prompt tokens and {frame.max_new_tokens} new ones are {total}; "
                f"the target's context is {info.max_context}",
            )
        try:
            sampling = Sampling(frame.temperature, frame.top_k, frame.top_p, frame.seed)
        except ValueError as e:
            raise ProtocolError("sampling", str(e)) from None
        if frame.mode == SYNC_Q and sampling.greedy:
            raise ProtocolError("sampling", f"temperature is 0 in mode {SYNC_Q}; allowed: above 0")
        eos_ids = info.eos_ids if frame.stop_at_eos else ()
        text = Text(prompt, committed, sampling, frame.max_new_tokens, eos_ids)
        if text.finish is not None:
            raise ProtocolError("prompt", "the committed tokens already end the generation")
        return text

    async def _on_resume(self, channel: Channel, connection: int, key: SessionKey, frame: Resume) -> None:
        session = self._sessions.get(key)
        if session is None or frame.length < session.text.n_prompt or frame.length > len(session.text):
            await channel.send(refusal("unknown-session", "not held here; open it again", session=key[1]))
            return
        if digest_ids(pack_ids(session.text.ids[: frame.length])) != frame.digest:
            await channel.send(refusal("unknown-session", "held with other tokens", session=key[1]))
            return
        log.info("session=%s resumed at=%d of=%d", key, frame.length, len(session.text))
        await self._catch_up(session, channel, connection, frame.length)

    async def _catch_up(self, session: _Session, channel: Channel, connection: int, base: int) -> None:
        """As `_Session.catch_up`; a session that is left without a connection all the same is lost anew."""
        try:
            await session.catch_up(channel, connection, base)
        finally:
            if session.channel is None:
                self._reap_later(session)

    async def _on_draft(self, channel: Channel, key: SessionKey, frame: Draft | DraftQ) -> None:
        session = self._sessions.get(key)
        if session is not None and session.stream is not None and isinstance(frame, Draft):
            self._on_streamed(session, session.stream, frame)
            return
        if session is None or TAKES_DRAFTS.get(session.opened.mode) is not type(frame):
            if key not in self._closed:
                await channel.send(refusal("unknown-session", "no session takes this draft", session=key[1]))
            return
        if session.text.finish is not None:
            await self._send_lacking(session, frame)
            return
        most = MAX_WAITING_DRAFTS[type(frame)]
        if len(session.drafts) >= most:  # its client has lost its way
            raise ProtocolError("bad-frame", f"more than {most} drafts wait")
        session.drafts.put(frame)

    def _on_streamed(self, session: _Session, stream: TargetStream, frame: Draft) -> None:
        """Drafts of a streaming session: they wait for the target, or die here."""
        ids = unpack_ids(frame.ids)
        if ids and max(ids) >= self._vocab_size:
            raise ProtocolError("bad-frame", "a drafted id is outside the vocabulary")
        if frame.base > len(session.text) + MAX_RUN_AHEAD:
            raise ProtocolError(
                "bad-frame", f"draft at position {frame.base}, but the text ends at {len(session.text)}"
            )
        if session.text.finish is not None or not stream.receive(frame.epoch, frame.base, ids, session.text):
            session.stale_frames += 1

    # running -------------------------------------------------------------------------------------

    async def _run(self, session: _Session) -> None:
        """A session from prefill to its end; whatever fails is told to the client."""
        try:
            if session.before is not None:  # its slot may be the only one
                await asyncio.wait([session.before])
            async with slot_of(self._compute, self._engine) as slot:
                await self._decode(session, slot)
            return  # finished: the text stays for a late Resume until Close or the linger time
        except NoFreeSlot as e:
            reason = refusal("busy", str(e), session=session.number, retry_after_ms=BUSY_RETRY_MS)
        except ContextFull as e:
            reason = refusal("context", str(e), session=session.number)
        except ProtocolError as e:
            reason = refusal(e.code, str(e), session=session.number)
        except Exception:
            log.exception("session=%s failed", session.key)
            reason = refusal("internal", "the verifier failed; its log says why", session=session.number)
        self._forget(session)
        await session.send(reason)

    async def _decode(self, session: _Session, slot: int) -> None:
        text, mode = session.text, session.opened.mode
        if mode in TAKES_DRAFTS:
            await self._prefill(session, slot)
            while text.finish is None:
                await self._judge(session, slot, await session.drafts.get())
            while session.drafts:  # sent after a reconnect, while the last window was judged
                await self._send_lacking(session, session.drafts.take())
            return
        if session.stream is not None:
            await self._prefill(session, slot)
            await self._stream(session, session.stream, slot)
            return
        gamma = session.opened.gamma if mode == "cloud-sd" else 0
        steps = decode(text, self._engine, slot, self._compute, gamma, self._drafter)
        with self._slack.asked():
            async with aclosing(steps):
                async for step in steps:
                    await self._commit(session, step)

    async def _commit(self, session: _Session, step: Step) -> None:
        """Send what a step decided."""
        await session.send(
            Commit(
                session.number,
                step.base,
                pack_ids(step.ids),
                step.drafted,
                step.accepted,
                microseconds(step.t_draft_s),
                microseconds(step.timing.queue_s),
                microseconds(step.timing.compute_s),
                step.beside,
            )
        )

    async def _judged(self, text: Text, slot: int, draft: Sequence[int]) -> tuple[tuple[int, int], Timing]:
        """`judge`, for somebody who waits."""
        with self._slack.asked():
            return await self._compute.run(lambda: judge(self._engine, slot, text.ids, draft, text.sampling))

    async def _judged_drawn(
        self, text: Text, slot: int, draft: Sequence[int], reported: Sequence[SparseQ]
    ) -> tuple[tuple[int, int], Timing]:
        """`judge_drawn`, for somebody who waits."""
        with self._slack.asked():
            return await self._compute.run(
                lambda: judge_drawn(self._engine, slot, text.ids, draft, reported, text.sampling)
            )

    async def _prefill(self, session: _Session, slot: int) -> None:
        text = session.text
        with self._slack.asked():
            read = await read_ahead(text, self._engine, slot, self._compute)
            (_, next_id), timing = await self._judged(text, slot, ())
        base = len(text)
        kept = text.append([next_id])
        await self._commit(session, Step(base, kept, 0, 0, 0.0, read.then(timing)))

    async def _stream(self, session: _Session, stream: TargetStream, slot: int) -> None:
        """`dsd-stream`: judge what has come whenever the target is free, decode alone at the pace's word."""
        text = session.text
        async with AsyncExitStack() as stack:
            beside_slot = -1
            while text.finish is None:
                window, asked = await stream.next_window(text)
                with self._slack.asked() if asked else self._slack.ahead():
                    n_streamed, t_beside_s = len(window), 0.0
                    more = min(stream.pace.beside, text.room - 1) - n_streamed
                    if self._drafter is not None and more > 0 and beside_slot < 0:
                        with suppress(NoFreeSlot):  # then this step goes without, and the next one asks again
                            beside_slot = await stack.enter_async_context(
                                slot_of(self._compute, self._drafter)
                            )
                    if self._drafter is not None and more > 0 and beside_slot >= 0:
                        added, t_beside_s = await propose(
                            self._compute,
                            self._drafter,
                            beside_slot,
                            text.ids,
                            more,
                            text.sampling,
                            self._vocab_size,
                            window,
                        )
                        window += added
                    (accepted, next_id), timing = await self._compute.run(
                        lambda: judge(self._engine, slot, text.ids, window, text.sampling)  # noqa: B023 - awaited at once
                    )
                base = len(text)
                kept = text.append([*window[:accepted], next_id])
                stream.chain.settle(text, base)
                beside = len(window) - n_streamed
                await self._commit(
                    session, Step(base, kept, len(window), accepted, t_beside_s, timing, beside)
                )

    async def _judge(self, session: _Session, slot: int, frame: Draft | DraftQ) -> None:
        """Verify one window. A window behind the text is answered with what its sender lacks."""
        text = session.text
        if frame.epoch < session.epoch:
            session.stale_frames += 1
            return
        session.epoch = frame.epoch
        if frame.base < len(text):
            await self._send_lacking(session, frame)
            return
        draft = unpack_ids(frame.ids)
        if frame.base > len(text):
            raise ProtocolError(
                "unknown-session", f"draft at position {frame.base}, but the text ends at {len(text)}"
            )
        if draft and max(draft) >= self._vocab_size:
            raise ProtocolError("bad-frame", "a drafted id is outside the vocabulary")
        room = text.room - 1  # what lies behind the length limit needs no verdict
        if isinstance(frame, DraftQ):
            reported = unpack_q(frame.q, draft, self._vocab_size)
            draft = draft[:room]
            (accepted, next_id), timing = await self._judged_drawn(text, slot, draft, reported[:room])
        else:
            draft = draft[:room]
            (accepted, next_id), timing = await self._judged(text, slot, draft)
        text.append([*draft[:accepted], next_id])
        await session.send(
            Verdict(
                session.number,
                frame.epoch,
                frame.base,
                accepted,
                next_id,
                microseconds(timing.queue_s),
                microseconds(timing.compute_s),
            )
        )

    async def _send_lacking(self, session: _Session, frame: Draft | DraftQ) -> None:
        """Answer a window that comes too late to be judged with every token its sender may lack."""
        session.stale_frames += 1
        base = min(max(frame.base, session.text.n_prompt), len(session.text))
        await session.send(session.commit_from(base))

    # ending --------------------------------------------------------------------------------------

    def _forget(self, session: _Session) -> None:
        if self._sessions.get(session.key) is session:
            del self._sessions[session.key]
            others = self._of_node[session.key[0]]
            others.pop(session, None)
            if not others:
                del self._of_node[session.key[0]]

    async def _end(self, session: _Session) -> None:
        self._forget(session)
        if session.task is not None:
            session.task.cancel()
            # unlike `await task`: a cancellation of this one passes
            await asyncio.wait([task for task in (session.task, session.before) if task is not None])

    def _remember_close(self, key: SessionKey) -> None:
        self._closed[key] = None
        while len(self._closed) > _REMEMBERED_CLOSES:
            self._closed.popitem(last=False)

    def _reap_later(self, session: _Session) -> None:
        """Forget a session whose client does not come back."""
        session.losses += 1
        losses = session.losses

        async def reap() -> None:
            await asyncio.sleep(self._linger_s)
            lost = session.channel is None and session.losses == losses
            if lost and self._sessions.get(session.key) is session:
                log.info("session=%s forgotten after %g s", session.key, self._linger_s)
                await self._end(session)

        task = asyncio.create_task(reap())
        self._reapers.add(task)
        task.add_done_callback(self._reapers.discard)
