"""A scenario in virtual time: the nodes of the testbed over a modelled link, spending calibrated time.

One generation is one run of `DrafterNode` and `VerifierNode` on a virtual clock. Who says which token, and
how long saying it takes, are separate: a recorded trace or a synthetic process for the first
(`dsdlab.sim.replay`, `dsdlab.models.emulated`), a system profile for the second (`dsdlab.sim.costs`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from dsdlab.decoding import Sampling
from dsdlab.models.alone import generate_alone
from dsdlab.models.base import Engine
from dsdlab.models.drafters import LOOKUP, Drafter, PromptLookup
from dsdlab.models.emulated import EmulatedEngine, EmulatedProfile, parse_profile
from dsdlab.nodes import DrafterNode, GenerationRecord, GenerationRequest, VerifierNode
from dsdlab.nodes.request import EDGE_DRAFTING_MODES, STREAMING_MODES
from dsdlab.protocol.channel import Channel
from dsdlab.protocol.errors import ChannelClosed
from dsdlab.scenario import Cell, Scenario
from dsdlab.sim.channel import SimLink
from dsdlab.sim.compute import SimCompute
from dsdlab.sim.contention import SharedCompute, share
from dsdlab.sim.costs import ForwardCost, NodeCosts, SystemProfile, UnfitProfile
from dsdlab.sim.loop import run
from dsdlab.sim.prediction import PredictedCell, PredictedGeneration
from dsdlab.sim.profile import LinkProfile, LinkStep
from dsdlab.sim.replay import ReplayDrafter, ReplayTarget
from dsdlab.sim.synthetic import SyntheticDrafter
from dsdlab.sim.trace import Trace
from dsdlab.sweep.plan import Job, batches_of

__all__ = ["Pair", "simulate_cell", "simulate_generation", "simulate_together"]

EMULATED = "emulated:"
NO_OVERHEAD = NodeCosts()
SLOTS = 8  # sessions of an emulated model, where not more are to run at once
VOCAB = 1 << 20  # of synthetic models: a real prompt's ids fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Target and drafter as the simulator has them.

    profile: what everything costs; None where the models are emulated and say so themselves.
    trace: what they say; without one they are emulated: by the scenario's own words (`emulated:…`), or, with
    `alpha`, by a synthetic acceptance process in place of the real pair's. edge_target, edge_drafter: other
    emulated models at the edge.
    """

    target: str
    drafter: str
    profile: SystemProfile | None = None
    trace: Trace | None = None
    alpha: float | None = None
    persist: float | None = None
    max_context: int = 2048
    edge_target: str | None = None
    edge_drafter: str | None = None

    @property
    def edge(self) -> NodeCosts:
        return self.profile.edge if self.profile is not None else NO_OVERHEAD

    @property
    def cloud(self) -> NodeCosts:
        return self.profile.cloud if self.profile is not None else NO_OVERHEAD

    def _cost(self, node: str, model: str) -> ForwardCost | None:
        """What a model costs on a node; None without a profile. Raises UnfitProfile where it is not in it."""
        if self.profile is None:
            return None
        cost: ForwardCost | None = getattr(getattr(self.profile, node), model)
        if cost is None:
            raise UnfitProfile(f"profile {self.profile.name} has no costs of the {model} on the {node} node")
        return cost

    def target_engine(self, node: str, compute: SimCompute, rng: random.Random, slots: int = SLOTS) -> Engine:
        """The target on a node ("edge" or "cloud"). slots: sessions at a time."""
        cost = self._cost(node, "target")
        if self.trace is not None and cost is not None:
            return ReplayTarget(self.trace, compute.meter(cost, rng))
        synthetic = self.alpha is not None
        name = (self.edge_target if node == "edge" else None) or self.target
        spec = EmulatedProfile(vocab_size=VOCAB) if synthetic else self._emulated(name)
        return self._engine(spec, cost, compute, rng, slots)

    def drafter_on(self, node: str, compute: SimCompute, rng: random.Random, slots: int = SLOTS) -> Drafter:
        """The drafter on a node. slots: sessions at a time."""
        if self.drafter == LOOKUP and self.alpha is None:
            return PromptLookup()  # itself, recorded or not: it costs nothing
        cost = self._cost(node, "drafter") if self.drafter != LOOKUP else ForwardCost(base_s=0.0)
        if self.trace is not None and cost is not None:
            return ReplayDrafter(self.trace, compute.meter(cost, rng))
        if self.alpha is not None:
            spec = EmulatedProfile(alpha=self.alpha, persist=self.persist or 0.0, vocab_size=VOCAB)
        else:
            spec = self._emulated((self.edge_drafter if node == "edge" else None) or self.drafter)
        return SyntheticDrafter(self._engine(spec, cost, compute, rng, slots))

    def _emulated(self, name: str) -> EmulatedProfile:
        if not name.startswith(EMULATED):
            raise UnfitProfile(f"model {name} says nothing by itself; needs a trace, or simulate.alpha")
        return parse_profile(name.removeprefix(EMULATED))

    def _engine(
        self,
        spec: EmulatedProfile,
        cost: ForwardCost | None,
        compute: SimCompute,
        rng: random.Random,
        slots: int,
    ) -> EmulatedEngine:
        charge = None if cost is None else compute.meter(cost, rng)
        return EmulatedEngine(
            spec, slots=slots, max_context=self.max_context, wait=compute.spend, charge=charge
        )

    def alone(self, job: Job, max_new_tokens: int, stop_at_eos: bool) -> list[int]:
        """What the target says by itself: every simulated generation must say the same."""
        engine = self.target_engine("cloud", SimCompute(), random.Random(0))
        eos_ids = engine.info.eos_ids if stop_at_eos else ()
        return generate_alone(engine, job.prompt_ids, job.sampling, max_new_tokens, eos_ids)


