"""The drafter: the node at the edge. It asks for a generation, drafts where the mode wants it, and
keeps the session alive across lost connections and restarted verifiers.

INVARIANT D1: a token enters the text only from a Verdict or Commit of the target, at its absolute
position; frames seen before, of an older epoch or for another session change nothing and are counted.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from itertools import count, islice

from dsdlab.models.base import Engine
from dsdlab.models.compute import Compute
from dsdlab.models.drafters import Drafter
from dsdlab.nodes.record import GenerationRecord
from dsdlab.nodes.request import GenerationRequest
from dsdlab.nodes.step import decode, propose, slot_of
from dsdlab.nodes.text import Gap, Text
from dsdlab.policies import Outcome, load_window_policy
from dsdlab.protocol.channel import Channel
from dsdlab.protocol.errors import ChannelClosed, ConnectFailed, ProtocolError
from dsdlab.protocol.frames import (
    PROTOCOL_VERSION,
    AnyFrame,
    Close,
    Commit,
    Draft,
    Error,
    Hello,
    Open,
    Ping,
    Pong,
    Resume,
    Verdict,
    Welcome,
    digest_ids,
    pack_ids,
    unpack_ids,
)
from dsdlab.protocol.handshake import client_handshake, new_node_id

log = logging.getLogger("dsdlab.drafter")

RETRY_FIRST_S = 0.05
RETRY_MOST_S = 1.0
PATIENCE_S = 60.0
MAX_REOPENED = 3  # without a token between
MAX_GAPS = 3
_MAX_SESSION = 0xFFFF
MAX_VOCAB = 1 << 24

Dial = Callable[[], Awaitable[Channel]]
OnCommit = Callable[[list[int], int], None]
"""Called with (new ids, how many of them were drafted) as the text grows."""


class GenerationFailed(Exception):
    """A generation was refused or could not be finished; `code` is the protocol's, the message one line."""

    def __init__(self, code: str, message: str, retry_after_ms: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_ms = retry_after_ms


class _Generation:
    """One generation under way."""

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
        self.reopened = 0
        record = self.record
        if not record.commits:
            record.ttft_s = self.since(now_s)
        record.commits.append((self.since(now_s), len(new)))
        record.ids += new
        if self.on_commit is not None:
            self.on_commit(new, min(drafted, len(new)))

    def event(self, kind: str, begun_s: float, ended_s: float) -> None:
        self.record.events.append((kind, self.since(begun_s), self.since(ended_s)))


class DrafterNode:
    """Dials a verifier and generates, one session at a time.

    dial: opens a new Channel; raises ConnectFailed. drafter: needed for `dsd-sync` and `edge-sd`.
    target: only for `edge-sd`, where both models run here. target_name: asked for at the handshake.
    patience_s: how long to look for a verifier that went away before giving up.
    """

    __slots__ = (
        "_channel", "_compute", "_dial", "_drafter", "_goodbye", "_last_session", "_node_id", "_nonces",
        "_patience_s", "_target", "_target_name", "_token", "_tokenizer", "rtt_s", "welcome",
    )  # fmt: skip

    def __init__(
        self,
        dial: Dial,
        compute: Compute,
        *,
        drafter: Drafter | None = None,
        target: Engine | None = None,
        target_name: str = "",
        tokenizer: str = "",
        token: str = "",
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._dial, self._compute = dial, compute
        self._drafter, self._target = drafter, target
        self._target_name, self._tokenizer, self._token = target_name, tokenizer, token
        self._patience_s = patience_s
        self._node_id = new_node_id()
        self._channel: Channel | None = None
        self._goodbye: asyncio.Task[None] | None = None  # of a connection that `renew` gave up
        self._last_session = 0
        self._nonces = count()  # never used again: a late Pong must not pass for a new one's
        self.welcome: Welcome | None = None
        self.rtt_s: float | None = None  # of the handshake or the last ping; places flights on the timeline

    # connection ----------------------------------------------------------------------------------

    async def connect(self) -> Channel:
        """The connection, dialled if need be. Raises ConnectFailed, ChannelClosed, Refused, ProtocolError."""
        if self._channel is None:
            channel = await self._dial()
            hello = Hello(
                version=PROTOCOL_VERSION,
                node_id=self._node_id,
                token=self._token,
                target=self._target_name,
                tokenizer=self._tokenizer,
                t_s=asyncio.get_running_loop().time(),
            )
            self.welcome = await client_handshake(channel, hello)
            self.rtt_s = asyncio.get_running_loop().time() - hello.t_s
            self._channel = channel
        return self._channel

    async def disconnect(self) -> None:
        """Drop the connection; the next use dials anew."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def renew(self) -> Channel:
        """A fresh connection; the old one says goodbye meanwhile. Raises what `connect` raises."""
        old, self._channel = self._channel, None
        if old is not None:
            self._goodbye = asyncio.get_running_loop().create_task(old.close())
        return await self.connect()

    async def reconnect(self) -> None:
        """Dial until somebody answers, for `patience_s` at most."""
        await self.disconnect()
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + self._patience_s
        delay_s = RETRY_FIRST_S
        while True:
            try:
                await self.connect()
                return
            except (ConnectFailed, ChannelClosed) as e:
                if loop.time() + delay_s > give_up_s:
                    raise ConnectFailed(f"{e} (tried for {self._patience_s:g} s)") from None
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, RETRY_MOST_S)

    async def ping(self, n: int) -> list[float]:
        """n round trips over the connection, one after the other: seconds each.

        A connection that was lost while idle is dialled anew.
        """
        try:
            return await self._ping(await self.connect(), n)
        except ChannelClosed:
            await self.disconnect()
            return await self._ping(await self.connect(), n)

    async def _ping(self, channel: Channel, n: int) -> list[float]:
        loop = asyncio.get_running_loop()
        out: list[float] = []
        for nonce in islice(self._nonces, n):
            sent_s = loop.time()
            await channel.send(Ping(nonce, sent_s))
            while True:
                frame = await channel.recv()
                if isinstance(frame, Pong) and frame.nonce == nonce:
                    break
            out.append(loop.time() - sent_s)
        if out:
            self.rtt_s = sorted(out)[len(out) // 2]
        return out

    # generation ----------------------------------------------------------------------------------

    async def generate(
        self, request: GenerationRequest, on_commit: OnCommit | None = None
    ) -> GenerationRecord:
        """Run one generation to its end.

        Raises GenerationFailed when it is refused; ConnectFailed and Refused from (re)connecting.
        A connection lost on the way is restored and the session resumed.
        """
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        if request.mode == "edge-sd":
            return await self._generate_here(request, start_s, on_commit)
        if request.mode == "dsd-sync" and self._drafter is None:
            raise GenerationFailed("mode", "mode dsd-sync needs a drafter; this node was started without one")
        await self.connect()
        self._last_session = self._last_session % _MAX_SESSION + 1
        eos_ids = self.welcome.eos_ids if self.welcome is not None and request.stop_at_eos else ()
        text = Text(request.prompt_ids, (), request.sampling, request.max_new_tokens, eos_ids)
        run = _Generation(request, self._last_session, text, start_s, on_commit)
        sent: Counter[str] = Counter()
        received: Counter[str] = Counter()
        drive = self._draft_and_wait if request.mode == "dsd-sync" else self._follow
        while True:
            channel = await self.connect()
            before = channel.bytes_sent.copy(), channel.bytes_received.copy()
            try:
                await self._enter(channel, run)
                await drive(channel, run)
                await channel.send(Close(run.session))
                break
            except ChannelClosed as e:
                if text.finish is not None:
                    break
                log.info("session=%d lost its connection: %s", run.session, e)
                run.record.reconnects += 1
                run.epoch += 1
                await self.reconnect()
            except Gap as e:  # no ordered connection does this: ask again for what is missing
                log.warning("session=%d has a gap: %s", run.session, e)
                run.gaps += 1
                if run.gaps > MAX_GAPS:
                    await self.disconnect()
                    raise ProtocolError("bad-frame", str(e)) from None
                run.record.reconnects += 1
                run.epoch += 1
                await self.reconnect()
            except GenerationFailed as e:
                if e.code != "unknown-session" or run.reopened >= MAX_REOPENED:
                    raise
                run.reopened += 1  # the verifier forgot the session: open it again where it stands
                run.epoch += 1
                run.opened = False
            except BaseException:
                await self._abandon(run.session)
                raise
            finally:
                sent += channel.bytes_sent - before[0]
                received += channel.bytes_received - before[1]
        run.record.finish = text.finish or ""
        run.record.bytes_up, run.record.bytes_down = dict(sent), dict(received)
        return run.record

    async def _abandon(self, session: int) -> None:
        """Tell the verifier that nobody wants the rest; best effort."""
        if self._channel is not None:
            try:
                await self._channel.send(Close(session))
            except ChannelClosed:
                await self.disconnect()

    async def _enter(self, channel: Channel, run: _Generation) -> None:
        """Open the session, or resume it, and take the first tokens that the verifier sends."""
        text = run.text
        if run.opened:
            packed = pack_ids(text.ids)
            await channel.send(Resume(run.session, len(text), digest_ids(packed)))
            try:
                await self._await_commit(channel, run)
                return
            except GenerationFailed as e:
                if e.code != "unknown-session":
                    raise
                log.info("session=%d is unknown there: opened again at %d", run.session, len(text))
                run.opened = False
        await self._open(channel, run)

    async def _open(self, channel: Channel, run: _Generation) -> None:
        request, sampling = run.request, run.request.sampling
        frame = Open(
            session=run.session,
            mode=request.mode,
            prompt=pack_ids(request.prompt_ids),
            committed=pack_ids(run.text.committed),
            gamma=request.gamma if request.mode == "cloud-sd" else 0,
            max_new_tokens=request.max_new_tokens,
            stop_at_eos=request.stop_at_eos,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
        )
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + self._patience_s
        while True:
            await channel.send(frame)
            try:
                await self._await_commit(channel, run)
                run.opened = True
                return
            except GenerationFailed as e:
                if e.code != "busy" or not e.retry_after_ms or loop.time() > give_up_s:
                    raise
                await asyncio.sleep(e.retry_after_ms / 1000)

    async def _await_commit(self, channel: Channel, run: _Generation) -> None:
        while True:
            frame = await self._next(channel, run)
            if isinstance(frame, Commit):
                self._take_commit(frame, run)
                return
            run.record.stale_frames += 1

    async def _next(self, channel: Channel, run: _Generation) -> Verdict | Commit:
        """The next frame of this session. Raises GenerationFailed for an Error frame."""
        while True:
            frame: AnyFrame = await channel.recv()
            match frame:
                case Error(code="busy", session=run.session) if run.opened:
                    run.record.stale_frames += 1  # a second copy: the session has been let in since
                case Error(session=session) if session in (0, run.session):
                    raise GenerationFailed(frame.code, frame.message, frame.retry_after_ms)
                case Verdict() | Commit() if frame.session == run.session:
                    return frame
                case Verdict() | Commit() | Error() | Welcome():
                    run.record.stale_frames += 1
                case Pong():
                    pass
                case _:
                    name = type(frame).__name__
                    raise ProtocolError("bad-frame", f"{name} is no frame for a drafter")

    def _take_commit(self, frame: Commit, run: _Generation) -> int:
        """Put a Commit's tokens into the text; returns how many were new."""
        now_s = asyncio.get_running_loop().time()
        new = run.text.merge(frame.base, unpack_ids(frame.ids))
        if not new:
            if frame.ids:
                run.record.stale_frames += 1
            return 0
        record = run.record
        run.committed(new, frame.accepted, now_s)
        if frame.compute_us or frame.drafted:  # a step of the target; catching up costs nothing
            compute_s = frame.compute_us / 1e6
            record.t_verify_s.append(compute_s)
            record.t_queue_s.append(frame.queue_us / 1e6)
            record.windows.append((frame.drafted, frame.accepted))
            if frame.drafted:
                record.t_draft_s.append(frame.draft_us / 1e6)
            sent_s = now_s - (self.rtt_s or 0.0) / 2
            begun_s = sent_s - compute_s
            if frame.drafted:
                run.event("draft", begun_s - frame.draft_us / 1e6, begun_s)
            run.event("verify" if frame.drafted else "decode", begun_s, sent_s)
            run.event("flight_down", sent_s, now_s)
        return len(new)

    async def _follow(self, channel: Channel, run: _Generation) -> None:
        """`cloud-ar` and `cloud-sd`: take what the target streams."""
        while run.text.finish is None:
            frame = await self._next(channel, run)
            if isinstance(frame, Commit):
                self._take_commit(frame, run)
            else:
                run.record.stale_frames += 1

    async def _draft_and_wait(self, channel: Channel, run: _Generation) -> None:
        """`dsd-sync`: draft γ, send, wait for the verdict."""
        if self._drafter is None:
            raise GenerationFailed("mode", "this node has no drafter")
        loop = asyncio.get_running_loop()
        request, text, record, start_s = run.request, run.text, run.record, run.start_s
        policy = load_window_policy(request.policy, request.gamma)
        async with slot_of(self._compute, self._drafter) as slot:
            vocab_size = self.welcome.vocab_size if self.welcome is not None else MAX_VOCAB
            while text.finish is None:
                base = len(text)
                want = min(policy.decide().gamma, text.room - 1)
                begun_s = loop.time()
                draft: list[int] = []
                t_draft_s = 0.0
                if want > 0:
                    draft, t_draft_s = await propose(
                        self._compute, self._drafter, slot, text, want, vocab_size
                    )
                sent_s = loop.time()
                await channel.send(Draft(run.session, run.epoch, base, pack_ids(draft)))
                verdict = await self._await_verdict(channel, run, base, len(draft))
                now_s = loop.time()
                begun_at_s, sent_at_s, now_at_s = begun_s - start_s, sent_s - start_s, now_s - start_s
                if draft:
                    record.events.append(("draft", begun_at_s, sent_at_s))
                if verdict is None:  # a Commit moved the text on: draft again from there
                    continue
                new = text.append([*draft[: verdict.accepted], verdict.next_id])
                run.committed(new, verdict.accepted, now_s)
                t_verify_s, t_queue_s = verdict.compute_us / 1e6, verdict.queue_us / 1e6
                record.windows.append((len(draft), verdict.accepted))
                record.t_draft_s.append(t_draft_s)
                record.t_verify_s.append(t_verify_s)
                record.t_queue_s.append(t_queue_s)
                flight_s = max(0.0, now_s - sent_s - t_verify_s - t_queue_s) / 2
                verified_at_s = now_at_s - flight_s
                record.events += (
                    ("flight_up", sent_at_s, sent_at_s + flight_s),
                    ("verify", verified_at_s - t_verify_s, verified_at_s),
                    ("flight_down", verified_at_s, now_at_s),
                )
                policy.observe(
                    Outcome(len(draft), verdict.accepted, t_draft_s, t_verify_s, t_queue_s, now_s - sent_s)
                )

    async def _await_verdict(
        self, channel: Channel, run: _Generation, base: int, n_drafted: int
    ) -> Verdict | None:
        """The verdict on the window at `base`; None if a Commit brought new tokens instead."""
        while True:
            frame = await self._next(channel, run)
            if isinstance(frame, Commit):
                if self._take_commit(frame, run):
                    return None
            elif frame.base == base and frame.epoch == run.epoch:
                if frame.accepted > n_drafted:
                    raise ProtocolError("bad-frame", f"{frame.accepted} of {n_drafted} drafted ids accepted")
                return frame
            else:
                run.record.stale_frames += 1

    async def _generate_here(
        self, request: GenerationRequest, start_s: float, on_commit: OnCommit | None
    ) -> GenerationRecord:
        """`edge-sd`: both models on this node, no network."""
        target = self._target
        if target is None or self._drafter is None:
            raise GenerationFailed("mode", "mode edge-sd needs target and drafter on the edge node")
        if len(request.prompt_ids) + request.max_new_tokens > target.info.max_context:
            raise GenerationFailed(
                "context",
                f"{len(request.prompt_ids)} prompt tokens and {request.max_new_tokens} new ones; "
                f"the target's context is {target.info.max_context}",
            )
        vocab_size = target.info.vocab_size
        if not all(0 <= i < vocab_size for i in request.prompt_ids):
            raise GenerationFailed("prompt", f"a token id is outside the vocabulary of {vocab_size}")
        eos_ids = target.info.eos_ids if request.stop_at_eos else ()
        text = Text(request.prompt_ids, (), request.sampling, request.max_new_tokens, eos_ids)
        run = _Generation(request, 0, text, start_s, on_commit)
        record = run.record
        loop = asyncio.get_running_loop()
        async with (
            slot_of(self._compute, target) as slot,
            aclosing(decode(text, target, slot, self._compute, request.gamma, self._drafter)) as steps,
        ):
            async for step in steps:
                now_s = loop.time()
                run.committed(step.ids, step.accepted, now_s)
                compute_s = step.timing.compute_s
                record.windows.append((step.drafted, step.accepted))
                record.t_verify_s.append(compute_s)
                record.t_queue_s.append(step.timing.queue_s)
                if step.drafted:
                    record.t_draft_s.append(step.t_draft_s)
                    run.event("draft", now_s - compute_s - step.t_draft_s, now_s - compute_s)
                run.event("verify" if step.drafted else "decode", now_s - compute_s, now_s)
        record.finish = text.finish or ""
        return record
