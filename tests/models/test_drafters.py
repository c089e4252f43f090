"""Drafters: what they propose, and what they hold after full, partial and no acceptance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCAB, engine_of, tiny_drafter, tiny_target, write_tiny_llama

from dsdlab.decoding import Sampling, pick
from dsdlab.models import drafters
from dsdlab.models.base import Chunk, ModelError, NoFreeSlot
from dsdlab.models.drafters import (
    FIRST_LONGEST,
    FIRST_SHORTEST,
    LookupFirst,
    ModelDrafter,
    PromptLookup,
    believed,
    common_prefix,
    load_drafter,
)
from dsdlab.models.emulated import EmulatedEngine
from dsdlab.models.loading import EngineOptions
from dsdlab.models.torch_engine import TorchEngine
from dsdlab.models.weights_io import load_llama_dir

GREEDY = Sampling()
SAMPLED = Sampling(1.0, 0, 1.0, 11)
TEXT = st.lists(st.integers(0, 2), max_size=40)  # three ids: repeats abound


@given(st.lists(st.integers(0, 1), max_size=80), st.lists(st.integers(0, 1), max_size=80), st.integers(0, 80))
def test_common_prefix(a: list[int], b: list[int], shared: int) -> None:
    b = a[:shared] + b
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    assert common_prefix(a, b) == n == common_prefix(b, a)


# prompt lookup -----------------------------------------------------------------------------------


def lookup_oracle(ids: list[int], tail: list[int], longest: int, shortest: int) -> int:
    """By brute force: the latest earlier n-gram equal to the text's last one, longest n first."""
    whole = ids[-longest:] + tail
    for n in range(longest, shortest - 1, -1):
        if n > len(whole):
            continue
        gram = whole[-n:]
        for end in range(len(ids) - 1, n - 1, -1):  # something must follow it inside ids
            if ids[end - n : end] == gram:
                return end
    return len(ids)


@given(TEXT, st.integers(0, 6), st.sampled_from([(3, 1), (3, 2), (2, 2), (1, 1), (4, 1)]))
def test_lookup_equals_brute_force(ids: list[int], n: int, lengths: tuple[int, int]) -> None:
    lookup = PromptLookup(*lengths)
    slot = lookup.open()
    at = lookup_oracle(ids, [], *lengths)
    assert lookup.propose(slot, ids, n, GREEDY) == ids[at : at + n]


@given(TEXT, st.lists(st.integers(1, 5), max_size=12), st.lists(st.integers(0, 2), max_size=4))
def test_lookup_as_the_text_grows(ids: list[int], steps: list[int], tail: list[int]) -> None:
    """The index is built piece by piece; a session beside it changes nothing."""
    lookup = PromptLookup()
    slot, other = lookup.open(), lookup.open()
    end = 0
    for step in steps:
        end = min(len(ids), end + step)
        lookup.find(other, [1, 1, 1, 2, 2, 0], ())
        at, matched = lookup.find(slot, ids[:end], tail)
        assert at == lookup_oracle(ids[:end], tail, 3, 1)
        assert (matched == 0) == (at == end)
        assert [*ids[:end], *tail][-matched:] == ids[at - matched : at] or not matched


def test_lookup_slots_are_never_reused() -> None:
    lookup = PromptLookup()
    first = lookup.open()
    lookup.propose(first, [1, 2, 1], 2, GREEDY)
    lookup.close(first)
    lookup.close(first)
    second = lookup.open()
    assert second != first
    assert lookup.propose(second, [2, 9, 1], 2, GREEDY) == []


# a model -----------------------------------------------------------------------------------------


class Watched(TorchEngine):
    """Counts the tokens computed, to see what a drafter computes again."""

    fed = 0

    def extend(self, chunks: list[Chunk]) -> list[np.ndarray]:
        self.fed += sum(len(c.ids) for c in chunks)
        return super().extend(chunks)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TorchEngine:
    engine = tiny_target(tmp_path_factory.mktemp("drafter"), "bf16")
    engine.__class__ = Watched
    return engine


def proposal(engine: TorchEngine, ids: list[int], n: int, sampling: Sampling) -> list[int]:
    """What a fresh session says, each token after a prefill of the whole text: the definition."""
    out: list[int] = []
    for _ in range(n):
        slot = engine.open()
        row = engine.extend([Chunk(slot, [*ids, *out], 1)])[0][0]
        engine.close(slot)
        out.append(pick(row, sampling, len(ids) + len(out), engine.output_ids))
    return out


