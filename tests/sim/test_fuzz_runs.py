"""Fuzzed runs: exact whatever happens, repeatable from their seed; and the checks can fail."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from click.testing import CliRunner

from dsdlab.cli import main
from dsdlab.decoding import Sampling
from dsdlab.models.base import Chunk
from dsdlab.nodes import MODES, text, verifier
from dsdlab.nodes.draft_stream import DraftStream
from dsdlab.nodes.drafter import DrafterNode
from dsdlab.nodes.step import judge
from dsdlab.nodes.verifier import VerifierNode
from dsdlab.policies import Decision, WindowPolicy, window_policy_names
from dsdlab.policies.registry import offer
from dsdlab.protocol.channel import ChannelClosed
from dsdlab.protocol.frames import Close, Hello, Ping, Pong
from dsdlab.sim.channel import SimLink
from dsdlab.sim.fuzz import fuzz, repeat_command, show
from dsdlab.sim.fuzz_draw import Situation, described_situation, draw, policy_names
from dsdlab.sim.fuzz_faults import FrameLog, RoughChannel, Roughness
from dsdlab.sim.fuzz_models import HashEngine, HashModel, Whims, said_alone
from dsdlab.sim.fuzz_play import play
from dsdlab.sim.loop import run
from dsdlab.sim.profile import LinkProfile

RUNS = 700


# the promise -------------------------------------------------------------------------------------


def test_runs_are_exact() -> None:
    """Every mode and policy, everything that may go wrong: the ids are the target's alone."""
    report = fuzz(1_000_000, RUNS)
    assert report.failures == []
    assert report.exact_line == f"exact: {RUNS} of {RUNS} runs"
    assert report.generations > RUNS
    assert report.unfinished < 0.1 * report.generations
    assert report.tokens > 10 * RUNS


@pytest.mark.parametrize("policy", policy_names())
def test_every_policy_is_held_to_it(policy: str) -> None:
    assert fuzz(2_000_000, 40, policies=[policy]).failures == []


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_held_to_it(mode: str) -> None:
    assert fuzz(3_000_000, 25, modes=[mode]).failures == []


# what is drawn -----------------------------------------------------------------------------------


def situations(n: int = 1500) -> list[Situation]:
    return [draw(seed) for seed in range(n)]


def test_everything_is_drawn() -> None:
    """Modes, policies and faults of all kinds come often enough to meet each other."""
    drawn = situations()
    clients = [client for s in drawn for client in s.clients]
    requests = [r for client in clients for r in client.requests]
    for mode in MODES:
        assert sum(r.mode == mode for r in requests) > 50, mode
    for policy in policy_names():
        assert sum(r.policy == policy for r in requests) > 50, policy
    steps = [step for client in clients for step in client.steps]
    often = {
        "restarts": sum(bool(s.restarts) for s in drawn),
        "several clients": sum(len(s.clients) > 1 for s in drawn),
        "too few slots": sum(s.slots < len(s.clients) for s in drawn),
        "emulated": sum(s.kind == "emulated" for s in drawn),
        "ends of sequence": sum(bool(s.eos_ids) for s in drawn),
        "resets": sum(bool(c.drops_s) for c in clients),
        "loss": sum(any(link.loss_pct for link in c.links) for c in clients),
        "jitter": sum(any(link.jitter_ms for link in c.links) for c in clients),
        "other networks": sum(len(c.links) > 1 for c in clients),
        "partitions": sum("partitioned" in step.changes for step in steps),
        "jumps of the round trip": sum("rtt_ms" in step.changes for step in steps),
        "patience that ends": sum(c.may_give_up for c in clients),
        "copies": sum(c.up.duplicate > 0 for c in clients),
        "frames out of order": sum(c.down.reorders for c in clients),
        "lost pongs": sum(c.down.lose_pong > 0 for c in clients),
        "full sockets": sum(c.up.slow > 0 for c in clients),
        "users who leave": sum(c.leaves_s is not None for c in clients),
        "free run": sum(r.free_run and r.mode == "dsd-stream" for r in requests),
        "beside": sum(r.beside > 0 for r in requests),
        "one token": sum(r.max_new_tokens == 1 for r in requests),
        "a hundred": sum(r.max_new_tokens > 100 for r in requests),
        "no window": sum(r.gamma == 0 for r in requests),
        "sampled": sum(r.sampling.temperature > 0 for r in requests),
        "silent drafters": sum(c.drafter.silent == 1.0 for c in clients),
        "alien ids": sum(c.drafter.alien > 0 for c in clients),
    }
    assert {what: n for what, n in often.items() if n < 30} == {}


