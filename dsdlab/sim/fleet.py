"""Many drafters, several verifiers: the real nodes on the virtual clock, sharing targets.

Every session is a `DrafterNode` with a device, a link and a drafter of its own; every verifier is a
`VerifierNode` whose compute serves windows first come, first served. Which sessions begin when is the
workload: closed (N users who pause and ask again) or open (Poisson arrivals). What comes out is added up on
the way, so that 10⁵ sessions fit into memory; one run is a deterministic function of its `FleetSpec`.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from dsdlab.decoding import Sampling
from dsdlab.models.drafters import Drafter, ModelDrafter
from dsdlab.models.emulated import EmulatedEngine, EmulatedProfile
from dsdlab.nodes import DrafterNode, GenerationFailed, GenerationRecord, GenerationRequest, VerifierNode
from dsdlab.nodes.request import EDGE_DRAFTING_MODES, STREAMING_MODES
from dsdlab.policies.base import RUN_AHEAD
from dsdlab.protocol.channel import Channel
from dsdlab.protocol.errors import ChannelClosed, Refused
from dsdlab.scenario_fleet import FLEET_MODES, ROUTINGS
from dsdlab.sim import loop
from dsdlab.sim.channel import SimLink
from dsdlab.sim.compute import SimCompute
from dsdlab.sim.costs import ForwardCost, NodeCosts, UnfitProfile
from dsdlab.sim.fleet_parts import Log, LoggedChannel, MeasuredCompute, Router, Tally, Window, quantile
from dsdlab.sim.profile import LinkProfile

__all__ = ["FleetResult", "FleetSpec", "Percentiles", "run_fleet"]

OPEN_SLOTS = 1 << 17  # of each verifier where neither slots nor users are numbered
OnRecord = Callable[[GenerationRecord], None]
NO_EDGE = NodeCosts(drafter=ForwardCost(base_s=0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSpec:
    """One fleet. Fields of `dsdlab.scenario_fleet.Fleet` and `GenerationRequest` mean what they mean there.

    drafters: users of a closed workload; None: an open one of `arrival_per_s`. edge, cloud: what the models
        cost on each node; the target's `stages` and `hop_s` partition it (a drafter beside it likewise).
    alpha: probability that a drafted token is the target's; persist: as in the scenario's [simulate].

    Raises ValueError, naming the field.
    """

    mode: str = "dsd-sync"
    policy: str = "static"
    gamma: int = 4
    run_ahead: int = RUN_AHEAD
    free_run: bool = False
    beside: int = 0
    alpha: float = 0.8
    persist: float | None = None
    informed: float = 0.0  # as in EmulatedProfile: what a drafter knows of its own chances
    link: LinkProfile = field(default_factory=LinkProfile)
    shared_link: bool = False
    nodelay: bool = True
    edge: NodeCosts = NO_EDGE
    cloud: NodeCosts
    drafters: int | None = None
    arrival_per_s: float | None = None
    verifiers: int = 1
    routing: str = "round-robin"
    think_s: float = 0.0
    duration_s: float | None = None
    warmup_s: float = 0.0
    generations_per_session: int = 1
    prompt_tokens: int = 64
    max_new_tokens: int = 64
    temperature: float = 0.0
    slots: int | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        if self.mode not in FLEET_MODES:
            raise ValueError(f"mode is {self.mode!r}; allowed: {', '.join(FLEET_MODES)}")
        if self.routing not in ROUTINGS:
            raise ValueError(f"routing is {self.routing!r}; allowed: {', '.join(ROUTINGS)}")
        if (self.drafters is None) == (self.arrival_per_s is None):
            raise ValueError("drafters, arrival_per_s: allowed: one of the two")
        if self.arrival_per_s is not None and self.duration_s is None:
            raise ValueError("duration_s is None; allowed with arrival_per_s: above 0")
        for name in ("drafters", "verifiers", "generations_per_session", "prompt_tokens", "slots"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; allowed: 1 or more")
        for name in ("arrival_per_s", "duration_s"):
            value = getattr(self, name)
            if value is not None and not value > 0.0:
                raise ValueError(f"{name} is {value}; allowed: above 0")
        if not 0.0 <= self.warmup_s < (self.duration_s or math.inf):
            raise ValueError(f"warmup_s is {self.warmup_s}; allowed: 0 or more, less than duration_s")
        if not self.think_s >= 0.0:
            raise ValueError(f"think_s is {self.think_s}; allowed: 0 or more")
        self.request((1,), 0)  # which names a field that no node could serve

    def request(self, prompt_ids: Sequence[int], seed: int) -> GenerationRequest:
        """What one of its generations asks for."""
        return GenerationRequest(
            prompt_ids=prompt_ids,
            mode=self.mode,
            policy=self.policy,
            gamma=self.gamma,
            run_ahead=self.run_ahead,
            free_run=self.free_run,
            beside=self.beside,
            sampling=Sampling(self.temperature, seed=seed),
            max_new_tokens=self.max_new_tokens,
            stop_at_eos=False,
        )


class Percentiles(msgspec.Struct, frozen=True):
    """Of one number a generation, ms; None of no generation."""

    p50: float | None
    p95: float | None
    p99: float | None

    @classmethod
    def of(cls, values_s: list[float]) -> Percentiles:
        if not values_s:
            return cls(None, None, None)
        values_s.sort()
        return cls(*(1e3 * quantile(values_s, q) for q in (0.50, 0.95, 0.99)))


class FleetResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a fleet, the warm-up and what came after `duration_s` left out.

    generations: begun then, and finished; windows (forwards of the target), drafted, wasted (tokens; where
    drafts stream the edge's, judged or not), times and bytes are theirs. tokens, goodput_tps: what was
    committed then. utilisation, queue_mean, wait_ms: one of each verifier: share of the time that its stages
    were busy, number of works that wait, their mean wait.
    """

    generations: int
    tokens: int
    seconds: float  # of virtual time
    goodput_tps: float
    tpot_ms: Percentiles
    ttft_ms: Percentiles
    utilisation: list[float]
    queue_mean: list[float]
    wait_ms: list[float]
    windows: int
    drafted: int
    wasted: int
    bytes_up_per_token: float
    bytes_down_per_token: float
    inexact: int  # of all generations: those that are not the target's alone
    refused: int  # those that found no slot in time
    sessions: int  # of the whole run
    virtual_s: float
    wall_s: float


