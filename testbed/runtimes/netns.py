"""The `netns` runtime: nodes as child processes, each alone in a network namespace.

As root, or as an ordinary user inside the fabric's user namespace. The namespaces have no names and end with
the nodes. Files, memory and cores are the host's: the same interpreter, the same models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from testbed.child import Child
from testbed.fabric import Fabric
from testbed.links.base import LinkError
from testbed.runtimes.base import WIRING_END_S, NodeSpec
from testbed.runtimes.process import ProcessRuntime

__all__ = ["NetnsRuntime"]


class NetnsRuntime(ProcessRuntime):
    """Children that wait, in a fresh namespace, until the fabric has given it an interface."""

    name: ClassVar[str] = "netns"

    def __init__(self, fabric: Fabric) -> None:
        super().__init__()
        self._fabric = fabric

    def _address(self, node: str) -> str:
        return self._fabric.address(node)

    def _launch_options(self) -> Sequence[str]:
        return [*self._fabric.user_options, "--new-net", "--wait"]

    async def _connect(self, spec: NodeSpec, child: Child) -> None:
        try:
            await self._fabric.namespace_made(child.pid)
            await self._fabric.attach(spec.name, child.pid)
        except LinkError:
            await child.control.ended(WIRING_END_S)
            raise
        child.write(b"\n")
