"""The emulated engine: its costs, its acceptance process, its traces, and its errors in one line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dsdlab.decoding import Sampling
from dsdlab.models import emulated as emulated_module
from dsdlab.models.base import Chunk, ContextFull, ModelError, NoFreeSlot
from dsdlab.models.emulated import (
    EmulatedEngine,
    EmulatedProfile,
    load_emulated,
    parse_profile,
    precise_sleep,
)
from dsdlab.models.loading import EngineOptions, load_engine

UNLIKELY = 1e-4  # p-value below which a process is not what it is said to be; the seeds are fixed


class Clock:
    """Adds up what the engine would have waited."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def __call__(self, duration_s: float) -> None:
        self.waits.append(duration_s)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_cost_is_base_plus_tokens_plus_sessions(sizes: list[int]) -> None:
    clock = Clock()
    profile = EmulatedProfile(base_s=0.5, per_token_s=0.01, per_session_s=0.001)
    engine = EmulatedEngine(profile, wait=clock)
    chunks = [Chunk(engine.open(), [1] * n, 0) for n in sizes]
    engine.extend(chunks)
    assert clock.waits == [pytest.approx(0.5 + 0.01 * sum(sizes) + 0.001 * len(sizes))]
    assert [engine.length(c.slot) for c in chunks] == sizes


def test_a_target_is_a_function_of_seeds_and_position() -> None:
    """Neither windows, batches, slots nor rollback change a token; seeds do."""
    wait = Clock()
    engine = EmulatedEngine(EmulatedProfile(seed=3), wait=wait)
    sampling = Sampling(1.0, seed=9)
    slot = engine.open()
    engine.choose([Chunk(slot, [1] * 10, 1)], [sampling])
    alone = [engine.choose([Chunk(slot, [1], 1)], [sampling])[0][0] for _ in range(30)]
    other = engine.open()
    engine.choose([Chunk(other, [2] * 10, 0)], [sampling])
    windows: list[int] = []
    while len(windows) < 30:
        ids = engine.choose([Chunk(slot, [], 0), Chunk(other, [7] * 6, 6)], [Sampling(), sampling])[1]
        windows += ids[:3]
        engine.rollback(other, engine.length(other) - 3)
    assert windows == alone
    assert [engine.token(9, 11 + i) for i in range(30)] == alone
    assert [engine.token(10, 11 + i) for i in range(30)] != alone
    assert [EmulatedEngine(EmulatedProfile(seed=4), wait=wait).token(9, 11 + i) for i in range(30)] != alone
    assert min(alone) >= 1  # never the end of sequence


@pytest.mark.parametrize(
    "profile",
    [
        EmulatedProfile(alpha=0.7, seed=3),
        EmulatedProfile(alpha=0.0, vocab_size=3),
        EmulatedProfile(alpha=0.7, informed=3.0, vocab_size=1 << 24),
        EmulatedProfile(accepts=(True, False, True), seed=1 << 70),
        EmulatedProfile(alpha=0.7, persist=9.0),
    ],
)
@given(
    st.lists(
        st.tuples(st.sampled_from([0, 7, -7, 2**64 - 1]), st.integers(0, 300), st.integers(0, 90)), max_size=9
    )
)
def test_tokens_are_their_definition_in_any_order(
    profile: EmulatedProfile, asked: list[tuple[int, int, int]]
) -> None:
    """However many are drawn at once: each is a function of seeds and position."""
    engine, one = EmulatedEngine(profile), EmulatedEngine(profile)

    def defined(sampling_seed: int, position: int) -> int:
        stream = emulated_module._stream(profile.seed, sampling_seed)
        bits = emulated_module._bits(stream, position)
        u, others = bits % 2**32, profile.vocab_size - 1
        right = 1 + (bits >> 32) % others
        if profile.accepts:
            agrees = profile.accepts[position % len(profile.accepts)]
        elif profile.persist:
            agrees = one._state(stream, position, u)
        elif profile.informed:
            agrees = u < engine.confidence(sampling_seed, position) * 2.0**32
        else:
            agrees = u < round(profile.alpha * 2**32)
        return right if agrees else 1 + right % others

    for sampling_seed, first, n in asked:
        want = [defined(sampling_seed, position) for position in range(first, first + n)]
        assert engine.tokens(sampling_seed, first, n) == want
        assert engine.token(sampling_seed, first) == defined(sampling_seed, first)


