"""Closed forms of one target that many share: waiting, capacity, pipelines. Times are in seconds.

Sources: Kleinrock, "Queueing Systems" I (1975) for M/M/1 and the Pollaczek–Khinchine formula; Denning and
Buzen, "The Operational Analysis of Queueing Network Models" (ACM Computing Surveys 10, 1978) for the
asymptotic bounds, which hold for whatever distribution; Reiser and Lavenberg, "Mean-Value Analysis of Closed
Multichain Queuing Networks" (J. ACM 27, 1980).

The closed model is the machine repairman's: N drafters each think for Z seconds (draft, send, travel, read),
then need the target for D seconds, first come first served. For `dsd-sync` Z = γ t_d + RTT + transfer and D =
t_v(γ); with the drafter beside the target (`cloud-sd`) D = γ t_d + t_v(γ).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dsdlab.sim.theory import Array, Real, checked, expected_tokens

__all__ = [
    "Closed",
    "capacity_sessions",
    "capacity_sessions_at_tpot",
    "capacity_tokens_per_s",
    "machine_repairman",
    "md1_wait_s",
    "mg1_wait_s",
    "mm1_wait_s",
    "pipeline_latency_s",
    "pipeline_throughput_per_s",
    "response_bound_s",
    "throughput_bound_per_s",
]


def mg1_wait_s(arrival_per_s: Real, service_s: Real, service_variance_s2: Real) -> Array:
    """Mean time in the queue of M/G/1, s: λ (s² + σ²) / (2 (1 − λ s)); infinity from λ s = 1 on.

    Pollaczek–Khinchine: Poisson arrivals, any distribution of service with mean s and variance σ².
    """
    rate = checked("arrival_per_s", arrival_per_s, 0.0)
    mean = checked("service_s", service_s, 0.0)
    second = mean**2 + checked("service_variance_s2", service_variance_s2, 0.0)
    load = rate * mean
    with np.errstate(divide="ignore", invalid="ignore"):
        wait = rate * second / (2.0 * (1.0 - load))
    return np.asarray(np.where(load < 1.0, wait, np.inf), dtype=np.float64)


def md1_wait_s(arrival_per_s: Real, service_s: Real) -> Array:
    """Mean time in the queue of M/D/1 (constant service), s: ρ s / (2 (1 − ρ))."""
    return mg1_wait_s(arrival_per_s, service_s, 0.0)


def mm1_wait_s(arrival_per_s: Real, service_s: Real) -> Array:
    """Mean time in the queue of M/M/1 (exponential service), s: ρ s / (1 − ρ)."""
    return mg1_wait_s(arrival_per_s, service_s, checked("service_s", service_s, 0.0) ** 2)


def throughput_bound_per_s(customers: Real, demand_s: Real, think_s: Real, servers: Real = 1) -> Array:
    """X(N) ≤ min(M/D, N/(D + Z)): work finished per second, at most.

    servers: M of them, each with its own share of the customers. Met exactly once D, Z are constant and N is
    a multiple of M. Source: Denning and Buzen, section "Bottleneck analysis".
    """
    n, m = checked("customers", customers, 0.0), checked("servers", servers, 1.0)
    d, z = checked("demand_s", demand_s, 0.0), checked("think_s", think_s, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.minimum(m / d, n / (d + z)), dtype=np.float64)


def response_bound_s(customers: Real, demand_s: Real, think_s: Real, servers: Real = 1) -> Array:
    """R(N) ≥ max(D, N D/M − Z): seconds from asking for the target to its answer, at least.

    The interactive response time formula R = N/X − Z with the bound on X.
    """
    n, m = checked("customers", customers, 0.0), checked("servers", servers, 1.0)
    d, z = checked("demand_s", demand_s, 0.0), checked("think_s", think_s, 0.0)
    return np.asarray(np.maximum(d, n * d / m - z), dtype=np.float64)


class Closed(NamedTuple):
    """A closed network in equilibrium."""

    throughput_per_s: float
    response_s: float  # waiting and service
    queue: float  # customers waiting or in service
    utilisation: float


def machine_repairman(customers: int, demand_s: float, think_s: float) -> Closed:
    """N customers, exponential service D and any think time of mean Z, by mean-value analysis (exact).

    R(n) = D (1 + Q(n−1)), X(n) = n/(R(n) + Z), Q(n) = X(n) R(n). Constant service waits less.
    """
    if customers < 1:
        raise ValueError(f"customers is {customers}; allowed: 1 or more")
    d, z = float(checked("demand_s", demand_s, 0.0)), float(checked("think_s", think_s, 0.0))
    if d + z == 0.0:
        raise ValueError("demand_s and think_s are both 0; allowed: one above 0")
    queue = throughput = response = 0.0
    for n in range(1, customers + 1):
        response = d * (1.0 + queue)
        throughput = n / (response + z)
        queue = throughput * response
    return Closed(throughput, response, queue, throughput * d)


def capacity_tokens_per_s(
    alpha: Real,
    gamma: Real,
    t_v_s: Real,
    *,
    fused_t_d_s: Real = 0.0,
    stages: Real = 1,
    utilisation: Real = 1.0,
) -> Array:
    """Tokens per second of one target that is busy for a share `utilisation` of the time: ρ K E(γ)/D.

    fused_t_d_s: t_d of a drafter on the target's own node, which then cannot verify; 0 with edge drafters.
    stages: K, each with an equal share of t_v(γ), all busy with different sessions.
    """
    drafting_s = checked("gamma", gamma, 0.0) * checked("fused_t_d_s", fused_t_d_s, 0.0)
    demand_s = drafting_s + checked("t_v_s", t_v_s, 0.0)
    busy = checked("utilisation", utilisation, 0.0, 1.0) * checked("stages", stages, 1.0)
    with np.errstate(divide="ignore"):
        return np.asarray(busy * expected_tokens(alpha, gamma) / demand_s, dtype=np.float64)


def capacity_sessions(demand_s: Real, think_s: Real, *, stages: Real = 1, utilisation: Real = 1.0) -> Array:
    """Sessions that keep one target busy for a share `utilisation` of the time: ρ K (D + Z)/D.

    At utilisation 1 and K = 1 it is N*, the knee of the bounds (Denning and Buzen's saturation point). A
    session that pauses between generations has the pause in Z, per window. A real number: round down.
    """
    d, z = checked("demand_s", demand_s, 0.0), checked("think_s", think_s, 0.0)
    busy = checked("utilisation", utilisation, 0.0, 1.0) * checked("stages", stages, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(busy * (d + z) / d, dtype=np.float64)


def capacity_sessions_at_tpot(
    alpha: Real, gamma: Real, demand_s: Real, think_s: Real, tpot_s: Real, *, stages: Real = 1
) -> Array:
    """Sessions of one target that each still get a token every `tpot_s` seconds, at most: K E(γ) tpot/D.

    0 where not even a single session is that fast. From the bounds: the window of one session takes
    max(D + Z, N D/K); exact for constant times, an upper bound otherwise. A real number: round down.
    """
    window_s = expected_tokens(alpha, gamma) * checked("tpot_s", tpot_s, 0.0)
    d, z = checked("demand_s", demand_s, 0.0), checked("think_s", think_s, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        sessions = checked("stages", stages, 1.0) * window_s / d
    return np.asarray(np.where(d + z <= window_s, sessions, 0.0), dtype=np.float64)


def pipeline_latency_s(stages_s: Real, hops_s: Real) -> Array:
    """Time of one piece of work through a pipeline, s: Σ stages + Σ hops, both along the last axis."""
    stages, hops = checked("stages_s", stages_s, 0.0), checked("hops_s", hops_s, 0.0)
    return np.asarray(np.sum(stages, axis=-1) + np.sum(hops, axis=-1))


def pipeline_throughput_per_s(stages_s: Real, customers: Real = np.inf, rest_s: Real = 0.0) -> Array:
    """Pieces of work per second through a pipeline: 1/max stage, and no more than N/(Σ stages + rest).

    rest_s: hops and whatever else one of N customers does between two pieces. A single session gains nothing
    from a pipeline, because its next window depends on the last one's verdict.
    """
    stages = checked("stages_s", stages_s, 0.0)
    cycle_s = np.sum(stages, axis=-1) + checked("rest_s", rest_s, 0.0)
    with np.errstate(divide="ignore"):
        return np.asarray(
            np.minimum(1.0 / np.max(stages, axis=-1), checked("customers", customers, 0.0) / cycle_s)
        )
