"""A fuzzed run: the nodes of the testbed in virtual time, and everything that must hold afterwards."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from dsdlab.models.base import Engine, NoFreeSlot
from dsdlab.models.drafters import Drafter, LookupFirst, ModelDrafter, PromptLookup
from dsdlab.models.emulated import EmulatedEngine, EmulatedProfile
from dsdlab.nodes import DrafterNode, GenerationFailed, GenerationRecord, GenerationRequest, VerifierNode
from dsdlab.protocol.channel import Channel
from dsdlab.protocol.errors import ChannelClosed, ConnectFailed, ProtocolError, Refused
from dsdlab.sim.channel import SimChannel, SimLink
from dsdlab.sim.compute import SimCompute
from dsdlab.sim.fuzz_draw import MAX_CONTEXT, ClientPlan, DrafterPlan, Situation
from dsdlab.sim.fuzz_faults import FrameLog, RoughChannel
from dsdlab.sim.fuzz_models import HashEngine, HashModel, Whims, said_alone
from dsdlab.sim.loop import Deadlock, Runaway, run
from dsdlab.sim.profile import LinkStep
from dsdlab.sim.synthetic import SyntheticDrafter

__all__ = ["Played", "play"]

MAX_TIME_S = 20_000.0  # of virtual time, where partitions of an hour are the longest thing there is
MAX_CALLBACKS = 5_000_000
MAX_STILL = 100_000
SETTLE_S = 200.0  # a TCP that lost much waits long before it tries again
ROUNDING_S = 1e-6


@dataclass(slots=True)
class Played:
    """What came of a run. wrong: one line for everything that should not be. tokens: committed in all."""

    wrong: list[str] = field(default_factory=list)
    generations: int = 0
    unfinished: int = 0  # ended by an error that they had to end by
    tokens: int = 0
    log: list[str] = field(default_factory=list)


def play(situation: Situation, *, keep_log: bool = False) -> Played:
    """Play a situation and check it."""
    random.seed(situation.seed)  # for policies that draw from the module's own
    world = _World(situation, FrameLog(keep_log))
    try:
        run(
            world.main(),
            max_time_s=MAX_TIME_S,
            max_callbacks=MAX_CALLBACKS,
            max_still=MAX_STILL,
        )
    except (Deadlock, Runaway) as e:
        world.played.wrong.append(f"hangs: {e}")
    except Exception as e:
        world.played.wrong.append(f"{type(e).__name__}: {e}")
    world.played.log = list(world.log.lines)
    return world.played


class _World:
    """A verifier that may be lost, its clients and the ways between them."""

    def __init__(self, situation: Situation, log: FrameLog) -> None:
        self.situation, self.log = situation, log
        self.played = Played()
        self._rng = random.Random(f"{situation.seed}/faults")
        self._whims = random.Random(f"{situation.seed}/whims")
        self._compute = SimCompute()
        self._hash = HashModel(situation.seed, situation.vocab_size)
        self._engines: dict[str, tuple[Engine, int]] = {}
        """By what they are, with their slots: all must be free in the end."""
        self._target = self._engine(
            "the target", self._compute, situation.slots, 1.0, situation.base_s, situation.row_s
        )
        self._beside = self._drafter(
            "the drafter beside it", situation.beside, self._compute, situation.beside_slots
        )
        self._channels: list[SimChannel] = []  # clients' ends
        self._verifiers: list[VerifierNode] = []
        self._away_until_s = -math.inf
        self._background: dict[asyncio.Task[None], None] = {}

    # who speaks ----------------------------------------------------------------------------------

    def _engine(
        self, name: str, compute: SimCompute, slots: int, agree: float, base_s: float, row_s: float = 0.0
    ) -> Engine:
        s = self.situation
        engine: Engine
        if s.kind == "hash":
            engine = HashEngine(
                self._hash,
                agree=agree,
                slots=slots,
                max_context=MAX_CONTEXT,
                eos_ids=s.eos_ids,
                base_s=base_s,
                row_s=row_s,
                spend=compute.spend,
            )
        else:
            profile = EmulatedProfile(
                base_s=base_s, per_token_s=row_s, alpha=agree, vocab_size=s.vocab_size, seed=s.seed
            )
            engine = EmulatedEngine(profile, slots=slots, max_context=MAX_CONTEXT, wait=compute.spend)
            engine.info = _ending(engine, s.eos_ids)
        self._engines[name] = engine, slots
        return engine

    def _drafter(self, name: str, plan: DrafterPlan, compute: SimCompute, slots: int) -> Drafter:
        inner: Drafter
        if plan.kind == "lookup":
            inner = PromptLookup()
        else:
            engine = self._engine(name, compute, slots, plan.alpha, plan.token_s)
            if plan.kind == "synthetic" and isinstance(engine, EmulatedEngine):
                inner = SyntheticDrafter(engine)
            else:
                inner = ModelDrafter(engine)
            if plan.kind == "lookup first" and isinstance(inner, ModelDrafter):
                inner = LookupFirst(inner)
        if not plan.silent + plan.short + plan.wrong + plan.alien:
            return inner
        return Whims(
            inner,
            self._whims,
            self.situation.vocab_size,
            silent=plan.silent,
            short=plan.short,
            wrong=plan.wrong,
            alien=plan.alien,
        )

    def _alone(self, request: GenerationRequest) -> tuple[list[int], str]:
        target = self._target
        return said_alone(
            target if isinstance(target, EmulatedEngine) else self._hash,
            request.prompt_ids,
            request.sampling,
            request.max_new_tokens,
            self.situation.eos_ids if request.stop_at_eos else (),
        )

    # the verifier --------------------------------------------------------------------------------

    def _start(self) -> None:
        self._verifiers.append(
            VerifierNode(self._target, self._compute, drafter=self._beside, linger_s=self.situation.linger_s)
        )

    async def _serve(self, name: str, verifier: VerifierNode, channel: Channel) -> None:
        try:
            await verifier.serve(channel)
        except (ChannelClosed, Refused):
            pass
        except ProtocolError as e:
            self._complain(f"{name}: the verifier refuses a frame: {e}")
            await channel.close()

    async def _restart(self, at_s: float, away_s: float) -> None:
        """As after kill -9: connections break, sessions are gone, the same weights come back."""
        await asyncio.sleep(at_s)
        self.log.note(f"the verifier is killed, away for {away_s:g} s")
        self._away_until_s = asyncio.get_running_loop().time() + away_s
        for channel in self._channels:
            channel.drop()
        self._channels.clear()
        old = self._verifiers[-1]
        self._start()
        await old.close()

    # the clients ---------------------------------------------------------------------------------

    async def main(self) -> None:
        """The whole run."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._unhandled)
        self._start()
        clients = [
            asyncio.create_task(_Client(self, number, plan).play(), name=f"client {number}")
            for number, plan in enumerate(self.situation.clients)
        ]
        for at_s, away_s in self.situation.restarts:
            self.spawn(self._restart(at_s, away_s), "restart")
        await asyncio.wait(clients)
        for client in clients:
            client.result()
        await asyncio.sleep(self.situation.linger_s + SETTLE_S)
        self._check_rest()
        for verifier in self._verifiers:
            await verifier.close()
        for task in self._background:
            if not task.done():
                task.cancel()
        if self._background:
            await asyncio.wait(self._background)
        for task in self._background:
            if not task.cancelled() and (error := task.exception()) is not None:
                self._complain(f"{task.get_name()} ends with {type(error).__name__}: {error}")
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:
            self._complain(f"tasks are left: {', '.join(sorted(t.get_name() for t in left))}")

    def spawn(self, work: Any, name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)
        self._background[task] = None
        return task

    async def dial(self, plan: ClientPlan, name: str, box: SimLink) -> RoughChannel:
        if asyncio.get_running_loop().time() < self._away_until_s:
            raise ConnectFailed("nobody answers")
        here, there = box.pair()
        self._channels.append(here)
        seeds = self._rng.getrandbits(63), self._rng.getrandbits(63)
        client = RoughChannel(here, plan.up, random.Random(seeds[0]), self.log, name)
        server = RoughChannel(there, plan.down, random.Random(seeds[1]), self.log, f"{name} <- verifier")
        self.spawn(self._serve(name, self._verifiers[-1], server), f"verifier of {name}")
        return client

    # afterwards ----------------------------------------------------------------------------------

    def _complain(self, what: str) -> None:
        self.played.wrong.append(what)

    def _unhandled(self, _: Any, context: dict[str, Any]) -> None:
        error = context.get("exception")
        what = f"{type(error).__name__}: {error}" if error is not None else context.get("message")
        self._complain(f"unhandled: {what}")

    def _check_rest(self) -> None:
        """No session and no slot outlives what it was for."""
        for number, verifier in enumerate(self._verifiers):
            if verifier.n_sessions:
                self._complain(f"verifier {number} still holds {verifier.n_sessions} sessions")
        for name, (engine, slots) in self._engines.items():
            free = _free_slots(engine)
            if free != slots:
                self._complain(f"{name} has {free} of {slots} slots left")


