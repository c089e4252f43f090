"""Which runtime and link this host can give, and whose turn it is to measure on it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from testbed import doctor
from testbed.links.base import LinkError
from testbed.links.uml import uml_problem
from testbed.runtimes.base import RuntimeFailed

__all__ = ["Choice", "choose", "docker_problem", "host_turn", "netem_problem", "netns_problem"]

AUTO = "auto"
TOOLS = {"ip": "iproute2", "tc": "iproute2", "ss": "iproute2", "ethtool": "ethtool", "nsenter": "util-linux"}
TURN = "\0dsdlab-measuring"  # an abstract socket: it is free again when its holder ends, however it ends
ASK_AGAIN_S = 0.5


@dataclass(frozen=True, slots=True)
class Choice:
    """What "auto" came to, and why: one line for everything better that this host cannot do yet."""

    runtime: str
    link: str
    reasons: list[str] = field(default_factory=list)


def netns_problem() -> str:
    """Why nodes cannot have network namespaces here, with the mend; empty where they can."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = sorted({package for tool, package in TOOLS.items() if shutil.which(tool, path=path) is None})
    if missing:
        return f"tools are missing (apt install {' '.join(missing)})"
    found = doctor.namespaces()
    return "" if found.status == "ok" else f"{found.detail} ({found.how})"


def netem_problem() -> str:
    """Why this kernel cannot shape with netem; empty where it can."""
    found = doctor.netem()
    return "" if found.status == "ok" else f"no sch_netem ({found.detail})"


def docker_problem() -> str:
    """Why nodes cannot live in containers here, with the mend; empty where they can."""
    from testbed.engine import NEEDS_ROOT, connect
    from testbed.image import image_problem

    if os.geteuid() != 0:
        return NEEDS_ROOT
    try:
        client = connect(timeout_s=10.0)
    except RuntimeFailed as error:
        return str(error)
    with contextlib.closing(client):
        return image_problem(client) or ""


def choose(runtime: str, link: str) -> Choice:
    """Replace "auto" by the most real thing that works here. Raises RuntimeFailed or LinkError.

    What is named stays as it is: if this host cannot do it, starting it says why.
    """
    reasons: list[str] = []

    def best(options: list[tuple[str, Callable[[], str]]], fallback: str) -> str:
        for name, problem in options:
            if not (why := problem()):
                return name
            reasons.append(f"not {name}: {why.removeprefix(name + ': ')}")
        return fallback

    if link == "wan":  # there is nothing to shape, and so nothing that needs namespaces
        return Choice("process" if runtime == AUTO else runtime, link)
    if runtime == AUTO:
        runtime = best([("docker", docker_problem), ("netns", netns_problem)], "process")
        if runtime == "process" and link not in (AUTO, "modelled"):
            raise LinkError(f"link {link} needs runtime netns or docker; {'; '.join(reasons)}")
    if link == AUTO:
        if runtime == "process":
            reasons.append("not netem: processes share the host's network (runtime netns or docker)")
            link = "modelled"
        else:
            link = best([("netem", netem_problem), ("netem-uml", uml_problem)], "modelled")
    return Choice(runtime, link, reasons)


@contextlib.asynccontextmanager
async def host_turn(say: Callable[[str], None]) -> AsyncIterator[None]:
    """Wait until no other controller measures on this host: two at once would spoil each other's numbers.

    say: told once, if there is a wait. A controller that is killed gives its turn back.
    """
    with socket.socket(socket.AF_UNIX) as turn:
        waiting = False
        while True:
            try:
                turn.bind(TURN)
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE:  # no abstract sockets, so no turns (elsewhere than Linux)
                    break
                if not waiting:
                    say("another dsdlab measures on this host; waiting for it to end (Ctrl-C gives up)")
                    waiting = True
            await asyncio.sleep(ASK_AGAIN_S)
        yield
