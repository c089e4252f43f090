"""The drafter's side of a streaming session: drafts leave while earlier ones are still under way.

One coroutine drafts and sends, another takes what the target decides; both share the *tail*, the drafts that
follow the text and are not judged yet. A commit that confirms a prefix of the tail leaves the rest standing;
one that differs ends the epoch: the tail is dropped and drafting begins anew behind the committed token.

INVARIANT R1: the tail never holds more than `run_ahead` tokens, nor more than can still be committed.
INVARIANT R2: within an epoch, the frames sent are one sequence of tokens without a gap.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Coroutine, Iterable
from itertools import count
from typing import Any

from dsdlab.models.compute import Compute
from dsdlab.models.drafters import Drafter
from dsdlab.nodes.dialer import Dialer
from dsdlab.nodes.generation import Generation
from dsdlab.nodes.request import POLICY_MODES, GenerationRequest
from dsdlab.nodes.step import propose, slot_of
from dsdlab.policies import Outcome, Pace, WindowPolicy, load_window_policy
from dsdlab.protocol.channel import Channel
from dsdlab.protocol.frames import (
    HOLD_FOREVER_US,
    MAX_WINDOW,
    Commit,
    Draft,
    Ping,
    Pong,
    Steer,
    microseconds,
    pack_ids,
)

MAX_VOCAB = 1 << 24
MAX_EPOCH = 0xFFFF  # of the wire
BARS = 256  # that are remembered
JOIN_S = 0.002  # drafting calls closer than this are one bar on the timeline
SMOOTH = 0.2  # weight of the latest call in the mean time of a drafted token
ADAPTIVE = "adaptive"


def pace_of(request: GenerationRequest) -> Pace:
    """The pace that a request asks for in so many words."""
    if request.free_run:
        return Pace(hold_s=0.0, beside=request.beside)
    return Pace()


def policy_of(request: GenerationRequest) -> WindowPolicy:
    """Who decides: in `dsd-stream` nobody, every token leaves at once."""
    if request.mode == "dsd-adaptive" and request.policy == "static":
        return load_window_policy(ADAPTIVE, request.gamma)
    if request.mode in POLICY_MODES:
        return load_window_policy(request.policy, request.gamma)
    return load_window_policy("static", 1)


class EpochsSpent(Exception):
    """A session has no epoch left for another chain; a new session has."""


class DraftStream:
    """Drafting, sending and taking commits for one generation, over as many connections as it takes."""

    __slots__ = (
        "_bars", "_began", "_changed", "_compute", "_decision", "_drafter", "_empty_at", "_fresh", "_node",
        "_numbers", "_pace", "_pings", "_policy", "_run", "_sent", "_tail", "_token_s", "_vocab_size",
        "_waiter",
    )  # fmt: skip

    def __init__(self, run: Generation, compute: Compute, drafter: Drafter, node: Dialer) -> None:
        self._run, self._compute, self._drafter, self._node = run, compute, drafter, node
        self._policy = policy_of(run.request)
        self._policy.begin(beside=run.request.beside, rtt_s=node.rtt_s)
        self._vocab_size = node.welcome.vocab_size if node.welcome is not None else MAX_VOCAB
        self._tail: list[int] = []  # drafts behind the text
        self._sent = 0  # of the tail
        self._fresh = True  # nothing of this epoch was sent yet
        self._empty_at = -1  # position for which the target was asked without a draft
        self._numbers = count()  # of Steer frames
        self._pings: dict[int, float] = {}  # by nonce: when it left
        self._changed = False  # something was committed since the drafting loop last looked
        self._waiter: asyncio.Future[None] | None = None
        self._token_s = math.nan
        self._began = False
        self._bars: deque[tuple[float, float, int]] = deque(
            maxlen=BARS
        )  # drafting: from, to, place in events
        self._decision = self._policy.decide()
        self._pace = self._decision.pace or pace_of(run.request)

    # the target's pace ---------------------------------------------------------------------------

    async def steer(self, channel: Channel) -> None:
        """Tell the target the pace; after each opening or resuming of the session, and when it changes."""
        pace = self._pace
        hold_us = HOLD_FOREVER_US  # which an infinite time is rounded to as well
        if pace.hold_s < math.inf:
            hold_us = min(microseconds(pace.hold_s), HOLD_FOREVER_US - 1)
        number = next(self._numbers)
        await channel.send(
            Steer(self._run.session, number, pace.drafting, hold_us, pace.max_window, pace.beside)
        )

    def _decide(self) -> bool:
        """Ask the policy; whether the target is to hear of a new pace."""
        decision = self._policy.decide()
        if decision == self._decision:
            return False
        pace = decision.pace or pace_of(self._run.request)
        changed, self._decision, self._pace = pace != self._pace, decision, pace
        if self._run.request.mode == "dsd-adaptive":
            now_s = asyncio.get_running_loop().time()
            self._run.record.decisions.append((self._run.since(now_s), self._policy.describe(decision)))
        return changed

    # the loops -----------------------------------------------------------------------------------

    async def drive(self, channel: Channel) -> None:
        """Go on over a connection until the text is finished.

        Raises EpochsSpent, and what the connection and `Generation.next` raise.
        """
        self._cut()
        self._empty_at = -1
        self._began = False
        async with slot_of(self._compute, self._drafter) as slot:
            await _first_of(self._take(channel), self._draft(channel, slot), *self._pinging(channel))

    async def _take(self, channel: Channel) -> None:
        """Take frames until the text is finished."""
        run, clock = self._run, asyncio.get_running_loop()
        text = run.text
        while text.finish is None:
            frame = await run.next(channel)
            if isinstance(frame, Commit):
                self._commit(frame)
            elif isinstance(frame, Pong):
                sent_s = self._pings.pop(frame.nonce, None)
                if sent_s is not None:
                    self._node.rtt_s = clock.time() - sent_s
                    self._policy.observe_rtt(self._node.rtt_s)
            else:
                run.record.stale_frames += 1
        self._wake()

    def _commit(self, frame: Commit) -> None:
        run, node = self._run, self._node
        now_s = asyncio.get_running_loop().time()
        new = run.take(frame, node.rtt_s or 0.0)
        if not new:
            return
        tail = self._tail
        n = min(len(new), len(tail))
        agreed = next((i for i in range(n) if new[i] != tail[i]), n)
        compared = agreed if agreed == n else agreed + 1
        run.record.drafts_committed += min(agreed, frame.accepted, frame.drafted - frame.beside)
        if agreed < n:
            self._cut()
        else:
            del tail[:n]
            self._sent = max(self._sent - n, 0)
        if frame.compute_us or frame.drafted:
            self._policy.observe(
                Outcome(
                    frame.drafted,
                    frame.accepted,
                    0.0,
                    frame.compute_us / 1e6,
                    frame.queue_us / 1e6,
                    math.nan,
                    compared,
                    agreed,
                    frame.draft_us / 1e6,
                    frame.beside,
                    math.nan if node.rtt_s is None else node.rtt_s,
                    len(run.text),
                    now_s,
                    self._token_s,
                    self._overlap_s(now_s - (node.rtt_s or 0.0) / 2, frame.compute_us / 1e6),
                )
            )
        self._wake()

    def _cut(self) -> None:
        """End the epoch: what is drafted and not judged is dropped. Raises EpochsSpent."""
        if self._run.epoch >= MAX_EPOCH:
            raise EpochsSpent
        self._run.epoch += 1
        self._tail = []
        self._sent = 0
        self._fresh = True

    async def _draft(self, channel: Channel, slot: int) -> None:
        """Draft and send until the text is finished."""
        run = self._run
        text = run.text
        ids: list[int] = []
        while text.finish is None:
            self._changed = False
            if self._decide():
                await self.steer(channel)
            decision = self._decision
            frame = decision.first or decision.gamma if self._fresh else decision.gamma
            run_ahead = run.request.run_ahead if decision.run_ahead is None else decision.run_ahead
            free = min(run_ahead, text.room - 1) - len(self._tail)
            if decision.gamma < 1 or free < 1:
                await self._send(channel, even_empty=min(decision.gamma, run_ahead) < 1)
                await self._change()
                continue
            want = min(frame, free) if self._policy.stops else 1
            if len(ids) != len(text):
                ids = text.ids.copy()  # a thread reads it while commits come in
            if not await self._add(slot, ids, want):
                await self._send(channel, even_empty=True)
                await self._change()
            elif len(self._tail) - self._sent >= frame or self._policy.stops:
                await self._send(channel)

    async def _add(self, slot: int, ids: list[int], want: int) -> bool:
        """Draft at most `want` tokens more; whether the drafter had any idea.

        ids: the text, which may grow meanwhile.
        """
        run, clock = self._run, asyncio.get_running_loop()
        epoch, tail = run.epoch, tuple(self._tail)
        begun_s = clock.time()
        goes_on = self._policy.goes_on if self._policy.stops else None
        more, t_draft_s = await propose(
            self._compute,
            self._drafter,
            slot,
            ids,
            want,
            run.text.sampling,
            self._vocab_size,
            tail,
            goes_on,
        )
        if not more:
            return False
        ended_s = clock.time()
        record = run.record
        record.drafted += len(more)
        record.t_draft_s.append(t_draft_s)
        self._bar(begun_s, ended_s)
        if self._began:
            each_s, known_s = t_draft_s / len(more), self._token_s
            self._token_s = each_s if math.isnan(known_s) else known_s + SMOOTH * (each_s - known_s)
        self._began = True  # the first call reads the prompt as well
        if run.epoch == epoch:
            at = len(ids) + len(tail)  # position of the first new draft
            known = max(0, min(len(run.text) - at, len(more)))  # the target may have been there before
            if more[:known] == run.text.ids[at : at + known]:
                self._tail += more[known:]
        return True

    def _bar(self, begun_s: float, ended_s: float) -> None:
        """Note drafting on the timeline; what follows at once lengthens the last bar."""
        events, bars = self._run.record.events, self._bars
        if bars and begun_s - bars[-1][1] < JOIN_S:
            at, begun_s = bars[-1][2], bars[-1][0]
            bars[-1] = (begun_s, ended_s, at)
            events[at] = ("draft", self._run.since(begun_s), self._run.since(ended_s))
            return
        bars.append((begun_s, ended_s, len(events)))
        self._run.event("draft", begun_s, ended_s)

    def _overlap_s(self, ended_s: float, took_s: float) -> float:
        """How long this node drafted during a step of the target that ended then."""
        begun_s = ended_s - took_s
        total_s = 0.0
        for first_s, last_s, _ in reversed(self._bars):
            if last_s <= begun_s:
                break
            total_s += max(min(last_s, ended_s) - max(first_s, begun_s), 0.0)
        return total_s

    async def _send(self, channel: Channel, *, even_empty: bool = False) -> None:
        """Send what is drafted and not sent. even_empty: without a draft, ask for the next token alone."""
        run = self._run
        ids = self._tail[self._sent : self._sent + MAX_WINDOW]
        base = len(run.text) + self._sent
        if not ids:
            if even_empty and not self._tail and self._pace.hold_s > 0.0 and self._empty_at < base:
                self._empty_at = base
                await channel.send(Draft(run.session, run.epoch, base, b""))
            return
        self._sent += len(ids)
        self._fresh = False
        sent_s = asyncio.get_running_loop().time()
        await channel.send(Draft(run.session, run.epoch, base, pack_ids(ids)))
        run.event("flight_up", sent_s, sent_s + (self._node.rtt_s or 0.0) / 2)

    def _pinging(self, channel: Channel) -> Iterable[Coroutine[Any, Any, None]]:
        every_s = self._policy.ping_every_s
        if every_s < math.inf:
            yield self._ping(channel, every_s)

    async def _ping(self, channel: Channel, every_s: float) -> None:
        clock = asyncio.get_running_loop()
        self._pings.clear()
        while True:
            await asyncio.sleep(every_s)
            nonce = self._node.new_nonce()
            self._pings[nonce] = clock.time()
            await channel.send(Ping(nonce, clock.time()))

    # waiting -------------------------------------------------------------------------------------

    def _wake(self) -> None:
        self._changed = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _change(self) -> None:
        """Until something was committed, also while what went before waited for a drafter or a socket."""
        if self._changed:
            return
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


async def _first_of(*work: Coroutine[Any, Any, None]) -> None:
    """Run all until one ends, which ends the others; raises what it raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    failed = [task for task in tasks if not task.cancelled() and task.exception() is not None]
    for task in (*failed, *done):  # the first that failed, in the order in which they were given
        task.result()
