"""The WAN itself: no box at all. The edge dials a verifier that somebody started on another machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path
from typing import Any, ClassVar

from dsdlab.protocol.errors import one_line
from dsdlab.sim.profile import LinkProfile
from testbed.links.base import Endpoint, Link, LinkError

__all__ = ["WanLink", "tcp_problem"]

ANSWER_S = 5.0  # a verifier that does not take a call within this time is not there


async def tcp_problem(endpoint: Endpoint, timeout_s: float = ANSWER_S) -> str:
    """Why nobody takes a TCP call there, for people; empty where somebody does."""
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
    except TimeoutError:
        return f"no answer within {timeout_s:g} s"
    except socket.gaierror:
        return "host name not found"
    except OSError as error:
        return os.strerror(error.errno).lower() if error.errno else one_line(str(error))
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return ""


class WanLink(Link):
    """A path that is what it is: it can be measured, not changed, and nothing of it is ours to take away."""

    name: ClassVar[str] = "wan"
    label: ClassVar[str] = "wan"

    def __init__(self, verifier: Endpoint) -> None:
        self.verifier = verifier

    async def check(self) -> None:
        """Raises LinkError, with the mend, when no verifier listens."""
        if problem := await tcp_problem(self.verifier):
            raise LinkError(
                f"no verifier at ws://{self.verifier}/ ({problem}); start one there: "
                "dsdlab node verifier --host 0.0.0.0 --token-file FILE"
            )

    async def start(self, run_dir: Path) -> Endpoint:  # noqa: ARG002 - nothing is made
        """Where the verifier is, once it takes calls. Raises LinkError."""
        await self.check()
        return self.verifier

    async def set_target(self, target: Endpoint) -> None:
        """The verifier is where it always is. Raises LinkError for another place."""
        if target != self.verifier:
            raise LinkError(f"link wan: the verifier is at {self.verifier} (asked: {target})")

    async def apply(self, profile: LinkProfile) -> None:
        """Nothing: a profile is no more than a label here."""

    async def drop(self) -> int:
        return 0

    async def stats(self) -> dict[str, Any]:
        return {}

    async def stop(self) -> None:
        """Nothing was made."""

    @property
    def alive(self) -> bool:
        return True
