"""The drafter: the node at the edge. It asks for a generation, drafts where the mode wants it, and
keeps the session alive across lost connections and restarted verifiers.

INVARIANT D1: a token enters the text only from a Verdict or Commit of the target, at its absolute
position; frames seen before, of an older epoch or for another session change nothing and are counted.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter, deque
from contextlib import aclosing, suppress

from dsdlab.decoding import SparseQ
from dsdlab.models.base import Engine
from dsdlab.models.compute import Compute
from dsdlab.models.drafters import Drafter, ModelDrafter
from dsdlab.nodes.dialer import PATIENCE_S, Dial, Dialer
from dsdlab.nodes.draft_stream import DraftStream, EpochsSpent
from dsdlab.nodes.generation import Generation, GenerationFailed, OnCommit
from dsdlab.nodes.record import GenerationRecord
from dsdlab.nodes.request import EDGE_DRAFTING_MODES, STREAMING_MODES, SYNC_Q, GenerationRequest
from dsdlab.nodes.step import decode, draw, propose, slot_of
from dsdlab.nodes.text import Gap, Text
from dsdlab.policies import Outcome, load_window_policy
from dsdlab.protocol.channel import Channel
from dsdlab.protocol.errors import ChannelClosed, ProtocolError
from dsdlab.protocol.frames import (
    MAX_FRAME_BYTES,
    Close,
    Commit,
    Draft,
    DraftQ,
    Open,
    Resume,
    Verdict,
    digest_ids,
    pack_ids,
)
from dsdlab.protocol.q_rows import pack_q, rows_that_fit

log = logging.getLogger("dsdlab.drafter")

MAX_REOPENED = 3  # without a token between
MAX_GAPS = 3  # without a token between
MAX_LEFT = 64
FRAME_SPARE_BYTES = 64  # of a DraftQ beside its ids and distributions
_MAX_SESSION = 0xFFFF
MAX_VOCAB = 1 << 24


class DrafterNode(Dialer):
    """Dials a verifier and generates, one session at a time.

    drafter: needed for every mode that drafts at the edge. target: only for `edge-sd`, where both models run
    here. The rest is as `Dialer` has it.
    """

    __slots__ = ("_compute", "_drafter", "_last_session", "_left", "_target")

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
        super().__init__(
            dial, target_name=target_name, tokenizer=tokenizer, token=token, patience_s=patience_s
        )
        self._compute = compute
        self._drafter, self._target = drafter, target
        self._last_session = 0
        self._left: deque[int] = deque(maxlen=MAX_LEFT)  # sessions to be closed when there is a connection

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
        if request.mode in EDGE_DRAFTING_MODES and self._drafter is None:
            raise GenerationFailed(
                "mode", f"mode {request.mode} needs a drafter; this node was started without one"
            )
        if request.acceptance == "rejection" and not isinstance(self._drafter, ModelDrafter):
            name = "none" if self._drafter is None else self._drafter.name
            raise GenerationFailed(
                "mode", f"acceptance rejection needs a model as drafter; this node's is {name}"
            )
        await self.connect()
        eos_ids = self.welcome.eos_ids if self.welcome is not None and request.stop_at_eos else ()
        text = Text(request.prompt_ids, (), request.sampling, request.max_new_tokens, eos_ids)
        run = Generation(request, self._new_session(), text, start_s, on_commit)
        sent: Counter[str] = Counter()
        received: Counter[str] = Counter()
        stream = None
        if request.mode in STREAMING_MODES and self._drafter is not None:
            stream = DraftStream(run, self._compute, self._drafter, self)
        while True:
            channel = await self.connect()
            before = channel.bytes_sent.copy(), channel.bytes_received.copy()
            try:
                while self._left:
                    await channel.send(Close(self._left[0]))
                    self._left.popleft()
                await self._enter(channel, run, stream)
                if stream is not None:
                    await stream.drive(channel)
                elif request.mode == "dsd-sync":
                    await self._draft_and_wait(channel, run)
                else:
                    await self._follow(channel, run)
                await channel.send(Close(run.session))
                break
            except ChannelClosed as e:
                if text.finish is not None:
                    self._left.append(run.session)
                    break
                log.info("session=%d lost its connection: %s", run.session, e)
                await self._come_back(run)
            except EpochsSpent:
                await self._abandon(run.session)
                if text.finish is not None:
                    break
                run.session, run.epoch, run.opened = self._new_session(), 0, False
            except Gap as e:  # no ordered connection does this: ask again for what is missing
                log.warning("session=%d has a gap: %s", run.session, e)
                run.gaps += 1
                if run.gaps > MAX_GAPS:
                    self._left.append(run.session)
                    await self.disconnect()
                    raise ProtocolError("bad-frame", str(e)) from None
                await self._come_back(run)
            except GenerationFailed as e:
                if e.code == "busy" and run.opened:
                    continue  # a late copy, or what told of the session was one: resume it and see
                if e.code != "unknown-session" or run.reopened >= MAX_REOPENED:
                    raise
                run.reopened += 1  # the verifier forgot the session: open it again where it stands
                run.epoch += 1
                run.opened = False
                if stream is not None:  # more drafts of it are on their way, to be refused one by one
                    await self._abandon(run.session)
                    run.session, run.epoch = self._new_session(), 0
            except BaseException:
                await self._abandon(run.session)
                raise
            finally:
                sent += channel.bytes_sent - before[0]
                received += channel.bytes_received - before[1]
        run.record.bytes_up, run.record.bytes_down = dict(sent), dict(received)
        return run.finished()

    def _new_session(self) -> int:
        self._last_session = self._last_session % _MAX_SESSION + 1
        return self._last_session

    async def _come_back(self, run: Generation) -> None:
        """Reconnect for a session that goes on. Raises ConnectFailed, Refused."""
        run.record.reconnects += 1
        run.epoch += 1
        try:
            await self.reconnect()
        except BaseException:
            self._left.append(run.session)
            raise

    async def _abandon(self, session: int) -> None:
        """Tell the verifier that nobody wants the rest: now, or when there is a connection again."""
        if self._channel is not None:
            with suppress(ChannelClosed):
                await self._channel.send(Close(session))
                return
        self._left.append(session)

    async def _enter(self, channel: Channel, run: Generation, stream: DraftStream | None) -> None:
        """Open the session, or resume it, and take the first tokens that the verifier sends."""
        text = run.text
        if run.opened:
            packed = pack_ids(text.ids)
            await channel.send(Resume(run.session, len(text), digest_ids(packed)))
            if stream is not None:
                await stream.steer(channel)
            try:
                await self._await_commit(channel, run)
                return
            except GenerationFailed as e:
                if e.code != "unknown-session":
                    raise
                log.info("session=%d is unknown there: opened again at %d", run.session, len(text))
                run.opened = False
        await self._open(channel, run, stream)

    async def _open(self, channel: Channel, run: Generation, stream: DraftStream | None) -> None:
        request, sampling = run.request, run.request.sampling
        frame = Open(
            session=run.session,
            mode=_mode_on_wire(request),
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
            if stream is not None:
                await stream.steer(channel)
            try:
                await self._await_commit(channel, run)
                run.opened = True
                return
            except GenerationFailed as e:
                if e.code != "busy" or not e.retry_after_ms or loop.time() > give_up_s:
                    raise
                await asyncio.sleep(e.retry_after_ms / 1000)

    async def _await_commit(self, channel: Channel, run: Generation) -> None:
        while True:
            frame = await run.next(channel)
            if isinstance(frame, Commit):
                run.take(frame, self.rtt_s or 0.0)
                return
            if isinstance(frame, Verdict):
                run.record.stale_frames += 1

    async def _follow(self, channel: Channel, run: Generation) -> None:
        """`cloud-ar` and `cloud-sd`: take what the target streams."""
        while run.text.finish is None:
            await self._await_commit(channel, run)

    async def _draft_and_wait(self, channel: Channel, run: Generation) -> None:
        """`dsd-sync`: draft γ, send, wait for the verdict."""
        if self._drafter is None:
            raise GenerationFailed("mode", "this node has no drafter")
        loop = asyncio.get_running_loop()
        request, text, record, start_s = run.request, run.text, run.record, run.start_s
        drafter, rejection = self._drafter, request.acceptance == "rejection"
        policy = load_window_policy(request.policy, request.gamma)
        goes_on = policy.goes_on if policy.stops else None
        async with slot_of(self._compute, drafter) as slot:
            vocab_size = self.welcome.vocab_size if self.welcome is not None else MAX_VOCAB
            while text.finish is None:
                base = len(text)
                want = min(policy.decide().gamma, text.room - 1)
                begun_s = loop.time()
                draft: list[int] = []
                t_draft_s = 0.0
                drawn_from: list[SparseQ] = []
                if want > 0 and rejection and isinstance(drafter, ModelDrafter):
                    (draft, drawn_from), t_draft_s = await draw(
                        self._compute, drafter, slot, text, want, vocab_size, request.top_q, goes_on
                    )
                    # a size depends on the text before a draft, not on what was drawn: leaving out is no bias
                    fit = rows_that_fit(drawn_from, MAX_FRAME_BYTES - FRAME_SPARE_BYTES)
                    draft, drawn_from = draft[:fit], drawn_from[:fit]
                elif want > 0:
                    draft, t_draft_s = await propose(
                        self._compute, drafter, slot, text.ids, want, text.sampling, vocab_size, (), goes_on
                    )
                sent_s = loop.time()
                packed = pack_ids(draft)
                await channel.send(
                    DraftQ(run.session, run.epoch, base, packed, pack_q(drawn_from))
                    if rejection
                    else Draft(run.session, run.epoch, base, packed)
                )
                verdict = await self._await_verdict(channel, run, base, len(draft))
                now_s = loop.time()
                begun_at_s, sent_at_s, now_at_s = begun_s - start_s, sent_s - start_s, now_s - start_s
                if draft:
                    record.events.append(("draft", begun_at_s, sent_at_s))
                if verdict is None:  # a Commit moved the text on: draft again from there
                    continue
                accepted, n_drafted = verdict.accepted, len(draft)
                new = text.append([*draft[:accepted], verdict.next_id])
                run.committed(new, accepted, now_s)
                record.drafted += n_drafted
                record.drafts_committed += min(accepted, len(new))
                t_verify_s, t_queue_s = verdict.compute_us / 1e6, verdict.queue_us / 1e6
                record.windows.append((n_drafted, accepted))
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
                    Outcome(
                        n_drafted,
                        accepted,
                        t_draft_s,
                        t_verify_s,
                        t_queue_s,
                        now_s - sent_s,
                        min(accepted + 1, n_drafted),
                        accepted,
                        rtt_s=2 * flight_s,
                        context=base,
                        now_s=now_s,
                        t_token_s=t_draft_s / n_drafted if n_drafted else math.nan,
                    )
                )

    async def _await_verdict(
        self, channel: Channel, run: Generation, base: int, n_drafted: int
    ) -> Verdict | None:
        """The verdict on the window at `base`; None if a Commit brought new tokens instead."""
        while True:
            frame = await run.next(channel)
            if isinstance(frame, Commit):
                if run.take(frame, self.rtt_s or 0.0):
                    return None
            elif not isinstance(frame, Verdict):
                continue
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
        run = Generation(request, 0, text, start_s, on_commit)
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
                    record.drafted += step.drafted
                    record.drafts_committed += min(step.accepted, len(step.ids))
                    record.t_draft_s.append(step.t_draft_s)
                    run.event("draft", now_s - compute_s - step.t_draft_s, now_s - compute_s)
                run.event("verify" if step.drafted else "decode", now_s - compute_s, now_s)
        return run.finished()


def _mode_on_wire(request: GenerationRequest) -> str:
    """All streaming is one there; rejection sampling is a mode of its own."""
    if request.acceptance == "rejection":
        return SYNC_Q
    return "dsd-stream" if request.mode in STREAMING_MODES else request.mode
