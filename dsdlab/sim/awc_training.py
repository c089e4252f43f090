"""Training of the AWC network: situations drawn at random, simulated with every window, and a fit.

A situation is a link, a pair's costs and acceptance, and how many users share the target. The real nodes run
it on the virtual clock once for each static window; what the policy would see is recorded on the way, and the
label is what a token took under each window. The network is fitted to the logarithm of that time, less its
mean over the windows; situations that it has not seen tell what it is worth.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from dsdlab.policies.awc import FEATURES, GAMMAS, AwcWeights, Network, Seen
from dsdlab.policies.base import Decision, Outcome, WindowPolicy
from dsdlab.policies.registry import offer
from dsdlab.sim.costs import ForwardCost, NodeCosts
from dsdlab.sim.fleet import FleetSpec, run_fleet
from dsdlab.sim.profile import LinkProfile

__all__ = ["Recipe", "record_situations", "train"]

Array = npt.NDArray[np.float64]
OnProgress = Callable[[str, int, int], None]
RECORDER = "awc-recorder"


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that determines the weights. Ranges are drawn from log-uniformly, but for alpha (uniform).

    Raises ValueError, naming the field.
    """

    seed: int = 1
    situations: int = 2000
    held_out: float = 0.2
    tokens: int = 96  # of each generation
    rtt_ms: tuple[float, float] = (0.5, 400.0)
    token_ms: tuple[float, float] = (1.0, 40.0)  # a drafted token
    verify_ms: tuple[float, float] = (10.0, 120.0)  # a step of one row
    row_share: tuple[float, float] = (0.002, 0.1)  # another row's part of it
    alpha: tuple[float, float] = (0.2, 0.95)
    runs: tuple[float, float] = (1.0, 3.0)  # mean run of accepted tokens, over that of independent ones
    users: tuple[int, ...] = (1, 1, 1, 2, 4, 8)  # of one target
    loss_pct: tuple[float, ...] = (0.0, 0.0, 0.0, 0.5)
    snapshots: int = 6  # of what a policy sees, a generation
    width: int = 32
    epochs: int = 300
    batch: int = 256
    rate: float = 2e-3

    def __post_init__(self) -> None:
        for name, least in (("situations", 10), ("tokens", 16), ("width", 1), ("epochs", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {least} or more")
        if not 0.0 < self.held_out < 1.0:
            raise ValueError(f"held_out is {self.held_out}; allowed: between 0 and 1")


class _Recorder(WindowPolicy):
    """A static window that notes what the network would look at."""

    notes: list[Array] = []  # noqa: RUF012 - of all recorders of the fleet that runs
    every = 1

    def __init__(self, gamma: int) -> None:
        self._decision = Decision(gamma)
        self._seen = Seen(gamma)

    def decide(self) -> Decision:
        return self._decision

    def observe(self, outcome: Outcome) -> None:
        seen = self._seen
        seen.observe(outcome)
        if seen.windows % self.every == 0 and (features := seen.features()) is not None:
            self.notes.append(features)


def _draw(recipe: Recipe, number: int) -> dict[str, Any]:
    """The situation of a number."""
    rng = random.Random(f"{recipe.seed}/{number}")

    def log_uniform(low: float, high: float) -> float:
        return float(low * (high / low) ** rng.random())

    alpha = rng.uniform(*recipe.alpha)
    verify_s = log_uniform(*recipe.verify_ms) / 1e3
    row_s = verify_s * log_uniform(*recipe.row_share)
    runs = log_uniform(*recipe.runs)
    return {
        "seed": number,
        "mode": "dsd-sync",
        "policy": RECORDER,
        "alpha": alpha,
        "persist": None if runs < 1.05 else runs / (1.0 - alpha),
        "link": LinkProfile(rtt_ms=log_uniform(*recipe.rtt_ms), loss_pct=rng.choice(recipe.loss_pct)),
        "edge": NodeCosts(drafter=ForwardCost(base_s=log_uniform(*recipe.token_ms) / 1e3)),
        "cloud": NodeCosts(target=ForwardCost(base_s=verify_s - row_s, per_token_s=row_s)),
        "drafters": rng.choice(recipe.users),
        "max_new_tokens": recipe.tokens,
        "prompt_tokens": 16,
    }


def _situation(recipe: Recipe, number: int) -> tuple[Array, Array]:
    """What is seen in a situation: [n, features]; and log seconds a token under each window: [windows]."""
    offer(RECORDER, _Recorder)
    fields = _draw(recipe, number)
    seen: list[Array] = []
    labels = np.zeros(len(GAMMAS))
    rng = random.Random(f"{recipe.seed}/{number}/notes")
    for i, gamma in enumerate(GAMMAS):
        _Recorder.notes = []
        result = run_fleet(FleetSpec(gamma=gamma, **fields))
        labels[i] = np.log(fields["drafters"] * result.virtual_s / max(result.tokens, 1))
        seen += rng.sample(_Recorder.notes, min(recipe.snapshots, len(_Recorder.notes)))
    return np.array(seen), labels


def record_situations(recipe: Recipe, on_progress: OnProgress | None = None) -> list[tuple[Array, Array]]:
    """All situations of a recipe, each as `_situation` gives it."""
    out = []
    for number in range(recipe.situations):
        out.append(_situation(recipe, number))
        if on_progress is not None:
            on_progress("simulating", number + 1, recipe.situations)
    return out


def train(recipe: Recipe, on_progress: OnProgress | None = None) -> AwcWeights:
    """Simulate, fit, judge."""
    begun = datetime.now(UTC)
    recorded = record_situations(recipe, on_progress)
    n_train = round(len(recorded) * (1.0 - recipe.held_out))
    x = np.concatenate([seen for seen, _ in recorded[:n_train]])
    y = np.concatenate([np.tile(_centred(labels), (len(seen), 1)) for seen, labels in recorded[:n_train]])
    mean, scale = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-3)
    layers = _fit((x - mean) / scale, y, recipe, on_progress)
    weights = AwcWeights(
        features=FEATURES,
        gammas=GAMMAS,
        mean=_rounded(mean),
        scale=_rounded(scale),
        layers={name: _rounded(value) for name, value in layers.items()},
    )
    network = Network(weights)
    return msgspec.structs.replace(
        weights,
        provenance={
            "recipe": msgspec.to_builtins(recipe),
            "trained_at": begun.isoformat(timespec="seconds"),
            "wall_s": (datetime.now(UTC) - begun).total_seconds(),
            "rows": len(x),
            "held_out": judged(network, recorded[n_train:]),
        },
    )


def judged(network: Network, recorded: list[tuple[Array, Array]]) -> dict[str, float]:
    """Regret against the best window of each situation, as a share of its time a token: of the network's
    choice, of the best single window of all, and of γ = 4."""
    regrets: dict[str, list[float]] = {"awc": [], "static_4": []}
    every = np.array([labels - labels.min() for _, labels in recorded])
    for seen, labels in recorded:
        picks = [int(np.argmin(network(row))) for row in seen]
        regrets["awc"].append(float(np.mean(np.exp(labels[picks] - labels.min()) - 1.0)))
        regrets["static_4"].append(float(np.exp(labels[GAMMAS.index(4)] - labels.min()) - 1.0))
    out = {name: float(np.mean(values)) for name, values in regrets.items()}
    out["awc_p95"] = float(np.quantile(regrets["awc"], 0.95))
    single = np.exp(every).mean(axis=0) - 1.0
    out["best_static"] = float(single.min())
    out["best_static_gamma"] = float(GAMMAS[int(single.argmin())])
    out["situations"] = float(len(recorded))
    return out


def _centred(labels: Array) -> Array:
    out: Array = labels - labels.mean()
    return out


def _rounded(values: Array) -> list[Any]:
    out: list[Any] = np.round(values, 5).tolist()
    return out


def _fit(x: Array, y: Array, recipe: Recipe, on_progress: OnProgress | None) -> dict[str, Array]:
    """Adam on the mean squared error (Kingma and Ba, ICLR 2015), with a rate that falls to nothing.

    x: [n, features]; y: [n, windows]. Written out, for the network is small and needs no more than numpy.
    """
    rng = np.random.default_rng(recipe.seed)
    width, n_in, n_out = recipe.width, x.shape[1], y.shape[1]

    def init(rows: int, columns: int, gain: float = 1.0) -> Array:
        return np.asarray(rng.normal(0.0, gain * (2.0 / columns) ** 0.5, (rows, columns)))

    p = {"w_in": init(width, n_in), "b_in": np.zeros(width)}
    for block in range(Network.BLOCKS):
        p |= {f"w1_{block}": init(width, width), f"b1_{block}": np.zeros(width)}
        p |= {f"w2_{block}": init(width, width, 0.1), f"b2_{block}": np.zeros(width)}
    p |= {"w_out": init(n_out, width, 0.1), "b_out": np.zeros(n_out)}
    first = {name: np.zeros_like(value) for name, value in p.items()}
    second = {name: np.zeros_like(value) for name, value in p.items()}
    step, steps = 0, recipe.epochs * -(-len(x) // recipe.batch)
    for epoch in range(recipe.epochs):
        order = rng.permutation(len(x))
        for at in range(0, len(x), recipe.batch):
            batch = order[at : at + recipe.batch]
            grads = _gradients(p, x[batch], y[batch])
            step += 1
            rate = recipe.rate * 0.5 * (1.0 + np.cos(np.pi * step / steps))
            for name, grad in grads.items():
                first[name] += 0.1 * (grad - first[name])
                second[name] += 0.001 * (grad * grad - second[name])
                m = first[name] / (1.0 - 0.9**step)
                v = second[name] / (1.0 - 0.999**step)
                p[name] -= rate * m / (np.sqrt(v) + 1e-8)
        if on_progress is not None:
            on_progress("fitting", epoch + 1, recipe.epochs)
    return p


def _gradients(p: dict[str, Array], x: Array, y: Array) -> dict[str, Array]:
    """Of the mean squared error of a batch; the network is `Network`'s, row by row."""
    hidden = [x @ p["w_in"].T + p["b_in"]]
    inner = []
    for block in range(Network.BLOCKS):
        inner.append(np.maximum(hidden[-1] @ p[f"w1_{block}"].T + p[f"b1_{block}"], 0.0))
        hidden.append(hidden[-1] + inner[-1] @ p[f"w2_{block}"].T + p[f"b2_{block}"])
    d = 2.0 * (hidden[-1] @ p["w_out"].T + p["b_out"] - y) / y.size
    grads = {"w_out": d.T @ hidden[-1], "b_out": d.sum(axis=0)}
    d = d @ p["w_out"]
    for block in reversed(range(Network.BLOCKS)):
        grads |= {f"w2_{block}": d.T @ inner[block], f"b2_{block}": d.sum(axis=0)}
        back = (d @ p[f"w2_{block}"]) * (inner[block] > 0.0)
        grads |= {f"w1_{block}": back.T @ hidden[block], f"b1_{block}": back.sum(axis=0)}
        d = d + back @ p[f"w1_{block}"]
    return grads | {"w_in": d.T @ x, "b_in": d.sum(axis=0)}