def run_fleet(spec: FleetSpec, log: Log | None = None, on_record: OnRecord | None = None) -> FleetResult:
    """Run one fleet to its end.

    log: takes the event log; the same spec gives the same lines. on_record: takes every generation.

    Raises UnfitProfile where a model that the mode needs has no cost, and whatever the nodes raise.
    """
    begun = time.perf_counter()
    try:
        result = loop.run(_Fleet(spec, log, on_record).main())
    except ExceptionGroup as failed:  # of the tasks; the first to fail has stopped the others
        first: Exception = failed
        while isinstance(first, ExceptionGroup):
            first = first.exceptions[0]
        raise first from None
    return msgspec.structs.replace(result, wall_s=time.perf_counter() - begun)


class _Verifier:
    """A node in the cloud with its compute and the connections that it serves."""

    def __init__(self, fleet: _Fleet, number: int) -> None:
        spec, cloud = fleet.spec, fleet.spec.cloud
        target = cloud.target
        if target is None:
            raise UnfitProfile("the profile has no costs of the target on the cloud node")
        self.name = f"v{number}"
        self.compute = MeasuredCompute(
            self.name,
            fleet.clock.time,
            fleet.window,
            fleet.log,
            hop_s=cloud.hop_s,
            stages=target.stages,
            stage_hop_s=target.hop_s,
        )
        slots = spec.slots or spec.drafters or OPEN_SLOTS
        rng = fleet.rng(self.name)
        engine = fleet.engine(fleet.words, target, self.compute, rng, slots)
        drafter: Drafter | None = None
        if spec.mode == "cloud-sd" or spec.beside:
            if cloud.drafter is None:
                raise UnfitProfile("the profile has no costs of the drafter on the cloud node")
            drafter = ModelDrafter(fleet.engine(fleet.acceptance, cloud.drafter, self.compute, rng, slots))
        self.node = VerifierNode(engine, self.compute, drafter=drafter)

    async def serve(self, channel: Channel) -> None:
        with suppress(ChannelClosed, Refused):  # the client left, or its Hello came too late
            await self.node.serve(channel)


