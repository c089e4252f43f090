"""A child process that links are made of: the fabric's agent, a router, a modelled box."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from testbed.child import Child
from testbed.control import NodeDied, NodeError
from testbed.ledger import Ledger
from testbed.links.base import LinkError

__all__ = ["Part"]


class Part:
    """Started, asked, stopped; whatever goes wrong with it is a LinkError.

    name: in errors and the name of its log. prefix: put before what it says is wrong.
    """

    def __init__(self, name: str, *, prefix: str = "") -> None:
        self.name = name
        self._prefix = prefix
        self._child: Child | None = None

    async def start(
        self, argv: Sequence[str], run_dir: Path, timeout_s: float, *, first: bytes = b"", **options: Any
    ) -> dict[str, Any]:
        """Its ready line. Raises LinkError, and then nothing of it is left.

        first: written to its input before it speaks control lines. options: further ones of `Child.start`.
        """
        try:
            self._child = await Child.start(
                self.name,
                argv,
                log_path=run_dir / "logs" / f"{self.name}.log",
                ledger=Ledger(run_dir / "objects.jsonl", uuid.uuid4().hex[:12]),
                **options,
            )
            self._child.write(first)
            return await self._child.wait_ready(timeout_s)
        except (NodeDied, NodeError) as error:
            await self.stop()
            raise LinkError(f"{self._prefix}{error}") from error
        except BaseException:
            await self.stop()
            raise

    async def ask(self, message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """A request and its answer. Raises LinkError."""
        if self._child is None:
            raise LinkError(f"{self._prefix}{self.name}: not started")
        try:
            return await self._child.control.request(message, timeout_s)
        except (NodeDied, NodeError, TimeoutError) as error:
            raise LinkError(f"{self._prefix}{error}") from error

    async def stop(self, grace_s: float = 1.0) -> None:
        """Ask it to end, then make it; idempotent."""
        if self._child is not None:
            await self._child.stop(grace_s=grace_s)
            self._child = None

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._child is not None and self._child.returncode is None

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._child.pid if self._child is not None and self.alive else None
