"""Adaptive Window Control: a small residual network that predicts the best window from what is seen.

Source: "DSD: A Distributed Speculative Decoding Solution for Edge-Cloud Agile Large Model Serving"
(arXiv 2511.21669), whose AWC predicts γ by a residual MLP over load, round trip, time per token, recent
acceptance and the last γ, and steadies what it says. Here the network gives, for each of some windows, the
expected logarithm of the time of a token under it; the window with the least is taken, with hysteresis. It is
trained in this simulator by `dsdlab train-awc`; weights, recipe and held-out results are in
`awc_weights.json`.
"""

from __future__ import annotations

import math
from functools import cache
from importlib.resources import files
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from dsdlab.policies.base import Decision, Outcome, PolicyError, WindowPolicy, check_gamma
from dsdlab.policies.estimates import Estimates, Mean

WEIGHTS = "awc_weights.json"
WEIGHTS_VERSION = 1
GAMMAS = (1, 2, 3, 4, 6, 8, 12, 16)
FEATURES = (
    "alpha", "log_token_s", "log_verify_s", "row_share", "log_round_s", "round_trend", "queue_share",
    "log_tpot_s", "tpot_trend", "last_gamma", "log_context",
)  # fmt: skip
STEADY = 0.02  # another window must promise so much less time, as a logarithm
FIRST_WINDOWS = 2  # before so many were judged, the first window stays
SLOW, FAST = 16.0, 3.0  # memories of the two means whose ratio is a trend

Array = npt.NDArray[np.float64]


class AwcWeights(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A trained network: x = (features - mean)/scale; h = W_in x + b; twice h += W_2 relu(W_1 h + b_1) + b_2;
    out = W_out h + b_out, one value for each of `gammas`. Matrices are lists of rows."""

    version: int = WEIGHTS_VERSION
    features: tuple[str, ...]
    gammas: tuple[int, ...]
    mean: list[float]
    scale: list[float]
    layers: dict[str, list[Any]]
    provenance: dict[str, Any] = {}


class Network:
    """The forward pass. Raises PolicyError for weights that do not fit together."""

    BLOCKS = 2

    def __init__(self, weights: AwcWeights) -> None:
        if weights.version != WEIGHTS_VERSION:
            raise PolicyError(f"{WEIGHTS} has version {weights.version}; this dsdlab reads {WEIGHTS_VERSION}")
        if weights.features != FEATURES or not weights.gammas:
            raise PolicyError(f"{WEIGHTS} is of other features; train it anew: dsdlab train-awc")
        try:
            self._layers = {name: np.array(value, dtype=np.float64) for name, value in weights.layers.items()}
            self._mean, self._scale = np.array(weights.mean), np.array(weights.scale)
            if not self._mean.shape == self._scale.shape == (len(FEATURES),):
                raise ValueError(f"{len(FEATURES)} features need as many means and scales")
            self(np.zeros(len(FEATURES)))
        except (ValueError, KeyError, TypeError) as e:
            raise PolicyError(f"{WEIGHTS} is broken ({e}); train it anew: dsdlab train-awc") from None
        self.gammas = weights.gammas

    def __call__(self, features: Array) -> Array:
        """features: [11] → log seconds a token: [gammas]."""
        layers = self._layers
        h = layers["w_in"] @ ((features - self._mean) / self._scale) + layers["b_in"]
        for block in range(self.BLOCKS):
            inner = np.maximum(layers[f"w1_{block}"] @ h + layers[f"b1_{block}"], 0.0)
            h = h + layers[f"w2_{block}"] @ inner + layers[f"b2_{block}"]
        out: Array = layers["w_out"] @ h + layers["b_out"]
        return out


@cache
def shipped() -> Network:
    """The network of the package. Raises PolicyError."""
    try:
        data = files("dsdlab.policies").joinpath(WEIGHTS).read_bytes()
        return Network(msgspec.json.decode(data, type=AwcWeights))
    except (OSError, msgspec.MsgspecError) as e:
        raise PolicyError(f"{WEIGHTS}: {e}; train it anew: dsdlab train-awc") from None


class Seen:
    """What the network looks at, kept up to date by Outcomes."""

    __slots__ = ("_known", "_last_s", "_round", "_tpot", "context", "gamma", "windows")

    def __init__(self, gamma: int) -> None:
        self.gamma = gamma
        self.windows = self.context = 0
        self._known = Estimates()
        self._round = Mean(SLOW), Mean(FAST)
        self._tpot = Mean(SLOW), Mean(FAST)
        self._last_s = math.nan

    def observe(self, outcome: Outcome) -> None:
        self._known.observe(outcome)
        self.windows += 1
        self.context = outcome.context
        round_s = outcome.t_round_s - outcome.t_verify_s - outcome.t_queue_s
        if round_s >= 0.0:  # NaN is not
            for mean in self._round:
                mean.add(round_s)
        if outcome.now_s > self._last_s:
            for mean in self._tpot:
                mean.add((outcome.now_s - self._last_s) / (outcome.accepted + 1))
        self._last_s = outcome.now_s

    def features(self) -> Array | None:
        """[11], by FEATURES; None while too little is known."""
        known = self._known
        if math.isnan(known.token_s) or math.isnan(known.verify.at_one_s):
            return None
        verify_s = known.verify.at_one_s
        round_s, tpot_s = self._round[0].value, self._tpot[0].value
        return np.array(
            (
                known.alpha,
                _log(known.token_s),
                _log(verify_s),
                known.verify.slope_s / verify_s,
                _log(round_s),
                _trend(self._round),
                math.log1p(known.queue_s.value / verify_s),
                _log(tpot_s),
                _trend(self._tpot),
                math.log2(self.gamma + 1),
                math.log1p(self.context),
            )
        )


def _log(t_s: float) -> float:
    """Of a time in milliseconds, bounded; 0 for one that is not known."""
    return 0.0 if math.isnan(t_s) else math.log(min(max(1e3 * t_s, 0.05), 1e5))


def _trend(means: tuple[Mean, Mean]) -> float:
    slow, fast = means[0].value, means[1].value
    return math.log(fast / slow) if slow > 1e-6 and fast > 1e-6 else 0.0


class AwcWindow(WindowPolicy):
    """The network's window. gamma: the first one, until something is known. Raises PolicyError."""

    def __init__(self, gamma: int = 4) -> None:
        self._network = shipped()
        self._seen = Seen(check_gamma(gamma))

    def observe(self, outcome: Outcome) -> None:
        self._seen.observe(outcome)

    def decide(self) -> Decision:
        seen = self._seen
        if seen.windows >= FIRST_WINDOWS and (features := seen.features()) is not None:
            values = self._network(features)
            best = int(np.argmin(values))
            gammas = self._network.gammas
            present = gammas.index(seen.gamma) if seen.gamma in gammas else -1
            if present < 0 or values[best] < values[present] - STEADY:
                seen.gamma = gammas[best]
        return Decision(seen.gamma)
