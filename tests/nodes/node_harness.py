"""Nodes in one event loop on a virtual clock: a verifier that can be lost, links with faults."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, repeat
from typing import Any, TypeVar

import numpy as np

from dsdlab.decoding import Sampling, gumbel, log_softmax, warp
from dsdlab.models.base import Chunk, Engine
from dsdlab.models.compute import Compute, Timing
from dsdlab.models.drafters import Drafter, GoesOn, ModelDrafter
from dsdlab.models.emulated import EmulatedEngine, EmulatedProfile
from dsdlab.nodes import DrafterNode, GenerationRecord, GenerationRequest, VerifierNode
from dsdlab.protocol import ChannelClosed, ConnectFailed, ProtocolError, Refused
from dsdlab.protocol.frames import PROTOCOL_VERSION, AnyFrame, Draft, Hello, Open, Welcome, pack_ids
from dsdlab.protocol.memory import Faults, MemoryChannel, memory_pair
from dsdlab.sim.compute import SimCompute

T = TypeVar("T")
Pair = tuple[Faults, Faults]
CLEAN: Pair = (Faults(), Faults())
PROMPT = [5, 3, 9, 5, 3, 9, 5]


class Costly(SimCompute):
    """Real engines on the virtual clock: every piece of work takes the same time of it."""

    def __init__(self, cost_s: float) -> None:
        super().__init__()
        self._cost_s = cost_s

    async def run(self, work: Callable[[], T]) -> tuple[T, Timing]:
        def costly() -> T:
            self.spend(self._cost_s)
            return work()

        return await super().run(costly)


class World:
    """A verifier and the links to it. Each dial takes the next pair of faults (up, down)."""

    def __init__(
        self,
        target: Engine,
        *,
        links: Iterable[Pair] = (),
        compute: Compute | None = None,
        cloud_drafter: Drafter | None = None,
        linger_s: float = 60.0,
        token: str = "",
        reachable: Callable[[int], bool] = lambda _: True,
    ) -> None:
        self.target = target
        self.compute = compute or SimCompute()
        self._cloud_drafter, self._linger_s, self._token = cloud_drafter, linger_s, token
        self._links: Iterator[Pair] = chain(links, repeat(CLEAN))
        self._reachable = reachable
        self.dials = 0
        self.channels: list[MemoryChannel] = []  # the clients' ends
        self._serving: set[asyncio.Task[None]] = set()
        self.failures: list[BaseException] = []
        self.restarts = 0
        self.verifier = self._start()

    def _start(self) -> VerifierNode:
        return VerifierNode(
            self.target,
            self.compute,
            drafter=self._cloud_drafter,
            token=self._token,
            linger_s=self._linger_s,
        )

    async def dial(self) -> MemoryChannel:
        self.dials += 1
        if not self._reachable(self.dials):
            raise ConnectFailed("nobody answers")
        up, down = next(self._links)
        client, server = memory_pair(replace(up, duplicate=0.0), replace(down, duplicate=0.0))
        _after_first_send(client, up)  # a greeting said twice is a broken protocol, not a fault of the link
        _after_first_send(server, down)
        self.channels.append(client)
        task = asyncio.create_task(self._serve(self.verifier, server))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        return client

    async def _serve(self, verifier: VerifierNode, server: MemoryChannel) -> None:
        try:
            await verifier.serve(server)
        except (ChannelClosed, Refused):
            pass
        except ProtocolError as e:
            self.failures.append(e)
            await server.close()

    def drop_all(self) -> None:
        for channel in self.channels:
            channel.drop()

    async def restart(self) -> None:
        """As after kill -9: connections break, sessions are gone, the same weights come back."""
        self.restarts += 1
        old = self.verifier
        self.drop_all()
        self.verifier = self._start()
        await old.close()

    async def quiet(self) -> None:
        """Let everything under way come to rest."""
        await asyncio.sleep(5.0)

    def free_slots(self) -> int:
        """Slots that can be opened right now; all are given back."""
        opened = []
        try:
            while True:
                opened.append(self.target.open())
        except Exception as e:
            if type(e).__name__ != "NoFreeSlot":
                raise
        for slot in opened:
            self.target.close(slot)
        return len(opened)

    def client(
        self, drafter: Drafter | None = None, target: Engine | None = None, **options: Any
    ) -> DrafterNode:
        options = {"token": self._token} | options
        return DrafterNode(self.dial, SimCompute(), drafter=drafter, target=target, **options)


def _after_first_send(channel: MemoryChannel, faults: Faults) -> None:
    send = channel.send

    async def first(frame: AnyFrame) -> None:
        await send(frame)
        channel._faults = faults
        channel.send = send  # type: ignore[method-assign]

    channel.send = first  # type: ignore[method-assign]


class Raw:
    """A client that says just what a test wants said."""

    def __init__(self, channel: MemoryChannel, welcome: Welcome) -> None:
        self.channel, self.welcome = channel, welcome

    @classmethod
    async def dial(cls, world: World, node_id: str = "0123456789abcdef") -> Raw:
        channel = await world.dial()
        await channel.send(Hello(PROTOCOL_VERSION, node_id, "", "", "", 0.0))
        welcome = await channel.recv()
        assert isinstance(welcome, Welcome)
        return cls(channel, welcome)

    async def send(self, *frames: AnyFrame) -> None:
        for frame in frames:
            await self.channel.send(frame)

    async def recv(self) -> AnyFrame:
        return await self.channel.recv()

    async def silence(self, for_s: float = 2.0) -> None:
        """Nothing more arrives."""
        try:
            frame = await asyncio.wait_for(self.channel.recv(), for_s)
        except TimeoutError:
            return
        raise AssertionError(f"unexpected {frame}")


def open_frame(**changes: Any) -> Open:
    fields: dict[str, Any] = {
        "session": 1,
        "mode": "dsd-sync",
        "prompt": pack_ids(PROMPT),
        "committed": b"",
        "gamma": 0,
        "max_new_tokens": 12,
        "stop_at_eos": False,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": 1,
    }
    return Open(**(fields | changes))


def draft_frame(base: int, ids: Iterable[int], epoch: int = 0, session: int = 1) -> Draft:
    return Draft(session, epoch, base, pack_ids(ids))


# the target alone --------------------------------------------------------------------------------


def alone(engine: Engine, request: GenerationRequest) -> tuple[list[int], str]:
    """(ids, finish) of the target decoding by itself: one token at a time, nothing of dsdlab's nodes."""
    eos = engine.info.eos_ids if request.stop_at_eos else ()
    ids: list[int] = []
    slot = -1 if isinstance(engine, EmulatedEngine) else engine.open()
    feed = list(request.prompt_ids)
    while True:
        position = len(request.prompt_ids) + len(ids)
        if isinstance(engine, EmulatedEngine):
            token = engine.token(request.sampling.seed, position)
        else:
            token = decide(engine.extend([Chunk(slot, feed, 1)])[0][0], request.sampling, position)
        ids.append(token)
        feed = [token]
        finish = "eos" if token in eos else "length" if len(ids) == request.max_new_tokens else ""
        if finish:
            if slot >= 0:
                engine.close(slot)
            return ids, finish