class _Client:
    """One drafter node's part of a run."""

    def __init__(self, world: _World, number: int, plan: ClientPlan) -> None:
        self._world, self._plan, self._name = world, plan, f"client {number}"
        rng = random.Random(f"{world.situation.seed}/link {number}")
        self._boxes = [SimLink(link, seed=rng.getrandbits(63)) for link in plan.links]
        self._dials = 0
        self._opened: list[RoughChannel] = []
        self._compute = SimCompute()
        drafter = world._drafter(f"the drafter of {self._name}", plan.drafter, self._compute, 1)
        target = None
        if any(request.mode == "edge-sd" for request in plan.requests):
            s = world.situation
            target = world._engine(f"the target on {self._name}", self._compute, 1, 1.0, s.base_s, s.row_s)
        self._node = DrafterNode(
            self._dial, self._compute, drafter=drafter, target=target, patience_s=plan.patience_s
        )

    async def _dial(self) -> Channel:
        box = self._boxes[min(self._dials, len(self._boxes) - 1)]
        self._dials += 1
        channel = await self._world.dial(self._plan, self._name, box)
        self._opened.append(channel)
        return channel

    async def play(self) -> None:
        plan, world = self._plan, self._world
        await asyncio.sleep(plan.begins_s)
        begun_s = asyncio.get_running_loop().time()
        for box, link in zip(self._boxes, plan.links, strict=True):
            if plan.steps:
                world.spawn(_steps(box, LinkStep.timeline(link, plan.steps)), f"link of {self._name}")
        if plan.drops_s:
            world.spawn(self._drop(begun_s), f"faults of {self._name}")
        for number, request in enumerate(plan.requests):
            last = number == len(plan.requests) - 1
            await self._generate(request, plan.leaves_s if last else None)
        await self._node.disconnect()
        if plan.may_give_up:  # a verifier's heartbeat finds that nobody is there any more
            for channel in self._opened:
                channel.inner.drop()

    async def _drop(self, begun_s: float) -> None:
        for at_s in self._plan.drops_s:
            await asyncio.sleep(max(begun_s + at_s - asyncio.get_running_loop().time(), 0.0))
            if self._opened:
                self._world.log.note(f"{self._name}'s connection breaks")
                self._opened[-1].inner.drop()

    async def _generate(self, request: GenerationRequest, leaves_s: float | None) -> None:
        """One generation, checked."""
        world = self._world
        played = world.played
        expected = world._alone(request)
        seen: list[tuple[list[int], int]] = []
        clock = asyncio.get_running_loop()
        error: Exception | None = None
        record: GenerationRecord | None = None
        begun_s = clock.time()
        went_away = False
        try:
            if request.mode != "edge-sd" and self._node.welcome is None:
                await self._node.reconnect()
            begun_s = clock.time()
            generation = self._node.generate(request, lambda new, drafted: seen.append((list(new), drafted)))
            if leaves_s is None:
                record = await generation
            else:
                async with asyncio.timeout(leaves_s) as limit:
                    record = await generation
        except TimeoutError as e:
            went_away = leaves_s is not None and limit.expired()
            error = None if went_away else e
        except Exception as e:
            error = e
        played.generations += 1
        ids = [token for new, _ in seen for token in new]
        played.tokens += len(ids)
        problems = list(_differences(ids, expected[0]))
        if record is not None:
            problems += _broken_promises(record, expected, seen, clock.time() - begun_s)
        elif error is not None and not self._had_to_fail(error):
            problems.append(f"{type(error).__name__}: {error}")
        else:
            played.unfinished += 1
        where = f"{self._name}, {request.mode}, policy {request.policy}"
        played.wrong += [f"{where}: {problem}" for problem in problems]

    def _had_to_fail(self, error: Exception) -> bool:
        """Whether this is how a generation that cannot go on ends."""
        plan, situation = self._plan, self._world.situation
        if isinstance(error, ConnectFailed | ChannelClosed):
            return plan.may_give_up
        if isinstance(error, GenerationFailed):
            slots = min(situation.slots, situation.beside_slots)
            return error.code == "busy" and slots < len(situation.clients)
        if isinstance(error, ProtocolError):  # gaps without end, which only frames out of order make
            return plan.down.reorders and "the text ends at" in str(error)
        return False


