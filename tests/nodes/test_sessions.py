"""Sessions: refused, several at once, closed in the middle, abandoned; slots always come back."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest
from node_harness import (
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
from dsdlab.models.compute import ThreadCompute
from dsdlab.models.drafters import ModelDrafter
from dsdlab.models.emulated import EmulatedEngine, EmulatedProfile
from dsdlab.nodes import MODES, DrafterNode, GenerationFailed, GenerationRecord, GenerationRequest
from dsdlab.policies import PolicyError
from dsdlab.protocol import Refused
from dsdlab.protocol.frames import (
    Close,
    Commit,
    Error,
    Ping,
    Pong,
    Resume,
    Verdict,
    digest_ids,
    pack_ids,
    unpack_ids,
)
from dsdlab.protocol.memory import Faults
from dsdlab.sim.compute import SimCompute
from dsdlab.sim.loop import run

PROMPT = [5, 3, 9, 5, 3, 9, 5]
N = len(PROMPT)


def request_for(mode: str, n: int = 20, gamma: int = 4, seed: int = 1) -> GenerationRequest:
    return GenerationRequest(PROMPT, mode, gamma=gamma, sampling=Sampling(1.0, seed=seed), max_new_tokens=n)


# refusals ----------------------------------------------------------------------------------------

REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown mode": ({"mode": "dsd-telepathy"}, "mode"),
    "no drafter beside the target": ({"mode": "cloud-sd", "gamma": 4}, "mode"),
    "edge-sd needs no verifier": ({"mode": "edge-sd"}, "mode"),
    "empty prompt": ({"prompt": b""}, "prompt"),
    "prompt id outside the vocabulary": ({"prompt": pack_ids([1, 1024])}, "prompt"),
    "committed id outside the vocabulary": ({"committed": pack_ids([1024])}, "prompt"),
    "committed past the end": ({"committed": pack_ids([1] * 12)}, "prompt"),
    "half an id": ({"prompt": b"\1\0\0\1"}, "bad-frame"),
    "no tokens wanted": ({"max_new_tokens": 0}, "sampling"),
    "too long for the context": ({"max_new_tokens": 58}, "context"),
    "prompt longer than the context": ({"prompt": pack_ids([1] * 65), "max_new_tokens": 1}, "context"),
    "temperature": ({"temperature": -1.0}, "sampling"),
    "not a temperature": ({"temperature": float("nan")}, "sampling"),
    "top_p": ({"top_p": 0.0}, "sampling"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_session_leaves_the_node_as_it_was(name: str) -> None:
    changes, code = REFUSALS[name]

    async def main() -> None:
        world = World(emulated(max_context=64))
        raw = await Raw.dial(world)
        await raw.send(open_frame(**changes))
        error = await raw.recv()
        assert isinstance(error, Error)
        assert (error.session, error.code) == (1, code)
        assert error.message
        assert "\n" not in error.message
        assert world.verifier.n_sessions == 0
        assert world.free_slots() == 4
        await raw.send(open_frame(), Ping(3, 0.0))  # the connection is as good as new, the number free
        assert isinstance(await raw.recv(), Pong | Commit)
        assert isinstance(await raw.recv(), Pong | Commit)

    run(main())


@pytest.mark.parametrize("mode", ["cloud-ar", "dsd-sync", "dsd-pipelined", "dsd-stream"])
def test_a_refusal_reaches_the_user_with_its_reason(mode: str) -> None:
    async def main() -> None:
        world = World(emulated(max_context=64))
        edge = emulated(0.5, slots=1)
        client = world.client(ModelDrafter(edge))
        with pytest.raises(GenerationFailed, match=r"7 prompt tokens and 90 new ones are 97; .* is 64") as e:
            await client.generate(request_for(mode, n=90))
        assert e.value.code == "context"
        bad = replace(request_for(mode), prompt_ids=[1, 5000])
        with pytest.raises(GenerationFailed, match="outside the vocabulary of 1024"):
            await client.generate(bad)
        edge.close(edge.open())
        record = await client.generate(request_for(mode))
        check(record, alone(world.target, request_for(mode)))
        assert world.dials == 1

    run(main())


def test_what_no_node_could_serve_is_refused_before_anything_is_sent() -> None:
    for changes, reason in (
        ({"prompt_ids": []}, "prompt_ids is empty"),
        ({"mode": "magic"}, "mode is 'magic'; allowed: cloud-ar, cloud-sd, edge-sd, dsd-sync"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; allowed: 1 or more"),
        ({"gamma": -1}, "gamma is -1; allowed: 0 to 256"),
        ({"gamma": 257}, "gamma is 257; allowed: 0 to 256"),
    ):
        with pytest.raises(ValueError, match=reason):
            replace(request_for("dsd-sync"), **changes)


def test_modes_the_node_lacks_parts_for() -> None:
    async def main() -> None:
        world = World(emulated())
        for mode in ("dsd-sync", "edge-sd"):
            with pytest.raises(GenerationFailed) as e:
                await world.client().generate(request_for(mode))
            assert e.value.code == "mode"
        with pytest.raises(GenerationFailed, match="7 prompt tokens and 50 new ones"):
            await world.client(emulated_drafter(1.0), emulated(max_context=32)).generate(
                request_for("edge-sd", n=50)
            )
        for ids in ([1, 1024], [-1]):
            with pytest.raises(GenerationFailed, match="outside the vocabulary of 1024"):
                await world.client(emulated_drafter(1.0), emulated()).generate(
                    replace(request_for("edge-sd"), prompt_ids=ids)
                )

    run(main())


def test_an_unknown_policy_ends_its_session_alone() -> None:
    async def main() -> None:
        world = World(emulated())
        client = world.client(emulated_drafter(0.5))
        with pytest.raises(PolicyError, match=r"unknown window policy 'oracle'; installed: .*static"):
            await client.generate(replace(request_for("dsd-sync"), policy="oracle"))
        await world.quiet()
        assert world.verifier.n_sessions == 0
        assert world.free_slots() == 4
        check(await client.generate(request_for("dsd-sync")), alone(world.target, request_for("dsd-sync")))

    run(main())


def test_a_wrong_token_is_refused() -> None:
    async def main() -> None:
        world = World(emulated(), token="s3cret")
        with pytest.raises(Refused, match="wrong token") as e:
            await world.client(token="guess").generate(request_for("cloud-ar"))
        assert e.value.code == "token"
        check(
            await world.client().generate(request_for("cloud-ar")),
            alone(world.target, request_for("cloud-ar")),
        )

    run(main())


def test_a_drafted_id_outside_the_vocabulary_ends_the_session_alone() -> None:
    async def main() -> None:
        world = World(emulated())
        raw = await Raw.dial(world)
        await raw.send(open_frame(), open_frame(session=2))
        assert {(await raw.recv()).session, (await raw.recv()).session} == {1, 2}
        await raw.send(draft_frame(N + 1, [3, 1024]))
        error = await raw.recv()
        assert isinstance(error, Error)
        assert (error.session, error.code) == (1, "bad-frame")
        await raw.send(draft_frame(N + 1, [3], session=2))
        assert isinstance(await raw.recv(), Verdict)
        assert world.verifier.n_sessions == 1
        assert world.free_slots() == 3

    run(main())


# busy --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["cloud-ar", "cloud-sd", "dsd-sync", "dsd-pipelined", "dsd-stream"])
def test_busy_is_waited_for(mode: str) -> None:
    """The only slot is taken for three seconds; the generation then runs, exactly."""

    async def main() -> None:
        world = World(emulated(slots=1), cloud_drafter=emulated_drafter(0.7))
        raw = await Raw.dial(world)
        await raw.send(open_frame(max_new_tokens=100))
        await raw.recv()
        watch = Watch()
        pending = asyncio.create_task(world.client(emulated_drafter(0.7)).generate(request_for(mode), watch))
        await asyncio.sleep(3.0)
        assert not pending.done()
        assert not watch.pieces
        await raw.send(Close(1))
        check(await pending, alone(world.target, request_for(mode)), watch)
        await world.quiet()
        assert world.free_slots() == 1

    run(main())


def test_busy_of_the_drafter_beside_the_target() -> None:
    """The target has room, its drafter has not: busy as well, and the target's slot is given back."""

    async def main() -> None:
        drafter = emulated(0.7, slots=1)
        world = World(emulated(), cloud_drafter=ModelDrafter(drafter))
        taken = drafter.open()
        raw = await Raw.dial(world)
        await raw.send(open_frame(mode="cloud-sd", gamma=4))
        first = await raw.recv()
        error = first if isinstance(first, Error) else await raw.recv()
        assert isinstance(error, Error)
        assert error.code == "busy"
        assert error.retry_after_ms > 0
        assert world.free_slots() == 4
        drafter.close(taken)
        check(
            await world.client().generate(request_for("cloud-sd")),
            alone(world.target, request_for("cloud-sd")),
        )

    run(main())


