"""The fleets of a scenario: one for each combination of [grid] and [fleet], over all cores."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import msgspec

from dsdlab.models.emulated import EmulatedProfile, parse_profile
from dsdlab.nodes.request import STREAMING_MODES
from dsdlab.protocol.codec import encode
from dsdlab.protocol.frames import Draft, Verdict, pack_ids
from dsdlab.scenario import Cell, Scenario
from dsdlab.sim import queueing, theory
from dsdlab.sim.channel import websocket_bytes
from dsdlab.sim.costs import ForwardCost, NodeCosts, SystemProfile, UnfitProfile
from dsdlab.sim.fleet import FleetResult, FleetSpec, run_fleet
from dsdlab.sim.grid import OnDone, run_tasks
from dsdlab.sim.profile import LinkProfile

__all__ = ["FleetRow", "bound_tps", "fleet_json", "fleet_specs", "simulate_fleet_grid"]

EMULATED = "emulated:"


class FleetRow(msgspec.Struct, frozen=True, kw_only=True):
    """One fleet: where it stands in the grid, what became of it, and what the closed form allows at most.

    bound_tps: None where drafts stream, of which the closed form knows nothing.
    """

    mode: str
    policy: str
    gamma: int
    run_ahead: int
    free_run: bool
    beside: int
    rtt_ms: float
    rate_mbit: float | None
    loss_pct: float
    jitter_ms: float
    drafters: int | None
    arrival_per_s: float | None
    verifiers: int
    routing: str
    stages: int
    alpha: float
    bound_tps: float | None
    result: FleetResult


def simulate_fleet_grid(
    scenario: Scenario,
    profile: SystemProfile | None = None,
    *,
    alpha: float | None = None,
    persist: float | None = None,
    engine: str = "local",
    workers: int | None = None,
    on_done: OnDone | None = None,
) -> list[FleetRow]:
    """Run every fleet of a scenario. profile: what the models cost; None where they are emulated and say so.

    alpha, persist: of the acceptance, in place of the scenario's [fleet], [simulate] or its emulated drafter.
    Raises UnfitProfile where costs or acceptance are missing, GridFailed.
    """
    specs = fleet_specs(scenario, profile, alpha=alpha, persist=persist)
    results = run_tasks(
        _run, None, [spec for _, spec in specs], engine=engine, workers=workers, on_done=on_done
    )
    return [_row(cell, spec, result) for (cell, spec), result in zip(specs, results, strict=True)]


def _run(payload: None, spec: FleetSpec) -> FleetResult:  # noqa: ARG001 - what run_tasks calls
    return run_fleet(spec)


def fleet_specs(
    scenario: Scenario,
    profile: SystemProfile | None = None,
    *,
    alpha: float | None = None,
    persist: float | None = None,
) -> list[tuple[Cell, FleetSpec]]:
    """Every fleet of a scenario with its cell, in grid order. Raises UnfitProfile."""
    fleet = scenario.fleet
    if fleet is None:
        raise UnfitProfile(f"scenario {scenario.name} has no table [fleet]")
    edge, cloud = _costs(scenario, profile)
    acceptances = _acceptances(scenario, alpha, persist)
    warmup_s = fleet.warmup_s if fleet.warmup_s is not None else 0.1 * (fleet.duration_s or 0.0)
    assert cloud.target is not None
    out: dict[FleetSpec, Cell] = {}
    loads: list[tuple[int | None, float | None]]
    loads = [(n, None) for n in fleet.drafters or ()] + [(None, rate) for rate in fleet.arrival_per_s or ()]
    for cell in scenario.cells():
        for (alpha, persist, informed), (drafters, arrival_per_s), verifiers, stages, routing in product(
            acceptances if cell.mode != "cloud-ar" else acceptances[:1],  # there it is nothing
            loads,
            fleet.verifiers,
            fleet.stages,
            fleet.routing,
        ):
            target = msgspec.structs.replace(cloud.target, stages=stages, hop_s=fleet.stage_hop_ms / 1e3)
            spec = FleetSpec(
                mode=cell.mode,
                policy=cell.policy,
                gamma=cell.gamma,
                run_ahead=cell.run_ahead,
                free_run=cell.free_run,
                beside=cell.beside,
                alpha=alpha,
                persist=persist,
                informed=informed,
                link=scenario.profile_of(cell),
                shared_link=fleet.shared_link,
                nodelay=cell.nodelay,
                edge=edge,
                cloud=msgspec.structs.replace(cloud, target=target),
                drafters=drafters,
                arrival_per_s=arrival_per_s,
                verifiers=verifiers,
                routing=routing if verifiers > 1 else fleet.routing[0],  # one is as good as another
                think_s=fleet.think_s,
                duration_s=fleet.duration_s,
                warmup_s=warmup_s,
                generations_per_session=fleet.generations_per_session or 1,
                prompt_tokens=fleet.prompt_tokens,
                max_new_tokens=scenario.workload.max_new_tokens,
                temperature=cell.temperature,
                slots=fleet.slots,
                seed=scenario.run.seed,
            )
            out.setdefault(spec, cell)
    return [(cell, spec) for spec, cell in out.items()]


def _acceptances(
    scenario: Scenario, alpha: float | None, persist: float | None
) -> list[tuple[float, float | None, float]]:
    """Every (alpha, persist, informed) of a fleet's drafters. Raises UnfitProfile."""
    assert scenario.fleet is not None
    said = _emulated(scenario.models.drafter)
    if alpha is None and persist is None and scenario.fleet.alpha is not None:
        if scenario.simulate.alpha is not None:
            raise UnfitProfile("fleet.alpha, simulate.alpha are both given; allowed: one of the two")
        return [(each, None, said.informed if said is not None else 0.0) for each in scenario.fleet.alpha]
    alpha = scenario.simulate.alpha if alpha is None else alpha
    persist = scenario.simulate.persist if persist is None else persist
    if alpha is not None:
        return [(alpha, persist, 0.0)]
    if all(mode == "cloud-ar" for mode in scenario.grid.mode):
        return [(0.0, persist, 0.0)]
    if said is None:
        raise UnfitProfile("simulate.alpha is missing; a fleet needs it unless its drafter is emulated")
    return [(said.alpha, said.persist or None, said.informed)]