def test_a_seed_is_a_run() -> None:
    """The same situation, frame by frame at the same instants; another process does the same."""
    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    for seed in range(40):
        same = show(seed) == show(seed)
        assert same, seed
    here = fuzz(0, 60, workers=1)
    assert fuzz(0, 60, workers=2) == here


def test_modes_and_policies_to_draw_from_change_nothing_else() -> None:
    for seed in range(50):
        wide, narrow = draw(seed), draw(seed, ["dsd-stream"], ["static"])
        assert [c.links for c in narrow.clients] == [c.links for c in wide.clients]
        assert narrow.restarts == wide.restarts
        assert all(r.mode == "dsd-stream" for c in narrow.clients for r in c.requests)
    named = [draw(seed, [], ["ucb"]) for seed in range(50)]
    assert {r.policy for s in named for c in s.clients for r in c.requests} == {"ucb"}


def test_a_situation_in_words_names_what_is_special() -> None:
    for seed in range(100):
        situation = draw(seed)
        words = described_situation(situation)
        assert f"seed {seed}:" in words
        assert words.count("client ") == len(situation.clients)
        assert words.count("asks: ") == sum(len(c.requests) for c in situation.clients)
        assert ("restarts" in words) == bool(situation.restarts)


# the parts ---------------------------------------------------------------------------------------


def test_a_hash_models_token_hangs_on_the_whole_text() -> None:
    model = HashModel(3, 30)
    prompt = list(range(10))
    ids, finish = said_alone(model, prompt, Sampling(), 40, ())
    assert finish == "length"
    for at in (0, 4, 9):
        other = [*prompt]
        other[at] = 29
        changed, _ = said_alone(model, other, Sampling(), 40, ())
        assert sum(a == b for a, b in zip(ids, changed, strict=True)) < 12
    eos = ids[5]
    assert said_alone(model, prompt, Sampling(), 40, (eos,)) == (ids[: ids.index(eos) + 1], "eos")


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, 5, 0.9, 11)])
def test_a_hash_engine_says_what_the_model_says(sampling: Sampling) -> None:
    model = HashModel(4, 16)
    spent: list[float] = []
    engine = HashEngine(model, base_s=1.0, row_s=0.5, spend=spent.append)
    prompt = [1, 2, 3]
    expected, _ = said_alone(model, prompt, sampling, 20, ())
    slot = engine.open()
    ids, accepted, n = [*prompt], 0, 0
    while n < 15:
        draft = [*expected[n : n + 3]]
        draft[-1] = (draft[-1] + n % 2) % 16
        accepted, next_id = judge(engine, slot, ids, draft, sampling)
        ids += [*draft[:accepted], next_id]
        n += accepted + 1
        assert engine.length(slot) == len(ids) - 1
    assert ids[3:] == expected[: len(ids) - 3]
    assert spent[0] == 1.0 + 0.5 * 6
    row = engine.extend([Chunk(slot, ids[-1:], 1)])[0]
    assert row.shape == (1, 16)