class _Device:
    """One user's device: a compute, a drafter, and a connection to each verifier that it has been sent to."""

    __slots__ = ("_drafter", "_fleet", "_link", "_nodes", "compute", "generations", "number")

    def __init__(self, fleet: _Fleet, number: int) -> None:
        self._fleet, self.number = fleet, number
        self.compute = SimCompute(hop_s=fleet.spec.edge.hop_s)
        self.generations = 0
        self._nodes: dict[int, DrafterNode] = {}
        self._link = fleet.shared_link
        cost = fleet.spec.edge.drafter
        self._drafter: Drafter | None = None
        if fleet.spec.mode in EDGE_DRAFTING_MODES:
            if cost is None:
                raise UnfitProfile("the profile has no costs of the drafter on the edge node")
            engine = fleet.engine(fleet.acceptance, cost, self.compute, fleet.edge_rng, 1)
            self._drafter = ModelDrafter(engine)

    async def node(self, at: int) -> DrafterNode:
        """The node that talks to verifier `at`, connected."""
        node = self._nodes.get(at)
        if node is None:
            node = self._nodes[at] = DrafterNode(lambda: self._dial(at), self.compute, drafter=self._drafter)
            await node.reconnect()  # until somebody answers: Hello and Welcome may be lost for long
        return node

    async def _dial(self, at: int) -> Channel:
        fleet, spec = self._fleet, self._fleet.spec
        if self._link is None:
            self._link = fleet.link(self.number)
        here, there = self._link.pair(
            edge=(spec.edge.send_s, spec.edge.recv_s), cloud=(spec.cloud.send_s, spec.cloud.recv_s)
        )
        edge_end: Channel = here
        cloud_end: Channel = there
        if fleet.log is not None:
            name = fleet.name_of(f"d{self.number}-v{at}")
            edge_end = LoggedChannel(here, f"{name} edge", fleet.clock.time, fleet.log)
            cloud_end = LoggedChannel(there, f"{name} cloud", fleet.clock.time, fleet.log)
        fleet.group.create_task(fleet.verifiers[at].serve(cloud_end), name=f"v{at} serves d{self.number}")
        return edge_end

    async def leave(self) -> None:
        for node in self._nodes.values():
            await node.disconnect()


