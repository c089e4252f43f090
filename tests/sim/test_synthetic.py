"""A synthetic drafter is a model drafter over an emulated engine, in fewer calls."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dsdlab.decoding import Sampling
from dsdlab.models.drafters import Drafter, ModelDrafter
from dsdlab.models.emulated import EmulatedEngine, EmulatedProfile
from dsdlab.sim.synthetic import SyntheticDrafter

PROFILE = EmulatedProfile(base_s=0.005, per_token_s=0.001, per_session_s=0.0001, alpha=0.7, persist=5.0)
TARGET = EmulatedEngine(EmulatedProfile())


def played(
    kind: type[ModelDrafter] | type[SyntheticDrafter], windows: list[int], sampling: Sampling, metered: bool
) -> tuple[list[list[int]], list[tuple[int, int, int, int]], float]:
    """Windows of a whole session, its forwards, the time spent."""
    forwards: list[tuple[int, int, int, int]] = []
    spent: list[float] = []
    charge = (lambda *forward: forwards.append(forward)) if metered else None
    drafter: Drafter = kind(EmulatedEngine(PROFILE, max_context=64, wait=spent.append, charge=charge))
    slot = drafter.open()
    ids = [3, 1, 4]
    said = []
    for n in windows:
        window = drafter.propose(slot, ids, n, sampling)
        assert drafter.by_model == (True,) * len(window)
        said.append(window)
        for drafted in [*window, -1]:  # the target's token where the draft is wrong, or after it
            true = TARGET.token(sampling.seed, len(ids))
            ids.append(true)
            if drafted != true:
                break
    drafter.close(slot)
    return said, forwards, sum(spent)


@given(
    st.lists(st.integers(0, 9), max_size=20),
    st.builds(Sampling, temperature=st.sampled_from([0.0, 0.8]), seed=st.integers(0, 99)),
    st.booleans(),
)
def test_same_windows_same_forwards_same_time(windows: list[int], sampling: Sampling, metered: bool) -> None:
    model = played(ModelDrafter, windows, sampling, metered)
    synthetic = played(SyntheticDrafter, windows, sampling, metered)
    assert synthetic[:2] == model[:2]
    assert abs(synthetic[2] - model[2]) < 1e-9
