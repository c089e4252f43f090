"""`dsd-sync` by rejection sampling: the text has the target's law, and repeats itself under faults."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import repeat

import numpy as np
import pytest
from node_harness import PROMPT, Costly, Raw, Watch, World, emulated, open_frame
from scipy import stats
from table_models import TableEngine

from dsdlab.decoding import Sampling, SparseQ, probabilities, sparsify
from dsdlab.models.drafters import GoesOn, LookupFirst, ModelDrafter, PromptLookup
from dsdlab.nodes import GenerationFailed, GenerationRecord, GenerationRequest
from dsdlab.protocol import DraftQ, Error, Open, Verdict, pack_ids
from dsdlab.protocol.frames import Close, Commit, Draft
from dsdlab.protocol.memory import Faults
from dsdlab.protocol.q_rows import pack_q
from dsdlab.sim.loop import run

V = 3
LENGTH = 4  # tokens of a text whose law is looked at; the first comes from the prompt's step
TEXTS = 1500
LEVEL = 1e-4
START = [1, 2, 0]
HEAT = Sampling(0.8)


def request(
    seed: int, gamma: int = 2, top_q: int = 2, n: int = LENGTH, **changes: object
) -> GenerationRequest:
    fields: dict[str, object] = {"sampling": Sampling(HEAT.temperature, seed=seed), "stop_at_eos": False}
    return GenerationRequest(
        START, "dsd-sync", gamma=gamma, max_new_tokens=n, acceptance="rejection", top_q=top_q,
        **(fields | changes),  # type: ignore[arg-type]
    )  # fmt: skip


class Liar(ModelDrafter):
    """Draws from what it keeps of q, and reports the distribution of another temperature."""

    def draw(
        self, slot: int, ids: Sequence[int], n: int, sampling: Sampling, vocab_size: int, top_q: int = 0,
        goes_on: GoesOn | None = None,
    ) -> tuple[list[int], list[SparseQ]]:  # fmt: skip
        draft, drawn_from = super().draw(slot, ids, n, sampling, vocab_size, top_q, goes_on)
        reports = []
        for q in drawn_from:
            flat = np.sqrt(q.dense(vocab_size))
            reports.append(sparsify(flat / flat.sum(), vocab_size))
        return draft, reports


def texts(target: TableEngine, drafter: ModelDrafter, gamma: int, top_q: int) -> np.ndarray:
    """How often each text came, over TEXTS seeds."""

    async def main() -> np.ndarray:
        world = World(target)
        client = world.client(drafter)
        counts = np.zeros((V,) * LENGTH, dtype=np.int64)
        for seed in range(TEXTS):
            record = await client.generate(request(seed, gamma, top_q))
            counts[tuple(record.ids)] += 1
        await client.disconnect()
        return counts.ravel()

    return run(main())


def p_value(counts: np.ndarray, law: np.ndarray) -> float:
    """Of a chi-square; texts that are expected less than five times are one."""
    expected = law * counts.sum()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    kept = wanted > 0
    return float(
        stats.chisquare(observed[kept], wanted[kept] * observed[kept].sum() / wanted[kept].sum()).pvalue
    )


@pytest.mark.parametrize(("gamma", "top_q", "drafter_ids"), [(3, 2, V), (2, 1, V), (2, 0, 5)])
def test_the_text_has_the_targets_law(gamma: int, top_q: int, drafter_ids: int) -> None:
    """Nodes, frames and all: truncated to one id, to two, whole; and a drafter padded to more ids."""
    target = TableEngine(1, V)
    counts = texts(target, ModelDrafter(TableEngine(2, drafter_ids)), gamma, top_q)
    assert p_value(counts, target.law(START[-1], LENGTH, HEAT)) > LEVEL


def test_a_restarted_verifier_keeps_to_the_law() -> None:
    """It begins anew where the client's text ends, with a token of its own; what it said unheard is lost."""
    target = TableEngine(1, V)

    async def main() -> np.ndarray:
        world = World(target, links=repeat((Faults(delay_s=0.01), Faults(delay_s=0.01))))
        client = world.client(ModelDrafter(TableEngine(2, V)))
        counts = np.zeros((V,) * LENGTH, dtype=np.int64)
        for seed in range(TEXTS // 2):
            restarting: list[asyncio.Task[None]] = []

            def restart(pieces: int, restarting: list[asyncio.Task[None]] = restarting) -> None:
                if pieces == 1:  # the first window is on its way then
                    restarting.append(asyncio.create_task(world.restart()))

            record = await client.generate(request(seed), Watch(restart))
            await asyncio.gather(*restarting)
            counts[tuple(record.ids)] += 1
        assert world.restarts == TEXTS // 2
        await client.disconnect()
        return counts.ravel()

    assert p_value(run(main()), target.law(START[-1], LENGTH, HEAT)) > LEVEL


def test_a_report_that_is_not_what_was_drawn_from_is_caught() -> None:
    """The negative control: the same test with a drafter whose report is another distribution."""
    target = TableEngine(1, V)
    counts = texts(target, Liar(TableEngine(2, V)), 2, 0)
    assert p_value(counts, target.law(START[-1], LENGTH, HEAT)) < LEVEL / 1e3


def test_a_report_truncated_after_drawing_is_refused() -> None:
    """Drawn from the whole of q, reported to the likeliest id: an id outside it is no draft from it."""

    class Truncating(ModelDrafter):
        def draw(self, *args: object, **words: object) -> tuple[list[int], list[SparseQ]]:
            draft, drawn_from = super().draw(*args, **words)  # type: ignore[arg-type]
            return draft, [sparsify(q.dense(V), 1) for q in drawn_from]

    async def main() -> None:
        world = World(TableEngine(1, V))
        with pytest.raises(GenerationFailed, match="drafted from a distribution without it") as caught:
            for seed in range(50):
                await world.client(Truncating(TableEngine(2, V))).generate(request(seed, top_q=0))
        assert caught.value.code == "bad-frame"

    run(main())


def generate(
    links: Sequence[tuple[Faults, Faults]] = (), *, eos: tuple[int, ...] = (), **changes: object
) -> GenerationRecord:
    async def main() -> GenerationRecord:
        world = World(TableEngine(3, 40, eos), links=links)
        client = world.client(ModelDrafter(TableEngine(4, 40)))
        record = await client.generate(request(11, 4, 6, 60, **changes))
        await world.quiet()
        assert world.verifier.n_sessions == 0
        assert not world.failures
        assert world.free_slots() == 4
        return record

    return run(main())


def test_a_run_repeats_itself() -> None:
    record = generate()
    assert record.ids == generate().ids
    assert len(record.ids) == 60
    assert record.finish == "length"
    assert sum(a for _, a in record.windows) > 0
    assert any(a < d for d, a in record.windows)
    assert record.bytes_up["DraftQ"] > 0
    assert "Draft" not in record.bytes_up
    assert generate(sampling=Sampling(0.8, seed=12)).ids != record.ids


@pytest.mark.parametrize("seed", range(4))
def test_faults_change_nothing(seed: int) -> None:
    """Frames that come twice or late, and connections that are lost: the same text, window by window."""
    clean = generate()
    shaky = Faults(
        seed=seed, delay_s=0.01, jitter_s=0.07, duplicate=0.3, duplicate_lag=3, drop_after=9 + seed
    )
    record = generate([(shaky, shaky)] * 3)
    assert record.reconnects > 0
    assert record.ids == clean.ids


def test_an_end_of_sequence_inside_a_window_ends_the_text() -> None:
    record = generate(eos=(5, 6, 7), stop_at_eos=True)
    assert record.finish == "eos"
    assert record.ids[-1] in (5, 6, 7)
    assert not {5, 6, 7} & set(record.ids[:-1])


# refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"mode": "dsd-stream"}, "acceptance is rejection in mode dsd-stream; needs dsd-sync"),
        ({"mode": "cloud-sd"}, "acceptance is rejection in mode cloud-sd; needs dsd-sync"),
        ({"sampling": Sampling()}, "acceptance is rejection at temperature 0; needs a temperature above 0"),
        ({"top_q": -1}, "top_q is -1; allowed: 0 "),
        ({"acceptance": "hope"}, "acceptance is 'hope'; allowed: coupled, rejection"),
        ({"acceptance": "coupled", "top_q": 8}, "top_q is 8 with acceptance coupled; needs rejection"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for(changes: dict[str, object], why: str) -> None:
    fields: dict[str, object] = {"mode": "dsd-sync", "sampling": HEAT, "acceptance": "rejection"}
    with pytest.raises(ValueError, match=why):
        GenerationRequest(START, **(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("with_model", [False, True])
def test_a_drafter_that_cannot_say_what_it_draws_from(with_model: bool) -> None:
    drafter = LookupFirst(ModelDrafter(emulated())) if with_model else PromptLookup()

    async def main() -> None:
        world = World(TableEngine(1, V))
        with pytest.raises(
            GenerationFailed, match=r"needs a model as drafter; this node's is (lookup\+|prompt)"
        ):
            await world.client(drafter).generate(request(1))
        assert not world.dials

    run(main())


def hot(**changes: object) -> Open:
    return open_frame(mode="dsd-sync-q", temperature=0.8, **changes)


ROW = SparseQ(np.array([2, 0]), np.array([40000, 25535]))


def test_frames_of_the_other_kind_are_refused() -> None:
    """A Draft in a session that wants to know q, and the other way round; greedy has no q."""

    async def main() -> None:
        world = World(TableEngine(1, 12))
        client = await Raw.dial(world)
        assert "dsd-sync-q" in client.welcome.modes
        await client.send(hot())
        assert isinstance(await client.recv(), Commit)
        n = len(PROMPT) + 1
        await client.send(Draft(1, 0, n, pack_ids([2])))
        answer = await client.recv()
        assert isinstance(answer, Error)
        assert answer.code == "unknown-session"
        await client.send(DraftQ(1, 0, n, pack_ids([2]), pack_q([ROW])))
        verdict = await client.recv()
        assert isinstance(verdict, Verdict)
        await client.send(DraftQ(1, 0, n + verdict.accepted + 1, pack_ids([5]), pack_q([ROW])))
        answer = await client.recv()
        assert isinstance(answer, Error)
        assert answer.code == "bad-frame"

        await client.send(Close(1), open_frame(session=2, temperature=0.8))
        assert isinstance(await client.recv(), Commit)
        await client.send(DraftQ(2, 0, n, pack_ids([2]), pack_q([ROW])))
        answer = await client.recv()
        assert isinstance(answer, Error)
        assert answer.code == "unknown-session"

        await client.send(Close(2), open_frame(session=3, mode="dsd-sync-q"))
        answer = await client.recv()
        assert isinstance(answer, Error)
        assert answer.code == "sampling"
        await client.send(Close(3))

    run(main())


def test_the_same_window_gets_the_same_verdict() -> None:
    """In two sessions of one seed; another seed gives another one now and then."""
    q = sparsify(probabilities(TableEngine(2, 12).table[0], HEAT, 12), 8)

    async def verdicts(seed: int) -> list[tuple[int, int]]:
        world = World(TableEngine(1, 12))
        client = await Raw.dial(world)
        out = []
        for session in (1, 2):
            await client.send(hot(session=session, seed=seed))
            commit = await client.recv()
            assert isinstance(commit, Commit)
            n = len(PROMPT) + 1
            draft = [q.draw(seed, n + i) for i in range(4)]
            await client.send(DraftQ(session, 0, n, pack_ids(draft), pack_q([q] * 4)))
            verdict = await client.recv()
            assert isinstance(verdict, Verdict)
            out.append((verdict.accepted, verdict.next_id))
            await client.send(Close(session))
        return out

    found = [run(verdicts(seed)) for seed in range(8)]
    assert all(first == second for first, second in found)
    assert len({first for first, _ in found}) > 1


def test_few_windows_may_wait() -> None:
    """One of them may be as long as a frame, so that a flood must not be kept."""

    async def main() -> None:
        world = World(TableEngine(1, 12), compute=Costly(0.1))
        client = await Raw.dial(world)
        await client.send(hot())
        assert isinstance(await client.recv(), Commit)
        flood = [DraftQ(1, 0, len(PROMPT) + 1, pack_ids([2]), pack_q([ROW]))] * 12
        await client.send(*flood)
        await world.quiet()
        assert [str(e) for e in world.failures] == ["more than 8 drafts wait"]

    run(main())