PROMPT = [5, 9, 300, 21, 7, 7, 100]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "coupled"])
@pytest.mark.parametrize("accepted", [0, 1, 2, 3, 4])
def test_proposals_after_any_acceptance(engine: TorchEngine, sampling: Sampling, accepted: int) -> None:
    """The cache-rewind trap: of 4 drafts `accepted` stand, then comes a token of the target's own."""
    drafter = ModelDrafter(engine)
    slot = drafter.open()
    ids = list(PROMPT)
    for round_ in range(6):
        expected = proposal(engine, ids, 4, sampling)
        assert drafter.propose(slot, ids, 4, sampling) == expected, round_
        if accepted == 4:
            ids = [*ids, *expected, (expected[-1] + 1) % VOCAB]
        else:
            ids = [*ids, *expected[:accepted], (expected[accepted] + 1) % VOCAB]
    drafter.close(slot)


def test_after_full_acceptance_only_two_tokens_are_computed_again(engine: TorchEngine) -> None:
    """The last draft's keys are missing, and the bonus token's; nothing else."""
    drafter = ModelDrafter(engine)
    slot = drafter.open()
    draft = drafter.propose(slot, PROMPT, 4, GREEDY)
    ids = [*PROMPT, *draft, 17]
    before = engine.fed
    drafter.propose(slot, ids, 1, GREEDY)
    assert engine.fed - before == 2
    before = engine.fed
    drafter.propose(slot, ids, 1, GREEDY)  # the same question again: its last token alone
    assert engine.fed - before == 1
    drafter.close(slot)


def test_windows_of_every_size_and_texts_that_change(engine: TorchEngine) -> None:
    """Random windows, random acceptance, sometimes another text altogether: always the definition."""
    rng = np.random.default_rng(0)
    drafter = ModelDrafter(engine)
    slot = drafter.open()
    ids = list(PROMPT)
    for _ in range(40):
        n = int(rng.integers(0, 7))
        expected = proposal(engine, ids, n, SAMPLED)
        assert drafter.propose(slot, ids, n, SAMPLED) == expected
        # after a lost connection the target may be several tokens ahead
        ahead = rng.integers(0, VOCAB, rng.integers(1, 5)).tolist()
        ids = [*ids, *expected[: rng.integers(0, n + 1)], *ahead]
        if rng.random() < 0.15:
            ids = ids[: rng.integers(1, len(ids))]
    drafter.close(slot)


def test_the_end_of_the_context(tmp_path: Path) -> None:
    small = tiny_target(tmp_path, "bf16", max_context=10)
    drafter = ModelDrafter(small)
    slot = drafter.open()
    assert len(drafter.propose(slot, PROMPT, 8, GREEDY)) == 3
    assert drafter.propose(slot, [*PROMPT, 1, 2, 3], 8, GREEDY) == []
    assert drafter.propose(slot, [*PROMPT, 1, 2, 3, 4], 8, GREEDY) == []


def test_ids_beyond_a_smaller_vocabulary_do_no_harm(tmp_path: Path) -> None:
    """A target padded to more ids than the drafter knows: drafting goes on with a stand-in."""
    weights = load_llama_dir(write_tiny_llama(tmp_path, vocab_size=128), "")
    drafter = ModelDrafter(engine_of(weights, "bf16"))
    slot = drafter.open()
    draft = drafter.propose(slot, [5, 383, 9], 3, GREEDY)
    assert draft == drafter.propose(slot, [5, 383, 9], 3, GREEDY)
    assert len(draft) == 3
    assert max(draft) < 128
    assert len(drafter.propose(slot, [5, 383, 9, draft[0], 200], 3, GREEDY)) == 3


def test_reduced_head_proposes_its_own_ids(tmp_path: Path) -> None:
    engine = tiny_drafter(tmp_path / "drafter.safetensors")
    drafter = ModelDrafter(engine)
    assert engine.output_ids is not None
    allowed = set(engine.output_ids.tolist())
    slot = drafter.open()
    for sampling in (GREEDY, SAMPLED):
        draft = drafter.propose(slot, PROMPT, 12, sampling)
        assert draft == proposal(engine, PROMPT, 12, sampling)
        assert set(draft) <= allowed


def test_close_twice_and_no_slot(tmp_path: Path) -> None:
    drafter = ModelDrafter(tiny_target(tmp_path, "bf16", slots=1))
    slot = drafter.open()
    with pytest.raises(NoFreeSlot):
        drafter.open()
    drafter.close(slot)
    drafter.close(slot)
    assert drafter.open() == slot


