"""The emulated engine: its costs, its acceptance process, its traces, and its errors in one line."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsdlab.decoding import Sampling
from dsdlab.models.base import Chunk, ContextFull, ModelError, NoFreeSlot
from dsdlab.models.emulated import (
    EmulatedEngine,
    EmulatedProfile,
    load_emulated,
    parse_profile,
    precise_sleep,
)
from dsdlab.models.loading import EngineOptions, load_engine


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


@pytest.mark.parametrize("alpha", [0.0, 0.37, 0.9, 1.0])
def test_acceptance_is_independent_with_probability_alpha(alpha: float) -> None:
    target = EmulatedEngine(EmulatedProfile(seed=1))
    drafter = EmulatedEngine(EmulatedProfile(seed=1, alpha=alpha))
    n = 8000
    agrees = np.array([target.token(5, i) == drafter.token(5, i) for i in range(n)])
    slack = 4.5 * np.sqrt(0.25 / n)
    assert abs(agrees.mean() - alpha) <= (slack if 0 < alpha < 1 else 0)
    if 0 < alpha < 1:
        assert abs(np.corrcoef(agrees[:-1], agrees[1:])[0, 1]) < 4.5 / np.sqrt(n)
        other = np.array([target.token(6, i) == drafter.token(6, i) for i in range(n)])
        assert abs(np.corrcoef(agrees, other)[0, 1]) < 4.5 / np.sqrt(n)


def test_tokens_are_uniform_over_the_vocabulary() -> None:
    engine = EmulatedEngine(EmulatedProfile(vocab_size=16))
    counts = np.bincount([engine.token(0, i) for i in range(15_000)], minlength=16)
    assert counts[0] == 0
    assert (np.abs(counts[1:] - 1000) < 5 * np.sqrt(1000)).all()


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
