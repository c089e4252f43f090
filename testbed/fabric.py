"""The fabric: a network namespace of our own in which the links of a run are built.

Everything that a run needs of networking (bridges, virtual cables, taps, qdiscs) is made inside one namespace
that no name points to. An agent process holds it, and dies with the controller; the kernel then takes the
namespace and all that is in it away. So a controller that is killed leaves no interface behind, the host's
own interfaces, firewall and routes are never touched, and two controllers never meet.

    edge0 ── bridge e0 ══ box 0 ══╗
    edge1 ── bridge e1 ══ box 1 ══╬══ bridge core ── verifier
      …                      …    ║

A box (`testbed.links.netem`) is what shapes; each node is alone in a namespace with one interface, `eth0`.
All are in one subnet, with permanent neighbour entries, so that no ARP is delayed or lost by a link. Offloads
are off everywhere: with them a link would drop or delay 64 KB at a time.

Not root? Then the fabric is made inside a user namespace of its own, and only runtimes that can put their
nodes there (`netns`) can use it.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsdlab.sim.profile import TcpRegime
from testbed import agent
from testbed.links.base import LinkError
from testbed.links.part import Part

__all__ = ["SUBNET", "VERIFIER", "Fabric", "edge_name"]

SUBNET = "10.77.0"
VERIFIER = "verifier"
CORE = "core"
MTU = 1500
REQUEST_TIMEOUT_S = 30.0
OFFLOADS = ("rx", "tx", "sg", "tso", "gso", "gro")
NAMESPACE_TIMEOUT_S = 20.0
MAX_EDGES = 64
BRIDGE_OPTIONS = "ageing_time 8640000 mcast_snooping 0"  # who is where stays known: nothing is flooded


def edge_name(index: int) -> str:
    """The name of an edge node."""
    return f"edge{index}"


def _host_number(node: str) -> int:
    return 1 if node == VERIFIER else 10 + int(node.removeprefix("edge"))


def _mac(node: str) -> str:
    return f"02:d5:d1:ab:00:{_host_number(node):02x}"


def _network_namespace(pid: int) -> str:
    """The identity of a process's network namespace. Raises OSError."""
    return str(Path(f"/proc/{pid}/ns/net").readlink())


def available_congestion() -> list[str]:
    """The congestion controls of this kernel; empty where it does not say."""
    try:
        return Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    except OSError:
        return []


def offloads_off(device: str) -> list[str]:
    """The command that switches a device's offloads off."""
    return ["ethtool", "-K", device, *(word for name in OFFLOADS for word in (name, "off"))]


