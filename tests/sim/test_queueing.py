"""The queueing formulas against textbook values, each other and direct simulation of the recursion."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsdlab.sim import queueing, theory

times = st.floats(1e-3, 1.0)


def test_waiting_times() -> None:
    """At load 1/2 a constant service of 1 s makes people wait 1/2 s, an exponential one 1 s."""
    assert queueing.md1_wait_s(0.5, 1.0) == pytest.approx(0.5)
    assert queueing.mm1_wait_s(0.5, 1.0) == pytest.approx(1.0)
    assert queueing.mg1_wait_s(0.5, 1.0, 0.25) == pytest.approx(0.625)
    assert queueing.md1_wait_s(0.0, 1.0) == 0.0
    assert queueing.md1_wait_s(1.0, 1.0) == np.inf
    assert queueing.md1_wait_s(np.array([0.25, 2.0]), 1.0) == pytest.approx([1 / 6, np.inf])


@given(st.floats(0.0, 0.99), times)
def test_constant_service_waits_half_as_long(load: float, service: float) -> None:
    rate = load / service
    wait = float(queueing.md1_wait_s(rate, service))
    assert queueing.mm1_wait_s(rate, service) == pytest.approx(2 * wait)


@given(st.integers(1, 60), times, st.floats(0.0, 5.0))
def test_a_closed_network_keeps_within_the_bounds(customers: int, demand: float, think: float) -> None:
    got = queueing.machine_repairman(customers, demand, think)
    assert got.throughput_per_s <= float(queueing.throughput_bound_per_s(customers, demand, think)) * (
        1 + 1e-9
    )
    assert got.response_s >= float(queueing.response_bound_s(customers, demand, think)) * (1 - 1e-9)
    assert got.utilisation <= 1 + 1e-9
    assert got.queue == pytest.approx(got.throughput_per_s * got.response_s)  # Little
    assert got.queue + got.throughput_per_s * think == pytest.approx(customers)


def test_machine_repairman_against_its_markov_chain() -> None:
    """Birth-death: with n of N waiting or served, n + 1 comes at (N − n)/Z and goes at 1/D."""
    customers, demand, think = 6, 0.4, 1.0
    weights = [1.0]
    for n in range(customers):
        weights.append(weights[-1] * (customers - n) / think * demand)
    p = np.array(weights) / sum(weights)
    got = queueing.machine_repairman(customers, demand, think)
    assert got.utilisation == pytest.approx(1 - p[0])
    assert got.queue == pytest.approx(float(p @ np.arange(customers + 1)))


@given(st.integers(1, 40), st.integers(1, 4), times, st.floats(0.0, 2.0))
def test_constant_times_meet_the_bound(per_server: int, servers: int, demand: float, think: float) -> None:
    """Customers of constant times, played one after the other at each server: X = min(M/D, N/(D + Z))."""
    rounds = 50
    ready = [0.0] * per_server  # when each of one server's customers asks again
    free = 0.0
    ends: list[float] = []
    for _ in range(rounds):
        for n in range(per_server):  # first come first served never changes their order
            free = max(free, ready[n]) + demand
            ready[n] = free + think
            ends.append(free)
    skip = per_server * (rounds // 2)
    rate = (len(ends) - 1 - skip) // per_server * per_server  # whole rounds
    measured = servers * rate / (ends[skip + rate] - ends[skip])
    bound = queueing.throughput_bound_per_s(per_server * servers, demand, think, servers)
    assert measured == pytest.approx(float(bound), rel=1e-6)


@given(st.floats(0.0, 1.0), st.integers(1, 16), times, times, st.floats(0.0, 1.0))
def test_capacities_agree(alpha: float, gamma: int, t_d: float, t_v: float, rtt: float) -> None:
    split = queueing.capacity_tokens_per_s(alpha, gamma, t_v)
    fused = queueing.capacity_tokens_per_s(alpha, gamma, t_v, fused_t_d_s=t_d)
    assert split / fused == pytest.approx(float(theory.capacity_ratio(gamma, t_d, t_v)))
    think = gamma * t_d + rtt
    sessions = queueing.capacity_sessions(t_v, think)
    per_session = 1.0 / theory.sync_tpot_s(alpha, gamma, t_d, t_v, rtt)
    assert sessions * per_session == pytest.approx(float(split))
    knee = queueing.capacity_sessions_at_tpot(alpha, gamma, t_v, think, 1.0 / per_session * (1 + 1e-12))
    assert knee == pytest.approx(float(sessions))


def test_capacity_at_a_bound() -> None:
    # E(4) = 5 at α = 1; a window may take 0.5 s, the target needs 0.05 of it
    assert queueing.capacity_sessions_at_tpot(1.0, 4, 0.05, 0.1, 0.1) == pytest.approx(10.0)
    assert queueing.capacity_sessions_at_tpot(1.0, 4, 0.05, 0.5, 0.1) == 0.0
    assert queueing.capacity_sessions_at_tpot(1.0, 4, 0.05, 0.1, 0.1, stages=2) == pytest.approx(20.0)
    assert queueing.capacity_sessions(0.05, 0.15, utilisation=0.5) == pytest.approx(2.0)


def test_pipelines() -> None:
    assert queueing.pipeline_latency_s([0.02, 0.03, 0.01], [0.005, 0.005]) == pytest.approx(0.07)
    assert queueing.pipeline_throughput_per_s([0.02, 0.03, 0.01]) == pytest.approx(1 / 0.03)
    assert queueing.pipeline_throughput_per_s([0.02, 0.03, 0.01], 1, 0.01) == pytest.approx(1 / 0.07)
    assert queueing.pipeline_throughput_per_s([[0.02, 0.02], [0.01, 0.03]], 3, 0.0) == pytest.approx(
        [50, 1 / 0.03]
    )


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: queueing.md1_wait_s(-1, 1.0), "arrival_per_s is -1"),
        (lambda: queueing.mm1_wait_s(1, float("nan")), "service_s is nan"),
        (lambda: queueing.machine_repairman(0, 1.0, 1.0), "customers is 0"),
        (lambda: queueing.machine_repairman(1, 0.0, 0.0), "both 0"),
        (lambda: queueing.capacity_sessions(0.1, 0.1, utilisation=1.5), "utilisation is 1.5"),
        (lambda: queueing.throughput_bound_per_s(3, 0.1, 0.1, 0), "servers is 0"),
    ],
)
def test_values_out_of_range_are_named(call: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()  # type: ignore[operator]
