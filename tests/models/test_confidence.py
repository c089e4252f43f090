"""Drafting behind a tail and with confidences: the same tokens, no forward too many, early ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tiny_models import VOCAB, engine_of, tiny_drafter, write_tiny_llama

from dsdlab.decoding import Sampling, confidence
from dsdlab.models.base import Chunk, Engine, Logits
from dsdlab.models.drafters import Drafter, LookupFirst, ModelDrafter, PromptLookup
from dsdlab.models.emulated import EmulatedEngine, EmulatedProfile
from dsdlab.models.weights_io import load_llama_dir
from dsdlab.policies import load_window_policy
from dsdlab.sim.synthetic import SyntheticDrafter

GREEDY = Sampling()
COUPLED = Sampling(0.9, 0, 0.95, 7)
SAMPLINGS = [pytest.param(GREEDY, id="greedy"), pytest.param(COUPLED, id="coupled")]
PROMPT = [5, 9, 300, 21, 7, 7, 100]
N = 8


class Counted(Engine):
    """Another engine, and the rows of each of its forwards."""

    def __init__(self, inner: Engine) -> None:
        self._inner = inner
        self.info, self.output_ids = inner.info, inner.output_ids
        self.rows: list[int] = []

    def open(self) -> int:
        return self._inner.open()

    def close(self, slot: int) -> None:
        self._inner.close(slot)

    def length(self, slot: int) -> int:
        return self._inner.length(slot)

    def rollback(self, slot: int, length: int) -> None:
        self._inner.rollback(slot, length)

    def extend(self, chunks: Sequence[Chunk]) -> list[Logits]:
        self.rows.append(sum(len(c.ids) for c in chunks))
        return self._inner.extend(chunks)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counted]:
    folder = tmp_path_factory.mktemp("confidence")
    llama = load_llama_dir(write_tiny_llama(folder / "llama", num_hidden_layers=1), "")
    return {
        "whole head": Counted(engine_of(llama, "bf16")),
        "reduced head": Counted(tiny_drafter(folder / "d.safetensors")),
    }


@pytest.fixture(params=["whole head", "reduced head"])
def engine(engines: dict[str, Counted], request: pytest.FixtureRequest) -> Counted:
    found = engines[request.param]
    found.rows.clear()
    return found


def window(drafter: Drafter, ids: list[int], n: int, sampling: Sampling) -> list[int]:
    """What a session that has seen nothing else proposes at once."""
    slot = drafter.open()
    out = drafter.propose(slot, ids, n, sampling)
    drafter.close(slot)
    return out


# a tail ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_token_by_token_is_the_whole_window(engine: Counted, sampling: Sampling) -> None:
    """… at one forward a token, of one row each but for the first."""
    drafter = ModelDrafter(engine)
    whole = window(drafter, PROMPT, N, sampling)
    engine.rows.clear()
    slot, tail = drafter.open(), list[int]()
    for _ in range(N):
        tail += drafter.propose(slot, PROMPT, 1, sampling, tail)
        assert drafter.by_model == (True,)
    drafter.close(slot)
    assert tail == whole
    assert engine.rows == [len(PROMPT)] + [1] * (N - 1)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_commits_under_way_cost_nothing(engine: Counted, sampling: Sampling) -> None:
    """The target confirms the tail's beginning while its end grows: still one row a token."""
    drafter = ModelDrafter(engine)
    whole = window(drafter, PROMPT, 3 * N, sampling)
    engine.rows.clear()
    rng = np.random.default_rng(2)
    slot, done, told = drafter.open(), 0, list[int]()
    for _ in range(3 * N):
        told += drafter.propose(slot, PROMPT + whole[:done], 1, sampling, told[done:])
        done += int(rng.integers(0, len(told) - done + 1))
    drafter.close(slot)
    assert told == whole
    assert engine.rows == [len(PROMPT)] + [1] * (3 * N - 1)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_after_a_mismatch_only_what_differs_is_computed(engine: Counted, sampling: Sampling) -> None:
    drafter = ModelDrafter(engine)
    slot, tail = drafter.open(), list[int]()
    for _ in range(6):
        tail += drafter.propose(slot, PROMPT, 1, sampling, tail)
    wrong = (tail[2] + 1) % VOCAB
    ids = [*PROMPT, *tail[:2], wrong]
    engine.rows.clear()
    said = drafter.propose(slot, ids, 2, sampling)
    assert engine.rows == [1, 1]  # the wrong token alone, then what was said after it
    assert said == window(drafter, ids, 2, sampling)
    engine.rows.clear()
    other = [*PROMPT, *tail[:2], wrong, (said[0] + 1) % VOCAB]
    assert drafter.propose(slot, other, 1, sampling, [17, 18]) == window(
        drafter, [*other, 17, 18], 1, sampling
    )
    assert engine.rows[0] == 3  # the token that differs and a tail that it never saw
    drafter.close(slot)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_windows_behind_any_tail(engine: Counted, sampling: Sampling) -> None:
    """Whatever was asked before, a proposal is a function of ids + tail."""
    drafter = ModelDrafter(engine)
    rng = np.random.default_rng(3)
    slot, ids, tail = drafter.open(), list(PROMPT), list[int]()
    for _ in range(30):
        n = int(rng.integers(0, 4))
        said = drafter.propose(slot, ids, n, sampling, tail)
        assert said == window(drafter, ids + tail, n, sampling)
        tail += said
        if rng.random() < 0.3:
            tail = tail[: rng.integers(0, len(tail) + 1)]
        if rng.random() < 0.2:
            tail.append(int(rng.integers(0, VOCAB)))
        confirmed = int(rng.integers(0, len(tail) + 1))
        ids, tail = ids + tail[:confirmed], tail[confirmed:]
    drafter.close(slot)


