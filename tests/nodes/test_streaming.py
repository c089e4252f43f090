"""Streaming sessions: chains, epochs, the pace of the target, slack, and what may go wrong on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from node_harness import PROMPT, Costly, Watch, World, alone, check, emulated, emulated_drafter

from dsdlab.decoding import Sampling
from dsdlab.models.drafters import Drafter
from dsdlab.nodes import GenerationRecord, GenerationRequest
from dsdlab.policies import Decision, WindowPolicy
from dsdlab.policies.registry import offer
from dsdlab.protocol.frames import AnyFrame, Draft
from dsdlab.protocol.memory import Faults, MemoryChannel
from dsdlab.sim.loop import run

N = len(PROMPT)
STEP_S = 0.05


def request_for(mode: str, n: int = 24, **changes: object) -> GenerationRequest:
    fields = {"gamma": 4, "sampling": Sampling(1.0, seed=5), "max_new_tokens": n} | changes
    return GenerationRequest(PROMPT, mode, **fields)


class Mute(Drafter):
    """Never has an idea."""

    name = "mute"
    tokenizer = ""

    def open(self) -> int:
        return 0

    def close(self, _: int) -> None:
        pass

    def propose(self, *_: object, **__: object) -> list[int]:
        return []


class Scripted(WindowPolicy):
    """Decides what a script says for the tokens that are committed."""

    def __init__(self, script: Callable[[int], Decision]) -> None:
        self._script = script
        self._context = 0

    def observe(self, outcome) -> None:
        self._context = outcome.context

    def decide(self) -> Decision:
        return self._script(self._context)


class SlowSocket(World):
    """A full socket: whoever sends is held up, while the frame is on its way."""

    held_s = 0.2

    async def dial(self) -> MemoryChannel:
        channel = await super().dial()

        async def slowly(frame: AnyFrame) -> None:
            await MemoryChannel.send(channel, frame)
            if isinstance(frame, Draft):
                await asyncio.sleep(self.held_s)

        self._slow(channel, slowly)
        return channel

    @staticmethod
    def _slow(channel: MemoryChannel, slowly) -> None:
        first = channel.send

        async def greeting(frame: AnyFrame) -> None:
            await first(frame)
            channel.send = slowly

        channel.send = greeting


def generate(
    request: GenerationRequest,
    drafter: Drafter,
    *,
    delay_s: float = 0.02,
    world: type[World] = World,
    cloud_drafter: Drafter | None = None,
) -> GenerationRecord:
    """One generation over a link of 2 · delay_s, where a step of the target takes 50 ms; checked."""

    async def main() -> GenerationRecord:
        link = (Faults(delay_s=delay_s), Faults(delay_s=delay_s))
        one = world(emulated(), compute=Costly(STEP_S), links=[link], cloud_drafter=cloud_drafter)
        watch = Watch()
        record = await one.client(drafter).generate(request, watch)
        check(record, alone(one.target, request), watch)
        await one.quiet()
        assert one.verifier.n_sessions == 0
        assert one.free_slots() == 4
        assert not one.failures
        return record

    return run(main())


# nobody waits for ever ---------------------------------------------------------------------------


@pytest.mark.parametrize("held_s", [0.0, 0.01, 0.2])
@pytest.mark.parametrize("mode", ["dsd-pipelined", "dsd-stream"])
def test_a_drafter_without_ideas_asks_for_every_token(mode: str, held_s: float) -> None:
    """Also where a commit comes while the question before is still on its way into a full socket."""

    class Socket(SlowSocket):
        pass

    Socket.held_s = held_s
    record = generate(request_for(mode), Mute(), world=Socket)
    assert record.drafted == 0
    assert [n for _, n in record.commits] == [1] * 24


@pytest.mark.parametrize("held_s", [0.01, 0.06, 0.2])
def test_a_commit_that_comes_while_drafts_are_sent_is_not_missed(held_s: float) -> None:
    class Socket(SlowSocket):
        pass

    Socket.held_s = held_s
    generate(request_for("dsd-pipelined", run_ahead=4), emulated_drafter(0.7), world=Socket)


@pytest.mark.parametrize("gamma", [0, 3])
@pytest.mark.parametrize("run_ahead", [0, 2])
def test_a_policy_that_drafts_nothing_still_gets_tokens(gamma: int, run_ahead: int) -> None:
    """Where the target waits for drafts for ever, a window or run-ahead of 0 asks for a token instead."""
    offer("scripted", lambda **_: Scripted(lambda at: Decision(2) if at < N + 6 else later))
    later = Decision(gamma, run_ahead)
    record = generate(request_for("dsd-pipelined", policy="scripted"), emulated_drafter(0.7))
    drafted = [drafted for drafted, _ in record.windows[8:-1]]  # the last has no room for a draft
    assert any(drafted) == (min(gamma, run_ahead) > 0)


def test_a_target_without_room_for_a_drafter_beside_it_goes_on_alone() -> None:
    """Two sessions, one slot of the drafter beside: whoever has none takes steps without it."""

    async def main() -> None:
        beside = emulated_drafter(0.8)
        beside.engine._free = beside.engine._free[:1]
        world = World(emulated(), compute=Costly(STEP_S), cloud_drafter=beside)
        request = request_for("dsd-stream", free_run=True, beside=4)
        records = await asyncio.gather(*(world.client(Mute()).generate(request) for _ in range(2)))
        for record in records:
            check(record, alone(world.target, request))
        assert any(drafted for drafted, _ in records[0].windows + records[1].windows)

    run(main())


# slack -------------------------------------------------------------------------------------------


def test_who_waits_for_slack_gets_it_in_turn() -> None:
    """Invariant K2: three free-running sessions without drafts share the target step by step."""

    async def main() -> None:
        world = World(emulated(), compute=Costly(STEP_S))
        order: list[int] = []
        request = request_for("dsd-stream", free_run=True)

        async def one(number: int) -> None:
            watch = Watch(lambda _: order.append(number))
            check(await world.client(Mute()).generate(request, watch), alone(world.target, request))

        await asyncio.gather(*map(one, range(3)))
        assert order[6:66] == [*order[6:9]] * 20
        assert sorted(order[6:9]) == [0, 1, 2]

    run(main())


# the timeline ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["cloud-ar", "dsd-sync", "dsd-stream"])
def test_events_lie_inside_the_generation(mode: str) -> None:
    """A round trip of a second when the node said hello, and none since."""

    class Shortening(World):
        async def dial(self) -> MemoryChannel:
            channel = await super().dial()
            asyncio.get_running_loop().call_later(0.9, self._shorten, channel)
            return channel

        @staticmethod
        def _shorten(channel: MemoryChannel) -> None:
            for end in (channel, channel._other):
                end._faults = Faults()

    async def main() -> GenerationRecord:
        slow = (Faults(delay_s=0.5), Faults(delay_s=0.5))
        world = Shortening(emulated(), compute=Costly(STEP_S), links=[slow])
        return await world.client(emulated_drafter(0.7)).generate(request_for(mode))

    record = run(main())
    end_s = record.commits[-1][0]
    assert all(0.0 <= begun <= ended <= end_s + 1e-9 for _, begun, ended in record.events)
