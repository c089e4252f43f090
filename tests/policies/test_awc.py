"""AWC: what its network sees, what it says, and weights that cannot be used."""

from __future__ import annotations

import math
import random

import msgspec
import numpy as np
import pytest

from dsdlab.policies import Outcome, PolicyError
from dsdlab.policies.awc import FEATURES, GAMMAS, AwcWeights, AwcWindow, Network, Seen, shipped
from dsdlab.sim.awc_training import Recipe, _fit, _gradients, record_situations, train

SMALL = Recipe(situations=12, tokens=24, epochs=3, users=(1, 2), width=8)


def window(gamma: int, accepted: int, rtt_s: float, number: int, t_d_s: float = 0.005) -> Outcome:
    return Outcome(
        gamma,
        accepted,
        gamma * t_d_s,
        0.05,
        0.0,
        rtt_s + 0.05,
        min(accepted + 1, gamma),
        accepted,
        context=10 * number,
        now_s=(rtt_s + 0.05 + gamma * t_d_s) * number,
        t_token_s=t_d_s,
    )


def drive(rtt_s: float, alpha: float, windows: int = 60) -> list[int]:
    """Windows of the shipped policy where each draft is accepted with probability alpha."""
    policy, draw, out = AwcWindow(4), random.Random(1), []
    for number in range(1, windows + 1):
        gamma = policy.decide().gamma
        out.append(gamma)
        accepted = next((k for k in range(gamma) if draw.random() >= alpha), gamma)
        policy.observe(window(gamma, accepted, rtt_s, number))
    return out


def test_the_first_windows_are_what_was_asked_for() -> None:
    assert drive(0.1, 0.8)[:2] == [4, 4]


def test_windows_stay_within_what_was_trained() -> None:
    for rtt_s, alpha in ((0.001, 0.2), (0.3, 0.95), (0.05, 0.6)):
        assert set(drive(rtt_s, alpha)) <= {*GAMMAS}


def test_longer_round_trips_and_better_drafts_make_longer_windows() -> None:
    def mean(rtt_s: float, alpha: float) -> float:
        return float(np.mean(drive(rtt_s, alpha)[20:]))

    assert mean(0.3, 0.9) > mean(0.001, 0.9) > mean(0.001, 0.3)


def test_the_same_outcomes_make_the_same_windows() -> None:
    assert drive(0.08, 0.7) == drive(0.08, 0.7)


def test_what_is_seen_is_finite_once_a_window_was_judged() -> None:
    seen = Seen(4)
    assert seen.features() is None
    seen.observe(window(4, 2, 0.1, 1))
    features = seen.features()
    assert features is not None
    assert features.shape == (len(FEATURES),)
    assert np.isfinite(features).all()


def test_drafts_in_flight_have_no_round_and_do_no_harm() -> None:
    seen = Seen(4)
    for number in range(1, 4):
        seen.observe(msgspec.structs.replace(window(4, 2, 0.1, number), t_round_s=math.nan))
    features = seen.features()
    assert features is not None
    assert np.isfinite(features).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has version 2; this dsdlab reads 1"),
        ({"features": ("alpha",)}, "is of other features"),
        ({"layers": {}}, "is broken"),
        ({"mean": [0.0]}, "is broken"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    good = train(SMALL)
    with pytest.raises(PolicyError, match=message):
        Network(msgspec.structs.replace(good, **change))


def test_training_is_a_function_of_its_recipe() -> None:
    one, two = train(SMALL), train(SMALL)
    assert one.layers == two.layers
    assert train(msgspec.structs.replace(SMALL, seed=2)).layers != one.layers
    back = msgspec.json.decode(msgspec.json.encode(one), type=AwcWeights)
    assert back.layers == one.layers


def test_gradients_are_those_of_the_loss() -> None:
    """Against differences, for some entries of every matrix."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(5, len(FEATURES))), rng.normal(size=(5, len(GAMMAS)))
    layers = _fit(x, y, msgspec.structs.replace(SMALL, epochs=1), None)
    weights = AwcWeights(
        features=FEATURES,
        gammas=GAMMAS,
        mean=[0.0] * len(FEATURES),
        scale=[1.0] * len(FEATURES),
        layers={name: value.tolist() for name, value in layers.items()},
    )

    def loss() -> float:
        network = Network(
            msgspec.structs.replace(weights, layers={name: value.tolist() for name, value in layers.items()})
        )
        return float(np.mean([(network(row) - want) ** 2 for row, want in zip(x, y, strict=True)]))

    grads = _gradients(layers, x, y)
    for name, value in layers.items():
        at = tuple(0 for _ in value.shape)
        before, step = value[at], 1e-6
        value[at] = before + step
        above = loss()
        value[at] = before - step
        below = loss()
        value[at] = before
        assert grads[name][at] == pytest.approx((above - below) / (2 * step), abs=1e-6), name


def test_situations_label_every_window() -> None:
    for seen, labels in record_situations(msgspec.structs.replace(SMALL, situations=10)):
        assert labels.shape == (len(GAMMAS),)
        assert np.isfinite(labels).all()
        assert seen.shape[1] == len(FEATURES)


def test_the_shipped_network_was_better_than_any_single_window_where_it_had_not_been() -> None:
    from importlib.resources import files

    from dsdlab.policies.awc import WEIGHTS

    data = files("dsdlab.policies").joinpath(WEIGHTS).read_bytes()
    held_out = msgspec.json.decode(data, type=AwcWeights).provenance["held_out"]
    assert held_out["situations"] >= 100
    assert held_out["awc"] < 0.5 * held_out["best_static"]
    assert shipped().gammas == GAMMAS


@pytest.mark.parametrize(("field", "value"), [("situations", 1), ("tokens", 2), ("epochs", 0)])
def test_recipes_that_train_nothing_are_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value}; allowed"):
        Recipe(**{field: value})