def test_a_drafter_with_whims() -> None:
    model = HashModel(5, 16)
    inner = HashEngine(model, spend=lambda _: None)
    from dsdlab.models.drafters import ModelDrafter

    true, _ = said_alone(model, [1], Sampling(), 4, ())
    seen = set()
    drafter = Whims(
        ModelDrafter(inner), random.Random(1), 16, silent=0.25, short=0.25, wrong=0.25, alien=0.25
    )
    slot = drafter.open()
    for _ in range(100):
        out = drafter.propose(slot, [1], 4, Sampling())
        if not out:
            seen.add("silent")
        elif len(out) < 4:
            seen.add("short")
            assert out == true[: len(out)]
        elif max(out) >= 16:
            seen.add("alien")
        else:
            seen.add("wrong")
            assert sum(a != b for a, b in zip(out, true, strict=True)) == 1
        assert len(drafter.by_model) == len(out)
    assert seen == {"silent", "short", "wrong", "alien"}


def through(rough: Roughness, frames: list[Any]) -> list[Any]:
    """What arrives of frames that are sent 10 ms apart, in order."""

    async def go() -> list[Any]:
        here, there = SimLink(LinkProfile(rtt_ms=2.0)).pair()
        channel = RoughChannel(here, rough, random.Random(2), FrameLog(True), "one")
        for frame in frames:
            await channel.send(frame)
            await asyncio.sleep(0.01)
        await asyncio.sleep(1.0)
        await channel.close()
        out = []
        while True:
            try:
                out.append(await there.recv())
            except ChannelClosed:
                return out

    return run(go())


FRAMES = [Ping(n, 0.0) for n in range(100)]


def test_a_rough_channel_does_what_it_is_told() -> None:
    assert through(Roughness(), FRAMES) == FRAMES
    twice = through(Roughness(duplicate=1.0, late_s=0.05), FRAMES)
    assert len(twice) == 200
    assert sorted(twice, key=lambda f: f.nonce)[::2] == FRAMES
    assert twice != sorted(twice, key=lambda f: f.nonce)
    for rough in (Roughness(hold=0.2, late_s=0.05), Roughness(swap=0.2, late_s=0.05)):
        late = through(rough, FRAMES)
        assert late != FRAMES
        assert sorted(late, key=lambda f: f.nonce) == FRAMES
    swapped = [f.nonce for f in through(Roughness(swap=1.0, late_s=0.05), FRAMES[:10])]
    assert sorted(swapped) == list(range(10))  # nothing follows the last: it comes all the same
    pongs = [Pong(n, 0.0) for n in range(100)]
    assert 0 < len(through(Roughness(lose_pong=0.5), pongs)) < 100
    assert through(Roughness(lose_pong=1.0), FRAMES) == FRAMES
    hello = Hello(2, "n", "", "", "", 0.0)
    assert through(Roughness(duplicate=1.0, hold=0.5, swap=0.5, late_s=0.1), [hello]) == [hello]


def test_what_is_kept_for_later_dies_with_its_connection() -> None:
    async def go() -> None:
        here, there = SimLink(LinkProfile()).pair()
        channel = RoughChannel(here, Roughness(hold=1.0, late_s=0.5), random.Random(1), FrameLog(False), "")
        await channel.send(Close(1))
        here.drop()
        await asyncio.sleep(1.0)
        with pytest.raises(ChannelClosed):
            await there.recv()

    run(go())


# the checks can fail -----------------------------------------------------------------------------


def caught(*, within: int = 300, modes: tuple[str, ...] = (), policies: tuple[str, ...] = ()) -> str:
    """What the first run says that finds something wrong."""
    for seed in range(within):
        if wrong := play(draw(seed, modes, policies)).wrong:
            return "; ".join(wrong)
    return ""


@pytest.fixture
def often() -> Iterator[Callable[[], bool]]:
    """True every seventh time."""
    numbers = count(1)
    yield lambda: next(numbers) % 7 == 0


NETWORKED = [mode for mode in MODES if mode != "edge-sd"]