def _compute(costs: NodeCosts) -> SimCompute:
    """A node's one compute thread; a partitioned target has a stage for each of its devices."""
    target = costs.target
    if target is None or target.stages == 1:
        return SimCompute(hop_s=costs.hop_s)
    return SimCompute(hop_s=costs.hop_s, stages=target.stages, stage_hop_s=target.hop_s)


def simulate_generation(
    pair: Pair,
    request: GenerationRequest,
    link: LinkProfile,
    steps: Sequence[LinkStep] = (),
    *,
    seed: str,
    nodelay: bool = True,
    timeout_s: float = 3600.0,
) -> GenerationRecord:
    """One generation in virtual time; the connection exists when it begins, as on the testbed.

    seed: of losses, jitter and the compute's residuals. Raises TimeoutError after `timeout_s` of virtual
    time, ValueError for what the link model has no words for, and whatever the nodes raise.
    """
    (record,) = simulate_together(
        pair, [request], link, steps, seed=seed, nodelay=nodelay, timeout_s=timeout_s
    )
    return record


def simulate_together(
    pair: Pair,
    requests: Sequence[GenerationRequest],
    link: LinkProfile,
    steps: Sequence[LinkStep] = (),
    *,
    seed: str,
    nodelay: bool = True,
    timeout_s: float = 3600.0,
) -> list[GenerationRecord]:
    """Generations of one mode that begin at once, each on an edge node and over a link of its own, with one
    verifier; their records in order. The rest is as in `simulate_generation`."""

    async def main() -> list[GenerationRecord]:
        rng = random.Random(seed)
        boxes = [SimLink(link, seed=rng.getrandbits(63), nodelay=nodelay) for _ in requests]
        edge, cloud = pair.edge, pair.cloud
        cloud_compute, *edge_computes = _computes(pair, len(requests))
        mode, slots = requests[0].mode, max(SLOTS, len(requests))
        beside = mode == "cloud-sd" or any(request.beside for request in requests)
        verifier = VerifierNode(
            pair.target_engine("cloud", cloud_compute, rng, slots),
            cloud_compute,
            drafter=pair.drafter_on("cloud", cloud_compute, rng, slots) if beside else None,
        )
        nodes: list[DrafterNode] = []
        serving: list[asyncio.Task[None]] = []
        for n, (box, compute) in enumerate(zip(boxes, edge_computes, strict=True)):
            here, there = box.pair(edge=(edge.send_s, edge.recv_s), cloud=(cloud.send_s, cloud.recv_s))

            async def dial(here: Channel = here) -> Channel:
                return here

            node = DrafterNode(
                dial,
                compute,
                drafter=pair.drafter_on("edge", compute, rng) if mode in EDGE_DRAFTING_MODES else None,
                target=pair.target_engine("edge", compute, rng) if mode == "edge-sd" else None,
            )
            nodes.append(node)
            serving.append(asyncio.create_task(_serve(verifier, there), name=f"verifier, for edge {n}"))
            await node.connect()
        timeline = LinkStep.timeline(link, tuple(steps))
        playing = [asyncio.create_task(_play(box, timeline), name="link steps") for box in boxes]
        try:
            async with asyncio.timeout(timeout_s):
                if len(nodes) == 1:
                    return [await nodes[0].generate(requests[0])]
                work = (node.generate(request) for node, request in zip(nodes, requests, strict=True))
                return await asyncio.gather(*work)
        finally:
            for play in playing:
                play.cancel()
            for node, serve in zip(nodes, serving, strict=True):
                await node.disconnect()
                await serve
            await verifier.close()

    return run(main())