# several at once ---------------------------------------------------------------------------------


def test_many_sessions_over_many_connections() -> None:
    """Twelve clients on four slots, all modes mixed: each gets its own text, whoever runs beside it."""

    async def main() -> None:
        target = emulated()
        world = World(target, compute=Costly(0.01), cloud_drafter=emulated_drafter(0.6, slots=8))
        modes = ("cloud-ar", "cloud-sd", "dsd-sync")
        requests = [request_for(modes[i % 3], n=15 + i, gamma=1 + i % 5, seed=i) for i in range(12)]
        records = await asyncio.gather(*(world.client(emulated_drafter(0.6)).generate(r) for r in requests))
        for record, request in zip(records, requests, strict=True):
            check(record, alone(target, request), note=str(request))
        await world.quiet()
        assert world.verifier.n_sessions == 0
        assert world.free_slots() == 4

    run(main())


def test_several_sessions_over_one_connection() -> None:
    """Streams and windows of five sessions interleave; each is whole, in order and its own."""

    async def main() -> None:
        target = emulated(slots=5)
        world = World(target, compute=Costly(0.01), cloud_drafter=emulated_drafter(0.5, slots=5))
        raw = await Raw.dial(world)
        modes = {1: "cloud-ar", 2: "cloud-sd", 3: "dsd-sync", 4: "dsd-sync", 5: "cloud-ar"}
        for session, mode in modes.items():
            await raw.send(
                open_frame(session=session, mode=mode, gamma=3 * (mode == "cloud-sd"), seed=session)
            )
        texts: dict[int, list[int]] = {s: [] for s in modes}
        windows = dict.fromkeys(modes, ())
        orders: list[int] = []
        while any(len(t) < 12 for t in texts.values()):
            frame = await raw.recv()
            s = frame.session
            orders.append(s)
            text = texts[s]
            if isinstance(frame, Commit):
                assert frame.base == N + len(text)
                text += unpack_ids(frame.ids)
            else:
                assert isinstance(frame, Verdict)
                assert frame.base == N + len(text)
                text += [*windows[s][: frame.accepted], frame.next_id]
            if modes[s] == "dsd-sync" and len(text) < 12:
                right = [target.token(s, N + len(text) + i) for i in range(min(4, 11 - len(text)))]
                windows[s] = tuple(right[:2] + [0] * len(right[2:]))  # two right, the rest wrong
                await raw.send(draft_frame(N + len(text), windows[s], session=s))
        for s, text in texts.items():
            assert text == [target.token(s, N + i) for i in range(12)], s
        assert orders != sorted(orders)
        await raw.silence()
        await raw.send(*(Close(s) for s in modes))
        await world.quiet()
        assert world.verifier.n_sessions == 0
        assert world.free_slots() == 5

    run(main())