def decide(row: np.ndarray, sampling: Sampling, position: int) -> int:
    if sampling.greedy:
        return int(np.argmax(row))
    noise = gumbel(sampling.seed, position, np.arange(row.size))
    return int(np.argmax(log_softmax(warp(row, sampling)) + noise))


class Watch:
    """Collects what the user saw, piece by piece."""

    def __init__(self, then: Callable[[int], None] = lambda _: None) -> None:
        self.pieces: list[list[int]] = []
        self._then = then

    def __call__(self, new: list[int], drafted: int) -> None:
        assert new
        assert 0 <= drafted <= len(new)
        self.pieces.append(list(new))
        self._then(len(self.pieces))

    @property
    def ids(self) -> list[int]:
        return [token for piece in self.pieces for token in piece]


def check(
    record: GenerationRecord, expected: tuple[list[int], str], watch: Watch | None = None, note: str = ""
) -> None:
    """The output is the target's alone; nothing was lost, doubled or counted wrongly."""
    assert record.ids == expected[0], note
    assert record.finish == expected[1], note
    assert sum(n for _, n in record.commits) == len(record.ids), note
    assert all(n > 0 for _, n in record.commits), note
    times = [t for t, _ in record.commits]
    assert times == sorted(times), note
    assert record.ttft_s == times[0], note
    assert all(0 <= accepted <= drafted for drafted, accepted in record.windows), note
    if watch is not None:
        assert watch.ids == record.ids, note
        assert [len(p) for p in watch.pieces] == [n for _, n in record.commits], note


def emulated(
    alpha: float = 1.0,
    *,
    slots: int = 4,
    eos: tuple[int, ...] | None = None,
    max_context: int = 2048,
    **profile: Any,
) -> EmulatedEngine:
    """An emulated engine on the virtual clock's inline compute; its time costs are left to `spend`."""
    engine = EmulatedEngine(
        EmulatedProfile(alpha=alpha, **profile), slots=slots, max_context=max_context, wait=lambda _: None
    )
    if eos is not None:
        engine.info = replace(engine.info, eos_ids=eos)
    return engine


def emulated_drafter(alpha: float, **profile: Any) -> ModelDrafter:
    return ModelDrafter(emulated(alpha, **profile))


class Moody(Drafter):
    """A good drafter that says something else at some positions, always the same ones."""

    def __init__(self, inner: Drafter, vocab_size: int) -> None:
        self.name, self.tokenizer = inner.name, inner.tokenizer
        self._inner, self._vocab_size = inner, vocab_size

    def open(self) -> int:
        return self._inner.open()

    def close(self, slot: int) -> None:
        self._inner.close(slot)

    def propose(
        self,
        slot: int,
        ids: Sequence[int],
        n: int,
        sampling: Sampling,
        tail: Sequence[int] = (),
        goes_on: GoesOn | None = None,
    ) -> list[int]:
        draft = self._inner.propose(slot, ids, n, sampling, tail, goes_on)
        at = len(ids) + len(tail)
        positions = range(at, at + len(draft))
        return [(t + (p * 7 % 11 < 3)) % self._vocab_size for t, p in zip(draft, positions, strict=True)]