def _computes(pair: Pair, edges: int) -> tuple[SimCompute, ...]:
    """The cloud's and those of the edges; on one machine they slow each other, which is known of one edge."""
    cloud, edge = pair.cloud, pair.edge
    contention = pair.profile.contention if pair.profile is not None else None
    staged = cloud.target is not None and cloud.target.stages > 1
    if contention is None or not contention.any or staged or edges > 1:
        return _compute(cloud), *(_compute(edge) for _ in range(edges))
    slower_cloud = SharedCompute(contention.target, hop_s=cloud.hop_s)
    slower_edge = SharedCompute(contention.drafter, hop_s=edge.hop_s)
    share(slower_cloud, slower_edge)
    return slower_cloud, slower_edge


async def _serve(verifier: VerifierNode, channel: Channel) -> None:
    with suppress(ChannelClosed):
        await verifier.serve(channel)


async def _play(box: SimLink, timeline: Sequence[tuple[float, LinkProfile, str]]) -> None:
    clock = asyncio.get_running_loop()
    begun_s = clock.time()
    for at_s, profile, _ in timeline:
        await asyncio.sleep(begun_s + at_s - clock.time())
        box.apply(profile)


def request_of(
    scenario: Scenario, cell: Cell, prompt_ids: Sequence[int], sampling: Sampling
) -> GenerationRequest:
    """What a cell asks of the nodes."""
    return GenerationRequest(
        prompt_ids=prompt_ids,
        mode=cell.mode,
        policy=cell.policy,
        gamma=cell.gamma,
        sampling=sampling,
        max_new_tokens=scenario.workload.max_new_tokens,
        stop_at_eos=scenario.workload.stop_at_eos,
        run_ahead=cell.run_ahead,
        free_run=cell.free_run,
        beside=cell.beside,
    )