def test_one_node_generates_again_and_again() -> None:
    async def main() -> None:
        world = World(emulated(), cloud_drafter=emulated_drafter(0.6))
        client = world.client(emulated_drafter(0.6), emulated())
        for i in range(12):
            mode = ("cloud-ar", "cloud-sd", "dsd-sync", "edge-sd")[i % 4]
            request = request_for(mode, n=1 + i, seed=i)
            check(await client.generate(request), alone(world.target, request))
        await world.quiet()
        assert world.dials == 1
        assert world.verifier.n_sessions == 0

    run(main())


# ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["cloud-ar", "cloud-sd", "dsd-sync", "dsd-stream"])
@pytest.mark.parametrize("after_s", [0.0, 0.005, 0.015, 0.1, 0.105])
def test_close_in_mid_generation_frees_the_slot(mode: str, after_s: float) -> None:
    async def main() -> None:
        drafter = emulated(0.5, slots=1)
        world = World(emulated(slots=1), compute=Costly(0.01), cloud_drafter=ModelDrafter(drafter))
        raw = await Raw.dial(world)
        await raw.send(open_frame(mode=mode, gamma=4 * (mode == "cloud-sd"), max_new_tokens=900))
        await asyncio.sleep(after_s)
        await raw.send(Close(1))
        await asyncio.sleep(0.1)
        assert world.verifier.n_sessions == 0
        assert world.free_slots() == 1
        drafter.close(drafter.open())
        await raw.send(Close(1), open_frame(session=1), Ping(1, 0.0))  # closed is closed: a late copy
        while not isinstance(frame := await raw.recv(), Pong):
            assert isinstance(frame, Commit)
        await raw.silence()
        await raw.send(open_frame(session=2))
        assert isinstance(await raw.recv(), Commit)

    run(main())


