"""Streaming sessions: chains, epochs, the pace of the target, slack, and what may go wrong on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from node_harness import (
    PROMPT,
    Costly,
    Raw,
    Watch,
    World,
    alone,
    check,
    draft_frame,
    emulated,
    emulated_drafter,
    open_frame,
)

from dsdlab.decoding import Sampling
from dsdlab.models.drafters import Drafter, ModelDrafter
from dsdlab.models.emulated import EmulatedEngine, EmulatedProfile
from dsdlab.nodes import DrafterNode, GenerationRecord, GenerationRequest
from dsdlab.nodes.chain import Chain
from dsdlab.nodes.slack import Slack
from dsdlab.nodes.target_stream import TargetStream
from dsdlab.nodes.text import Text
from dsdlab.policies import Decision, Pace, WindowPolicy
from dsdlab.policies.registry import offer
from dsdlab.protocol.frames import (
    HOLD_FOREVER_US,
    AnyFrame,
    Close,
    Commit,
    Draft,
    Open,
    Resume,
    Steer,
    unpack_ids,
)
from dsdlab.protocol.memory import Faults, MemoryChannel
from dsdlab.sim.compute import SimCompute
from dsdlab.sim.fuzz_models import HashEngine, HashModel, said_alone
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


async def steered(
    world: World, *, session: int = 1, n: int = 12, hold_us: int = 0, drafting: bool = True, **pace: int
) -> Raw:
    """A streaming session of a client that says just what a test wants said; the first token has come."""
    raw = await Raw.dial(world, f"{session:016x}")
    await raw.send(open_frame(session=session, mode="dsd-stream", max_new_tokens=n))
    await raw.send(Steer(session, 0, drafting, hold_us, pace.get("max_window", 256), pace.get("beside", 0)))
    first = await raw.recv()
    assert isinstance(first, Commit)
    assert (first.base, len(first.ids)) == (N, 3)
    return raw


def said(world: World, count: int, first: int = N) -> list[int]:
    """What the target says from a position on."""
    return [world.target.token(1, first + i) for i in range(count)]


def test_no_step_ahead_begins_while_somebody_waits() -> None:
    """Invariant K1: a session runs free; a window of another comes in mid-step and is the next."""

    class Noting(World):
        def __init__(self, *a, **k) -> None:
            super().__init__(*a, **k)
            self.steps: list[tuple[float, int]] = []  # when, whose slot
            choose = self.target.choose

            def noted(chunks, samplings):
                self.steps.append((asyncio.get_running_loop().time(), chunks[0].slot))
                return choose(chunks, samplings)

            self.target.choose = noted

    async def main() -> None:
        world = Noting(emulated(), compute=Costly(STEP_S))
        asking = await steered(world, hold_us=HOLD_FOREVER_US, n=40)
        free = await steered(world, session=2, n=200)
        clock = asyncio.get_running_loop()
        at, waited = N + 1, []
        for _ in range(12):
            await asyncio.sleep(0.17)  # always somewhere else in a step
            asked_s = clock.time()
            await asking.send(draft_frame(at, said(world, 1, at)))
            commit = await asking.recv()
            assert isinstance(commit, Commit)
            at += len(commit.ids) // 3
            later = [slot for when_s, slot in world.steps if when_s > asked_s]
            waited.append(later[0])
            assert clock.time() - asked_s < 2 * STEP_S + 1e-6
            begun = [slot for when_s, slot in world.steps if asked_s < when_s < clock.time() - 1e-6]
            assert set(begun) <= {waited[0]}
        assert set(waited) == {waited[0]}  # never the free one's
        assert sum(slot != waited[0] for _, slot in world.steps) > 12
        await free.send(Close(2))

    run(main())


def test_slack_goes_to_the_next_when_the_first_leaves() -> None:
    slack, woken = Slack(), []

    def one() -> None:
        woken.append(1)

    def two() -> None:
        woken.append(2)

    with slack.ahead():
        assert not slack.ready(one)
        slack.wait(one)
        slack.wait(two)
        slack.wait(one)  # keeps its place
    assert woken == [1]
    assert slack.ready(one)
    assert not slack.ready(two)
    slack.forget(one)  # its session was closed
    assert woken == [1, 2]
    assert slack.ready(two)
    with slack.asked():
        assert not slack.ready(two)
    assert woken == [1, 2, 2]
    slack.forget(two)
    assert slack.ready(one)


def test_who_does_not_draft_has_the_same_right_as_cloud_ar() -> None:
    """A session that decodes alone by its pace leaves no slack to one that runs free."""

    async def main() -> None:
        world = World(emulated(), compute=Costly(STEP_S))
        free = await steered(world, session=2, n=60)
        alone = await steered(world, n=20, drafting=False)
        ids, clock = 1, asyncio.get_running_loop()
        begun_s = clock.time()
        while ids < 20:
            commit = await alone.recv()
            assert isinstance(commit, Commit)
            ids += len(commit.ids) // 3
        assert clock.time() - begun_s < 21 * STEP_S
        others = 0
        while others < 59:
            commit = await free.recv()
            assert isinstance(commit, Commit)
            others += len(commit.ids) // 3
        assert clock.time() - begun_s > 70 * STEP_S

    run(main())


# the target's pace -------------------------------------------------------------------------------


@pytest.mark.parametrize("hold_s", [0.0, 0.03, 0.2])
def test_a_target_with_a_finite_hold_waits_no_longer(hold_s: float) -> None:
    """Invariant F1: without any draft, a token every hold + step; with one in time, at once."""

    async def main() -> None:
        world = World(emulated(), compute=Costly(STEP_S))
        raw = await steered(world, hold_us=round(hold_s * 1e6))
        clock = asyncio.get_running_loop()
        for at in range(N + 1, N + 6):
            begun_s = clock.time()
            commit = await raw.recv()
            assert isinstance(commit, Commit)
            assert (commit.base, unpack_ids(commit.ids)) == (at, said(world, 1, at))
            assert clock.time() - begun_s == pytest.approx(hold_s + STEP_S)
        begun_s = clock.time()
        await raw.send(draft_frame(N + 6, said(world, 2, N + 6)))
        commit = await raw.recv()
        assert isinstance(commit, Commit)
        if hold_s:
            assert (commit.drafted, commit.accepted, len(commit.ids)) == (2, 2, 9)
            assert clock.time() - begun_s == pytest.approx(STEP_S)

    run(main())


def test_a_target_that_holds_for_ever_never_decodes_alone() -> None:
    """Not but for the one token that an empty draft asks for, and the last, for which there is no draft."""

    async def main() -> None:
        world = World(emulated(), compute=Costly(STEP_S))
        raw = await steered(world, hold_us=HOLD_FOREVER_US, n=5)
        await raw.silence(5.0)
        await raw.send(draft_frame(N + 1, ()), draft_frame(N + 1, ()))  # a copy asks for the same token
        commit = await raw.recv()
        assert isinstance(commit, Commit)
        assert (commit.base, unpack_ids(commit.ids), commit.drafted) == (N + 1, said(world, 1, N + 1), 0)
        await raw.silence(5.0)
        await raw.send(draft_frame(N + 2, said(world, 1, N + 2)))
        commit = await raw.recv()
        assert isinstance(commit, Commit)
        assert len(commit.ids) == 6
        commit = await raw.recv()  # one is left
        assert isinstance(commit, Commit)
        assert (commit.base, unpack_ids(commit.ids)) == (N + 4, said(world, 1, N + 4))

    run(main())


def test_before_any_steer_the_target_decodes_alone() -> None:
    async def main() -> None:
        world = World(emulated(), compute=Costly(STEP_S))
        raw = await Raw.dial(world)
        await raw.send(open_frame(mode="dsd-stream", max_new_tokens=6))
        ids: list[int] = []
        while len(ids) < 6:
            commit = await raw.recv()
            assert isinstance(commit, Commit)
            ids += unpack_ids(commit.ids)
        assert ids == said(world, 6)
        assert asyncio.get_running_loop().time() == pytest.approx(7 * STEP_S)  # the slot costs one here

    run(main())


def test_a_steer_that_is_late_changes_nothing() -> None:
    async def main() -> None:
        world = World(emulated(), compute=Costly(STEP_S))
        raw = await steered(world, hold_us=HOLD_FOREVER_US)
        free = Steer(1, 3, True, 0, 256, 0)
        holding = Steer(1, 5, True, HOLD_FOREVER_US, 256, 0)
        await raw.send(holding, free, msgspec.structs.replace(free, number=5))
        await raw.silence(5.0)
        await raw.send(msgspec.structs.replace(free, session=9, number=6))
        await raw.silence(5.0)
        await raw.send(msgspec.structs.replace(free, number=6))
        for at in range(N + 1, N + 4):
            commit = await raw.recv()
            assert isinstance(commit, Commit)
            assert commit.base == at

    run(main())


@pytest.mark.parametrize("max_window", [1, 2, 5])
def test_a_step_judges_no_more_than_it_was_told(max_window: int) -> None:
    async def main() -> None:
        world = World(emulated(), compute=Costly(STEP_S))
        raw = await steered(world, hold_us=HOLD_FOREVER_US, max_window=max_window, n=30)
        await raw.send(draft_frame(N + 1, said(world, 10, N + 1)))
        at = N + 1
        while at < N + 9:
            commit = await raw.recv()
            assert isinstance(commit, Commit)
            left = N + 11 - at  # of the ten
            assert commit.drafted == commit.accepted == min(max_window, left)
            at += len(commit.ids) // 3

    run(main())


def test_drafts_that_no_node_could_have_sent() -> None:
    """An id outside the vocabulary, a place far beyond the text: the connection ends with the reason."""

    async def main(frame: Draft, reason: str) -> None:
        world = World(emulated(), compute=Costly(STEP_S))
        raw = await steered(world, hold_us=HOLD_FOREVER_US)
        await raw.send(frame)
        await world.quiet()
        assert [str(e) for e in world.failures] == [reason]

    run(main(draft_frame(N + 1, [3, 1024]), "a drafted id is outside the vocabulary"))
    run(main(draft_frame(N + 1 + 4097, [3]), f"draft at position {N + 4098}, but the text ends at {N + 1}"))


# chains ------------------------------------------------------------------------------------------


def text_of(*ids: int) -> Text:
    return Text(ids, (), Sampling(), 100, ())


def test_a_draft_that_differs_ends_its_chain() -> None:
    """Invariant C1: what is left of the chain, and what comes later, is never judged."""
    text, chain = text_of(1, 2), Chain()
    assert chain.receive(1, 2, [3, 4, 5], text)
    assert chain.window(text, 10) == [3, 4, 5]
    text.append([3])
    chain.settle(text, 2)
    assert chain.window(text, 10) == [4, 5]
    assert chain.window(text, 1) == [4]
    text.append([9])
    chain.settle(text, 3)
    assert chain.window(text, 10) == []
    assert not chain.receive(1, 5, [6, 7], text)
    assert chain.window(text, 10) == []
    text, chain = text_of(1, 2, 3), Chain()  # the target has been at the place before the draft came
    assert chain.receive(1, 2, [3, 4], text)
    assert chain.window(text, 10) == [4]
    assert not chain.receive(1, 1, [9, 3, 4, 5], text)
    assert chain.window(text, 10) == []


def test_an_epoch_ends_every_lower_one() -> None:
    """Invariant C2: whatever comes of a lower one afterwards."""
    text, chain = text_of(1, 2), Chain()
    assert chain.receive(4, 2, [3, 4, 5], text)
    assert chain.receive(6, 2, [7], text)
    assert chain.window(text, 10) == [7]
    for epoch in range(6):
        assert not chain.receive(epoch, 3, [4, 5], text)
    assert chain.window(text, 10) == [7]
    text.append([8])
    chain.settle(text, 2)
    assert not chain.receive(6, 3, [8], text)  # dead
    assert chain.receive(7, 3, [8], text)  # a higher one lives


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_frames_in_any_order_and_any_number(data: st.DataObject) -> None:
    """Against the plain meaning: a draft may be judged if it is there, of the highest epoch so far, and
    nothing of its epoch differs from the text."""
    alphabet = st.integers(0, 2)
    text, chain = text_of(0), Chain()
    chains: dict[int, list[int]] = {}  # by epoch: what its client drafts from position 1 on
    epoch, seen, dead = 0, {}, False
    for _ in range(data.draw(st.integers(1, 30))):
        if data.draw(st.booleans()):
            number = data.draw(st.integers(max(0, epoch - 1), epoch + 1))
            ids = chains.setdefault(number, data.draw(st.lists(alphabet, min_size=20, max_size=20)))
            at = data.draw(st.integers(1, 15))
            piece = ids[at - 1 : at - 1 + data.draw(st.integers(1, 5))]
            fresh = chain.receive(number, at, piece, text)
            if number > epoch:
                epoch, seen, dead = number, {}, False
            if number == epoch:
                seen |= {at + i: token for i, token in enumerate(piece)}
                known = range(at, min(at + len(piece), len(text)))
                dead = dead or any(seen[p] != text.ids[p] for p in known)
            assert fresh == (number == epoch and not dead and at + len(piece) > len(text))
        elif len(text) < 14:
            since = len(text)
            text.append(data.draw(st.lists(alphabet, min_size=1, max_size=3)))
            chain.settle(text, since)
            dead = dead or any(seen.get(p, text.ids[p]) != text.ids[p] for p in range(since, len(text)))
        most = data.draw(st.integers(0, 6))
        window = chain.window(text, most)
        expected = []
        while not dead and len(expected) < most and len(text) + len(expected) in seen:
            expected.append(seen[len(text) + len(expected)])
        assert window == expected


def test_stale_frames_never_reach_the_target() -> None:
    """Of a lower epoch, and of a dead chain: no step is taken for them."""

    async def main() -> None:
        world = World(emulated(), compute=Costly(STEP_S))
        raw = await steered(world, hold_us=HOLD_FOREVER_US)
        wrong = [(token + 1) % 1024 for token in said(world, 3, N + 1)]
        await raw.send(draft_frame(N + 1, wrong, epoch=2))
        commit = await raw.recv()
        assert isinstance(commit, Commit)
        assert (commit.drafted, commit.accepted, unpack_ids(commit.ids)) == (3, 0, said(world, 1, N + 1))
        right = said(world, 3, N + 2)
        await raw.send(draft_frame(N + 2, right, epoch=2), draft_frame(N + 2, right, epoch=1))
        await raw.silence(5.0)
        await raw.send(draft_frame(N + 2, right, epoch=3))
        commit = await raw.recv()
        assert isinstance(commit, Commit)
        assert (commit.drafted, commit.accepted) == (3, 3)

    run(main())


# run-ahead and epochs at the client --------------------------------------------------------------


class Listening(World):
    """Keeps what the client says, and how much of the text it then had."""

    def __init__(self, *a, **k) -> None:
        super().__init__(*a, **k)
        self.heard: list[tuple[AnyFrame, int]] = []
        self.had = 0
        self.record = GenerationRecord()

    async def dial(self) -> MemoryChannel:
        channel = await super().dial()
        send = channel.send

        async def noted(frame: AnyFrame) -> None:
            self.heard.append((frame, N + self.had))
            await MemoryChannel.send(channel, frame)

        async def first(frame: AnyFrame) -> None:
            await send(frame)
            channel.send = noted

        channel.send = first
        return channel

    @property
    def drafts(self) -> list[tuple[Draft, int]]:
        return [(frame, had) for frame, had in self.heard if isinstance(frame, Draft) and frame.ids]


def listened(request: GenerationRequest, alpha: float, token_s: float = 0.01) -> Listening:
    """A generation over 60 ms, a drafter of `token_s` a token; checked, and what was said."""

    async def main() -> Listening:
        link = (Faults(delay_s=0.03), Faults(delay_s=0.03))
        world = Listening(emulated(), compute=Costly(STEP_S), links=[link])
        compute = SimCompute()
        drafter = ModelDrafter(
            EmulatedEngine(EmulatedProfile(base_s=token_s, alpha=alpha), wait=compute.spend)
        )
        node = DrafterNode(world.dial, compute, drafter=drafter)

        def seen(new: list[int], _: int) -> None:
            world.had += len(new)

        world.record = await node.generate(request, seen)
        check(world.record, alone(world.target, request))
        return world

    return run(main())


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("run_ahead", [1, 3, 8])
@pytest.mark.parametrize("mode", ["dsd-pipelined", "dsd-stream"])
def test_run_ahead_is_bounded(mode: str, run_ahead: int, alpha: float) -> None:
    """Invariant R1; and a drafter that is faster than the link and always right reaches the bound."""
    request = request_for(mode, 40, run_ahead=run_ahead, gamma=min(2, run_ahead))
    ahead = [frame.base + len(frame.ids) // 3 - had for frame, had in listened(request, alpha).drafts]
    assert max(ahead) <= run_ahead
    if alpha == 1.0:
        assert max(ahead) == run_ahead
    ends = [f.base + len(f.ids) // 3 for f, _ in listened(request, alpha).drafts]
    assert max(ends) <= N + 39  # the last token needs no draft


@pytest.mark.parametrize("alpha", [0.0, 0.6, 0.9])
@pytest.mark.parametrize("free_run", [False, True])
def test_an_epoch_is_one_sequence_without_a_gap(free_run: bool, alpha: float) -> None:
    """Invariant R2: what a Draft skips is in the text already; each epoch begins behind the text."""
    world = listened(request_for("dsd-stream", 40, free_run=free_run), alpha)
    ends: dict[int, int] = {}
    epochs = [frame.epoch for frame, _ in world.drafts]
    assert epochs == sorted(epochs)
    for frame, had in world.drafts:
        end = ends.get(frame.epoch)
        assert frame.base == had if end is None else frame.base == max(end, had)
        ends[frame.epoch] = frame.base + len(frame.ids) // 3
    assert len(ends) > 5
    accepted = sum(accepted for _, accepted in world.record.windows)
    assert world.record.drafts_committed == accepted  # not what the target decided alone meanwhile


def test_a_first_frame_of_its_own_size() -> None:
    """`first` tokens after each mismatch, `gamma` after that."""
    offer("scripted", lambda **_: Scripted(lambda _: Decision(2, first=5)))
    world = listened(request_for("dsd-pipelined", 60, policy="scripted", run_ahead=20, gamma=2), 0.9)
    sizes: dict[int, list[int]] = {}
    for frame, _ in world.drafts:
        sizes.setdefault(frame.epoch, []).append(len(frame.ids) // 3)
    whole = [s for s in sizes.values() if len(s) > 2]
    assert whole
    assert all(s[0] == 5 and set(s[1:-1]) <= {2} for s in whole)


def test_a_policy_that_stops_ends_frames_early() -> None:
    """Where confidence falls a frame leaves with what there is, and drafting goes on behind it."""

    class Stops(Scripted):
        stops = True

        def goes_on(self, confidences: Sequence[float]) -> bool:
            return len(confidences) % 3 != 0

    offer("scripted", lambda **_: Stops(lambda _: Decision(8)))
    world = listened(request_for("dsd-pipelined", 60, policy="scripted"), 0.9)
    sizes = [len(frame.ids) // 3 for frame, _ in world.drafts]
    assert max(sizes) == 3
    assert sizes.count(3) > len(sizes) / 2


def test_epochs_that_run_out_open_another_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mismatch costs an epoch, and a session has 65536: another one goes on where it stands."""
    monkeypatch.setattr("dsdlab.nodes.draft_stream.MAX_EPOCH", 5)
    for mode in ("dsd-pipelined", "dsd-stream"):
        for n in range(5, 30):
            world = listened(request_for(mode, n), 0.2)
            assert max(frame.epoch for frame, _ in world.drafts) <= 5
            opened = [frame for frame, _ in world.heard if isinstance(frame, Open)]
            closed = [frame.session for frame, _ in world.heard if isinstance(frame, Close)]
            assert closed == [frame.session for frame in opened]
        assert len(opened) > 3