def simulate_cell(work: tuple[Scenario, Pair, int], jobs: Sequence[Job]) -> PredictedCell:
    """All generations of one cell, each in several draws. `work`: the scenario, the pair, how many draws.

    What one generation suffers (a time-out, a link that cannot be modelled) is told in the cell's `error`.
    """
    scenario, pair, draws = work
    cell, cell_id = jobs[0].cell, jobs[0].cell_id
    out = PredictedCell(
        cell=cell_id,
        axes=cell.model_dump(),
        outside=_outside(pair, cell, jobs, scenario),
        generations=[],
    )
    link = scenario.profile_of(cell)
    different = draws if _random(pair, link, scenario.steps) else 1
    for batch in batches_of(jobs):
        requests = [request_of(scenario, cell, job.prompt_ids, job.sampling) for job in batch]
        records: list[list[GenerationRecord]] = []  # by draw: one for each job
        late = 0
        for draw in range(different):
            seed = f"{scenario.run.seed}/{cell_id}/{batch[0].rep}/{draw}"
            try:
                records.append(
                    simulate_together(
                        pair,
                        requests,
                        link,
                        scenario.steps,
                        seed=seed,
                        nodelay=cell.nodelay,
                        timeout_s=scenario.run.timeout_s,
                    )
                )
            except TimeoutError:
                late += 1
            except ValueError as e:
                out.error = str(e)
                return out
        records *= draws // different
        late *= draws // different
        if late:
            out.error = f"{late} of {draws} draws not finished within {scenario.run.timeout_s:g} s"
        if records:
            out.generations += [
                _generation(scenario, pair, job, [draw[n] for draw in records]) for n, job in enumerate(batch)
            ]
    return out


def _random(pair: Pair, link: LinkProfile, steps: Sequence[LinkStep]) -> bool:
    """Whether two draws can differ at all."""
    models = (node for costs in (pair.edge, pair.cloud) for node in (costs.target, costs.drafter))
    links = (link, *(profile for _, profile, _ in LinkStep.timeline(link, tuple(steps))))
    return any(cost is not None and cost.residuals for cost in models) or any(
        one.loss_pct or one.jitter_ms for one in links
    )


def _generation(
    scenario: Scenario, pair: Pair, job: Job, records: Sequence[GenerationRecord]
) -> PredictedGeneration:
    first = records[0]
    alone = pair.alone(job, scenario.workload.max_new_tokens, scenario.workload.stop_at_eos)
    return PredictedGeneration(
        rep=job.rep,
        prompt=job.prompt.key,
        seed=job.sampling.seed,
        windows=first.windows,
        tokens=len(first.ids),
        finish=first.finish,
        exact=all(record.ids == alone for record in records),
        tpot_ms=[1e3 * t for record in records if (t := record.tpot_s) is not None],
        ttft_ms=[1e3 * record.ttft_s for record in records],
        alpha=first.alpha,
        tau=first.tau,
        bytes_up=first.bytes_up,
        bytes_down=first.bytes_down,
        drafted=first.drafted,
        wasted=first.wasted,
        target_s=first.target_s,
        beside_s=first.beside_s,
    )


def _outside(pair: Pair, cell: Cell, jobs: Sequence[Job], scenario: Scenario) -> str:
    """What of a cell's work lies far outside the sizes that the profile was calibrated for."""
    if pair.profile is None:
        return ""
    prompt = max(len(job.prompt_ids) for job in jobs)
    context = prompt + scenario.workload.max_new_tokens
    longest = max(cell.gamma, cell.beside, cell.run_ahead if cell.mode in STREAMING_MODES else 0)
    rows = max(prompt, longest + 1)
    nodes = {"cloud": {"target"}, "edge": set()}
    if cell.mode == "cloud-sd":
        nodes["cloud"].add("drafter")
    elif cell.mode == "edge-sd":
        nodes = {"cloud": set(), "edge": {"target", "drafter"}}
    elif cell.mode in EDGE_DRAFTING_MODES:
        nodes["edge"].add("drafter")
    if cell.beside:
        nodes["cloud"].add("drafter")
    found = []
    for node, models in nodes.items():
        for model in sorted(models):
            cost = getattr(getattr(pair.profile, node), model)
            if cost is not None and (words := cost.outside(rows, 1, context)):
                found.append(f"{model} on the {node}: {words}")
    return "; ".join(found)