def _emulated(name: str) -> EmulatedProfile | None:
    return parse_profile(name.removeprefix(EMULATED)) if name.startswith(EMULATED) else None


def _costs(scenario: Scenario, profile: SystemProfile | None) -> tuple[NodeCosts, NodeCosts]:
    """(edge, cloud). Raises UnfitProfile."""
    if profile is not None:
        if profile.cloud.target is None:
            raise UnfitProfile(f"profile {profile.name} has no costs of the target on the cloud node")
        return profile.edge, profile.cloud
    target, drafter = (_cost(_emulated(n)) for n in (scenario.models.target, scenario.models.drafter))
    if target is None:
        raise UnfitProfile(
            f"model {scenario.models.target} has no costs; needs a profile, or an emulated model"
        )
    return NodeCosts(drafter=drafter), NodeCosts(target=target, drafter=drafter)


def _cost(says: EmulatedProfile | None) -> ForwardCost | None:
    if says is None:
        return None
    return ForwardCost(
        base_s=says.base_s + says.per_session_s,  # a ForwardCost counts sessions from the second on
        per_token_s=says.per_token_s,
        per_session_s=says.per_session_s,
    )


# closed form ---------------------------------------------------------------------------------------


def _mean_s(cost: ForwardCost | None, rows: int, context: int) -> float:
    if cost is None:
        return 0.0
    ratio = sum(cost.residuals) / len(cost.residuals) if cost.residuals else 1.0
    return cost.cost_s(rows, 1, context) * ratio