def test_an_empty_draft_for_what_is_decided_asks_for_nothing() -> None:
    text = text_of(1, 2, 3)
    stream = TargetStream(Slack())
    assert not stream.receive(1, 2, [], text)
    assert stream.receive(1, 3, [], text)


@pytest.mark.parametrize("rtt_s", [0.0, 0.03, 0.2])
@pytest.mark.parametrize("token_s", [0.002, 0.04, 0.3])
def test_what_is_drafted_goes_on_behind_its_own_chain(token_s: float, rtt_s: float) -> None:
    """Each draft is what the drafter says behind the text and the drafts of its epoch before it, also where
    a mismatch was told in the middle of drafting, or the target has been at the place meanwhile."""
    model = HashModel(8, 16)
    sampling = Sampling(1.0, seed=5)
    expected, _ = said_alone(model, PROMPT, sampling, 60, ())
    whole = [*PROMPT, *expected]

    class Stops(Scripted):
        stops = True

    offer("scripted", lambda **_: Stops(lambda _: Decision(6, 20, pace=Pace(0.0))))
    ways = [
        request_for("dsd-stream", 60, sampling=sampling, stop_at_eos=False),
        request_for("dsd-stream", 60, sampling=sampling, stop_at_eos=False, free_run=True),
        request_for("dsd-adaptive", 60, sampling=sampling, stop_at_eos=False, policy="scripted"),
    ]

    async def main(request: GenerationRequest) -> int:
        link = (Faults(delay_s=rtt_s / 2), Faults(delay_s=rtt_s / 2))
        at_target, at_edge = SimCompute(), SimCompute()
        target = HashEngine(model, base_s=STEP_S, spend=at_target.spend)
        world = Listening(target, compute=at_target, links=[link])
        edge = HashEngine(model, agree=0.7, base_s=token_s, spend=at_edge.spend)
        node = DrafterNode(world.dial, at_edge, drafter=ModelDrafter(edge))

        def seen(new: list[int], _: int) -> None:
            world.had += len(new)

        record = await node.generate(request, seen)
        assert record.ids == expected
        chains: dict[int, dict[int, int]] = {}
        drafter = ModelDrafter(HashEngine(model, agree=0.7, spend=lambda _: None))
        slot = drafter.open()
        for frame, had in world.drafts:
            chain = chains.setdefault(frame.epoch, {})
            for at, token in enumerate(unpack_ids(frame.ids), frame.base):
                tail = [chain[p] for p in range(had, at)]
                assert drafter.propose(slot, whole[:had], 1, sampling, tail) == [token]
                chain[at] = token
        return len(chains)

    epochs = [run(main(way)) for way in ways]
    assert max(epochs) > 3


