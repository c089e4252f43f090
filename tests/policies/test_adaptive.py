"""The controller against the best static mode of each cell, on the virtual clock."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from dsdlab.decoding import Sampling
from dsdlab.models.drafters import ModelDrafter
from dsdlab.models.emulated import EmulatedEngine, EmulatedProfile
from dsdlab.nodes import DrafterNode, GenerationRecord, GenerationRequest, VerifierNode
from dsdlab.policies import Outcome
from dsdlab.policies.adaptive import ALONE, FREE, AdaptiveController, Facts, Plan, cost_of, settings_of
from dsdlab.protocol.channel import Channel
from dsdlab.protocol.errors import ChannelClosed
from dsdlab.sim.channel import SimLink
from dsdlab.sim.compute import SimCompute
from dsdlab.sim.loop import run
from dsdlab.sim.profile import LinkProfile

T_V1_S, ROW_S, T_D_S = 0.050, 0.001, 0.005
STATIC: list[dict[str, Any]] = [
    {"mode": "cloud-ar"},
    {"mode": "dsd-sync", "gamma": 4},
    {"mode": "dsd-sync", "gamma": 8},
    {"mode": "dsd-pipelined", "gamma": 4},
    {"mode": "dsd-stream"},
    {"mode": "dsd-stream", "free_run": True},
]
BESIDE: list[dict[str, Any]] = [
    {"mode": "cloud-sd", "gamma": 4},
    {"mode": "dsd-stream", "free_run": True, "beside": 4},
]


def generate(
    rtt_ms: float, seed: int, alpha: float, jump: tuple[float, float] | None = None, **asked: Any
) -> GenerationRecord:
    """One emulated generation. jump: (seconds, RTT in ms from then on)."""

    async def main() -> GenerationRecord:
        cloud, edge = SimCompute(), SimCompute()
        link = SimLink(LinkProfile(rtt_ms=rtt_ms), seed)
        here, there = link.pair()

        def drafter(compute: SimCompute) -> ModelDrafter:
            says = EmulatedProfile(base_s=T_D_S, alpha=alpha)
            return ModelDrafter(EmulatedEngine(says, slots=2, wait=compute.spend))

        costs = EmulatedProfile(base_s=T_V1_S - ROW_S, per_token_s=ROW_S)
        verifier = VerifierNode(
            EmulatedEngine(costs, slots=2, wait=cloud.spend), cloud, drafter=drafter(cloud)
        )

        async def dial() -> Channel:
            return here

        async def serve() -> None:
            with pytest.raises(ChannelClosed):
                await verifier.serve(there)

        node = DrafterNode(dial, edge, drafter=drafter(edge))
        serving = asyncio.create_task(serve())
        await node.connect()
        if jump is not None:
            asyncio.get_running_loop().call_later(jump[0], link.apply, LinkProfile(rtt_ms=jump[1]))
        request = GenerationRequest((5, 3, 9), sampling=Sampling(seed=seed), **asked)
        record = await node.generate(request)
        await node.disconnect()
        await serving
        await verifier.close()
        return record

    return run(main())


def mean_tpot_ms(rtt_ms: float, alpha: float, **asked: Any) -> float:
    records = [generate(rtt_ms, seed, alpha, max_new_tokens=120, **asked) for seed in range(4)]
    tpots = [record.tpot_s for record in records]
    return 1e3 * sum(t for t in tpots if t is not None) / len(tpots)


@pytest.mark.parametrize("alpha", [0.5, 0.8])
@pytest.mark.parametrize("rtt_ms", [1, 30, 100, 300])
def test_never_far_from_the_best_static_mode(rtt_ms: float, alpha: float) -> None:
    """Regret at most 5 %, and never slower than the target alone by more than 2 %."""
    static = {str(asked): mean_tpot_ms(rtt_ms, alpha, **asked) for asked in STATIC}
    adaptive = mean_tpot_ms(rtt_ms, alpha, mode="dsd-adaptive")
    assert adaptive <= 1.05 * min(static.values()), (adaptive, static)
    assert adaptive <= 1.02 * static[str(STATIC[0])]


@pytest.mark.parametrize("rtt_ms", [1, 60, 300])
def test_never_far_from_the_best_with_a_drafter_beside_the_target(rtt_ms: float) -> None:
    static = {str(asked): mean_tpot_ms(rtt_ms, 0.8, **asked) for asked in (*STATIC, *BESIDE)}
    adaptive = mean_tpot_ms(rtt_ms, 0.8, mode="dsd-adaptive", beside=8)
    assert adaptive <= 1.06 * min(static.values()), (adaptive, static)


def test_after_a_jump_of_the_round_trip_it_is_soon_near_the_new_best() -> None:
    """20 → 150 ms after 4 s: from 2 s later on within 10 % of the best static mode at 150 ms."""

    def tail_ms(**asked: Any) -> float:
        total = 0.0
        for seed in range(4):
            record = generate(20, seed, 0.8, (4.0, 150.0), max_new_tokens=420, **asked)
            late = [(t, n) for t, n in record.commits if t >= 6.0]
            total += (late[-1][0] - late[0][0]) / sum(n for _, n in late[1:])
        return 1e3 * total / 4

    best = min(tail_ms(**asked) for asked in STATIC)
    assert tail_ms(mode="dsd-adaptive") <= 1.10 * best


def test_the_same_ids_as_the_target_alone() -> None:
    for seed in range(3):
        alone = generate(50, seed, 0.6, mode="cloud-ar", max_new_tokens=90)
        for beside in (0, 8):
            found = generate(50, seed, 0.6, (0.5, 5.0), mode="dsd-adaptive", max_new_tokens=90, beside=beside)
            assert found.ids == alone.ids
            assert found.decisions  # it did decide


def facts(**changed: Any) -> Facts:
    values: dict[str, Any] = {
        "alpha": 0.8, "alpha_beside": 0.8, "token_s": 0.005, "one_s": 0.05, "busy_s": 0.05, "row_s": 0.001,
        "rtt_s": 0.1, "beside_s": 0.005, "run_ahead": 20, "window": 12,
    }  # fmt: skip
    return Facts(**(values | changed))


def test_plans_cost_what_the_modes_cost() -> None:
    assert cost_of(ALONE, facts()) == 0.05
    # cloud-sd at γ = 4: (50 + 4 · 6) ms over E(4) = 3.3616
    assert cost_of(Plan(0, 4, False), facts()) == pytest.approx(0.074 / 3.3616)
    waiting = Plan(1, 0, True)
    assert cost_of(waiting, facts(rtt_s=0.001)) < cost_of(FREE, facts(rtt_s=0.001))
    assert cost_of(waiting, facts(rtt_s=0.1)) > cost_of(FREE, facts(rtt_s=0.1))


def test_drafting_that_slows_the_target_is_left_alone_where_it_gains_little() -> None:
    free, quiet = (
        cost_of(FREE, facts(rtt_s=0.3, busy_s=0.065)),
        cost_of(ALONE, facts(rtt_s=0.3, busy_s=0.065)),
    )
    assert free > quiet


def test_a_waiting_target_never_waits_for_ever() -> None:
    """A lost packet must not stop the text: the hold is finite, but long enough for what is expected."""
    for rtt_s in (0.0, 0.1, 1.0):
        pace = settings_of(Plan(4, 0, True), facts(rtt_s=rtt_s)).pace
        assert pace is not None
        assert rtt_s + 4 * 0.005 < pace.hold_s < math.inf


def test_quiet_sessions_look_at_acceptance_again() -> None:
    """Drafting that did not pay is tried again, in case the text has changed."""
    policy = AdaptiveController()
    policy.begin(beside=0, rtt_s=0.03)
    drafted = []
    for context in range(400):
        decision = policy.decide()
        for _ in range(len(STATIC) + 4):
            decision = policy.decide()
        drafted.append(decision.gamma > 0)
        compared = int(decision.gamma > 0)
        policy.observe(
            Outcome(
                0,
                0,
                0.0,
                0.05,
                0.0,
                math.nan,
                compared,
                0,
                context=context,
                now_s=0.05 * context,
                t_token_s=0.005,
            )
        )
    assert not all(drafted[100:])
    assert any(drafted[100:])


def test_no_session_looks_for_acceptance_where_no_drafts_could_pay() -> None:
    """Over a round trip of twenty steps hardly a chain survives, however good the drafts: few are made."""
    policy = AdaptiveController()
    policy.begin(beside=0, rtt_s=1.0)
    drafted = []
    for context in range(300):
        for _ in range(len(STATIC) + 5):
            decision = policy.decide()
        drafted.append(decision.gamma > 0)
        policy.observe(
            Outcome(0, 0, 0.0, 0.05, 0.0, math.nan, context=context, now_s=0.05 * context, t_token_s=0.005)
        )
    assert not any(drafted[10:])