@pytest.mark.parametrize("mode", MODES)
def test_a_cancelled_generation_gives_everything_back(mode: str) -> None:
    """Cancelled at any instant: slots free at both ends, and the same node generates on."""

    async def main(after_s: float) -> None:
        edge, beside = emulated(0.5, slots=1), emulated(0.5, slots=1)
        local = emulated(slots=1)
        world = World(emulated(slots=1), compute=Costly(0.01), cloud_drafter=ModelDrafter(beside))
        node = DrafterNode(world.dial, Costly(0.004), drafter=ModelDrafter(edge), target=local)
        task = asyncio.create_task(node.generate(request_for(mode, n=400)))
        await asyncio.sleep(after_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(1.0)
        assert world.verifier.n_sessions == 0
        for engine in (edge, beside, local, world.target):
            engine.close(engine.open())
        check(await node.generate(request_for(mode)), alone(world.target, request_for(mode)))

    for step in range(30):
        run(main(0.0031 * step))


@pytest.mark.parametrize("mode", ["cloud-ar", "cloud-sd", "dsd-sync", "dsd-pipelined", "dsd-stream"])
@pytest.mark.parametrize("side", ["up", "down"])
def test_a_client_that_vanishes_is_forgotten_after_the_linger_time(mode: str, side: str) -> None:
    """Gone after any frame, seen first by a send or by a recv: no session and no slot stays behind."""

    async def main(k: int) -> None:
        faults = Faults(drop_after=k)
        links = [(faults, Faults()) if side == "up" else (Faults(), faults)]
        world = World(
            emulated(slots=2),
            compute=Costly(0.01),
            links=links,
            cloud_drafter=emulated_drafter(0.5),
            linger_s=2.0,
            reachable=lambda dial: dial == 1,
        )
        client = world.client(emulated_drafter(0.5), patience_s=0.0)
        task = asyncio.create_task(client.generate(request_for(mode, n=30)))
        await asyncio.wait([task])
        task.exception()
        await asyncio.sleep(1.0)
        await asyncio.sleep(2.0)
        assert world.verifier.n_sessions == 0, k
        assert world.free_slots() == 2, k

    for k in range(1, 14):
        run(main(k))


def test_linger_counts_from_the_last_loss() -> None:
    """A client that comes back and goes again has the whole linger time again."""

    async def main() -> None:
        world = World(emulated(), linger_s=10.0)
        raw = await Raw.dial(world)
        await raw.send(open_frame())
        first = await raw.recv()
        assert isinstance(first, Commit)
        held = [*PROMPT, *unpack_ids(first.ids)]
        resume = Resume(1, len(held), digest_ids(pack_ids(held)))
        for _ in range(4):
            raw.channel.drop()
            await asyncio.sleep(6.0)
            raw = await Raw.dial(world)
            await raw.send(resume)
            assert isinstance(await raw.recv(), Commit)
            assert world.verifier.n_sessions == 1
        raw.channel.drop()
        await asyncio.sleep(9.9)
        assert world.verifier.n_sessions == 1
        await asyncio.sleep(0.2)
        assert world.verifier.n_sessions == 0
        assert world.free_slots() == 4

    run(main())


def test_a_finished_session_can_still_be_read_until_close() -> None:
    """The last Commit was lost with the connection: Resume brings it; the slot is free meanwhile."""

    async def main() -> None:
        world = World(emulated(slots=1))
        raw = await Raw.dial(world)
        await raw.send(open_frame(mode="cloud-ar"))
        await asyncio.sleep(1.0)
        raw.channel.drop()
        assert world.free_slots() == 1
        raw = await Raw.dial(world)
        await raw.send(Resume(1, N, digest_ids(pack_ids(PROMPT))))
        commit = await raw.recv()
        assert isinstance(commit, Commit)
        assert unpack_ids(commit.ids) == [world.target.token(1, N + i) for i in range(12)]
        await raw.send(Close(1))
        await raw.silence()
        assert world.verifier.n_sessions == 0

    run(main())


# copies and strangers ----------------------------------------------------------------------------


def test_resume_is_refused_for_what_is_not_held() -> None:
    async def main() -> None:
        world = World(emulated())
        raw = await Raw.dial(world)
        await raw.send(open_frame())
        first = await raw.recv()
        assert isinstance(first, Commit)
        token = unpack_ids(first.ids)[0]
        for length, ids in (
            (N + 2, [*PROMPT, token, 5]),  # more than the verifier has
            (N + 1, [*PROMPT, token + 1]),  # other tokens
            (N - 1, PROMPT[:-1]),  # less than the prompt
        ):
            await raw.send(Resume(1, length, digest_ids(pack_ids(ids))))
            error = await raw.recv()
            assert isinstance(error, Error)
            assert (error.code, error.session) == ("unknown-session", 1)
        stranger = await Raw.dial(world, node_id="f" * 16)
        await stranger.send(Resume(1, N, digest_ids(pack_ids(PROMPT))), draft_frame(N + 1, [1]))
        for _ in range(2):
            error = await stranger.recv()
            assert isinstance(error, Error)
            assert error.code == "unknown-session"
        await raw.send(draft_frame(N + 1, [1]))  # the session itself is none the worse
        assert isinstance(await raw.recv(), Verdict)

    run(main())


def test_copies_of_open_draft_resume_and_close_change_nothing() -> None:
    async def main() -> None:
        target = emulated()
        world = World(target)
        raw = await Raw.dial(world)
        text = [target.token(1, N + i) for i in range(12)]
        first = open_frame()
        await raw.send(first, first)
        assert isinstance(await raw.recv(), Commit)
        await raw.silence()
        await raw.send(draft_frame(N + 1, text[1:4]), draft_frame(N + 1, text[1:4]))
        verdict = await raw.recv()
        assert isinstance(verdict, Verdict)
        assert (verdict.accepted, verdict.next_id) == (3, text[4])
        lacking = await raw.recv()
        assert isinstance(lacking, Commit)
        assert (lacking.base, unpack_ids(lacking.ids)) == (N + 1, text[1:5])
        await raw.send(first)
        await raw.silence()
        await raw.send(open_frame(committed=pack_ids(text[:2])))  # a late copy of another one
        lacking = await raw.recv()
        assert isinstance(lacking, Commit)
        assert (lacking.base, unpack_ids(lacking.ids)) == (N + 2, text[2:5])
        await raw.send(draft_frame(N + 5, text[5:9]))  # the session goes on where it was
        verdict = await raw.recv()
        assert isinstance(verdict, Verdict)
        assert verdict.accepted == 4
        assert world.verifier.n_sessions == 1
        assert world.free_slots() == 3
        await raw.send(Close(1), Close(1), first, draft_frame(N + 9, [1]), Close(77))
        await raw.silence()
        assert world.verifier.n_sessions == 0
        assert world.free_slots() == 4

    run(main())


def test_open_with_other_content_starts_anew() -> None:
    async def main() -> None:
        target = emulated(slots=1)
        world = World(target)
        raw = await Raw.dial(world)
        await raw.send(open_frame())
        await raw.recv()
        await raw.send(open_frame(seed=2))
        commit = await raw.recv()
        assert isinstance(commit, Commit)
        assert unpack_ids(commit.ids) == [target.token(2, N)]
        assert world.verifier.n_sessions == 1
        assert world.free_slots() == 0

    run(main())


def test_drafts_of_a_lower_epoch_die() -> None:
    async def main() -> None:
        target = emulated()
        world = World(target)
        raw = await Raw.dial(world)
        await raw.send(open_frame())
        await raw.recv()
        await raw.send(draft_frame(N + 1, [0], epoch=5))
        assert isinstance(await raw.recv(), Verdict)
        await raw.send(draft_frame(N + 2, [0], epoch=4))
        await raw.silence()
        await raw.send(draft_frame(N + 2, [0], epoch=5))
        assert isinstance(await raw.recv(), Verdict)
        await raw.send(draft_frame(N + 9, [0], epoch=5))  # beyond the text
        error = await raw.recv()
        assert isinstance(error, Error)
        assert error.code == "unknown-session"
        assert world.free_slots() == 4

    run(main())


def test_a_failing_engine_ends_its_session_with_a_reason() -> None:
    """An engine that breaks in the middle: "internal" to the client, the slot back, the node alive."""

    class Broken(EmulatedEngine):
        broken = False

        def choose(self, *args: Any) -> list[list[int]]:
            if self.broken:
                raise RuntimeError("kernel on fire")
            return super().choose(*args)

    async def main() -> None:
        target = Broken(EmulatedProfile(), slots=1, wait=lambda _: None)
        world = World(target)
        client = world.client(emulated_drafter(0.5))
        watch = Watch(lambda n: setattr(target, "broken", n == 3))
        with pytest.raises(GenerationFailed, match="its log says why") as e:
            await client.generate(request_for("dsd-sync", n=60), watch)
        assert e.value.code == "internal"
        target.broken = False
        assert world.verifier.n_sessions == 0
        check(await client.generate(request_for("dsd-sync")), alone(target, request_for("dsd-sync")))

    run(main())


# clocks ------------------------------------------------------------------------------------------


def test_times_on_the_virtual_clock_are_what_the_parts_cost() -> None:
    """RTT 80 ms, 5 ms a draft, 40 ms a verification: a round of full acceptance takes 140 ms, exactly."""

    async def main() -> None:
        cloud, edge = SimCompute(), SimCompute()
        target = EmulatedEngine(EmulatedProfile(base_s=0.04), wait=cloud.spend)
        drafter = EmulatedEngine(EmulatedProfile(base_s=0.005), wait=edge.spend)
        link = Faults(delay_s=0.04)
        world = World(target, compute=cloud, links=[(link, link)])
        node = DrafterNode(world.dial, edge, drafter=ModelDrafter(drafter))
        assert (await node.ping(3)) == pytest.approx([0.08] * 3)
        record = await node.generate(request_for("dsd-sync", n=26, gamma=4))
        check(record, alone(target, request_for("dsd-sync", n=26)))
        assert record.ttft_s == pytest.approx(0.08 + 0.04)
        gaps = [b[0] - a[0] for a, b in zip(record.commits, record.commits[1:], strict=False)]
        assert gaps == pytest.approx([0.08 + 4 * 0.005 + 0.04] * 5)
        assert record.tpot_s == pytest.approx(0.14 / 5)
        assert record.tau == 5
        assert record.t_draft_s == pytest.approx([0.02] * 5)
        assert record.t_verify_s == pytest.approx([0.04] * 6, abs=2e-6)
        record = await node.generate(request_for("cloud-ar", n=11))
        assert record.tpot_s == pytest.approx(0.04)

    run(main())


def test_ten_minutes_pass_in_well_under_a_second() -> None:
    """A second a round, nearly, for over ten minutes of the loop's clock, every token the target's."""
    request = request_for("dsd-sync", n=2000)

    async def main() -> tuple[GenerationRecord, Watch, float]:
        cloud, edge = SimCompute(), SimCompute()
        target = EmulatedEngine(EmulatedProfile(base_s=0.2), max_context=2048, wait=cloud.spend)
        drafter = EmulatedEngine(EmulatedProfile(base_s=0.05, alpha=0.6), wait=edge.spend)
        link = Faults(delay_s=0.2)
        world = World(target, compute=cloud, links=[(link, link)])
        watch = Watch()
        record = await DrafterNode(world.dial, edge, drafter=ModelDrafter(drafter)).generate(request, watch)
        return record, watch, asyncio.get_running_loop().time()

    begun = time.process_time()
    record, watch, seconds = run(main())
    spent_s = time.process_time() - begun
    check(record, alone(EmulatedEngine(EmulatedProfile()), request), watch)
    assert seconds == pytest.approx(0.8 * (len(record.windows) - 1) + 1.0, rel=0.001)
    assert seconds > 600
    assert spent_s < 1.0


def test_compute_runs_one_piece_at_a_time_in_order() -> None:
    async def main(compute: Any, work: Any) -> list[int]:
        done: list[int] = []

        def piece(i: int) -> int:
            work()
            done.append(i)
            return i

        results = await asyncio.gather(*(compute.run(lambda i=i: piece(i)) for i in range(8)))
        assert [r for r, _ in results] == list(range(8))
        assert all(t.queue_s >= 0 and t.compute_s >= 0 for _, t in results)
        assert results[7][1].queue_s > results[0][1].queue_s
        with pytest.raises(ZeroDivisionError):
            await compute.run(lambda: 1 // 0)
        assert (await compute.run(lambda: 5))[0] == 5
        return done

    virtual = SimCompute()
    assert run(main(virtual, lambda: virtual.spend(0.25))) == list(range(8))
    threaded = ThreadCompute()
    assert asyncio.run(main(threaded, lambda: time.sleep(0.003))) == list(range(8))
    threaded.close()