def bound_tps(spec: FleetSpec) -> float:
    """Tokens per second that a fleet commits at most, on average; tables call it the closed form.

    By the operational laws (`dsdlab.sim.queueing`): a generation needs the target for D seconds and all else
    for Z; windows are as long as γ and commit E(γ) tokens. For loss-free links, static windows and modes in
    which nobody drafts while the target works.
    """
    n, gamma, drafting = spec.max_new_tokens, spec.gamma, spec.mode != "cloud-ar"
    target, edge, cloud = spec.cloud.target, spec.edge, spec.cloud
    assert target is not None
    middle = spec.prompt_tokens + n // 2
    rtt_s = spec.link.rtt_ms / 1e3
    on_the_way_s = rtt_s + edge.send_s + edge.recv_s + cloud.send_s + cloud.recv_s
    steps = (n - 1) / float(theory.expected_tokens(spec.alpha, gamma if drafting else 0))
    t_v_s = _mean_s(target, gamma + 1 if drafting else 1, middle)
    demand_s = _mean_s(target, spec.prompt_tokens, 0) + steps * t_v_s
    rest_s = spec.think_s + on_the_way_s + (steps + 1) * (cloud.hop_s + (target.stages - 1) * target.hop_s)
    if drafting:
        drafter = edge.drafter if spec.mode == "dsd-sync" else cloud.drafter
        prefill_s = _mean_s(drafter, spec.prompt_tokens + 1, 0) - _mean_s(drafter, 1, middle)
        drafting_s = max(prefill_s, 0.0) + steps * gamma * _mean_s(drafter, 1, middle)
        if spec.mode == "cloud-sd":
            demand_s += drafting_s
        else:
            rest_s += drafting_s + steps * (edge.hop_s + on_the_way_s + _transfer_s(spec.link, gamma, middle))
    servers = spec.verifiers * target.stages
    if spec.drafters is None:
        rate = (spec.arrival_per_s or 0.0) * spec.generations_per_session
        return n * min(rate, servers / demand_s if demand_s else rate)
    # a pipeline of K stages is a bottleneck of D/K that each piece of work nevertheless passes in D
    slowest_s = demand_s / target.stages
    return n * float(
        queueing.throughput_bound_per_s(
            spec.drafters, slowest_s, rest_s + demand_s - slowest_s, spec.verifiers
        )
    )


def _transfer_s(link: LinkProfile, gamma: int, base: int) -> float:
    """Serialisation of one window's frames, headers included, s."""
    up = websocket_bytes(len(encode(Draft(1, 0, base, pack_ids(range(gamma))))), masked=True)
    down = websocket_bytes(len(encode(Verdict(1, 0, base, gamma, 1000, 0, 50_000))), masked=False)
    return link.transfer_s("up", up) + link.transfer_s("down", down) - link.rtt_ms / 1e3


# output --------------------------------------------------------------------------------------------


def _row(cell: Cell, spec: FleetSpec, result: FleetResult) -> FleetRow:
    assert spec.cloud.target is not None
    return FleetRow(
        mode=cell.mode,
        policy=cell.policy,
        gamma=cell.gamma,
        run_ahead=cell.run_ahead,
        free_run=cell.free_run,
        beside=cell.beside,
        rtt_ms=cell.rtt_ms,
        rate_mbit=cell.rate_mbit,
        loss_pct=cell.loss_pct,
        jitter_ms=cell.jitter_ms,
        drafters=spec.drafters,
        arrival_per_s=spec.arrival_per_s,
        verifiers=spec.verifiers,
        routing=spec.routing,
        stages=spec.cloud.target.stages,
        alpha=spec.alpha,
        bound_tps=None if spec.mode in STREAMING_MODES else bound_tps(spec),
        result=result,
    )


def fleet_json(rows: Iterable[FleetRow]) -> dict[str, Any]:
    """The rows as plain JSON-ready values: one flat object a fleet under "cells"."""
    cells = []
    for row in rows:
        flat = msgspec.to_builtins(row)
        result = flat.pop("result")
        for name in ("tpot_ms", "ttft_ms"):
            for q, value in result.pop(name).items():
                flat[f"{name}_{q}"] = value
        cells.append(flat | result)
    return {"cells": cells}