@pytest.mark.parametrize("mode", NETWORKED)
def test_a_wrong_token_is_found(mode: str, monkeypatch: pytest.MonkeyPatch, often: Any) -> None:
    def wrong(engine: Any, slot: int, ids: Any, draft: Any, sampling: Any) -> tuple[int, int]:
        accepted, next_id = judge(engine, slot, ids, draft, sampling)
        return accepted, (next_id + 1) % engine.info.vocab_size if often() else next_id

    monkeypatch.setattr("dsdlab.nodes.verifier.judge", wrong)
    monkeypatch.setattr("dsdlab.nodes.step.judge", wrong)
    assert "where the target alone says" in caught(modes=(mode,))


@pytest.mark.parametrize("mode", NETWORKED)
def test_a_doubled_token_is_found(mode: str, monkeypatch: pytest.MonkeyPatch, often: Any) -> None:
    append = text.Text.append

    def twice(self: text.Text, new: list[int]) -> list[int]:
        return append(self, [*new, new[-1]] if often() else new)

    monkeypatch.setattr(text.Text, "append", twice)
    assert "where the target alone says" in caught(modes=(mode,))


@pytest.mark.parametrize("mode", NETWORKED)
def test_a_missing_token_is_found(mode: str, monkeypatch: pytest.MonkeyPatch, often: Any) -> None:
    append = text.Text.append

    def less(self: text.Text, new: list[int]) -> list[int]:
        return append(self, new[1:] if len(new) > 1 and often() else new)

    monkeypatch.setattr(text.Text, "append", less)
    if mode == "cloud-ar":  # which commits one at a time
        monkeypatch.setattr(text.Text, "append", lambda self, new: append(self, new if not often() else []))
    assert caught(modes=(mode,))


def test_a_commit_that_lacks_its_end_is_found(monkeypatch: pytest.MonkeyPatch, often: Any) -> None:
    """The client asks again at the gap; at the end of a text there is none to ask about, and it hangs."""
    commit = VerifierNode._commit

    async def short(self: Any, session: Any, step: Any) -> None:
        await commit(self, session, replace(step, ids=step.ids[:-1]) if often() else step)

    monkeypatch.setattr(VerifierNode, "_commit", short)
    assert "hangs: nothing is left to run" in caught(modes=("cloud-ar", "dsd-stream"))


def test_a_client_that_does_not_skip_what_it_has_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text.Text, "merge", lambda self, base, new: self.append(new) if new else [])  # noqa: ARG005
    assert "where the target alone says" in caught(modes=("cloud-ar",))


def test_a_client_that_takes_any_verdict_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsdlab.protocol.frames import Commit, Verdict

    async def careless(self: Any, channel: Any, run: Any, base: int, n_drafted: int) -> Any:  # noqa: ARG001
        while True:
            frame = await run.next(channel)
            if isinstance(frame, Commit) and run.take(frame, 0.0):
                return None
            if isinstance(frame, Verdict):
                return frame

    monkeypatch.setattr(DrafterNode, "_await_verdict", careless)
    assert "where the target alone says" in caught(modes=("dsd-sync",))


def test_a_stop_that_is_missed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = text.apply_limits
    monkeypatch.setattr(text, "apply_limits", lambda new, n, most, _: limits(new, n, most, ()))
    assert "where the target alone says" in caught()


def test_a_leaked_slot_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def forget(self: Any, session: Any) -> None:
        self._forget(session)

    monkeypatch.setattr(VerifierNode, "_end", forget)
    assert "slots left" in caught()


def test_a_session_that_stays_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VerifierNode, "_reap_later", lambda self, session: None)  # noqa: ARG005
    assert "still holds" in caught()


def test_a_drafter_that_sleeps_through_a_commit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def forgetful(self: DraftStream) -> None:
        self._changed = False
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter

    monkeypatch.setattr(DraftStream, "_change", forgetful)
    assert "hangs" in caught(within=1000, modes=("dsd-pipelined",))