def test_the_context_ends_behind_the_tail_too(tmp_path: Path) -> None:
    llama = load_llama_dir(write_tiny_llama(tmp_path, num_hidden_layers=1), "")
    drafter = ModelDrafter(engine_of(llama, "bf16", max_context=12))
    slot = drafter.open()
    assert len(drafter.propose(slot, PROMPT, 9, GREEDY, [1, 2, 3])) == 2
    assert drafter.propose(slot, PROMPT, 9, GREEDY, [1, 2, 3], lambda _: True) != []
    assert drafter.propose(slot, PROMPT, 9, GREEDY, [1, 2, 3, 4, 5], lambda _: True) == []
    assert list(drafter.confidences) == []  # not those of the window before


# lookup ------------------------------------------------------------------------------------------


def test_lookup_knows_committed_text_alone() -> None:
    """A tail is looked behind, never looked up: it may be wrong."""
    lookup = PromptLookup()
    slot = lookup.open()
    ids = [1, 2, 3, 4, 1, 2]
    assert lookup.propose(slot, ids, 2, GREEDY) == [3, 4]
    assert lookup.propose(slot, ids, 2, GREEDY, [3]) == [4, 1]
    assert lookup.propose(slot, ids, 3, GREEDY, [8, 9, 8]) == []  # 8 9 was drafted, not said
    assert lookup.propose(slot, ids, 3, GREEDY, [8, 9, 8, 9]) == []
    assert lookup.propose(slot, [*ids, 8, 9], 2, GREEDY, [8]) == [9]  # now it was


def sayable(engine: Engine) -> list[int]:
    """Ids that the engine can say: lookup needs as many repeated tokens for each of them."""
    return [3, 4] if engine.output_ids is None else engine.output_ids.tolist()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_lookup_first_token_by_token(engine: Counted, sampling: Sampling) -> None:
    """The same tokens by the same parts; the model reads what lookup said when it is asked again."""
    drafter = LookupFirst(ModelDrafter(engine))
    rng = np.random.default_rng(4)
    parts: set[bool] = set()
    for _ in range(6):
        ids = rng.choice(sayable(engine)[:2], 30).tolist()
        slot = drafter.open()
        whole = drafter.propose(slot, ids, N, sampling)
        by_model, rows = list(drafter.by_model), list(engine.rows)
        drafter.close(slot)
        engine.rows.clear()
        slot, tail, said_by = drafter.open(), list[int](), list[bool]()
        for _ in range(N):
            tail += drafter.propose(slot, ids, 1, sampling, tail)
            said_by += drafter.by_model
        drafter.close(slot)
        assert tail == whole
        assert said_by == by_model
        assert engine.rows == rows
        assert len(rows) == sum(by_model)  # lookup costs no forward
        assert sum(rows) == (len(ids) + max(i for i, m in enumerate(by_model) if m) if any(by_model) else 0)
        parts |= set(by_model)
        engine.rows.clear()
    assert parts == {True, False}