class _Fleet:
    """A fleet under way."""

    def __init__(self, spec: FleetSpec, log: Log | None, on_record: OnRecord | None) -> None:
        self.spec, self.log, self.on_record = spec, log, on_record
        self.window = Window(spec.warmup_s, spec.duration_s or math.inf)
        self.tally = Tally(self.window, streamed=spec.mode in STREAMING_MODES)
        self.words = EmulatedProfile(seed=spec.seed)
        self.acceptance = msgspec.structs.replace(
            self.words, alpha=spec.alpha, persist=spec.persist or 0.0, informed=spec.informed
        )
        self.prompt = (1,) * spec.prompt_tokens
        self.edge_rng = self.rng("edge")
        self._users = self.rng("users")
        self._dials: Counter[str] = Counter()  # of each connection that is logged
        self.sessions = 0

    def rng(self, purpose: str) -> random.Random:
        return random.Random(f"{self.spec.seed}/{purpose}")

    def name_of(self, connection: str) -> str:
        """For the log; a connection that is dialled again has a number."""
        self._dials[connection] = n = self._dials[connection] + 1
        return connection if n == 1 else f"{connection}.{n}"

    def link(self, number: int) -> SimLink:
        seed = self.rng(f"link {number}").getrandbits(48)
        return SimLink(self.spec.link, seed=seed, nodelay=self.spec.nodelay)

    def engine(
        self, says: EmulatedProfile, cost: ForwardCost, compute: SimCompute, rng: random.Random, slots: int
    ) -> EmulatedEngine:
        """A model that says what `says` says, in the time that `cost` says."""
        charge = compute.meter(cost, rng if cost.residuals else None)
        room = self.spec.prompt_tokens + self.spec.max_new_tokens + 1
        return EmulatedEngine(says, slots=slots, max_context=room, wait=compute.spend, charge=charge)

    async def main(self) -> FleetResult:
        self.clock = asyncio.get_running_loop()
        spec = self.spec
        self.shared_link = self.link(-1) if spec.shared_link else None
        self.verifiers = [_Verifier(self, n) for n in range(spec.verifiers)]
        self.reference = EmulatedEngine(self.words)
        self.router = Router(spec.routing, spec.verifiers, self.rng("routing"))
        async with asyncio.TaskGroup() as self.group:  # of the connections
            devices = [_Device(self, n) for n in range(spec.drafters or 0)]
            async with asyncio.TaskGroup() as users:
                for device in devices:
                    users.create_task(self._user(device, self._users.random()), name=f"user {device.number}")
                if spec.arrival_per_s is not None:
                    await self._arrivals(users, spec.arrival_per_s)
            ended_s = self.clock.time()
            for device in devices:  # all at last: whoever leaves has a verifier look through its sessions
                await device.leave()
        for verifier in self.verifiers:
            await verifier.node.close()
        return self._result(ended_s)

    async def _user(self, device: _Device, place: float) -> None:
        """A user of the closed workload; `place` in 0 … 1 spreads the beginnings over half the warm-up."""
        spec = self.spec
        if spec.warmup_s:
            await asyncio.sleep(place * spec.warmup_s / 2)
        await self._pause()
        while not self._over():
            await self._session(device)
            if spec.duration_s is None:
                break
            await self._pause()

    async def _arrivals(self, users: asyncio.TaskGroup, rate: float) -> None:
        """Sessions by Poisson's law, until the end."""
        while True:
            await asyncio.sleep(self._users.expovariate(rate))
            if self._over():
                return
            users.create_task(self._visit(self.sessions), name=f"session {self.sessions}")
            self.sessions += 1

    async def _visit(self, number: int) -> None:
        device = _Device(self, number)
        await self._session(device)
        await device.leave()

    def _over(self) -> bool:
        return self.clock.time() >= (self.spec.duration_s or math.inf)

    async def _pause(self) -> None:
        if self.spec.think_s:
            await asyncio.sleep(self._users.expovariate(1.0 / self.spec.think_s))

    async def _session(self, device: _Device) -> None:
        """Some generations at one verifier."""
        if self.spec.drafters is not None:
            self.sessions += 1
        at = self.router.enter()
        try:
            node = await device.node(at)
            for n in range(self.spec.generations_per_session):
                if n:
                    await self._pause()
                    if self._over():
                        break
                await self._generate(device, node)
        finally:
            self.router.leave(at)

    async def _generate(self, device: _Device, node: DrafterNode) -> None:
        spec = self.spec
        seed = device.number << 20 | device.generations
        device.generations += 1
        begun_s = self.clock.time()
        try:
            record = await node.generate(spec.request(self.prompt, seed), self._on_commit)
        except GenerationFailed as e:
            if e.code != "busy":
                raise
            self.tally.refused += 1
            return
        first = len(self.prompt)
        exact = record.ids == [self.reference.token(seed, first + n) for n in range(spec.max_new_tokens)]
        self.tally.finished(record, begun_s, exact)
        if self.on_record is not None:
            self.on_record(record)

    def _on_commit(self, new: list[int], drafted: int) -> None:  # noqa: ARG002 - the nodes' signature
        self.tally.committed(len(new), self.clock.time())

    def _result(self, ended_s: float) -> FleetResult:
        tally, window = self.tally, self.window
        seconds = min(window.end_s, ended_s) - window.begin_s
        computes = [verifier.compute for verifier in self.verifiers]
        counted = max(tally.tokens_counted, 1)
        target = self.spec.cloud.target
        stages = target.stages if target is not None else 1
        return FleetResult(
            generations=tally.generations,
            tokens=tally.tokens,
            seconds=seconds,
            goodput_tps=tally.tokens / seconds if seconds else 0.0,
            tpot_ms=Percentiles.of(list(tally.tpot_s)),
            ttft_ms=Percentiles.of(list(tally.ttft_s)),
            utilisation=[c.busy_s / seconds / stages if seconds else 0.0 for c in computes],
            queue_mean=[c.waiting_s / seconds if seconds else 0.0 for c in computes],
            wait_ms=[1e3 * c.wait_s / max(c.works, 1) for c in computes],
            windows=tally.windows,
            drafted=tally.drafted,
            wasted=tally.drafted - tally.accepted,
            bytes_up_per_token=tally.bytes_up / counted,
            bytes_down_per_token=tally.bytes_down / counted,
            inexact=tally.inexact,
            refused=tally.refused,
            sessions=self.sessions,
            virtual_s=ended_s,
            wall_s=0.0,
        )
