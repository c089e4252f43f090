"""What every runtime is to the controller: a place where nodes run, each with its own cores and address."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from testbed.control import NodeDied, NodeError
from testbed.links.base import Endpoint

__all__ = [
    "NodeDied",
    "NodeError",
    "NodeHandle",
    "NodeSpec",
    "Runtime",
    "RuntimeFailed",
    "Wiring",
    "check_cpus",
    "thread_env",
]


class RuntimeFailed(Exception):
    """A runtime cannot be used here, or cannot do what a node asks for. The message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """A node to start, in words that hold in a process, a namespace and a container alike.

    name: unique within the runtime ("verifier", "edge0"); names the log and, later, the container.
    args: arguments of the Python interpreter, which the runtime chooses: ("-m", "dsdlab", "node", …). In each
        of them "{host}" becomes the address to bind and "{dir}" the node's own folder as the node sees it.
    env: added to the environment.
    files: put into the node's folder, readable by the node alone (a token, say).
    cpus: cores of the host it may use; None is all. OpenMP gets one thread per core, pinned.
    cpu_quota: share of those cores' time, 0 to 1; None is all of it.
    memory_mb: limit; None is none.
    """

    name: str
    args: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    cpus: tuple[int, ...] | None = None
    cpu_quota: float | None = None
    memory_mb: int | None = None

    def resolved_args(self, host: str, folder: str) -> list[str]:
        """`args` with the placeholders filled in."""
        return [arg.replace("{host}", host).replace("{dir}", folder) for arg in self.args]


def thread_env(cpus: tuple[int, ...] | None) -> dict[str, str]:
    """Environment that gives numerical libraries one thread per core and pins them."""
    if not cpus:
        return {}
    return {
        "OMP_NUM_THREADS": str(len(cpus)),
        "MKL_NUM_THREADS": str(len(cpus)),
        "GOMP_CPU_AFFINITY": " ".join(map(str, cpus)),
    }


def check_cpus(spec: NodeSpec) -> None:
    """Raises RuntimeFailed when a node asks for cores that this process may not use."""
    if spec.cpus is not None and hasattr(os, "sched_getaffinity"):
        missing = sorted(set(spec.cpus) - os.sched_getaffinity(0))
        if missing or not spec.cpus:
            usable = ",".join(map(str, sorted(os.sched_getaffinity(0))))
            raise RuntimeFailed(f"{spec.name}: cpus {list(spec.cpus)} not available (usable: {usable})")


WIRING_END_S = 1.0
"""How long to wait, when a node cannot be wired, for the news that it has ended: that is the reason then."""


class Wiring(Protocol):
    """Gives nodes that have a network namespace of their own their one interface, and an address."""

    def address(self, node: str) -> str:
        """The IP address that a node has or will have: "verifier", or "edge0" and so on."""

    async def attach(self, node: str, pid: int) -> None:
        """Make the interface in the network namespace of the process `pid` (as the host counts). Raises
        LinkError."""


class NodeHandle(ABC):
    """A started node."""

    name: str
    info: dict[str, Any]
    """Its ready line."""
    log_path: Path
    """Its standard error, on the controller's host."""

    @property
    @abstractmethod
    def returncode(self) -> int | None:
        """None while it runs."""

    @abstractmethod
    def endpoint(self, port: int) -> Endpoint:
        """Where others reach a port that it listens on."""

    @abstractmethod
    async def request(self, message: dict[str, Any], timeout_s: float = 30.0) -> dict[str, Any]:
        """One control line and its answer. Raises NodeError, NodeDied, TimeoutError."""

    @abstractmethod
    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone: a crash, on purpose."""

    @abstractmethod
    async def stop(self, grace_s: float = 5.0) -> int:
        """Ask, then terminate, then kill; its exit status. Idempotent."""


class Runtime(ABC):
    """Starts nodes. Everything it makes on the host is in its ledger, and `stop` takes all of it away."""

    name: ClassVar[str]

    @abstractmethod
    async def start(self, run_dir: Path) -> None:
        """Make ready, and take away what an earlier run left in this folder. Raises RuntimeFailed."""

    @abstractmethod
    async def start_node(self, spec: NodeSpec, timeout_s: float = 300.0) -> NodeHandle:
        """Start a node and wait for its ready line. Raises NodeDied, NodeError, RuntimeFailed."""

    def facts(self) -> dict[str, Any]:
        """What nodes are made of here beyond the host's own parts, for provenance."""
        return {}

    @abstractmethod
    async def stop(self) -> None:
        """Stop every node, remove everything else; idempotent."""
