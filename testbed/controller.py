"""The testbed: a verifier, a link and a drafter, started together and gone together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dsdlab.sim.profile import LinkProfile
from testbed.links.base import Endpoint, Link, LinkError
from testbed.links.modelled import ModelledLink
from testbed.runtimes.base import NodeDied, NodeError, NodeHandle, NodeSpec, Runtime, RuntimeFailed
from testbed.runtimes.process import ProcessRuntime

__all__ = ["CpuSplit", "Testbed", "make_link", "make_runtime"]

RUNTIMES = {"process": ProcessRuntime}
LINKS = {"modelled": ModelledLink}
ANSWER_GRACE_S = 15.0  # a node keeps its own time limit; this much later the controller gives up on it


def make_runtime(name: str) -> Runtime:
    """A runtime by the word of scenario files. Raises RuntimeFailed."""
    if name not in RUNTIMES:
        raise RuntimeFailed(f"runtime: {name!r} is unknown (allowed: {', '.join(RUNTIMES)})")
    return RUNTIMES[name]()


def make_link(name: str, *, seed: int = 0) -> Link:
    """A link by the word of scenario files. Raises LinkError."""
    if name not in LINKS:
        raise LinkError(f"link: {name!r} is unknown (allowed: {', '.join(LINKS)})")
    return LINKS[name](seed=seed)


@dataclass(frozen=True, slots=True)
class CpuSplit:
    """Which cores each side computes on."""

    verifier: tuple[int, ...]
    drafter: tuple[int, ...]

    @classmethod
    def default(cls, cores: Sequence[int] | None = None) -> CpuSplit:
        """The first half of the usable cores to the verifier, the rest to the drafter; one core is shared."""
        if cores is None:
            affinity = getattr(os, "sched_getaffinity", None)
            cores = sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))
        if len(cores) == 1:
            return cls(tuple(cores), tuple(cores))
        half = len(cores) // 2
        return cls(tuple(cores[:half]), tuple(cores[half:]))


class Testbed:
    """`async with Testbed(…) as bed:` two nodes with a link between them, ready to generate.

    run_dir: logs and the ledger of what was made go here.
    target, drafter, precision: as `dsdlab node` takes them.
    runtime, link: a name, or an object that has not been started.
    profile: what the link does until `set_link`.
    cpus: default `CpuSplit.default()`.
    token: shared by the nodes; a random one by default.
    edge_target: the drafter's node also loads the target (mode edge-sd).
    node_args: more options for both nodes, as ("--max-context", "512").
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
        precision: str = "bf16",
        runtime: Runtime | str = "process",
        link: Link | str = "modelled",
        profile: LinkProfile | None = None,
        seed: int = 0,
        cpus: CpuSplit | None = None,
        token: str | None = None,
        edge_target: bool = False,
        node_args: Sequence[str] = (),
        command: Sequence[str] = ("-m", "dsdlab", "node"),
        start_timeout_s: float = 600.0,
    ) -> None:
        self.run_dir = run_dir.resolve()
        self.runtime = make_runtime(runtime) if isinstance(runtime, str) else runtime
        self.link = make_link(link, seed=seed) if isinstance(link, str) else link
        self.profile = profile or LinkProfile()
        self.cpus = cpus or CpuSplit.default()
        self._models = ("--target", target, "--drafter", drafter, "--precision", precision)
        self._token = token or secrets.token_hex(16)
        self._edge_target = edge_target
        self._node_args = tuple(node_args)
        self._command = tuple(command)
        self._start_timeout_s = start_timeout_s
        self._verifier: NodeHandle | None = None
        self._drafter: NodeHandle | None = None
        self._edge: Endpoint | None = None
        self._port = 0

    # -- life ----------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            await self.runtime.start(self.run_dir)
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
        if self._drafter is not None:  # it first, so that it does not try to reconnect
            await self._drafter.stop()
        await asyncio.gather(self.runtime.stop(), self.link.stop())
        self._verifier = self._drafter = None

    async def _start(self) -> None:
        """Verifier, link and drafter at the same time: the link holds the drafter's call until the verifier
        listens. A drafter that did not have the patience gets a second chance then."""

        async def verifier() -> None:
            await self._start_verifier(0)
            await linked.wait()
            await self._point_link()

        async def edge() -> None:
            self._edge = await self.link.start(self.run_dir)
            await self.link.apply(self.profile)
            linked.set()
            try:
                self._drafter = await self._start_drafter(self._edge)
            except (NodeDied, NodeError):
                if listening.done():  # then it did not fail for want of a verifier
                    raise
                await asyncio.shield(listening)
                self._drafter = await self._start_drafter(self._edge)

        linked = asyncio.Event()
        listening = asyncio.create_task(verifier())
        await _all_or_none(listening, asyncio.create_task(edge()))

    async def _point_link(self) -> None:
        assert self._verifier is not None
        await self.link.set_target(self._verifier.endpoint(self._port))

    def _spec(self, role: str, args: tuple[str, ...], cpus: tuple[int, ...]) -> NodeSpec:
        common = ("--control", "stdio", "--token-file", "{dir}/token", "--threads", str(len(cpus)))
        return NodeSpec(
            name=role,
            args=(*self._command, role, *self._models, *args, *common, *self._node_args),
            files={"token": self._token + "\n"},
            cpus=cpus,
        )

    async def _start_verifier(self, port: int) -> None:
        spec = self._spec("verifier", ("--host", "{host}", "--port", str(port)), self.cpus.verifier)
        self._verifier = await self.runtime.start_node(spec, self._start_timeout_s)
        self._port = int(self._verifier.info["port"])

    async def _start_drafter(self, edge: Endpoint) -> NodeHandle:
        args: tuple[str, ...] = ("--connect", f"ws://{edge}/")
        if self._edge_target:
            args += ("--edge-target",)
        return await self.runtime.start_node(
            self._spec("drafter", args, self.cpus.drafter), self._start_timeout_s
        )

    # -- work ----------------------------------------------------------------------------------------------

    @property
    def verifier(self) -> NodeHandle:
        """The verifier's node. Raises RuntimeFailed outside the `async with` block."""
        if self._verifier is None:
            raise RuntimeFailed("testbed: not started")
        return self._verifier

    @property
    def drafter(self) -> NodeHandle:
        """The drafter's node. Raises RuntimeFailed outside the `async with` block."""
        if self._drafter is None:
            raise RuntimeFailed("testbed: not started")
        return self._drafter

    async def set_link(self, profile: LinkProfile) -> None:
        """Change what the link does to bytes sent from now on. Raises LinkError."""
        await self.link.apply(profile)
        self.profile = profile

    async def ping(self, n: int = 8, timeout_s: float = 60.0) -> list[float]:
        """Round trips in ms of the nodes' own frames over their own connection."""
        answer = await self.drafter.request({"op": "ping", "n": n, "timeout_s": timeout_s}, timeout_s + 5.0)
        return [float(rtt_ms) for rtt_ms in answer["rtt_ms"]]

    async def generate(self, job: dict[str, Any], timeout_s: float = 120.0) -> dict[str, Any]:
        """One generation; its record. `job` is the "generate" line without op, id and timeout_s.

        Raises NodeError (refused, failed, or code "timeout"), NodeDied, or TimeoutError when even the
        drafter's own time limit did not end it.
        """
        message = {**job, "op": "generate", "timeout_s": timeout_s}
        answer = await self.drafter.request(message, timeout_s + ANSWER_GRACE_S)
        record: dict[str, Any] = answer["record"]
        return record

    async def reconnect(self) -> None:
        """Have the drafter drop its connection and dial anew: fresh sockets for the next measurement."""
        await self.drafter.request({"op": "reconnect"}, 60.0)

    # -- faults --------------------------------------------------------------------------------------------

    async def drop_connections(self) -> int:
        """Reset every connection through the link; how many."""
        return await self.link.drop()

    async def kill_verifier(self) -> None:
        """SIGKILL the verifier and wait until it is gone."""
        await self.verifier.kill()

    async def restart_verifier(self) -> dict[str, Any]:
        """Start the verifier again on the port it had; its ready line."""
        if self.verifier.returncode is None:
            raise RuntimeFailed("verifier: still running (kill_verifier first)")
        await self._start_verifier(self._port)
        await self._point_link()
        return self.verifier.info


async def _all_or_none(*tasks: asyncio.Task[None]) -> None:
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