@pytest.mark.parametrize("k", range(3, 12))
def test_a_question_that_was_lost_is_asked_again(k: int) -> None:
    """The connection breaks under the empty Draft; the resumed session waits for it for ever."""

    async def main() -> None:
        link = (Faults(delay_s=0.02, drop_after=k), Faults(delay_s=0.02))
        world = World(emulated(), compute=Costly(STEP_S), links=[link])
        request = request_for("dsd-pipelined")
        record = await world.client(Mute()).generate(request)
        check(record, alone(world.target, request))
        assert record.reconnects == 1

    run(main())


def test_a_pace_is_said_again_behind_every_resume() -> None:
    """The connection may have broken under the last Steer."""
    paces = [Pace(0.0), Pace(), Pace(0.01, beside=2), Pace(0.0, max_window=4)]
    offer("scripted", lambda **_: Scripted(lambda at: Decision(2, 4, pace=paces[at % 4])))

    async def main(k: int) -> int:
        links = [(Faults(delay_s=0.02, drop_after=k), Faults(delay_s=0.02))] * 30
        world = Listening(emulated(), compute=Costly(STEP_S), links=links)
        request = request_for("dsd-adaptive", 30, policy="scripted")
        record = await world.client(emulated_drafter(0.6)).generate(request)
        check(record, alone(world.target, request))
        frames = [frame for frame, _ in world.heard]
        steers = [frame.number for frame in frames if isinstance(frame, Steer)]
        assert steers == sorted(set(steers))
        entered = [i for i, frame in enumerate(frames) if isinstance(frame, Resume | Open)]
        before: Steer | None = None
        for i, frame in enumerate(frames):
            if i in entered and i + 1 < len(frames):
                again = frames[i + 1]
                assert isinstance(again, Steer)
                if before is not None:
                    assert msgspec.structs.replace(again, number=before.number) == before
            if isinstance(frame, Steer):
                before = frame
        return sum(isinstance(frame, Resume) for frame in frames)

    assert sum(run(main(k)) for k in range(5, 14)) > 10