class Fabric:
    """The namespace, its agent and the nodes' cables. A `Wiring` for runtimes.

    n_edges: how many edge nodes there will be, 1 to 64. Raises LinkError.
    flat: no boxes in between; everything is on the core bridge, and so is the fabric itself (`host`).
    """

    host = f"{SUBNET}.254"
    """The fabric's own address where it is flat: for links that are programs."""

    def __init__(self, n_edges: int = 1, *, flat: bool = False) -> None:
        if not 1 <= n_edges <= MAX_EDGES:
            raise LinkError(f"edges: {n_edges} is out of range (allowed: 1 to {MAX_EDGES})")
        self.n_edges = n_edges
        self.flat = flat
        self.nodes = (VERIFIER, *(edge_name(i) for i in range(n_edges)))
        self.rootless = os.geteuid() != 0
        self._agent = Part("fabric")
        self._pids: dict[str, int] = {}
        self._algorithms: list[str] = []
        self.regime = TcpRegime()

    # -- life ----------------------------------------------------------------------------------------------

    async def start(self, run_dir: Path) -> None:
        """Make the namespace and its bridges. Raises LinkError, naming what this host lacks."""
        options = ["--new-user", "--new-net"] if self.rootless else ["--new-net"]
        try:
            command = [sys.executable, "-I", "-S", agent.__file__]
            await self._agent.start(command, run_dir, REQUEST_TIMEOUT_S, launch_options=options)
        except LinkError as error:
            raise LinkError(f"{error}{self._hint(str(error))}") from error
        try:
            bridges = sorted({CORE, *(self.bridge_of(node) for node in self.nodes)})
            await self.batch(
                "ip",
                ["link set lo up"]
                + [f"link add {name} type bridge {BRIDGE_OPTIONS}" for name in bridges]
                + [f"link set {name} up" for name in bridges]
                + ([f"addr add {self.host}/24 dev {CORE}"] if self.flat else []),
            )
            await self.quiet(bridges)
        except BaseException:
            await self.stop()
            raise

    def _hint(self, text: str) -> str:
        if self.rootless and ("unshare" in text or "setgroups" in text or "uid_map" in text):
            return " (user namespaces are refused here: run as root, or see dsdlab doctor)"
        return ""

    async def stop(self) -> None:
        """End the agent; the namespace goes when the nodes in it have ended too. Idempotent."""
        await self._agent.stop()

    @property
    def alive(self) -> bool:
        """Whether the namespace is held."""
        return self._agent.alive

    @property
    def pid(self) -> int:
        """A process in the namespace. Raises LinkError when it is gone."""
        if (pid := self._agent.pid) is None:
            raise LinkError("fabric: not started")
        return pid

    @property
    def join_options(self) -> list[str]:
        """Launch options that start a process in the fabric's own namespace."""
        return [*self.user_options, "--net-of", str(self.pid)]

    @property
    def user_options(self) -> list[str]:
        """Launch options that let a process make namespaces that the fabric may wire."""
        return ["--user-of", str(self.pid)] if self.rootless else []

    # -- commands ------------------------------------------------------------------------------------------

    async def run(self, *commands: Sequence[str], node: str | None = None, text: str = "") -> list[str]:
        """Run commands in the fabric, or in a node's namespace; their outputs. Raises LinkError."""
        prefix = [] if node is None else ["nsenter", f"--net=/proc/{self._node_pid(node)}/ns/net", "--"]
        request = {"op": "run", "commands": [[*prefix, *c] for c in commands], "input": text}
        answer = await self._agent.ask(request, REQUEST_TIMEOUT_S)
        outputs: list[str] = answer["outputs"]
        return outputs

    def _node_pid(self, node: str) -> int:
        if node not in self._pids:
            raise LinkError(f"fabric: {node} is not wired (nodes: {', '.join(self._pids) or 'none'})")
        return self._pids[node]

    def enter(self, node: str) -> list[str]:
        """The beginning of a command line that runs a program in a node's namespace. Raises LinkError."""
        pid = self._node_pid(node)
        user = ["--user", "--preserve-credentials"] if self.rootless else []
        return ["nsenter", f"--target={pid}", *user, "--net", "--"]

    async def batch(self, tool: str, lines: Sequence[str], node: str | None = None) -> None:
        """Many commands of `ip` or `tc` in one process. Raises LinkError."""
        await self.run([tool, "-batch", "-"], node=node, text="\n".join(lines) + "\n")

    async def quiet(self, devices: Sequence[str], node: str | None = None) -> None:
        """No IPv6 on devices: its neighbour discovery would be traffic that nobody asked for."""
        script = "".join(
            f"f=/proc/sys/net/ipv6/conf/{name}/disable_ipv6; [ ! -e $f ] || echo 1 > $f; " for name in devices
        )
        await self.run(["sh", "-c", script], node=node)

    # -- wiring --------------------------------------------------------------------------------------------

    def address(self, node: str) -> str:
        return f"{SUBNET}.{_host_number(node)}"

    def bridge_of(self, node: str) -> str:
        """The bridge that a node's cable ends at."""
        return CORE if node == VERIFIER or self.flat else "e" + node.removeprefix("edge")

    async def namespace_made(self, pid: int) -> None:
        """Wait until a launched process is in a network namespace of its own. Raises LinkError."""
        end_s = asyncio.get_running_loop().time() + NAMESPACE_TIMEOUT_S
        ours = _network_namespace(os.getpid())
        while asyncio.get_running_loop().time() < end_s:
            try:
                if _network_namespace(pid) != ours:
                    return
            except PermissionError:  # between two sets of credentials
                pass
            except OSError as error:
                raise LinkError(f"process {pid} ended before it had a network namespace") from error
            await asyncio.sleep(0.002)
        raise LinkError(f"process {pid} has no network namespace of its own after {NAMESPACE_TIMEOUT_S:g} s")

    async def attach(self, node: str, pid: int) -> None:
        """A cable from the node's bridge into the namespace of `pid`, and its address there."""
        cable = f"n{_host_number(node)}"
        self._pids[node] = pid
        await self.run(
            ["sh", "-c", f"ip link del {cable} 2>/dev/null || true"],  # of a node that died and starts again
            ["ip", "link", "add", cable, "mtu", str(MTU), "type", "veth",
             "peer", "name", "eth0", "address", _mac(node), "mtu", str(MTU), "netns", str(pid)],
            offloads_off(cable),
        )  # fmt: skip
        await self.quiet([cable])
        await self.batch("ip", [f"link set {cable} master {self.bridge_of(node)} up"])
        await self.quiet(["all", "default", "eth0"], node=node)
        await self.run(offloads_off("eth0"), node=node)
        others = [VERIFIER] if node != VERIFIER else list(self.nodes[1:])
        await self.batch(
            "ip",
            ["link set lo up", f"addr add {self.address(node)}/24 dev eth0", "link set eth0 up"]
            + [f"neigh replace {self.address(n)} lladdr {_mac(n)} nud permanent dev eth0" for n in others],
            node=node,
        )
        await self._apply_tcp(node)

    # -- TCP -----------------------------------------------------------------------------------------------

    async def set_tcp(self, regime: TcpRegime) -> None:
        """Put a regime into force in every node, for connections made from now on. Raises LinkError.

        Algorithm and RTO floor are attributes of the route: unlike the namespace's sysctl, a route may name
        algorithms that the host's administrator keeps from ordinary users, and both ends take it.
        """
        self._algorithm(regime.congestion)
        self.regime = regime
        for node in self._pids:
            await self._apply_tcp(node)

    async def _apply_tcp(self, node: str) -> None:
        algorithm = self._algorithm(self.regime.congestion)
        values = {
            "tcp_slow_start_after_idle": int(self.regime.slow_start_after_idle),
            "tcp_no_metrics_save": 1,  # nothing learnt from one connection is passed on to the next
        }
        script = "; ".join(f"echo {value} > /proc/sys/net/ipv4/{name}" for name, value in values.items())
        words = f"rto_min {self.regime.rto_min_ms:g}ms" + (f" congctl {algorithm}" if algorithm else "")
        route = f"route replace {SUBNET}.0/24 dev eth0 src {self.address(node)} {words}"
        await self.run(["sh", "-c", script], ["ip", *route.split()], node=node)

    def _algorithm(self, asked: str) -> str:
        if (
            not self._algorithms
        ):  # a fresh namespace hides what only root may choose; the route may all the same
            self._algorithms = available_congestion()
        if asked == "auto":
            return "cubic" if "cubic" in self._algorithms else ""
        if asked not in self._algorithms:
            raise LinkError(
                f"tcp.congestion: {asked!r} is not in this kernel (available: {', '.join(self._algorithms)}; "
                f"modprobe tcp_{asked} may add it)"
            )
        return asked

    async def tcp_state(self, node: str) -> dict[str, Any]:
        """What the kernel says of a node: slow start after idle; offloads that are on (none should be)."""
        sysctl, features = await self.run(
            ["cat", "/proc/sys/net/ipv4/tcp_slow_start_after_idle"], ["ethtool", "-k", "eth0"], node=node
        )
        names = ("rx-checksumming", "tx-checksumming", "scatter-gather", "tcp-segmentation-offload",
                 "generic-segmentation-offload", "generic-receive-offload")  # fmt: skip
        pairs = (line.partition(":") for line in features.splitlines())
        on = [key.strip() for key, _, value in pairs if key.strip() in names and value.split()[:1] == ["on"]]
        return {"slow_start_after_idle": sysctl.strip() == "1", "offloads_on": on}

    async def drop_connections(self, node: str) -> int:
        """Reset every TCP connection of a node; how many there were. Raises LinkError."""
        listed, _ = await self.run(["ss", "-Htn"], ["ss", "-K", "-Htn"], node=node)
        return len(listed.splitlines())