# confidences -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_what_confidence_is(engine: Counted, sampling: Sampling) -> None:
    """Of each token: the highest probability of the distribution at its position, drawn or not."""
    drafter = ModelDrafter(engine)
    slot = drafter.open()
    said = drafter.propose(slot, PROMPT, N, sampling, (), lambda _: True)
    sure = list(drafter.confidences)
    assert said == window(drafter, PROMPT, N, sampling)  # being asked changes no token
    assert len(sure) == N
    for k in range(N):
        fresh = engine.open()
        row = engine.extend([Chunk(fresh, PROMPT + said[:k], 1)])[0][-1]
        engine.close(fresh)
        assert sure[k] == confidence(row, sampling)
    assert 0.0 < min(sure) < max(sure) <= 1.0
    drafter.propose(slot, PROMPT, N, sampling)
    assert list(drafter.confidences) == []
    drafter.close(slot)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_being_asked_costs_no_forward(engine: Counted, sampling: Sampling) -> None:
    drafter = ModelDrafter(engine)
    slot, tail = drafter.open(), list[int]()
    for _ in range(N):
        tail += drafter.propose(slot, PROMPT, 1, sampling, tail, lambda _: True)
    drafter.close(slot)
    assert engine.rows == [len(PROMPT)] + [1] * (N - 1)


def drafters(engine: Engine) -> dict[str, Drafter]:
    emulated = EmulatedEngine(EmulatedProfile(alpha=0.7, informed=2.0), wait=lambda _: None)
    model = ModelDrafter(engine)
    return {
        "model": model,
        "lookup": PromptLookup(),
        "lookup first": LookupFirst(model),
        "emulated": ModelDrafter(emulated),
        "synthetic": SyntheticDrafter(emulated),
    }


@pytest.mark.parametrize("kind", ["model", "lookup", "lookup first", "emulated", "synthetic"])
@pytest.mark.parametrize("stop", [1, 3, N, N + 5])
def test_a_rule_ends_the_window(engine: Counted, kind: str, stop: int) -> None:
    """Every drafter asks, after each token, with the confidences of all so far; the tokens stay the same."""
    drafter = drafters(engine)[kind]
    text = [*range(3, 13), *range(3, 13), 3, 4, 5]
    whole = window(drafter, text, N, COUPLED)
    assert len(whole) == N
    asked: list[list[float]] = []

    def goes_on(sure: Sequence[float]) -> bool:
        asked.append(list(sure))
        return len(sure) < stop

    slot = drafter.open()
    said = drafter.propose(slot, text, N, COUPLED, (), goes_on)
    drafter.close(slot)
    assert said == whole[:stop]
    assert len(drafter.by_model) == len(drafter.confidences) == len(said)
    n_asked = [len(sure) for sure in asked]
    assert n_asked in ([*range(1, len(said) + 1)], [*range(1, len(said))])  # the n-th needs no answer
    assert n_asked[-1:] == [stop] or stop >= N
    for sure, by_model in zip(drafter.confidences, drafter.by_model, strict=True):
        assert math.isnan(sure) is not by_model


def test_the_threshold_drafts_on_through_lookup(engine: Counted) -> None:
    """What lookup says is never unsure; the first unsure word of the model ends the window behind it."""
    policy = load_window_policy("threshold", N)
    drafter = LookupFirst(ModelDrafter(engine))
    rng = np.random.default_rng(6)
    early = 0
    for _ in range(12):
        ids = rng.choice(sayable(engine)[:2], 30).tolist()
        whole = window(drafter, ids, N, COUPLED)
        slot = drafter.open()
        said = drafter.propose(slot, ids, N, COUPLED, (), policy.goes_on)
        drafter.close(slot)
        sure = list(drafter.confidences)
        assert said == whole[: len(said)]
        assert not any(c < 0.4 for c in sure[:-1])
        assert len(said) == N or sure[-1] < 0.4
        early += len(said) < N
    assert early
