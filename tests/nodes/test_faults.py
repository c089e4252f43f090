"""Lost connections, restarted verifiers, duplicates, delays: later, never other, twice or less."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from itertools import repeat

import pytest
from node_harness import (
    Costly,
    Moody,
    Pair,
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
from tiny_models import VOCAB, engine_of, write_tiny_llama

from dsdlab.decoding import Sampling
from dsdlab.models.drafters import Drafter, ModelDrafter, PromptLookup
from dsdlab.models.emulated import EmulatedEngine, EmulatedProfile
from dsdlab.models.weights_io import load_llama_dir
from dsdlab.nodes import MODES, GenerationRecord, GenerationRequest
from dsdlab.nodes.request import STREAMING_MODES
from dsdlab.protocol import ChannelClosed, ConnectFailed, ProtocolError
from dsdlab.protocol.codec import encode
from dsdlab.protocol.frames import (
    PROTOCOL_VERSION,
    Close,
    Commit,
    Resume,
    Verdict,
    Welcome,
    digest_ids,
    pack_ids,
    refusal,
    unpack_ids,
)
from dsdlab.protocol.memory import Faults
from dsdlab.sim.compute import SimCompute
from dsdlab.sim.loop import run

NETWORKED = tuple(mode for mode in MODES if mode != "edge-sd")
PROMPT = [5, 3, 9, 5, 3, 9, 5]
SAMPLING = Sampling(1.0, seed=77)


def request_for(mode: str, n: int = 24, gamma: int = 4) -> GenerationRequest:
    return GenerationRequest(PROMPT, mode, gamma=gamma, sampling=SAMPLING, max_new_tokens=n)


def welcome() -> Welcome:
    return Welcome(PROTOCOL_VERSION, "v" * 16, "t", "", 100, 512, (2,), ("dsd-sync",), 0.0)


def drop(after_up: int | None = None, after_down: int | None = None, delay_s: float = 0.01) -> Pair:
    return (
        Faults(delay_s=delay_s, drop_after=after_up),
        Faults(delay_s=delay_s, drop_after=after_down),
    )


class Slow:
    """A target on the virtual clock: each forward takes 40 ms of it."""

    def __init__(self, alpha: float = 1.0, base_s: float = 0.04, **options: int) -> None:
        self.compute = SimCompute()
        profile = EmulatedProfile(base_s=base_s, alpha=alpha)
        self.engine = EmulatedEngine(profile, wait=self.compute.spend, **options)


# dropped connections -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", NETWORKED)
@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_connection_lost_at_every_frame(mode: str, direction: str) -> None:
    """Shows 7: the first connection breaks after k frames, for every k; nothing is lost or doubled."""
    slow = Slow()
    expected = alone(slow.engine, request_for(mode))
    broken = 0
    for k in range(1, 40):

        async def main(k: int = k) -> tuple[GenerationRecord, Watch]:
            link = drop(after_up=k) if direction == "up" else drop(after_down=k)
            world = World(
                slow.engine,
                compute=SimCompute(),
                links=[link],
                cloud_drafter=emulated_drafter(0.7),
                linger_s=3.0,
            )
            watch = Watch()
            record = await world.client(emulated_drafter(0.7)).generate(request_for(mode), watch)
            await world.quiet()
            assert world.verifier.n_sessions == 0
            assert world.free_slots() == 8
            assert not world.failures
            return record, watch

        record, watch = run(main())
        check(record, expected, watch, f"{mode}, {direction} breaks after {k}")
        broken += record.reconnects
    assert broken >= (4 if mode == "dsd-sync" or direction == "down" else 1)


@pytest.mark.parametrize("mode", NETWORKED)
@pytest.mark.parametrize("k", [3, 4, 5, 6])
def test_every_connection_is_lost_soon(mode: str, k: int) -> None:
    """No connection carries more than a few frames: the generation crawls on and ends exactly.

    Where drafts stream, Steer comes between Resume and the first Draft, and one Draft is sent at a time: the
    next one would break the connection under it.
    """
    k += mode in STREAMING_MODES
    request = replace(request_for(mode), run_ahead=4 if mode == "dsd-pipelined" else 1)

    async def main() -> GenerationRecord:
        target = Slow()
        world = World(
            target.engine,
            compute=target.compute,
            links=repeat(drop(after_up=k, after_down=k)),
            cloud_drafter=emulated_drafter(0.5),
        )
        watch = Watch()
        record = await world.client(emulated_drafter(0.5)).generate(request, watch)
        check(record, alone(target.engine, request), watch)
        return record

    assert run(main()).reconnects >= 2


@pytest.mark.parametrize("after", [0, 1])
def test_a_handshake_that_breaks_is_an_error_and_the_node_lives_on(after: int) -> None:
    async def main() -> None:
        links = [drop(after_up=0)] if after == 0 else [drop(after_down=0)]
        world = World(emulated(), links=links)
        client = world.client(emulated_drafter(0.5))
        with pytest.raises(ChannelClosed):
            await client.generate(request_for("dsd-sync"))
        record = await client.generate(request_for("dsd-sync"))
        check(record, alone(world.target, request_for("dsd-sync")))
        await world.quiet()
        assert world.verifier.n_sessions == 0

    run(main())


@pytest.mark.parametrize("mode", NETWORKED)
def test_a_verifier_out_of_reach_for_a_while(mode: str) -> None:
    async def main() -> None:
        world = World(
            emulated(),
            links=[drop(after_down=4)],
            cloud_drafter=emulated_drafter(0.5),
            reachable=lambda dial: dial == 1 or dial > 6,
        )
        watch = Watch()
        record = await world.client(emulated_drafter(0.5)).generate(request_for(mode), watch)
        check(record, alone(world.target, request_for(mode)), watch)
        assert world.dials == 7
        assert record.reconnects == 1

    run(main())


@pytest.mark.parametrize("mode", NETWORKED)
def test_patience_ends(mode: str) -> None:
    """A verifier that stays away: one clear error after `patience_s`, no slot left behind on the edge."""

    async def main() -> None:
        world = World(
            emulated(),
            links=[drop(after_down=3)],
            cloud_drafter=emulated_drafter(0.5),
            reachable=lambda dial: dial == 1,
            linger_s=2.0,
        )
        edge = emulated(0.5, slots=1)
        client = world.client(ModelDrafter(edge), patience_s=4.0)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        with pytest.raises(ConnectFailed, match="tried for 4 s"):
            await client.generate(request_for(mode))
        assert 2.0 < loop.time() - begun < 5.0
        edge.close(edge.open())
        await world.quiet()
        assert world.verifier.n_sessions == 0
        assert world.free_slots() == 4

    run(main())


# restarted verifiers -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", NETWORKED)
def test_restarted_at_every_commit(mode: str) -> None:
    """Shows 7: the verifier dies at the i-th commit and comes back without its sessions."""
    for i in range(1, 12):

        async def main(i: int = i) -> GenerationRecord:
            target = Slow()
            world = World(target.engine, compute=target.compute, cloud_drafter=emulated_drafter(0.6))
            pending: list[asyncio.Task[None]] = []

            def then(n: int) -> None:
                if n == i:
                    pending.append(asyncio.create_task(world.restart()))

            watch = Watch(then)
            record = await world.client(emulated_drafter(0.6)).generate(request_for(mode), watch)
            check(record, alone(target.engine, request_for(mode)), watch, f"restart at {i}")
            await world.quiet()  # a restart at the last commit begins when all is over
            assert world.restarts == (i <= len(watch.pieces))
            assert world.verifier.n_sessions == 0
            assert world.free_slots() == 8
            return record

        run(main())


@pytest.mark.parametrize("mode", NETWORKED)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_restarts_on_a_real_model(tmp_path, mode: str, precision: str) -> None:
    """Prompt and committed text are prefilled in one block where they were decoded one by one: same bits."""
    weights = load_llama_dir(write_tiny_llama(tmp_path), "")
    sampling = Sampling(1.0, seed=5)
    request = GenerationRequest(
        PROMPT, mode, gamma=5, sampling=sampling, max_new_tokens=90, stop_at_eos=False
    )
    target = engine_of(weights, precision)

    def drafter() -> Drafter:
        return Moody(ModelDrafter(engine_of(weights, "int8")), VOCAB)

    async def main() -> None:
        world = World(
            target, compute=Costly(0.02), cloud_drafter=drafter(), links=repeat(drop(after_down=17))
        )
        pending: list[asyncio.Task[None]] = []

        def then(n: int) -> None:
            if n % 9 == 0:
                pending.append(asyncio.create_task(world.restart()))

        watch = Watch(then)
        record = await world.client(drafter()).generate(request, watch)
        check(record, alone(target, request), watch)
        assert world.restarts >= 1
        assert record.reconnects >= 3

    run(main())


def test_a_window_sent_while_the_last_one_is_judged_gets_its_answer() -> None:
    """The connection breaks under the final verdict; the resumed client's window must not wait for ever."""

    async def main() -> None:
        target = Slow()
        world = World(target.engine, compute=target.compute)
        raw = await Raw.dial(world)
        n = len(PROMPT)
        await raw.send(open_frame(max_new_tokens=4))
        first = await raw.recv()
        assert isinstance(first, Commit)
        text = [target.engine.token(1, n + i) for i in range(4)]
        await raw.send(draft_frame(n + 1, text[1:3]))
        await asyncio.sleep(0.01)  # the verifier is judging now
        raw.channel.drop()
        raw = await Raw.dial(world)
        await raw.send(Resume(1, n + 1, digest_ids(pack_ids([*PROMPT, text[0]]))))
        caught_up = await raw.recv()
        assert isinstance(caught_up, Commit)
        assert caught_up.ids == b""
        await raw.send(draft_frame(n + 1, text[1:3], epoch=1))
        answers = [await raw.recv(), await raw.recv()]
        late, lacking = sorted(answers, key=lambda f: type(f).__name__, reverse=True)
        assert isinstance(late, Verdict)
        assert late.epoch == 0  # of no use to the client
        assert isinstance(lacking, Commit)
        assert lacking.base == n + 1
        assert unpack_ids(lacking.ids) == text[1:]

    run(main())