def test_a_policy_hears_once_of_what_there_is() -> None:
    heard: list[tuple[int, float | None]] = []

    class Beginning(Scripted):
        def begin(self, *, beside: int, rtt_s: float | None) -> None:
            heard.append((beside, rtt_s))

    offer("scripted", lambda **_: Beginning(lambda _: Decision(2)))
    request = request_for("dsd-adaptive", policy="scripted", beside=3)
    generate(request, emulated_drafter(0.5), cloud_drafter=emulated_drafter(0.5))
    assert heard == [(3, pytest.approx(0.04))]


# one session, every way to go on -----------------------------------------------------------------

WAYS = {
    "cloud-ar": Decision(0, pace=Pace(0.0, drafting=False)),
    "cloud-sd": Decision(0, pace=Pace(0.0, beside=3, drafting=False)),
    "free run": Decision(1, 16, pace=Pace(0.0)),
    "free run with a drafter beside": Decision(1, 16, pace=Pace(0.0, beside=4)),
    "waits a while": Decision(2, 8, pace=Pace(0.02)),
    "waits for ever": Decision(4, 8, pace=Pace()),
    "as asked": Decision(3),
}


@pytest.mark.parametrize("delay_s", [0.0, 0.02, 0.15])
@pytest.mark.parametrize("mode", ["dsd-pipelined", "dsd-adaptive"])
def test_decoding_is_handed_over_and_taken_back(mode: str, delay_s: float) -> None:
    """A policy that changes its way every few tokens, from each to each: one session, no token lost."""
    order = [way for first in WAYS.values() for second in WAYS.values() for way in (first, second)]
    offer("scripted", lambda **_: Scripted(lambda at: order[max(at - N, 0) // 3 % len(order)]))
    request = request_for(mode, 3 * len(order), policy="scripted", sampling=Sampling(1.0, seed=3))

    async def main() -> None:
        link = (Faults(delay_s=delay_s), Faults(delay_s=delay_s))
        world = Listening(emulated(), compute=Costly(0.02), links=[link], cloud_drafter=emulated_drafter(0.8))
        watch = Watch()
        record = await world.client(emulated_drafter(0.8)).generate(request, watch)
        check(record, alone(world.target, request), watch)
        frames = [type(frame).__name__ for frame, _ in world.heard]
        assert frames.count("Open") == frames.count("Close") == 1
        assert frames.count("Steer") > len(WAYS)
        assert record.reconnects == 0
        assert record.beside_s > 0.0
        assert record.drafts_committed > 0
        assert bool(record.decisions) == (mode == "dsd-adaptive")
        assert any(drafted == 0 for drafted, _ in record.windows[1:])

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
