"""What a runtime and a link are made of: from two names to the parts that work together."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from testbed.engine import NEEDS_ROOT
from testbed.fabric import Fabric
from testbed.links.base import Endpoint, Link, LinkError
from testbed.links.modelled import ModelledLink
from testbed.links.netem import Boxes, KernelBoxes, NetemLink
from testbed.links.uml import UmlBoxes
from testbed.links.wan import WanLink
from testbed.runtimes.base import Runtime, RuntimeFailed
from testbed.runtimes.netns import NetnsRuntime
from testbed.runtimes.process import ProcessRuntime

__all__ = ["Lab", "make_lab"]

BOXES: dict[str, Callable[[Fabric], Boxes]] = {"netem": KernelBoxes, "netem-uml": UmlBoxes}
RUNTIMES = ("process", "netns", "docker")
LINKS = ("modelled", *BOXES, WanLink.name)


@dataclass(slots=True)
class Lab:
    """The parts of a testbed. `fabric` where nodes have namespaces; `boxes` where links are netem."""

    runtime: Runtime
    links: list[Link]
    fabric: Fabric | None = None
    boxes: Boxes | None = None

    async def start(self, run_dir: Path) -> None:
        """The runtime, which takes away what an earlier run left, and the fabric. Not yet the links."""
        await self.runtime.start(run_dir)
        if self.fabric is not None:
            await self.fabric.start(run_dir)

    @property
    def alive(self) -> bool:
        """Whether the links are there."""
        return all(link.alive for link in self.links) and (self.fabric is None or self.fabric.alive)

    async def stop(self) -> None:
        """Everything, nodes first; idempotent."""
        await asyncio.gather(self.runtime.stop(), *(link.stop() for link in self.links))
        if self.boxes is not None:
            await self.boxes.stop()
        if self.fabric is not None:
            await self.fabric.stop()


def make_lab(
    runtime: str, link: str, *, n_edges: int = 1, seed: int = 0, verifier: Endpoint | None = None
) -> Lab:
    """Parts that are not started. `verifier`: for link "wan" alone, where one is that was started by hand.

    Raises RuntimeFailed or LinkError for names that do not go together.
    """
    if runtime not in RUNTIMES:
        raise RuntimeFailed(f"runtime: {runtime!r} is unknown (allowed: {', '.join(RUNTIMES)})")
    if link not in LINKS:
        raise LinkError(f"link: {link!r} is unknown (allowed: {', '.join(LINKS)})")
    if (link == WanLink.name) != (verifier is not None):
        raise LinkError(f"link {link}: link wan and a verifier started by hand need each other")
    if verifier is not None:
        if runtime != "process":
            raise LinkError(f"link wan needs runtime process (this one is {runtime})")
        return Lab(ProcessRuntime(), [WanLink(verifier) for _ in range(n_edges)])
    if runtime == "process":
        if link != "modelled":
            raise LinkError(f"link {link} needs runtime netns or docker: processes share the host's network")
        links: list[Link] = [ModelledLink(seed=seed + i, box_name=_box_name(i)) for i in range(n_edges)]
        return Lab(ProcessRuntime(), links)
    fabric = Fabric(n_edges, flat=link == "modelled")
    if runtime == "netns":
        return _wired(NetnsRuntime(fabric), fabric, link, seed)
    if fabric.rootless:
        raise RuntimeFailed(NEEDS_ROOT)
    from testbed.runtimes.docker import DockerRuntime

    return _wired(DockerRuntime(fabric, run_id=uuid.uuid4().hex[:8]), fabric, link, seed)


def _wired(runtime: Runtime, fabric: Fabric, link: str, seed: int) -> Lab:
    edges = range(fabric.n_edges)
    if link == "modelled":
        return Lab(
            runtime,
            [ModelledLink(seed=seed + i, box_name=_box_name(i), fabric=fabric) for i in edges],
            fabric,
        )
    boxes = BOXES[link](fabric)
    return Lab(runtime, [NetemLink(boxes, i) for i in edges], fabric, boxes)


def _box_name(edge: int) -> str:
    return "link" if edge == 0 else f"link{edge}"