def test_a_chain_that_goes_on_after_a_mismatch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that drops its tail without a new epoch: the verifier waits for what it has let die."""

    def cut(self: DraftStream) -> None:
        self._tail, self._sent, self._fresh = [], 0, True

    monkeypatch.setattr(DraftStream, "_cut", cut)
    assert "hangs" in caught(modes=("dsd-pipelined",))


def test_an_exception_that_nobody_sees_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wake = verifier.TargetStream.wake

    def broken(self: Any) -> None:
        wake(self)
        asyncio.get_running_loop().call_soon(_fail)

    monkeypatch.setattr(verifier.TargetStream, "wake", broken)
    assert "unhandled: ZeroDivisionError" in caught(modes=("dsd-stream",))


def _fail() -> None:
    raise ZeroDivisionError


class Greedy(WindowPolicy):
    """A user's own, which fails when a window was refused."""

    def __init__(self, gamma: int) -> None:
        self._gamma = gamma

    def decide(self) -> Decision:
        return Decision(self._gamma)

    def observe(self, outcome: Any) -> None:
        self._gamma = outcome.drafted // outcome.accepted


def test_a_policy_that_fails_is_found_and_its_seed_repeats_it() -> None:
    offer("greedy", Greedy)
    report = fuzz(0, 30, policies=["greedy"], workers=1)
    assert report.failures
    seed = report.failures[0].seed
    _, again = show(seed, [], ["greedy"])
    assert again.failures == [report.failures[0]]
    assert "policy greedy: ZeroDivisionError" in report.failures[0].wrong[0]


class Endless(WindowPolicy):
    """A user's own, which never comes to a decision."""

    def __init__(self, gamma: int) -> None:
        pass

    def decide(self) -> Decision:
        while True:
            pass


def test_a_policy_that_never_decides_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsdlab.sim.fuzz.LONGEST_S", 0.2)
    offer("endless", Endless)
    report = fuzz(0, 1, policies=["endless"], workers=1)
    assert "busy for 0.2 s of processor time" in report.failures[0].wrong[0]


# the command -------------------------------------------------------------------------------------


def command(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["fuzz", *arguments])


def test_the_command_says_how_many_were_exact() -> None:
    result = command("--runs", "30", "--first", "5", "--workers", "1")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "exact: 30 of 30 runs"


def test_the_command_names_the_seed_and_how_to_repeat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(engine: Any, slot: int, ids: Any, draft: Any, sampling: Any) -> tuple[int, int]:
        accepted, next_id = judge(engine, slot, ids, draft, sampling)
        return accepted, (next_id + 1) % engine.info.vocab_size

    monkeypatch.setattr("dsdlab.nodes.verifier.judge", wrong)
    result = command("--runs", "3", "--seed", "11", "--mode", "dsd-stream", "--workers", "1")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[-1] == "exact: 0 of 3 runs"
    assert lines[0].startswith("seed 11: client 0, dsd-stream, policy ")
    assert "where the target alone says" in lines[0]
    assert lines[1].strip() == "repeat: dsdlab fuzz --seed 11 --runs 1 --mode dsd-stream -v"
    again = command(*repeat_command(11, ["dsd-stream"]).split()[2:])
    assert again.exit_code == 1
    assert lines[0] in again.stdout.splitlines()
    assert "verifier gets Open(dsd-stream" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--mode", "magic"), "--mode 'magic'; allowed: cloud-ar, "),
        (("--policy", "magic"), "unknown window policy 'magic'; installed: "),
        (("--policy", "ucb", "--mode", "cloud-ar"), "allowed: dsd-sync, dsd-pipelined, dsd-adaptive"),
        (("--runs", "0"), "0 is not in the range"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], reason: str) -> None:
    result = command(*arguments)
    assert result.exit_code == 2
    assert reason in result.output


def test_every_installed_policy_is_drawn_from() -> None:
    assert set(window_policy_names()) < set(policy_names())
