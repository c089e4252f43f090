"""The testbed: a verifier, edge nodes and a link for each, started together and gone together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from dsdlab.models.measures import Measures
from dsdlab.models.zoo import default_precision
from dsdlab.sim.profile import LinkProfile, TcpRegime
from dsdlab.sweep.calibration import LinkMeasure, judge
from testbed.fabric import VERIFIER, edge_name
from testbed.lab import Lab, make_lab
from testbed.links.base import Endpoint, percentile
from testbed.links.netem import VERIFIER_PORT
from testbed.links.wan import WanLink
from testbed.probing import probe_plan
from testbed.runtimes.base import NodeDied, NodeError, NodeHandle, NodeSpec, RuntimeFailed

__all__ = ["CpuSplit", "NodeLimits", "Testbed"]

ANSWER_GRACE_S = 15.0  # a node keeps its own time limit; this much later the controller gives up on it
PINGS = (3, 4, 8)
"""Pings of a calibration. The later ones are sent only while the median of all so far contradicts the
profile: a busy processor or a lost packet makes a few of them late, a wrong link most of them."""
WAN_PINGS = 9
"""The same where nobody knows what the round trip is meant to be."""
CALIBRATION_LIMIT_S = 900.0  # three repeats of everything, however slow the model is
SLOTS = 8  # sessions of a verifier that is not told otherwise
OFFSET_RTT_MS = 20.0  # what a box takes for itself is measured at this round trip
OFFSET_PROBES = 200


@dataclass(frozen=True, slots=True)
class CpuSplit:
    """Which cores each side computes on."""

    verifier: tuple[int, ...]
    drafter: tuple[int, ...]

    @classmethod
    def default(cls, cores: Sequence[int] | None = None) -> CpuSplit:
        """The first half of the usable cores to the verifier, the rest to the drafter; one core is shared."""
        cores = _usable_cores() if cores is None else cores
        if len(cores) == 1:
            return cls(tuple(cores), tuple(cores))
        half = len(cores) // 2
        return cls(tuple(cores[:half]), tuple(cores[half:]))

    @classmethod
    def edge_alone(cls) -> CpuSplit:
        """Every usable core to the drafter: the verifier has a machine of its own."""
        return cls((), tuple(_usable_cores()))


def _usable_cores() -> list[int]:
    affinity = getattr(os, "sched_getaffinity", None)
    return sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))


@dataclass(frozen=True, slots=True)
class NodeLimits:
    """What a node may use beyond its cores; see NodeSpec. Only containers have limits."""

    cpu_quota: float | None = None
    memory_mb: int | None = None


class Testbed:
    """`async with Testbed(…) as bed:` a verifier and edge nodes with a link to each, ready to generate.

    run_dir: logs and the ledger of what was made go here.
    target, drafter, precision: as `dsdlab node` takes them. edge_models: what edge nodes load in their place.
    runtime, link: names of scenario files, neither "auto" (see `testbed.host`).
    profiles: what the link of each edge node does until `set_link`; as many edge nodes as there are profiles.
    tcp: the regime until `set_tcp`.
    cpus: default `CpuSplit.default()`, or `edge_alone()` with an external verifier; edge nodes share theirs.
    edge_limits, cloud_limits: for the edge nodes, each, and the verifier.
    external: with link "wan", where a verifier listens that somebody else started; none is started then, and
        faults that would need its machine raise RuntimeFailed.
    token: shared by the nodes; a random one by default, the external verifier's with one ("": it wants none).
    edge_target: edge nodes also load the target (mode edge-sd).
    node_args: more options for all nodes, as ("--max-context", "512").
    command: what the interpreter is to run.

    Entering raises NodeDied, NodeError, LinkError or RuntimeFailed with one line, and leaves nothing behind.
    """

    __test__ = False  # the name looks like a test class to pytest

    def __init__(
        self,
        run_dir: Path,
        *,
        target: str,
        drafter: str,
        edge_models: tuple[str | None, str | None] = (None, None),
        precision: str | None = None,
        runtime: str = "process",
        link: str = "modelled",
        profiles: Sequence[LinkProfile] = (LinkProfile(),),
        tcp: TcpRegime | None = None,
        seed: int = 0,
        cpus: CpuSplit | None = None,
        edge_limits: NodeLimits | None = None,
        cloud_limits: NodeLimits | None = None,
        external: Endpoint | None = None,
        token: str | None = None,
        edge_target: bool = False,
        node_args: Sequence[str] = (),
        command: Sequence[str] = ("-m", "dsdlab", "node"),
        start_timeout_s: float = 600.0,
    ) -> None:
        self.run_dir = run_dir.resolve()
        self.lab: Lab = make_lab(runtime, link, n_edges=len(profiles), seed=seed, verifier=external)
        self.external = external
        self.packets = self.lab.boxes is not None
        """Whether links are measured with packets; a WAN that lets none through is measured with frames."""
        self.profiles = list(profiles)
        self.tcp = tcp or TcpRegime()
        self.cpus = cpus or (CpuSplit.default() if external is None else CpuSplit.edge_alone())
        self._limits = {True: edge_limits or NodeLimits(), False: cloud_limits or NodeLimits()}
        here = (edge_models[0] or target, edge_models[1] or drafter)
        precision = precision or default_precision(target)
        self._models = {  # by whether it is an edge node
            edge: ("--target", models[0], "--drafter", models[1], "--precision", precision)
            for edge, models in ((False, (target, drafter)), (True, here))
        }
        self._token = (token or secrets.token_hex(16)) if external is None else (token or "")
        self._edge_target = edge_target
        self._node_args = tuple(node_args)
        self._command = tuple(command)
        self._start_timeout_s = start_timeout_s
        self._verifier: NodeHandle | None = None
        self._edges: dict[int, NodeHandle] = {}
        self._port = 0

    # -- life ----------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            await self.lab.start(self.run_dir)
            await self._start()
        except BaseException:
            await asyncio.shield(self.stop())
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.shield(self.stop())

    async def stop(self) -> None:
        """Take everything away: ask, SIGTERM after a grace, SIGKILL after another; idempotent."""
        # edges first, so that they do not try to reconnect
        await asyncio.gather(*(edge.stop() for edge in self._edges.values()))
        await self.lab.stop()
        self._verifier = None
        self._edges.clear()

    async def _start(self) -> None:
        """Verifier, links and edges at the same time: a link holds an edge's call until the verifier listens.
        An edge that did not have the patience gets a second chance then."""
        if self.lab.fabric is not None:
            await self.lab.fabric.set_tcp(self.tcp)

        async def verifier() -> None:
            if self.external is not None:
                return
            await self._start_verifier(0 if self.lab.fabric is None else VERIFIER_PORT)
            await linked.wait()
            await self._point_links()

        async def links() -> list[Endpoint]:
            if self.lab.boxes is not None:
                await self.lab.boxes.start(self.run_dir)
            addresses = await asyncio.gather(*(link.start(self.run_dir) for link in self.lab.links))
            await asyncio.gather(
                *(link.apply(p) for link, p in zip(self.lab.links, self.profiles, strict=True))
            )
            linked.set()
            return addresses

        async def edge(index: int) -> None:
            address = (await asyncio.shield(linking))[index]
            try:
                self._edges[index] = await self._start_edge(index, address)
            except (NodeDied, NodeError):
                if listening.done():  # then it did not fail for want of a verifier
                    raise
                await asyncio.shield(listening)
                self._edges[index] = await self._start_edge(index, address)

        linked = asyncio.Event()
        listening = asyncio.create_task(verifier())
        linking = asyncio.create_task(links())
        edges = [asyncio.create_task(edge(index)) for index in range(len(self.profiles))]
        await _all_or_none(listening, linking, *edges)
        if self.lab.boxes is not None:
            await self._measure_offset()
        if self.external is not None:
            self.packets = await self._packets_pass()

    async def _measure_offset(self) -> None:
        """Find what the boxes take for themselves, on the path of the first edge, and take it off."""
        boxes = self.lab.boxes
        assert boxes is not None
        await boxes.shape({0: LinkProfile(rtt_ms=OFFSET_RTT_MS)})
        plan = probe_plan(LinkProfile(rtt_ms=OFFSET_RTT_MS), OFFSET_PROBES)
        measure = await self._probe(0, plan)
        for way, delay_ms in (("up", measure.up.delay_p50_ms), ("down", measure.down.delay_p50_ms)):
            if delay_ms is not None:
                boxes.offset_ms[way] = max(0.0, delay_ms - OFFSET_RTT_MS / 2)  # type: ignore[index]
        await boxes.shape(dict(enumerate(self.profiles)))

    async def _packets_pass(self) -> bool:
        """Whether the first edge's probes come back from a verifier whose network is not ours."""
        try:
            await self._probe(0, probe_plan(self.profiles[0]))
        except NodeError as error:
            if error.code != "probe":
                raise
            return False
        return True

    async def _point_links(self) -> None:
        assert self._verifier is not None
        target = self._verifier.endpoint(self._port)
        await asyncio.gather(*(link.set_target(target) for link in self.lab.links))

    def _spec(self, name: str, args: tuple[str, ...]) -> NodeSpec:
        edge = name != VERIFIER
        cpus, limits = (self.cpus.drafter if edge else self.cpus.verifier), self._limits[edge]
        secret = ("--token-file", "{dir}/token") if self._token else ()
        common = ("--control", "stdio", *secret, "--threads", str(len(cpus)))
        return NodeSpec(
            name=name,
            args=(*self._command, "drafter" if edge else "verifier", *self._models[edge], *args, *common,
                  *self._node_args),
            files={"token": self._token + "\n"} if self._token else {},
            cpus=cpus,
            cpu_quota=limits.cpu_quota,
            memory_mb=limits.memory_mb,
        )  # fmt: skip

    async def _start_verifier(self, port: int) -> None:
        slots = ("--slots", str(len(self.profiles))) if len(self.profiles) > SLOTS else ()
        spec = self._spec(VERIFIER, ("--host", "{host}", "--port", str(port), *slots))
        self._verifier = await self.lab.runtime.start_node(spec, self._start_timeout_s)
        self._port = int(self._verifier.info["port"])

    async def _start_edge(self, index: int, address: Endpoint) -> NodeHandle:
        args: tuple[str, ...] = ("--connect", f"ws://{address}/")
        if self._edge_target:
            args += ("--edge-target",)
        spec = self._spec(edge_name(index), args)
        return await self.lab.runtime.start_node(spec, self._start_timeout_s)

    # -- work ----------------------------------------------------------------------------------------------

    @property
    def verifier(self) -> NodeHandle:
        """The verifier's node. Raises RuntimeFailed when external, and outside the `async with` block."""
        if self.external is not None:
            raise RuntimeFailed(
                f"verifier ws://{self.external}/: started by hand elsewhere, out of our control"
            )
        if self._verifier is None:
            raise RuntimeFailed("testbed: not started")
        return self._verifier

    def edge(self, index: int = 0) -> NodeHandle:
        """An edge node. Raises RuntimeFailed outside the `async with` block."""
        if index not in self._edges:
            raise RuntimeFailed(f"testbed: edge {index} is not started (edges: {len(self._edges)})")
        return self._edges[index]

    @property
    def profile(self) -> LinkProfile:
        """What the first edge's link does."""
        return self.profiles[0]

    async def set_link(self, profile: LinkProfile, edge: int = 0) -> None:
        """Change what a link does to bytes sent from now on. Raises LinkError."""
        await self.lab.links[edge].apply(profile)
        self.profiles[edge] = profile

    async def set_tcp(self, regime: TcpRegime) -> None:
        """Change the TCP of all nodes for connections made from now on; `reconnect` makes new ones.

        Raises LinkError, or RuntimeFailed where the nodes share the host's TCP.
        """
        if self.external is not None:
            if regime != TcpRegime():
                raise RuntimeFailed(
                    f"tcp: {regime.label} needs a verifier of the testbed's (this one is external)"
                )
            return
        if self.lab.fabric is not None:
            await self.lab.fabric.set_tcp(regime)
        elif (regime.congestion, regime.slow_start_after_idle) != ("auto", True):
            raise RuntimeFailed(f"tcp: {regime.label} needs runtime netns or docker (this one is process)")
        await self.verifier.request({"op": "socket", "nodelay": regime.nodelay})
        self.tcp = regime

    async def tcp_state(self, edge: int = 0) -> dict[str, Any]:
        """TCP as read back: both ends of an edge's connection, and what its namespace says; empty where the
        verifier is external."""
        if self.external is not None:
            return {}
        state = {"verifier": (await self.verifier.request({"op": "socket"}))["state"]}
        if self.lab.fabric is not None:
            state |= await self.lab.fabric.tcp_state(edge_name(edge))
        return state

    async def ping(self, n: int = 8, timeout_s: float = 60.0, edge: int = 0) -> list[float]:
        """Round trips in ms of the nodes' own frames over their own connection."""
        message = {"op": "ping", "n": n, "timeout_s": timeout_s}
        answer = await self.edge(edge).request(message, timeout_s + 5.0)
        return [float(rtt_ms) for rtt_ms in answer["rtt_ms"]]

    async def calibrate(
        self, profile: LinkProfile | None = None, edge: int = 0, n: int | None = None
    ) -> LinkMeasure:
        """Measure a link over the nodes' own path: with packets where it carries packets, else with frames.

        profile: what it is meant to be; default: what was set last. n: probes; default: what suits it.
        Raises NodeError, NodeDied or TimeoutError.
        """
        profile = profile or self.profiles[edge]
        if self.packets:
            return await self._probe(edge, probe_plan(profile, n))
        begun_s = asyncio.get_running_loop().time()
        rtts_ms: list[float] = []
        rounds = PINGS if self.external is None else (WAN_PINGS,)
        for pings in rounds if n is None else (n,):
            rtts_ms += await self.ping(pings, edge=edge)
            measure = LinkMeasure(
                instrument="frames",
                rtt_p50_ms=percentile(rtts_ms, 0.5),
                rtt_p99_ms=percentile(rtts_ms, 0.99),
                n=len(rtts_ms),
                wall_s=asyncio.get_running_loop().time() - begun_s,
            )
            if not judge(profile, measure):
                break
        return measure

    async def measure_models(
        self,
        edge: int | None = None,
        *,
        sampling: Mapping[str, Any] | None = None,
        budget_s: float | None = None,
        seed: int = 0,
    ) -> dict[str, Measures]:
        """What forwards of a node's models cost, measured in its compute thread: "target", "drafter" or both.

        edge: an edge node's index; None: the verifier. sampling: how tokens are drawn, as in a job. budget_s:
        about how long it may take; default: the node's own. Nothing else should run on the bed meanwhile.
        Raises NodeError, NodeDied, TimeoutError, or RuntimeFailed for an external verifier.
        """
        node = self.verifier if edge is None else self.edge(edge)
        message: dict[str, Any] = {
            "op": "calibrate",
            "sampling": dict(sampling or {}),
            "shared_caches": self.external is None,
            "seed": seed,
        }
        if budget_s is not None:
            message["budget_s"] = budget_s
        answer = await node.request(message, CALIBRATION_LIMIT_S + (budget_s or 0.0))
        return msgspec.convert(answer["measures"], dict[str, Measures])

    async def _probe(self, edge: int, plan: dict[str, Any]) -> LinkMeasure:
        wait_s = 30.0 + plan["n"] * plan["gap_s"] + 10.0 * (plan["rtt_s"] + plan["train_s"])
        answer = await self.edge(edge).request({"op": "probe", **plan}, wait_s)
        return msgspec.convert(answer["measure"], LinkMeasure)

    async def facts(self) -> dict[str, Any]:
        """What the bed was made of, for provenance. Raises LinkError."""
        cpus = {"verifier": list(self.cpus.verifier), "edges": list(self.cpus.drafter)}
        boxes = {} if self.lab.boxes is None else await self.lab.boxes.facts()
        return {"cpus": cpus, **self.lab.runtime.facts(), **boxes}

    async def counters(self, edge: int = 0) -> dict[str, Any]:
        """Packets, bytes and drops of a netem link's two qdiscs; empty for other links. Raises LinkError."""
        return {} if self.lab.boxes is None else await self.lab.boxes.counters(edge)

    async def generate(self, job: dict[str, Any], timeout_s: float = 120.0, edge: int = 0) -> dict[str, Any]:
        """One generation; its record. `job` is the "generate" line without op, id and timeout_s.

        Raises NodeError (refused, failed, or code "timeout"), NodeDied, or TimeoutError when even the
        drafter's own time limit did not end it.
        """
        message = {**job, "op": "generate", "timeout_s": timeout_s}
        answer = await self.edge(edge).request(message, timeout_s + ANSWER_GRACE_S)
        record: dict[str, Any] = answer["record"]
        return record

    async def reconnect(self, edge: int = 0) -> dict[str, Any]:
        """Have an edge drop its connection and dial anew; the new connection's TCP as its kernel has it."""
        message = {"op": "reconnect", "nodelay": self.tcp.nodelay}
        state: dict[str, Any] = (await self.edge(edge).request(message, 60.0)).get("socket", {})
        return state

    async def check_verifier(self) -> None:
        """Raises NodeDied when our own verifier has ended, LinkError when an external one takes no calls."""
        if self._verifier is not None and self._verifier.returncode is not None:
            await self._verifier.request({"op": "socket"})  # which says how it ended
        for link in self.lab.links:
            if isinstance(link, WanLink):
                await link.check()

    # -- faults --------------------------------------------------------------------------------------------

    async def drop_connections(self, edge: int = 0) -> int:
        """Reset every connection through an edge's link; how many. Raises RuntimeFailed for a WAN's."""
        if self.external is not None:
            raise RuntimeFailed("link wan: nobody can cut it from here")
        return await self.lab.links[edge].drop()

    async def kill_verifier(self) -> None:
        """SIGKILL the verifier and wait until it is gone."""
        await self.verifier.kill()

    async def restart_verifier(self) -> dict[str, Any]:
        """Start the verifier again on the port it had; its ready line."""
        if self.verifier.returncode is None:
            raise RuntimeFailed("verifier: still running (kill_verifier first)")
        await self._start_verifier(self._port)
        await self._point_links()
        return self.verifier.info


async def _all_or_none(*tasks: asyncio.Task[Any]) -> None:
    """Wait for all; when one fails, cancel the others, wait for them and raise its error."""
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
        raise
