"""The `process` runtime: nodes as child processes on loopback. Needs no privilege."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from testbed.child import Child
from testbed.ledger import Ledger
from testbed.links.base import Endpoint
from testbed.runtimes.base import NodeHandle, NodeSpec, Runtime, RuntimeFailed, check_cpus, thread_env

__all__ = ["ProcessNode", "ProcessRuntime"]

LOOPBACK = "127.0.0.1"
ROOT = Path(__file__).parents[2]


class ProcessNode(NodeHandle):
    """A node that is a child of this process."""

    def __init__(self, child: Child, info: dict[str, Any], address: str = LOOPBACK) -> None:
        self.name = child.name
        self.info = info
        self._address = address
        self.log_path = child.log_path
        self._child = child

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def returncode(self) -> int | None:
        return self._child.returncode

    def endpoint(self, port: int) -> Endpoint:
        return Endpoint(self._address, port)

    async def request(self, message: dict[str, Any], timeout_s: float = 30.0) -> dict[str, Any]:
        return await self._child.control.request(message, timeout_s)

    async def kill(self) -> None:
        self._child.kill()
        await self._child.wait()

    async def stop(self, grace_s: float = 5.0) -> int:
        return await self._child.stop(grace_s)


class ProcessRuntime(Runtime):
    """Subprocesses, each with its core set, dying with the controller."""

    name: ClassVar[str] = "process"

    def __init__(self) -> None:
        self._run_dir: Path | None = None
        self._ledger: Ledger | None = None
        self._children: dict[str, Child] = {}

    async def start(self, run_dir: Path) -> None:
        self._run_dir = Path.cwd() / run_dir
        self._ledger = Ledger(self._run_dir / "objects.jsonl", uuid.uuid4().hex[:12])
        self._ledger.reap_processes()
        shutil.rmtree(self._run_dir / "nodes", ignore_errors=True)

    async def start_node(self, spec: NodeSpec, timeout_s: float = 300.0) -> NodeHandle:
        if self._run_dir is None or self._ledger is None:
            raise RuntimeFailed(f"{self.name} runtime: not started")
        if spec.cpu_quota is not None or spec.memory_mb is not None:
            field = "cpu_quota" if spec.cpu_quota is not None else "memory_mb"
            raise RuntimeFailed(f"{spec.name}: {field} needs the docker runtime (this one is {self.name})")
        running = self._children.get(spec.name)
        if running is not None and running.returncode is None:
            raise RuntimeFailed(f"{spec.name}: a node of this name is running already")
        check_cpus(spec)
        folder = self._run_dir / "nodes" / spec.name
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in spec.files.items():
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(content)
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
        child = await Child.start(
            spec.name,
            [sys.executable, *spec.resolved_args(self._address(spec.name), str(folder))],
            log_path=self._run_dir / "logs" / f"{spec.name}.log",
            ledger=self._ledger,
            env={**os.environ, "PYTHONPATH": path, **thread_env(spec.cpus), **spec.env},
            cpus=spec.cpus,
            launch_options=self._launch_options(),
        )
        self._children[spec.name] = child
        try:
            await self._connect(spec, child)
            return ProcessNode(child, await child.wait_ready(timeout_s), self._address(spec.name))
        except BaseException:
            child.kill()
            await child.wait()
            raise

    # What the runtimes that are made of child processes differ in:

    def _address(self, node: str) -> str:  # noqa: ARG002 - one address serves all nodes here
        """Where a node listens."""
        return LOOPBACK

    def _launch_options(self) -> Sequence[str]:
        """More options for `testbed.launch`."""
        return ()

    async def _connect(self, spec: NodeSpec, child: Child) -> None:
        """Give a started child its network."""

    async def stop(self) -> None:
        await asyncio.gather(*(child.stop() for child in self._children.values()))
        self._children.clear()
        if self._run_dir is not None:
            shutil.rmtree(self._run_dir / "nodes", ignore_errors=True)