def test_a_charge_takes_the_place_of_the_profiles_cost() -> None:
    charged: list[tuple[int, ...]] = []
    clock = Clock()
    engine = EmulatedEngine(EmulatedProfile(base_s=1.0), wait=clock, charge=lambda *f: charged.append(f))
    a, b = engine.open(), engine.open()
    engine.choose([Chunk(a, [1] * 5, 1)], [Sampling()])
    engine.choose([Chunk(a, [1] * 2, 1), Chunk(b, [1] * 3, 1)], [Sampling(), Sampling()])
    engine.rollback(a, 6)
    engine.choose([Chunk(b, [1], 1), Chunk(a, [1], 1)], [Sampling(0.5), Sampling()])
    assert charged == [(5, 1, 0, 0), (5, 2, 5, 0), (2, 2, 9, 1)]
    assert clock.waits == []


def accepted(n: int, sampling_seed: int = 5, **profile: Any) -> np.ndarray:
    """At which of n positions a drafter says what its target says."""
    target = EmulatedEngine(EmulatedProfile(seed=1))
    drafter = EmulatedEngine(EmulatedProfile(seed=1, **profile))
    return np.array([target.token(sampling_seed, i) == drafter.token(sampling_seed, i) for i in range(n)])


def chi_square(counts: Any, expected: Any) -> float:
    """The p-value of counts against their expectation."""
    counts, expected = np.asarray(counts, float).ravel(), np.asarray(expected, float).ravel()
    assert expected.min() > 5
    return float(stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), counts.size - 1))


@pytest.mark.parametrize("alpha", [0.0, 0.37, 0.9, 1.0])
def test_acceptance_is_independent_with_probability_alpha(alpha: float) -> None:
    n = 20_000
    agrees = accepted(n, alpha=alpha)
    if alpha in (0.0, 1.0):
        assert agrees.all() == alpha
        return
    pairs = {  # none shares a position with another
        "next": (agrees[::2], agrees[1::2]),
        "after next": (agrees[:-2:4], agrees[2::4]),
        "another session": (agrees, accepted(n, 6, alpha=alpha)),
    }
    one = np.array([1 - alpha, alpha])
    for name, (first, second) in pairs.items():
        table = np.histogram2d(first.astype(float), second.astype(float), bins=2)[0]
        assert chi_square(table, len(first) * np.outer(one, one)) > UNLIKELY, name


@pytest.mark.parametrize(
    ("alpha", "persist"), [(0.8, 5.0), (0.8, 12.0), (0.5, 40.0), (0.95, 60.0), (0.2, 3.0)]
)
def test_a_chain_with_memory(alpha: float, persist: float) -> None:
    """Transitions have the chain's probabilities, runs its geometric lengths; alpha holds at any position."""
    n = 60_000
    agrees = accepted(n, alpha=alpha, persist=persist)
    ends = 1 / persist  # an accepted position is the last of its run
    begins = ends * alpha / (1 - alpha)  # … and a refused one of its run
    for state, leaves in ((True, ends), (False, begins)):
        after = agrees[1:][agrees[:-1] == state]
        moved = int((after != state).sum())
        assert stats.binomtest(moved, len(after), leaves).pvalue > UNLIKELY, state
        runs = _runs(agrees, state)[1:-1]  # whole ones
        assert abs(runs.mean() - 1 / leaves) < 4.5 * np.sqrt((1 - leaves) / leaves**2 / len(runs))
        bins = np.unique(stats.geom.ppf(np.linspace(0, 1, 9), leaves)[1:-1])
        cuts = np.concatenate([[0], bins, [np.inf]])
        counts = np.histogram(runs, cuts + 0.5)[0]
        shares = np.diff(stats.geom.cdf(cuts, leaves))
        if len(counts) > 1:
            assert chi_square(counts, len(runs) * shares) > UNLIKELY, state
    # stationary from the first position on: the same position of many sessions is a fair sample
    drafter = EmulatedEngine(EmulatedProfile(seed=1, alpha=alpha, persist=persist))
    target = EmulatedEngine(EmulatedProfile(seed=1))
    for position in (0, 1, 17):
        hits = sum(target.token(s, position) == drafter.token(s, position) for s in range(4000))
        assert stats.binomtest(hits, 4000, alpha).pvalue > UNLIKELY, position


