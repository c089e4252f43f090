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


class Side:
    """A drafter, all its forwards and the time that they took."""

    def __init__(self, kind: type[ModelDrafter] | type[SyntheticDrafter], metered: bool) -> None:
        self.forwards: list[tuple[int, int, int, int]] = []
        self.spent: list[float] = []
        charge = (lambda *forward: self.forwards.append(forward)) if metered else None
        engine = EmulatedEngine(PROFILE, max_context=64, wait=self.spent.append, charge=charge)
        self.drafter: Drafter = kind(engine)
        self.slot = self.drafter.open()

    def propose(
        self, ids: list[int], n: int, sampling: Sampling, tail: list[int], stop: int
    ) -> tuple[list[int], tuple[bool, ...], list[float]]:
        """stop: after so many tokens the policy has enough; 0: nobody asks one."""
        goes_on = (lambda sure: len(sure) < stop) if stop else None
        said = self.drafter.propose(self.slot, ids, n, sampling, tail, goes_on)
        sure = list(self.drafter.confidences) if stop and said else []
        return said, tuple(self.drafter.by_model), sure


STEPS = st.lists(
    st.tuples(
        st.one_of(st.just(1), st.integers(0, 6)),  # asked for
        st.integers(0, 6),  # of what is said, so many join the tail: one frame, or what the target can say
        st.integers(0, 4),  # committed afterwards
        st.integers(0, 3),  # the policy stops after
    ),
    max_size=40,
)


@given(
    STEPS,
    st.builds(Sampling, temperature=st.sampled_from([0.0, 0.8]), seed=st.integers(0, 99)),
    st.booleans(),
)
def test_the_same_in_a_stream(
    steps: list[tuple[int, int, int, int]], sampling: Sampling, metered: bool
) -> None:
    """A tail that grows token by token or by windows, is confirmed in part, or dies of the target's word."""
    model, synthetic = Side(ModelDrafter, metered), Side(SyntheticDrafter, metered)
    ids, tail = [3, 1, 4], list[int]()
    for n, kept, commits, stop in steps:
        told = model.propose(ids, n, sampling, tail, stop)
        assert synthetic.propose(ids, n, sampling, tail, stop) == told
        assert synthetic.forwards == model.forwards
        assert abs(sum(synthetic.spent) - sum(model.spent)) < 1e-9
        tail += told[0][:kept]
        for _ in range(commits):
            true = TARGET.token(sampling.seed, len(ids))
            ids.append(true)
            tail = tail[1:] if tail and tail[0] == true else []
