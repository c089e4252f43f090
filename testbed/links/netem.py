"""Real netem: a two-port box per edge node, in the middle of its path, one qdisc per port and direction.

`KernelBoxes` shape with the host kernel's netem; `testbed.links.uml` does the same inside a User-Mode Linux
router where the host has none. `NetemLink` is one edge's link through either.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from dsdlab.sim.profile import Direction, LinkProfile
from testbed.fabric import CORE, VERIFIER, Fabric, edge_name, offloads_off
from testbed.links.base import Endpoint, Link, LinkError
from testbed.links.qdisc import netem_arguments

__all__ = ["VERIFIER_PORT", "Boxes", "KernelBoxes", "NetemLink"]

VERIFIER_PORT = 8765
DIRECTIONS: tuple[Direction, Direction] = ("up", "down")


class Boxes(ABC):
    """The boxes of a fabric: two devices each, whose outgoing qdiscs are the link.

    `offset_ms` is what a box takes for itself, per direction; it is measured and set from outside.
    """

    name: ClassVar[str]
    label: ClassVar[str]

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self.offset_ms: dict[Direction, float] = {"up": 0.0, "down": 0.0}

    @abstractmethod
    async def start(self, run_dir: Path) -> None:
        """Build a box between each edge's bridge and the core. Raises LinkError."""

    @abstractmethod
    def device(self, edge: int, direction: Direction) -> str:
        """The device whose outgoing side shapes a direction."""

    @abstractmethod
    async def tc(self, *arguments: str, lines: Sequence[str] = ()) -> str:
        """Run `tc` where the devices are; `lines` for `-batch -`. Raises LinkError."""

    @abstractmethod
    async def stop(self) -> None:
        """Take down what is not the fabric's; idempotent."""

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether the boxes are there."""

    async def shape(self, profiles: dict[int, LinkProfile]) -> None:
        """Put profiles on edges' links in one go; packets under way keep their time. Raises LinkError."""
        lines = [
            f"qdisc replace dev {self.device(edge, way)} root netem "
            + " ".join(netem_arguments(profile, way, self.offset_ms[way]))
            for edge, profile in profiles.items()
            for way in DIRECTIONS
        ]
        await self.tc("-batch", "-", lines=lines)

    async def facts(self) -> dict[str, Any]:
        """What the boxes are, for provenance. Raises LinkError."""
        offset = {way: round(ms, 4) for way, ms in self.offset_ms.items()}
        return {"tc": (await self.tc("-V")).strip(), "box_offset_ms": offset}

    async def counters(self, edge: int) -> dict[str, dict[str, int]]:
        """Packets, bytes and drops of an edge's two qdiscs since they were made. Raises LinkError."""
        text = await self.tc("-s", "-j", "qdisc", "show")
        by_device = {q["dev"]: q for q in json.loads(text) if q.get("kind") == "netem"}
        out: dict[str, dict[str, int]] = {}
        for way in DIRECTIONS:
            q = by_device.get(self.device(edge, way), {})
            names = ("packets", "bytes", "drops", "overlimits", "backlog", "qlen")
            out[way] = {name: int(q[name]) for name in names if name in q}
        return out


class KernelBoxes(Boxes):
    """A box is a virtual cable from an edge's bridge to the core, with a netem on either end."""

    name = "netem"
    label = "netem"

    async def start(self, run_dir: Path) -> None:  # noqa: ARG002 - other boxes write there
        fabric = self.fabric
        for edge in range(fabric.n_edges):
            near, far = f"a{edge}", f"b{edge}"
            await fabric.batch("ip", [f"link add {near} type veth peer name {far}"])
            await fabric.run(offloads_off(near), offloads_off(far))
            await fabric.quiet([near, far])
            await fabric.batch(
                "ip", [f"link set {near} master e{edge} up", f"link set {far} master {CORE} up"]
            )
        try:
            await self.shape(dict.fromkeys(range(fabric.n_edges), LinkProfile()))
        except LinkError as error:
            raise LinkError(
                f"link netem: this kernel has no sch_netem ({error}); link netem-uml brings its own"
            ) from error

    def device(self, edge: int, direction: Direction) -> str:
        return f"a{edge}" if direction == "up" else f"b{edge}"

    async def tc(self, *arguments: str, lines: Sequence[str] = ()) -> str:
        return (await self.fabric.run(["tc", *arguments], text="".join(f"{line}\n" for line in lines)))[0]

    async def stop(self) -> None:
        """The devices go with the fabric."""

    @property
    def alive(self) -> bool:
        return self.fabric.alive


class NetemLink(Link):
    """The link of one edge node. The edge dials the verifier itself: the box is invisible."""

    def __init__(self, boxes: Boxes, edge: int = 0) -> None:
        self.name = boxes.name  # type: ignore[misc] # both kinds of boxes make this link
        self.label = boxes.label  # type: ignore[misc]
        self.edge = edge
        self.profile = LinkProfile()
        self._boxes = boxes

    async def start(self, run_dir: Path) -> Endpoint:  # noqa: ARG002 - the boxes are there already
        return Endpoint(self._boxes.fabric.address(VERIFIER), VERIFIER_PORT)

    async def set_target(self, target: Endpoint) -> None:
        """The verifier is where it always is; another place cannot be had."""
        if target != await self.start(Path()):
            raise LinkError(f"link {self.name}: the verifier has one address (asked: {target})")

    async def apply(self, profile: LinkProfile) -> None:
        await self._boxes.shape({self.edge: profile})
        self.profile = profile

    async def drop(self) -> int:
        return await self._boxes.fabric.drop_connections(edge_name(self.edge))

    async def stats(self) -> dict[str, Any]:
        return await self._boxes.counters(self.edge)

    async def stop(self) -> None:
        """The boxes end with the testbed."""

    @property
    def alive(self) -> bool:
        return self._boxes.alive