# duplicates and delays ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", NETWORKED)
@pytest.mark.parametrize("seed", range(6))
def test_duplicates_and_delays(mode: str, seed: int) -> None:
    """Shows 7: every frame comes twice, the copy up to four frames late, over a jittery link."""

    async def main() -> GenerationRecord:
        def faults(s: int) -> Faults:
            return Faults(delay_s=0.03, jitter_s=0.05, duplicate=1.0, duplicate_lag=4, seed=s)

        target = Slow()
        world = World(
            target.engine,
            compute=target.compute,
            links=[(faults(2 * seed), faults(2 * seed + 1))],
            cloud_drafter=emulated_drafter(0.6),
        )
        client = world.client(emulated_drafter(0.6))
        watch = Watch()
        record = await client.generate(request_for(mode), watch)
        check(record, alone(target.engine, request_for(mode)), watch)
        assert not world.failures
        assert record.reconnects == 0
        return record

    assert run(main()).stale_frames > 0


def test_a_commit_is_taken_once_however_it_overlaps() -> None:
    """A hand-written verifier repeats itself, overlaps, and sends frames of other sessions and epochs."""

    async def main() -> None:
        from dsdlab.nodes import DrafterNode
        from dsdlab.protocol.frames import Draft, Hello, Open
        from dsdlab.protocol.memory import memory_pair

        client, server = memory_pair()
        ids = [11, 12, 13, 14, 15]
        n = len(PROMPT)

        async def verifier() -> None:
            assert isinstance(await server.recv(), Hello)
            await server.send(welcome())
            opened = await server.recv()
            assert isinstance(opened, Open)
            s = opened.session
            await server.send(Verdict(s, 0, n, 0, 99, 0, 0))  # before anything was drafted
            await server.send(Commit(s + 1, n, pack_ids([50, 51]), 0, 0, 0, 0, 0))  # another session's
            await server.send(Commit(s, n, pack_ids(ids[:1]), 0, 0, 0, 0, 0))
            await server.send(Commit(s, n, pack_ids(ids[:1]), 0, 0, 0, 0, 0))
            draft = await server.recv()
            assert isinstance(draft, Draft)
            assert draft.base == n + 1
            await server.send(Verdict(s, 3, n + 1, 0, 98, 0, 0))  # another epoch's
            await server.send(Commit(s, n, pack_ids(ids[:3]), 0, 0, 0, 0, 0))  # overlaps and goes on
            draft = await server.recv()
            assert isinstance(draft, Draft)
            assert draft.base == n + 3
            await server.send(Verdict(s, 0, n + 1, 1, 97, 0, 0))  # an older window's
            await server.send(Verdict(s, 0, n + 3, 0, ids[3], 0, 0))
            draft = await server.recv()
            assert isinstance(draft, Draft)
            await server.send(Verdict(s, 0, n + 3, 0, ids[3], 0, 0))  # a copy
            await server.send(Verdict(s, 0, n + 4, 0, ids[4], 0, 0))
            assert isinstance(await server.recv(), Close)

        async def dial():
            return client

        serving = asyncio.create_task(verifier())
        node = DrafterNode(dial, SimCompute(), drafter=PromptLookup())
        watch = Watch()
        record = await node.generate(request_for("dsd-sync", n=5), watch)
        check(record, (ids, "length"), watch)
        assert record.stale_frames == 6
        await serving

    run(main())


