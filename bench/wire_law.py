"""Does rejection sampling say what the real target alone would? Asked of both nodes' own functions.

At some places of the target's texts, the drafter's distribution is truncated and drawn from, and the verifier
judges the draft, with very many seeds; a chi-square then compares what was committed with the target's own
distribution there. The same is done with a report truncated after drawing, which must be caught.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from dsdlab.decoding import Sampling, SparseQ, probabilities, sparsify, verify_rejection
from dsdlab.models.base import Chunk, Engine

FloatArray = npt.NDArray[np.float64]
LEAST = 5.0  # expected draws of a class of a chi-square
NARROW = 8  # ids to which the control's report is cut


@dataclass(frozen=True, slots=True)
class Place:
    """A position of a text: the target's logits [V] and distribution there, and the drafter's."""

    position: int
    logits: npt.NDArray[np.float32]
    p: FloatArray
    q: FloatArray


def places_of(
    target: Engine, drafter: Engine, prompt: Sequence[int], new: Sequence[int], sampling: Sampling
) -> list[Place]:
    """Every position of a text but the first new one, which is never drafted."""
    vocab_size = target.info.vocab_size
    rows = []
    for engine in (target, drafter):
        slot = engine.open()
        rows.append(engine.extend([Chunk(slot, [*prompt, *new[:-1]], len(new) - 1)])[0])
        engine.close(slot)
    return [
        Place(
            len(prompt) + 1 + n,
            of_target,
            probabilities(of_target, sampling, vocab_size, target.output_ids),
            probabilities(of_drafter, sampling, vocab_size, drafter.output_ids),
        )
        for n, (of_target, of_drafter) in enumerate(zip(*rows, strict=True))
    ]


def overlap(places: Sequence[Place], top_q: int) -> float:
    """Mean of Σ min(p, q) = 1 − TV: what the best coupling of p and the truncated q accepts."""
    found = []
    for place in places:
        q = sparsify(place.q, top_q or place.q.size)
        found.append(np.minimum(place.p[q.ids], q.weights / q.weights.sum()).sum())
    return float(np.mean(found))


def kept_ids(places: Sequence[Place], top_q: int) -> float:
    """Mean number of ids in a distribution."""
    return float(np.mean([len(sparsify(place.q, top_q or place.q.size).ids) for place in places]))


def p_value(
    places: Sequence[Place], top_q: int, sampling: Sampling, seeds: int, *, lie: bool = False
) -> float:
    """Of one chi-square over all places: draws of so many seeds at each, against the target alone.

    lie: draw from all of q, and report it cut to its likeliest `NARROW` ids.
    """
    total, freedom = 0.0, 0
    for place in places:
        reported = sparsify(place.q, NARROW if lie else top_q or place.q.size)
        drawn_from = sparsify(place.q, place.q.size) if lie else reported
        committed = [_commit(place, drawn_from, reported, sampling, seed) for seed in range(seeds)]
        counts = np.bincount(committed, minlength=place.p.size).astype(np.float64)
        expected = place.p * seeds
        often = expected >= LEAST
        observed = np.append(counts[often], counts[~often].sum())
        wanted = np.append(expected[often], expected[~often].sum())
        if wanted[-1] < LEAST and len(wanted) > 1:  # too few for a class of their own
            observed, wanted = _fold(observed), _fold(wanted)
        if len(wanted) > 1:
            total += float(((observed - wanted) ** 2 / wanted).sum())
            freedom += len(wanted) - 1
    return float(stats.chi2.sf(total, freedom))


def _fold(values: FloatArray) -> FloatArray:
    """The last class joined to the one before it."""
    return np.append(values[:-2], values[-2:].sum())


def _commit(place: Place, drawn_from: SparseQ, reported: SparseQ, sampling: Sampling, seed: int) -> int:
    """The token that a window of one draft commits at this place."""
    draft = drawn_from.draw(seed, place.position)
    seeded = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, seed)
    rows = [place.logits, place.logits]  # the second, of the bonus token, is not looked at here
    accepted, next_id = verify_rejection([draft], [reported], rows, seeded, place.position, place.p.size)
    return draft if accepted else next_id