def _runs(agrees: np.ndarray, state: bool) -> np.ndarray:
    """Lengths of the runs of `state`."""
    change = np.diff(np.concatenate([[False], agrees == state, [False]]).astype(int))
    return np.flatnonzero(change == -1) - np.flatnonzero(change == 1)


@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=60),
    st.integers(0, 2),
    st.sampled_from([5.0, 30.0, 1e4]),
)
def test_a_chain_asked_in_any_order(positions: list[int], seed: int, persist: float) -> None:
    """Windows overlap, sessions alternate, runs are remembered: a position's state is the same every time."""
    profile = EmulatedProfile(alpha=0.8, persist=persist, seed=3)
    engine = EmulatedEngine(profile)
    for i, position in enumerate(positions):
        turn = (seed + i) % 3
        assert engine.token(turn, position) == EmulatedEngine(profile).token(turn, position)


def test_memory_costs_no_more_than_a_look_back() -> None:
    """The bits drawn per token stay few for any persistence, in windows that step back as drafting does."""
    drawn = 0
    real = emulated_module._bits

    def counted(key: int, position: int) -> int:
        nonlocal drawn
        drawn += 1
        return real(key, position)

    for persist in (5.0, 50.0, 5000.0):
        engine = EmulatedEngine(EmulatedProfile(alpha=0.8, persist=persist))
        engine.token(1, 0)
        drawn, asked, base = 0, 0, 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(emulated_module, "_bits", counted)
            while base < 20_000:
                for position in range(base, base + 8):
                    engine.token(1, position)
                    asked += 1
                base += 3
        assert drawn / asked < 3, persist


def test_tokens_are_uniform_over_the_vocabulary() -> None:
    engine = EmulatedEngine(EmulatedProfile(vocab_size=16))
    counts = np.bincount([engine.token(0, i) for i in range(30_000)], minlength=16)
    assert counts[0] == 0
    assert chi_square(counts[1:], [2000] * 15) > UNLIKELY
    pairs = np.zeros((15, 15))
    for i in range(0, 60_000, 2):  # no pair shares a position with another
        pairs[engine.token(7, i) - 1, engine.token(7, i + 1) - 1] += 1
    assert chi_square(pairs, np.full((15, 15), 30_000 / 225)) > UNLIKELY


def test_the_tokens_are_these() -> None:
    """Pinned: results of emulated scenarios can be compared across versions only while they stay."""
    engine = EmulatedEngine(EmulatedProfile(alpha=0.7, persist=8.0, seed=3, vocab_size=1024))
    assert [engine.token(9, i) for i in range(8)] == [803, 658, 522, 391, 426, 74, 256, 834]


@pytest.mark.parametrize("vocab_size", [3, 4, 1024])
def test_a_wrong_token_is_never_the_right_one(vocab_size: int) -> None:
    target = EmulatedEngine(EmulatedProfile(vocab_size=vocab_size))
    wrong = EmulatedEngine(EmulatedProfile(vocab_size=vocab_size, alpha=0.0))
    for i in range(500):
        token = wrong.token(2, i)
        assert token != target.token(2, i)
        assert 1 <= token < vocab_size


def test_a_trace_repeats() -> None:
    trace = (True, False, False, True, True)
    target = EmulatedEngine(EmulatedProfile())
    drafter = EmulatedEngine(EmulatedProfile(accepts=trace))
    agrees = tuple(target.token(1, i) == drafter.token(1, i) for i in range(15))
    assert agrees == trace * 3