def test_a_verdict_for_more_than_was_drafted_is_refused() -> None:
    from dsdlab.nodes import DrafterNode
    from dsdlab.protocol.frames import Draft
    from dsdlab.protocol.memory import memory_pair

    async def main() -> None:
        client, server = memory_pair()

        async def verifier() -> None:
            await server.recv()
            await server.send(welcome())
            opened = await server.recv()
            await server.send(Commit(opened.session, len(PROMPT), pack_ids([9]), 0, 0, 0, 0, 0))
            draft = await server.recv()
            assert isinstance(draft, Draft)
            await server.send(Verdict(opened.session, 0, draft.base, len(draft.ids) // 3 + 1, 5, 0, 0))
            assert isinstance(await server.recv(), Close)

        async def dial():
            return client

        serving = asyncio.create_task(verifier())
        with pytest.raises(ProtocolError, match="drafted ids accepted"):
            await DrafterNode(dial, SimCompute(), drafter=PromptLookup()).generate(request_for("dsd-sync"))
        await serving

    run(main())


def test_a_gap_is_asked_for_again() -> None:
    """A Commit beyond the text's end: reconnect and resume; a verifier that insists is refused. Any number
    of gaps is healed where tokens come in between."""

    class Gappy(World):
        """Commits say that they stand further on than they do: some in a row, or every other one."""

        gaps = 1
        every_other = False
        commits = 0

        async def dial(self):
            channel = await super().dial()
            receive = channel.recv

            async def recv():
                frame = await receive()
                if not isinstance(frame, Commit) or not frame.ids:
                    return frame
                self.commits += 1
                if self.gaps > 0 and (not self.every_other or self.commits % 2 == 0):
                    self.gaps -= 1
                    return Commit(frame.session, frame.base + 2, frame.ids, 0, 0, 0, 0, 0)
                return frame

            channel.recv = recv
            return channel

    async def main(mode: str, gaps: int, every_other: bool = False) -> GenerationRecord:
        world = Gappy(emulated(), compute=Costly(0.02))
        world.gaps, world.every_other = gaps, every_other
        record = await world.client(emulated_drafter(0.5)).generate(request_for(mode))
        check(record, alone(world.target, request_for(mode)))
        return record

    assert run(main("dsd-sync", 2)).reconnects == 2
    assert run(main("cloud-ar", 9, every_other=True)).reconnects == 9
    with pytest.raises(ProtocolError, match="the text ends at"):
        run(main("dsd-sync", 1000))


# connections that were lost and are read late ----------------------------------------------------


@pytest.mark.parametrize("late", ["Open", "Resume"])
def test_a_lost_connection_that_is_read_late_takes_nothing_over(late: str) -> None:
    """What a client said before it came back by another way changes nothing."""

    async def main() -> None:
        target = Slow()
        world = World(target.engine, compute=target.compute)
        n = len(PROMPT)
        old = await Raw.dial(world)
        await old.send(open_frame(mode="cloud-ar"))
        assert isinstance(await old.recv(), Commit)
        new = await Raw.dial(world)
        resume = Resume(1, n, digest_ids(pack_ids(PROMPT)))
        await new.send(resume)
        await asyncio.sleep(0.01)
        await old.send(resume if late == "Resume" else open_frame(mode="cloud-ar"))
        ids: list[int] = []
        while len(ids) < 12:
            frame = await new.recv()
            assert isinstance(frame, Commit)
            ids += unpack_ids(frame.ids)[n + len(ids) - frame.base :]
        assert ids == [target.engine.token(1, n + i) for i in range(12)]
        await new.send(Close(1))
        await world.quiet()
        assert world.verifier.n_sessions == 0
        assert world.free_slots() == 8

    run(main())


def test_a_session_that_is_found_is_not_forgotten_meanwhile() -> None:
    """The linger time runs out while the answer to Resume waits for a frame that is still being sent."""

    async def main() -> None:
        target = Slow()
        world = World(target.engine, compute=target.compute, linger_s=0.05)
        n = len(PROMPT)
        old = await Raw.dial(world)
        await old.send(open_frame())
        assert isinstance(await old.recv(), Commit)
        [session] = world.verifier._sessions.values()
        async with session.sending:
            old.channel.drop()
            await asyncio.sleep(0.01)
            new = await Raw.dial(world)
            await new.send(Resume(1, n, digest_ids(pack_ids(PROMPT))))
            await asyncio.sleep(0.2)
        assert isinstance(await new.recv(), Commit)
        await new.send(draft_frame(n + 1, [], epoch=1))
        assert isinstance(await new.recv(), Verdict)
        new.channel.drop()
        await world.quiet()
        assert world.verifier.n_sessions == 0

    run(main())


def test_a_resume_that_is_broken_off_leaves_no_session_behind() -> None:
    """Its connection ends while it waits: the linger time begins anew."""

    async def main() -> None:
        target = Slow()
        world = World(target.engine, compute=target.compute, linger_s=0.5)
        old = await Raw.dial(world)
        await old.send(open_frame())
        assert isinstance(await old.recv(), Commit)
        [session] = world.verifier._sessions.values()
        async with session.sending:
            old.channel.drop()
            new = await Raw.dial(world)
            await new.send(Resume(1, len(PROMPT), digest_ids(pack_ids(PROMPT))))
            await asyncio.sleep(0.1)
            for task in world._serving:
                task.cancel()
            await asyncio.sleep(0.1)
        await world.quiet()
        assert world.verifier.n_sessions == 0
        assert world.free_slots() == 8

    run(main())


@pytest.mark.parametrize("mode", ["dsd-sync", "dsd-stream"])
def test_what_was_given_up_is_closed_by_the_next_generation(mode: str) -> None:
    """The verifier's one slot is not kept for a session whose client could not come back in time."""

    async def main() -> None:
        target = Slow(slots=1)
        world = World(
            target.engine,
            compute=target.compute,
            links=[drop(after_down=3)],
            reachable=lambda _: not 3.0 < asyncio.get_running_loop().time() < 20.0,
            linger_s=600.0,
        )
        client = world.client(emulated_drafter(0.5), patience_s=2.0)
        await client.connect()
        await asyncio.sleep(3.5)
        with pytest.raises(ConnectFailed):
            await client.generate(request_for(mode))
        assert world.free_slots() == 0
        await asyncio.sleep(20.0)
        record = await client.generate(request_for(mode, n=9))
        check(record, alone(target.engine, request_for(mode, n=9)))
        await world.quiet()
        assert world.verifier.n_sessions == 0
        assert world.free_slots() == 1

    run(main())


@pytest.mark.parametrize("mode", ["dsd-sync", "dsd-stream"])
def test_forgotten_and_lost_at_once(mode: str) -> None:
    """The verifier's last word is that it does not know the session; then nobody answers for a while."""

    async def main() -> None:
        target = Slow()
        world = World(
            target.engine,
            compute=target.compute,
            links=[drop()],
            reachable=lambda dial: dial == 1 or asyncio.get_running_loop().time() > 8.0,
        )

        def then(n: int) -> None:
            if n == 4:
                client = world.channels[0]
                last = encode(refusal("unknown-session", "not held here", session=1))
                client._inbox.append((asyncio.get_running_loop().time(), last))
                world.drop_all()

        watch = Watch(then)
        record = await world.client(emulated_drafter(0.5)).generate(request_for(mode), watch)
        check(record, alone(target.engine, request_for(mode)), watch)
        assert asyncio.get_running_loop().time() > 8.0

    run(main())


def test_a_refusal_for_want_of_room_after_it_seemed_to_be_in() -> None:
    """A late copy of a Commit can tell of a session that is not in: the client looks, and waits for room."""
    from dsdlab.nodes import DrafterNode
    from dsdlab.protocol.frames import Hello, Open
    from dsdlab.protocol.memory import memory_pair

    async def main() -> None:
        client, server = memory_pair()
        ids, n = [11, 12, 13], len(PROMPT)
        busy = refusal("busy", "no room", session=1, retry_after_ms=250)

        async def verifier() -> None:
            assert isinstance(await server.recv(), Hello)
            await server.send(welcome())
            assert isinstance(await server.recv(), Open)
            await server.send(Commit(1, n, pack_ids(ids[:1]), 0, 0, 0, 0, 0))
            await server.send(busy)
            asked = await server.recv()
            assert isinstance(asked, Resume)
            assert asked.length == n + 1
            await server.send(refusal("unknown-session", "not held here", session=1))
            for _ in range(2):
                opened = await server.recv()
                assert isinstance(opened, Open)
                assert unpack_ids(opened.committed) == ids[:1]
                await server.send(busy)
            assert isinstance(await server.recv(), Open)
            await server.send(Commit(1, n + 1, pack_ids(ids[1:]), 0, 0, 0, 0, 0))
            assert isinstance(await server.recv(), Close)

        async def dial():
            return client

        serving = asyncio.create_task(verifier())
        watch = Watch()
        record = await DrafterNode(dial, SimCompute()).generate(request_for("cloud-ar", n=3), watch)
        check(record, (ids, "length"), watch)
        assert asyncio.get_running_loop().time() == pytest.approx(0.5)
        await serving

    run(main())


@pytest.mark.parametrize("slots", [1, 8])
def test_opened_again_and_again_while_the_first_one_ends(slots: int) -> None:
    """A client whose connections break at once: each Open comes while the session before is still in a
    step; one session is left, and one slot taken."""

    async def main() -> None:
        target = Slow(slots=slots)
        world = World(target.engine, compute=target.compute)
        for _ in range(4):
            raw = await Raw.dial(world)
            await raw.send(open_frame(mode="dsd-sync"))
            await asyncio.sleep(0.005)
        assert isinstance(await raw.recv(), Commit)
        assert world.verifier.n_sessions == 1
        assert world.free_slots() == slots - 1
        await raw.send(Close(1))
        await world.quiet()
        assert world.verifier.n_sessions == 0
        assert world.free_slots() == slots
        assert world.verifier._of_node == {}

    run(main())


# stress ------------------------------------------------------------------------------------------


def one_random_run(seed: int) -> None:
    """Everything at once: mode, window, drafter, faults on every connection, restarts at random times."""
    rng = random.Random(seed)
    mode = rng.choice(NETWORKED)
    vocab = rng.choice([8, 40, 1024])
    eos = (rng.randrange(1, vocab),) if rng.random() < 0.5 else ()
    alpha = rng.choice([0.0, 0.3, 0.8, 1.0])

    def faults() -> Faults:
        return Faults(
            delay_s=rng.choice([0.0, 0.001, 0.05]),
            jitter_s=rng.choice([0.0, 0.02]),
            duplicate=rng.choice([0.0, 0.0, 0.3, 1.0]),
            duplicate_lag=rng.randrange(4),
            drop_after=rng.choice([None, None, rng.randrange(2, 25)]),
            seed=rng.randrange(1 << 30),
        )

    request = GenerationRequest(
        [rng.randrange(1, vocab) for _ in range(rng.randrange(1, 12))],
        mode,
        gamma=rng.choice([int(mode == "dsd-pipelined"), 1, 2, 4, 7, 16]),
        run_ahead=rng.choice([16, 32]),
        free_run=rng.random() < 0.5,
        sampling=Sampling(rng.choice([0.0, 1.0]), seed=rng.randrange(1 << 40)),
        max_new_tokens=rng.choice([1, 2, 5, 20, 60]),
        stop_at_eos=rng.random() < 0.8,
    )

    async def main() -> None:
        compute = SimCompute()
        profile = EmulatedProfile(base_s=rng.choice([0.0, 0.01, 0.1]), vocab_size=vocab)
        target = EmulatedEngine(profile, slots=2, wait=compute.spend)
        target.info = type(target.info)(
            **{f: getattr(target.info, f) for f in target.info.__dataclass_fields__} | {"eos_ids": eos}
        )

        def drafter() -> Drafter:
            return PromptLookup() if alpha == 0.3 else emulated_drafter(alpha, vocab_size=vocab)

        world = World(
            target,
            compute=compute,
            links=((faults(), faults()) for _ in range(60)),
            cloud_drafter=drafter(),
            linger_s=rng.choice([0.02, 60.0]),
        )

        async def kill() -> None:
            for _ in range(rng.randrange(3)):
                await asyncio.sleep(rng.random())
                await world.restart()

        watch = Watch()
        node = world.client(drafter())
        await node.connect()
        killer = asyncio.create_task(kill())
        record = await node.generate(request, watch)
        check(record, alone(target, request), watch)
        assert not world.failures
        killer.cancel()
        await node.disconnect()
        await asyncio.sleep(120.0)
        assert world.verifier.n_sessions == 0
        assert world.free_slots() == 2

    run(main())


@pytest.mark.parametrize("block", range(10))
def test_random_runs(block: int) -> None:
    for seed in range(30 * block, 30 * (block + 1)):
        try:
            one_random_run(seed)
        except BaseException as e:
            e.add_note(f"one_random_run({seed})")
            raise
