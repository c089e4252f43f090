"""The `modelled` link: real bytes, delayed in user space by the model that the simulator uses.

`python -m testbed.links.modelled --target HOST:PORT` runs a box by hand: it prints {"op":"ready","port":N},
listens on loopback, relays every connection to the target, and is told what to do by JSON lines on standard
input, each answered by {"op":"ok",…} or {"op":"error","message":…} with the request's `id`, if it had one:

    {"op":"profile","rtt_ms":50,"rate_up_mbit":10}   shape what is sent from now on
    {"op":"target","target":"127.0.0.1:7000"}        where the first port's connections go (they wait for it)
    {"op":"open","target":"127.0.0.1:7001"}          another port through the same bottlenecks: {"port":N}
    {"op":"drop"}                                    reset every connection
    {"op":"stats"}                                   counters, and how late bytes were written (ms)
    {"op":"stop"}, or the end of the input           end

How exact it is on this host: `python -m testbed.links.bench`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from dsdlab.sim.profile import LinkProfile
from testbed.fabric import Fabric
from testbed.links.base import EchoServer, Endpoint, Link, LinkError, LinkProbe, probe_echo
from testbed.links.box import Box, emit
from testbed.links.part import Part

__all__ = ["ModelledLink", "main"]

REQUEST_TIMEOUT_S = 10.0
LOOPBACK = "127.0.0.1"


class ModelledLink(Link):
    """A box in a process of its own: on the controller's host, without any privilege, or in a flat fabric."""

    name = "modelled"
    label = "modelled"

    def __init__(
        self,
        profile: LinkProfile | None = None,
        *,
        seed: int = 0,
        box_name: str = "link",
        host: str = LOOPBACK,
        fabric: Fabric | None = None,
    ) -> None:
        self.profile = profile or LinkProfile()
        self._seed = seed
        self._box = Part(box_name)
        self._fabric = fabric
        self._host = host if fabric is None else fabric.host
        self.granted: dict[str, Any] = {}

    async def start(self, run_dir: Path) -> Endpoint:
        argv = [
            sys.executable,
            "-m",
            "testbed.links.modelled",
            "--host",
            self._host,
            "--seed",
            str(self._seed),
        ]
        argv += ["--profile", json.dumps(self.profile.to_dict())]
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        options = () if self._fabric is None else self._fabric.join_options
        ready = await self._box.start(argv, run_dir, REQUEST_TIMEOUT_S, env=env, launch_options=options)
        self.granted = {key: ready[key] for key in ("timer_slack", "scheduling") if key in ready}
        return Endpoint(self._host, int(ready["port"]))

    async def _request(self, op: str, **fields: Any) -> dict[str, Any]:
        return await self._box.ask({"op": op, **fields}, REQUEST_TIMEOUT_S)

    async def set_target(self, target: Endpoint) -> None:
        await self._request("target", target=str(target))

    async def apply(self, profile: LinkProfile) -> None:
        await self._request("profile", profile=profile.to_dict())
        self.profile = profile

    async def open_port(self, target: Endpoint) -> Endpoint:
        """Another port for the edge, sharing the link, to another target."""
        answer = await self._request("open", target=str(target))
        return Endpoint(self._host, int(answer["port"]))

    async def probe(self, n: int = 20, n_bytes: int = 200) -> LinkProbe:
        """Round trips to an echo peer behind a port of its own in the same box; on the host only."""
        echo = EchoServer(self._host)
        try:
            return await probe_echo(await self.open_port(echo.endpoint), n, n_bytes)
        except OSError as error:
            raise LinkError(f"{self._box.name}: probe failed: {error}") from error
        finally:
            await asyncio.to_thread(echo.close)

    async def drop(self) -> int:
        return int((await self._request("drop"))["dropped"])

    async def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = (await self._request("stats"))["stats"]
        return stats

    async def stop(self) -> None:
        await self._box.stop()

    @property
    def alive(self) -> bool:
        return self._box.alive

    @property
    def pid(self) -> int | None:
        """The box's process id while it runs."""
        return self._box.pid


def main(argv: list[str] | None = None) -> int:
    """The box's command line. Exit status 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m testbed.links.modelled", description=Box.__doc__)
    parser.add_argument("--target", help="HOST:PORT; without it connections wait for a target line")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0 takes a free one")
    parser.add_argument("--profile", default="{}", help="the first profile, as JSON")
    parser.add_argument("--seed", type=int, default=0, help="of losses and jitter")
    args = parser.parse_args(argv)
    try:
        values = json.loads(args.profile)
        if not isinstance(values, dict):
            raise ValueError("--profile: not a JSON object")
        box = Box(LinkProfile.from_dict(values), args.seed)
        target = None if args.target is None else Endpoint.parse(args.target)
        if not 0 <= args.port < 65536:
            raise ValueError(f"--port: {args.port} is out of range (allowed: 0 to 65535)")
        port = box.listen(args.host, args.port, target)
    except (ValueError, OSError) as error:
        where = f"cannot listen on {args.host}:{args.port}: " if isinstance(error, OSError) else ""
        sys.stderr.write(f"modelled link: {where}{error}\n")
        return 2
    emit({"op": "ready", "port": port, **box.granted})
    try:
        box.run(sys.stdin.fileno())
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