def test_logits_say_what_choose_says() -> None:
    engine = EmulatedEngine(EmulatedProfile(vocab_size=50), wait=Clock())
    a, b = engine.open(), engine.open()
    logits = engine.extend([Chunk(a, [1, 2, 3], 2)])[0]
    assert logits.shape == (2, 50)
    assert logits.argmax(1).tolist() == engine.choose([Chunk(b, [1, 2, 3], 2)], [Sampling()])[0]


def test_sessions() -> None:
    engine = EmulatedEngine(EmulatedProfile(), slots=1, max_context=8, wait=Clock())
    slot = engine.open()
    with pytest.raises(NoFreeSlot, match="all 1 session slots"):
        engine.open()
    engine.extend([Chunk(slot, [1] * 6, 1)])
    with pytest.raises(ContextFull, match="9 positions; the emulated model is set for 8"):
        engine.extend([Chunk(slot, [1] * 3, 1)])
    assert engine.length(slot) == 6
    with pytest.raises(ValueError, match="rollback to 7; allowed: 0 to the session's 6"):
        engine.rollback(slot, 7)
    engine.close(slot)
    engine.close(slot)
    assert engine.open() == slot
    assert engine.length(slot) == 0


def test_precise_sleep() -> None:
    for duration_s in (0.0, 0.0005, 0.004):
        best = min(_slept(duration_s) for _ in range(5))
        assert duration_s <= best < duration_s + 0.002


def _slept(duration_s: float) -> float:
    begun = time.perf_counter()
    precise_sleep(duration_s)
    return time.perf_counter() - begun


def test_parse(tmp_path: Path) -> None:
    expected = EmulatedProfile(base_s=0.05, per_token_s=0.001, alpha=0.8, seed=7, vocab_size=99)
    assert parse_profile("base_s=0.05,per_token_s=1e-3,alpha=0.8,seed=7,vocab_size=99") == expected
    assert parse_profile("") == EmulatedProfile()
    path = tmp_path / "slow.json"
    path.write_text(json.dumps({"base_s": 0.1, "accepts": [True, False]}))
    assert parse_profile(str(path)) == EmulatedProfile(base_s=0.1, accepts=(True, False))
    engine = load_engine(f"emulated:{path}", EngineOptions(slots=3, max_context=77))
    assert isinstance(engine, EmulatedEngine)
    assert engine.info.max_context == 77


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("base_s", "allowed: a .json file or KEY=VALUE of base_s, "),
        ("speed=3", "unknown field `speed`"),
        ("base_s=fast", "base_s"),
        ("alpha=1.5", "alpha is 1.5; allowed: 0 to 1"),
        ("alpha=nan", "alpha is nan; allowed: 0 to 1"),
        ("base_s=-1", "base_s is -1.0; allowed: 0 to 3600 seconds"),
        ("per_token_s=inf", "per_token_s is inf; allowed: 0 to 3600 seconds"),
        ("vocab_size=2", "vocab_size is 2; allowed: 3 to 16777216"),
        (
            "alpha=0.8,persist=4",
            "persist is 4; allowed with alpha 0.8: 5 (independent positions) to 1e6, or 0",
        ),
        ("alpha=0.8,persist=-1", "persist is -1; allowed with alpha 0.8: 5 "),
        ("alpha=0.8,persist=nan", "persist is nan; allowed with alpha 0.8: 5 "),
        ("alpha=1,persist=0.5", "persist is 0.5; allowed with alpha 1: 1 "),
        ("alpha=0.8,persist=1e7", "persist is 1e+07; allowed with alpha 0.8: 5 "),
        ("/nowhere/profile.json", "/nowhere/profile.json: No such file or directory"),
    ],
)
def test_errors_are_one_line(spec: str, reason: str) -> None:
    with pytest.raises(ModelError) as error:
        load_emulated(spec, 1, 64)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[1]", '{"base_s": "x"}', '{"colour": 1}', "\xff"])
def test_broken_json_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"broken\.json") as error:
        parse_profile(str(path))
    assert "\n" not in str(error.value)
