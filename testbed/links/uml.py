"""netem for kernels without it: the boxes live inside a User-Mode Linux router.

`linux.uml` is a Linux kernel that runs as an ordinary process (Debian: package user-mode-linux, sch_netem
among its modules). One router holds the boxes of all edges: each has two network devices, which are taps of
the fabric, and a bridge between them. The router's root is the host's file system, read-only; its first
process becomes the same agent that the fabric has, so that both are told what to do in the same words.

It runs in a PID namespace of its own: when it or the controller is killed, nothing of it lives on. Nothing of
it is on disk either: its start script goes in through its console.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsdlab.sim.profile import Direction, LinkProfile
from testbed import agent
from testbed.fabric import BRIDGE_OPTIONS, CORE, Fabric, offloads_off
from testbed.links.base import LinkError
from testbed.links.netem import Boxes
from testbed.links.part import Part

__all__ = ["MODULES", "UmlBoxes", "scratch_folder", "uml_problem"]

KERNEL = "linux.uml"
MODULES = Path("/usr/lib/uml/modules")
BOOT_TIMEOUT_S = 60.0
REQUEST_TIMEOUT_S = 30.0
VECTOR_DEPTH = 128  # packets that a device takes at once
TAP_PACKETS = 10_000


def uml_problem() -> str:
    """Why no router can be started here, with the mend; empty where one can."""
    if shutil.which(KERNEL) is None:
        return f"no {KERNEL} (apt install user-mode-linux)"
    if not any(MODULES.glob("*/kernel/net/sched/sch_netem.ko*")):
        return f"no sch_netem under {MODULES} (apt install user-mode-linux)"
    tun = Path("/dev/net/tun")
    try:
        tun.open("r+b", buffering=0).close()
    except OSError as error:
        mend = "modprobe tun" if not tun.exists() else f"chmod 666 {tun}"
        return f"{tun}: {(error.strerror or 'cannot be opened').lower()} ({mend})"
    return ""


def router_kernel() -> str:
    """The version of the router's kernel, by its modules."""
    return ", ".join(sorted(path.name for path in MODULES.glob("*")))


def scratch_folder(*needed: str) -> str:
    """Where the router may write: a folder of the host that it can cover with one in its own memory, because
    nothing that it needs is below. The project may be anywhere, /tmp included."""
    used = [
        Path(path).resolve()
        for path in (sys.executable, sys.prefix, sys.base_prefix, agent.__file__, *needed)
    ]
    for name in ("/run", "/mnt", "/media", "/srv", "/opt"):
        folder = Path(name)
        if folder.is_dir() and not any(path.is_relative_to(folder) for path in used):
            return name
    raise LinkError("link netem-uml: no folder that the router could cover (allowed: /run, /mnt, /media, …)")


def _start_script(n_boxes: int) -> str:
    """What the router's first process, a shell on its console, is told."""
    root = f"{scratch_folder()}/m"
    lines = [
        "PS1=; stty raw -echo",
        "mount -t proc proc /proc; mount -t sysfs sys /sys",
        f"mount -t tmpfs none {scratch_folder()}; mkdir -p {root}/lib/modules",
        f"ln -s {MODULES}/$(uname -r) {root}/lib/modules/$(uname -r)",
        "PATH=/usr/sbin:/usr/bin:/sbin:/bin; export PATH",
        f"modprobe -d {root} sch_netem; modprobe -d {root} bridge",
        "for f in /proc/sys/net/ipv6/conf/*/disable_ipv6; do echo 1 > $f; done",
    ]
    for box in range(n_boxes):
        near, far = f"vec{2 * box}", f"vec{2 * box + 1}"
        lines += [
            f"ip link add br{box} type bridge {BRIDGE_OPTIONS}",
            *(f"ip link set {port} master br{box} up" for port in (near, far)),
            f"ip link set br{box} up",
        ]
    lines += [f"echo; {shlex.quote(sys.executable)} -I -S {shlex.quote(agent.__file__)}; halt -f"]
    return "\n".join(lines) + "\n"


class UmlBoxes(Boxes):
    """All boxes of a fabric in one router process."""

    name = "netem-uml"
    label = "netem (User-Mode Linux)"

    def __init__(self, fabric: Fabric) -> None:
        super().__init__(fabric)
        self._router = Part("router", prefix="link netem-uml: ")

    async def start(self, run_dir: Path) -> None:
        if problem := uml_problem():
            raise LinkError(f"link netem-uml: {problem}")
        fabric = self.fabric
        argv = [
            KERNEL, f"mem={64 + 4 * fabric.n_edges}M", "rootfstype=hostfs", "rootflags=/", "ro",
            "init=/bin/sh", "uml_dir=/nonexistent", "con0=fd:0,fd:1", "con=null", "quiet",
        ]  # fmt: skip
        for edge in range(fabric.n_edges):
            await self._make_taps(edge)
            for k, tap in enumerate((f"a{edge}", f"b{edge}")):
                argv.append(f"vec{2 * edge + k}:transport=tap,ifname={tap},depth={VECTOR_DEPTH},gro=0")
        script = _start_script(fabric.n_edges).encode()
        options = [*fabric.join_options, "--new-pid", "--realtime"]
        await self._router.start(argv, run_dir, BOOT_TIMEOUT_S, first=script, launch_options=options)
        try:
            await self.shape(dict.fromkeys(range(fabric.n_edges), LinkProfile()))
        except BaseException:
            await self.stop()
            raise

    async def _make_taps(self, edge: int) -> None:
        fabric = self.fabric
        near, far = f"a{edge}", f"b{edge}"
        await fabric.batch(
            "ip", [f"tuntap add {tap} mode tap" for tap in (near, far)]
            + [f"link set {tap} txqueuelen {TAP_PACKETS}" for tap in (near, far)]
        )  # fmt: skip
        await fabric.run(offloads_off(near), offloads_off(far))
        await fabric.quiet([near, far])
        await fabric.batch("ip", [f"link set {near} master e{edge} up", f"link set {far} master {CORE} up"])

    def device(self, edge: int, direction: Direction) -> str:
        return f"vec{2 * edge + 1}" if direction == "up" else f"vec{2 * edge}"

    async def tc(self, *arguments: str, lines: Sequence[str] = ()) -> str:
        text = "".join(f"{line}\n" for line in lines)
        request = {"op": "run", "commands": [["tc", *arguments]], "input": text}
        return str((await self._router.ask(request, REQUEST_TIMEOUT_S))["outputs"][0])

    async def facts(self) -> dict[str, Any]:
        return {**await super().facts(), "router_kernel": router_kernel()}

    async def stop(self) -> None:
        await self._router.stop(grace_s=2.0)

    @property
    def alive(self) -> bool:
        return self._router.alive

    @property
    def pid(self) -> int | None:
        """The router's process while it runs."""
        return self._router.pid