# lookup first ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_lookup_first_equals_its_parts(engine: TorchEngine, seed: int) -> None:
    rng = np.random.default_rng(seed)
    both, alone = LookupFirst(ModelDrafter(engine)), ModelDrafter(engine)
    slot, alone_slot = both.open(), alone.open()
    ids = rng.integers(0, 2, 24).tolist()  # few different tokens repeat soon
    sources = set()
    for _ in range(8):
        expected: list[int] = []
        for _ in range(5):
            at = lookup_oracle(ids, expected, FIRST_LONGEST, FIRST_SHORTEST)
            sources.add(at < len(ids))
            expected += (
                [ids[at]] if at < len(ids) else alone.propose(alone_slot, [*ids, *expected], 1, SAMPLED)
            )
        assert both.propose(slot, ids, 5, SAMPLED) == expected
        ids = [*ids, *expected[: rng.integers(0, 6)], *rng.integers(0, 2, 8).tolist()]
    assert sources == {True, False}  # both parts were asked
    both.close(slot)
    both.close(slot)
    alone.close(alone_slot)


def test_lookup_says_what_its_model_cannot(tmp_path: Path) -> None:
    """Two tokens that repeat are enough for one outside the model's reduced vocabulary, not for others."""
    model = ModelDrafter(tiny_drafter(tmp_path / "drafter.safetensors"))
    assert model.engine.output_ids is not None
    sayable = set(model.engine.output_ids.tolist())
    odd = next(i for i in range(3, model.engine.info.vocab_size) if i not in sayable)
    even = min(sayable)
    both, slot = LookupFirst(model), 0
    for follower, repeats, by_model in ((odd, 2, False), (odd, 1, True), (even, 2, True), (even, 5, False)):
        gram = [60, 61, 62, 63, 64][-repeats:]
        slot = both.open()
        draft = both.propose(slot, [*gram, follower, 70, *gram], 1, GREEDY)
        assert both.by_model == [by_model], (follower, repeats)
        assert by_model or draft == [follower]
        both.close(slot)


@pytest.mark.parametrize(
    ("matched", "sayable", "expected"),
    [(8, None, True), (5, {7}, True), (4, {7}, False), (4, {6}, True), (2, {6}, True), (1, {6}, False),
     (4, None, False)],
)  # fmt: skip
def test_when_lookup_is_believed(matched: int, sayable: set[int] | None, expected: bool) -> None:
    assert believed(matched, 7, sayable) == expected


def test_lookup_first_stops_where_its_model_does(tmp_path: Path) -> None:
    both = LookupFirst(ModelDrafter(tiny_target(tmp_path, "bf16", max_context=8)))
    slot = both.open()
    assert len(both.propose(slot, [1, 2, 3, 4, 5, 6], 9, GREEDY)) == 2


# loading -----------------------------------------------------------------------------------------


def test_load_by_name() -> None:
    options = EngineOptions()
    assert isinstance(load_drafter("prompt-lookup", options), PromptLookup)
    emulated = load_drafter("emulated:alpha=0.5", options)
    assert isinstance(emulated, ModelDrafter)
    assert isinstance(emulated.engine, EmulatedEngine)
    both = load_drafter("lookup+emulated:alpha=0.5", options)
    assert both.name == "lookup+emulated"


def test_a_drafter_file_runs_in_int8(tmp_path: Path) -> None:
    from tiny_models import write_tiny_drafter

    path = write_tiny_drafter(tmp_path / "d.safetensors")
    drafter = load_drafter(str(path), EngineOptions(precision="bf16", device="cpu"))
    assert isinstance(drafter, ModelDrafter)
    assert drafter.engine.info.precision == "int8"
    assert drafter.tokenizer == "tiny"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lookup+prompt-lookup", "after lookup\\+ a model's name is needed"),
        ("no-such-model", "unknown model 'no-such-model'; allowed: "),
        ("no/such.safetensors", "model file no/such.safetensors does not exist"),
        ("emulated:alpha=2", "alpha is 2.0; allowed: 0 to 1"),
    ],
)
def test_bad_names_are_one_line(name: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as error:
        load_drafter(name, EngineOptions())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "beside", "own"),
    [
        ("smollm2-drafter", "int4", "int8"),
        ("some.safetensors", "bf16", "int8"),
        ("folder", "int4", "int4"),
        ("folder", "gguf", "bf16"),
        ("hf:folder", "int4", "bf16"),
        ("hf:folder", "fp32", "fp32"),
        ("llama:file.gguf", "bf16", "gguf"),
        ("smollm2-135m-instruct", "gguf", "int4"),
    ],
)
def test_a_drafter_runs_in_what_its_engine_has(name: str, beside: str, own: str) -> None:
    assert drafters._precision_of(name, beside) == own
