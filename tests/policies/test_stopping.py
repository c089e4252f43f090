"""Stopping rules: the threshold window goes by the distribution alone, and why every rule must."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from window_sessions import judged

from dsdlab.decoding import Sampling, confidence, pick, sample_rejection
from dsdlab.models.base import Chunk, Engine, Logits, ModelInfo
from dsdlab.models.drafters import ModelDrafter
from dsdlab.policies import Decision, PolicyError, WindowPolicy, load_window_policy, window_policy_names
from dsdlab.policies.threshold import SURE
from dsdlab.protocol.frames import MAX_WINDOW

# the rule ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("confidences", "goes_on"),
    [
        ([SURE], True),
        ([1.0], True),
        ([SURE - 1e-9], False),
        ([0.0], False),
        ([0.1, 0.9], True),  # the last one decides: an earlier one would have ended the window
        ([0.9, 0.1], False),
        ([math.nan], True),  # lookup said it: nothing was spent
        ([0.9, math.nan], True),
    ],
)
def test_the_threshold(confidences: list[float], goes_on: bool) -> None:
    policy = load_window_policy("threshold", 8)
    assert policy.stops
    assert policy.goes_on(confidences) is goes_on


@pytest.mark.parametrize("gamma", [0, 1, 8, MAX_WINDOW])
def test_the_threshold_has_one_limit(gamma: int) -> None:
    policy = load_window_policy("threshold", gamma)
    for accepted in range(min(gamma, 3) + 1):
        assert policy.decide() == Decision(gamma)
        policy.observe(judged(gamma, accepted))


@pytest.mark.parametrize("gamma", [-1, MAX_WINDOW + 1])
def test_gamma_out_of_range(gamma: int) -> None:
    with pytest.raises(PolicyError, match=f"gamma is {gamma}; allowed: 0 to {MAX_WINDOW}"):
        load_window_policy("threshold", gamma)


def test_whoever_does_not_stop_goes_on() -> None:
    for name in window_policy_names():
        policy = load_window_policy(name, 4)
        if not policy.stops:
            assert policy.goes_on([0.0])


# a function of the distribution, not of the draw -------------------------------------------------

VOCAB = 6
ROWS = st.lists(st.lists(st.floats(-4, 4), min_size=VOCAB, max_size=VOCAB), min_size=8, max_size=8)


class Scripted(Engine):
    """Its logits are a function of the position alone, so that another draw changes nothing else."""

    def __init__(self, rows: list[list[float]]) -> None:
        self.info = ModelInfo("scripted", "", VOCAB, 64, (), "fp32", 0)
        self._rows, self._length = np.array(rows, dtype=np.float32), 0

    def open(self) -> int:
        return 0

    def close(self, slot: int) -> None:
        pass

    def length(self, slot: int) -> int:  # noqa: ARG002 - there is one
        return self._length

    def rollback(self, slot: int, length: int) -> None:  # noqa: ARG002
        self._length = length

    def extend(self, chunks: Sequence[Chunk]) -> list[Logits]:
        self._length += len(chunks[0].ids)
        return [self._rows[[self._length % len(self._rows)]]]


@given(ROWS, st.sampled_from([0.3, 0.7, 1.0]), st.integers(0, 10**6), st.integers(0, 10**6))
def test_another_draw_is_the_same_decision(
    rows: list[list[float]], temperature: float, seed: int, other: int
) -> None:
    """Windows under two seeds: other tokens, as many of them, at the same confidences."""
    policy = load_window_policy("threshold", 8)
    told = []
    for s in (seed, other):
        drafter = ModelDrafter(Scripted(rows))
        said = drafter.propose(drafter.open(), [1, 2], 8, Sampling(temperature, seed=s), (), policy.goes_on)
        assert len(drafter.confidences) == len(said)
        told.append(list(drafter.confidences))
    assert told[0] == told[1]


def test_other_draws_there_are() -> None:
    """The property above compares windows that differ."""
    rows = [[2.0, 1.5, 0.0, 0.0, 0.0, 0.0]] * 8
    policy = load_window_policy("threshold", 8)
    windows = set()
    for seed in range(20):
        drafter = ModelDrafter(Scripted(rows))
        windows.add(
            tuple(drafter.propose(drafter.open(), [1], 8, Sampling(1.0, seed=seed), (), policy.goes_on))
        )
    assert len(windows) > 15
    assert {len(w) for w in windows} == {8}


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=12), st.sampled_from([0.2, 1.0, 1.7]))
def test_confidence_is_the_highest_probability(logits: list[float], temperature: float) -> None:
    """… of what is drawn from: greedy, of the softmax; else of the warped distribution."""
    z = np.array(logits, dtype=np.float32).astype(np.float64)
    p = np.exp(z - z.max())
    assert confidence(z, Sampling()) == pytest.approx(p.max() / p.sum())
    warped = np.exp((z - z.max()) / temperature)
    for seed in (1, 2):
        assert confidence(z, Sampling(temperature, seed=seed)) == pytest.approx(warped.max() / warped.sum())
    assert confidence(z, Sampling(temperature, top_k=1)) == 1.0
    assert pick(z, Sampling(), 0) == int(z.argmax())


# why: exact enumeration under rejection sampling -------------------------------------------------

Weights = dict[tuple[int, ...], list[int]]
P: Weights = {(): [1, 3, 4], (0,): [2, 2, 4], (1,): [6, 1, 1], (2,): [1, 5, 2]}  # eighths, by prefix
Q: Weights = {(): [4, 2, 2], (0,): [4, 2, 2], (1,): [2, 4, 2], (2,): [2, 2, 4]}
EIGHTHS, STEPS = 8, 12  # uniforms at 12 midpoints: each accept and each residual is a multiple of 1/12
TEXT = 2
Rule = Callable[[list[float], int], tuple[bool, bool]]
"""Of q and the token drawn from it: whether the token is kept, and whether drafting goes on behind it."""


def enumerated(rule: Rule) -> dict[tuple[int, ...], Fraction]:
    """The exact distribution of texts of two tokens, by windows of up to two drafts."""
    out: dict[tuple[int, ...], Fraction] = {}

    def settle(text: tuple[int, ...], weight: Fraction) -> None:
        if len(text) >= TEXT:
            out[text[:TEXT]] = out.get(text[:TEXT], Fraction(0)) + weight
        else:
            window(text, (), weight)

    def window(text: tuple[int, ...], draft: tuple[int, ...], weight: Fraction) -> None:
        prefix = text + draft
        if len(prefix) == TEXT:
            return judge(text, draft, weight)
        q = [w / EIGHTHS for w in Q[prefix]]
        for token, mass in enumerate(Q[prefix]):
            kept, goes_on = rule(q, token)
            now = weight * Fraction(mass, EIGHTHS)
            after = (*draft, token) if kept else draft
            (window if kept and goes_on else judge)(text, after, now)
        return None

    def judge(text: tuple[int, ...], draft: tuple[int, ...], weight: Fraction) -> None:
        if not draft:  # the bonus token, or the target alone
            if len(text) == TEXT:
                return settle(text, weight)
            for token, mass in enumerate(P[text]):
                settle((*text, token), weight * Fraction(mass, EIGHTHS))
            return None
        p, q = (np.array(table[text]) / EIGHTHS for table in (P, Q))
        uniforms = [(i + 0.5) / STEPS for i in range(STEPS)]
        for u in uniforms:
            accepted = u * q[draft[0]] < p[draft[0]]
            if accepted:
                judge((*text, draft[0]), draft[1:], weight / STEPS)
                continue
            for v in uniforms:
                token = sample_rejection(p, q, draft[0], u, v)
                settle((*text, token), weight / STEPS / STEPS)
        return None

    settle((), Fraction(1))
    return out


def wanted() -> dict[tuple[int, ...], Fraction]:
    return {
        (a, b): Fraction(P[()][a] * P[(a,)][b], EIGHTHS**2) for a in range(3) for b in range(3) if P[(a,)][b]
    }


def of_policy(policy: WindowPolicy) -> Rule:
    return lambda q, _: (True, policy.goes_on([max(q)]))


RULES: dict[str, Rule] = {
    "none": lambda q, token: (True, True),  # noqa: ARG005
    "never": lambda q, token: (False, False),  # noqa: ARG005
    "threshold": of_policy(load_window_policy("threshold", 2)),
    "drops by the distribution": lambda q, _: (max(q) > q[0], True),
    "stops behind a token, by its own probability": lambda q, token: (True, q[token] >= SURE),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_that_keep_the_distribution(name: str) -> None:
    """A token that is kept is part of the prefix: what is drafted behind it may hang on it."""
    assert enumerated(RULES[name]) == wanted()


def test_a_rule_that_drops_by_the_token_drawn_is_biased() -> None:
    """An unsure token is not sent, and the target draws there itself: likely drafts then come too often."""
    biased = enumerated(lambda q, token: (q[token] >= SURE, True))
    assert sum(biased.values()) == 1
    first = [sum((w for text, w in biased.items() if text[0] == t), Fraction(0)) for t in range(3)]
    # draft 0 (q 1/2) stands with 1/4; half of the time the target draws from p itself
    stands = Fraction(1, 2) * Fraction(1, 4)
    expected = [stands + Fraction(1, 2) * Fraction(1, 8)]
    residual = {1: Fraction(1, 3), 2: Fraction(2, 3)}
    expected += [
        Fraction(1, 2) * Fraction(P[()][t], 8) + Fraction(1, 2) * Fraction(3, 4) * residual[t] for t in (1, 2)
    ]
    assert first == expected
    assert first[0] == Fraction(3, 16) != Fraction(1, 8)