async def _steps(box: SimLink, timeline: Sequence[tuple[float, Any, str]]) -> None:
    clock = asyncio.get_running_loop()
    begun_s = clock.time()
    for at_s, profile, _ in timeline:
        await asyncio.sleep(begun_s + at_s - clock.time())
        box.apply(profile)


def _ending(engine: EmulatedEngine, eos_ids: tuple[int, ...]) -> Any:
    from dataclasses import replace

    return replace(engine.info, eos_ids=eos_ids)


def _free_slots(engine: Engine) -> int:
    """Slots that can be opened; all are given back."""
    opened = []
    with suppress(NoFreeSlot):
        while True:
            opened.append(engine.open())
    for slot in opened:
        engine.close(slot)
    return len(opened)


def _differences(ids: Sequence[int], expected: Sequence[int]) -> list[str]:
    """What the user saw must be how the target alone begins."""
    if list(ids) == list(expected[: len(ids)]):
        return []
    at = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), len(expected))
    if at == len(expected):
        return [f"{len(ids)} tokens, where the target alone says {len(expected)}"]
    return [f"token {at} is {ids[at]}, where the target alone says {expected[at]}"]


def _broken_promises(
    record: GenerationRecord,
    expected: tuple[list[int], str],
    seen: Sequence[tuple[list[int], int]],
    length_s: float,
) -> list[str]:
    """What of a finished generation's record cannot be."""
    times = [t for t, _ in record.commits]
    rules = {
        f"{len(record.ids)} of the {len(expected[0])} tokens of the target alone": record.ids == expected[0],
        f"finish {record.finish!r} instead of {expected[1]!r}": record.finish == expected[1],
        "what was seen is not what was recorded": [t for new, _ in seen for t in new] == record.ids,
        "commits do not add up": [n for _, n in record.commits] == [len(new) for new, _ in seen],
        "an empty commit": all(new for new, _ in seen),
        "more drafts than tokens in a commit": all(0 <= drafted <= len(new) for new, drafted in seen),
        "commits out of order": times == sorted(times) and times[0] == record.ttft_s >= 0.0,
        "commits after the end": times[-1] <= length_s + ROUNDING_S,
        "more accepted than drafted": all(0 <= a <= d for d, a in record.windows),
        "as many costs as steps": len(record.t_verify_s) == len(record.t_queue_s) == len(record.windows),
        f"{record.wasted} of {record.drafted} drafts wasted": 0 <= record.wasted <= record.drafted,
        "more drafts committed than tokens": record.drafts_committed <= len(record.ids),
        "negative times": min([0.0, record.beside_s, *record.t_draft_s, *record.t_verify_s]) >= 0.0,
        "events that end before they begin": all(
            begun <= ended + ROUNDING_S for _, begun, ended in record.events
        ),
        "events outside of the generation": all(
            begun >= 0.0 and ended <= length_s + ROUNDING_S for _, begun, ended in record.events
        ),
        "decisions outside of the generation": all(0.0 <= t <= length_s for t, _ in record.decisions),
    }
    return [name for name, holds in rules.items() if not holds]
