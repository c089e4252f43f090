"""The `docker` runtime: one container per node, with its own cores, share of them, memory and network.

A container runs the controller's own source, mounted over the image's copy, and sees of the host only that,
the model cache, the models named in its arguments and its own folder, all read-only. It has no network until
`Wiring` gives it an interface. Nothing outlives the controller: a container's input ends with the
controller's connection to the engine, the node ends with its input, and the engine removes what has ended;
what even that leaves (the engine was killed as well) carries a label with its owner, and the next start takes
it away.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dsdlab.models.zoo import cache_dir
from testbed.container import Container, Events, call, in_full
from testbed.engine import connect, one_line, remove, socket_path
from testbed.image import image_name, image_problem
from testbed.ledger import process_start
from testbed.links.base import Endpoint, LinkError
from testbed.runtimes.base import (
    WIRING_END_S,
    NodeHandle,
    NodeSpec,
    Runtime,
    RuntimeFailed,
    Wiring,
    check_cpus,
    thread_env,
)

if TYPE_CHECKING:
    from docker import DockerClient

__all__ = ["DockerNode", "DockerRuntime", "reap_containers"]

ROOT = Path(__file__).parents[2]
SOURCE = "/opt/dsdlab"
NODE_FOLDER = "/run/dsdlab/node"
RUN_LABEL, NODE_LABEL, OWNER_LABEL = "dsdlab.run", "dsdlab.node", "dsdlab.owner"
PERIOD_US = 10_000  # of the share of a core: the kernel's default, 100 ms, halts a slowed node for too long
MIN_QUOTA_US = 1_000  # the kernel's
MIN_MEMORY_MB = 8
MODEL_PREFIXES = ("lookup+", "hf:", "llama:")
SYSTEM_FOLDERS = {"/", "/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/opt", "/proc", "/run", "/sbin"}
SYSTEM_FOLDERS |= {"/sys", "/tmp", "/usr", "/var"}
NANO = 10**9


def owner_label() -> str:
    """This process, as no other process ever was or will be: id, start in clock ticks, boot."""
    return f"{os.getpid()}:{process_start(os.getpid())}:{_boot_id()}"


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _owner_is_dead(label: str) -> bool:
    pid, _, rest = label.partition(":")
    start, _, boot = rest.partition(":")
    if not (pid.isdigit() and start.isdigit() and boot):
        return False  # not one of ours
    return boot != _boot_id() or process_start(int(pid)) != int(start)


def reap_containers(client: DockerClient) -> list[str]:
    """Remove containers whose controller is dead; their names. Blocking. Raises DockerException."""
    removed = []
    for container in client.api.containers(all=True, filters={"label": OWNER_LABEL}):
        if _owner_is_dead(container["Labels"].get(OWNER_LABEL, "")):
            remove(client, container["Id"])
            removed.append(container["Names"][0].lstrip("/"))
    return removed


class DockerNode(NodeHandle):
    """A node in a container."""

    def __init__(self, container: Container, address: str, info: dict[str, Any]) -> None:
        self.name = container.name
        self.info = info
        self.log_path = container.log_path
        self._container = container
        self._address = address

    @property
    def pid(self) -> int:
        """Its process, as the host counts."""
        return self._container.pid

    @property
    def returncode(self) -> int | None:
        return self._container.returncode

    def endpoint(self, port: int) -> Endpoint:
        return Endpoint(self._address, port)

    async def request(self, message: dict[str, Any], timeout_s: float = 30.0) -> dict[str, Any]:
        return await self._container.control.request(message, timeout_s)

    async def kill(self) -> None:
        await in_full(self._container.kill())

    async def stop(self, grace_s: float = 5.0) -> int:
        return await in_full(self._container.stop(grace_s))


class DockerRuntime(Runtime):
    """Containers named dsdlab-RUN_ID-NODE."""

    name: ClassVar[str] = "docker"
    health_interval_s: ClassVar[float] = 10.0

    def __init__(self, wiring: Wiring, *, run_id: str) -> None:
        self._wiring = wiring
        self._run_id = run_id
        self._run_dir: Path | None = None
        self._facts: dict[str, str] = {}
        self._client: DockerClient | None = None
        self._events: Events | None = None
        self._containers: dict[str, Container] = {}

    async def start(self, run_dir: Path) -> None:
        from docker.errors import DockerException

        self._run_dir = Path.cwd() / run_dir
        try:
            await call(self._prepare)
            self._events = Events(socket_path(), f"{RUN_LABEL}={self._run_id}")
            await self._events.start()
        except (DockerException, OSError) as error:
            await self.stop()
            raise RuntimeFailed(f"docker: {one_line(error)}") from None
        except BaseException:
            await self.stop()
            raise
        shutil.rmtree(self._run_dir / "nodes", ignore_errors=True)

    def _prepare(self) -> None:
        self._client = connect()
        problem = image_problem(self._client)
        if problem is not None:
            raise RuntimeFailed(problem)
        image = self._client.images.get(image_name())
        self._facts = {
            "image": f"{image_name()} {image.short_id}",
            "engine": self._client.version()["Version"],
        }
        reap_containers(self._client)

    def facts(self) -> dict[str, Any]:
        return dict(self._facts)

    async def start_node(self, spec: NodeSpec, timeout_s: float = 300.0) -> NodeHandle:
        from docker.errors import DockerException

        if self._run_dir is None or self._client is None or self._events is None:
            raise RuntimeFailed("docker runtime: not started")
        running = self._containers.get(spec.name)
        if running is not None and running.returncode is None:
            raise RuntimeFailed(f"{spec.name}: a node of this name is running already")
        _check(spec)
        address = self._wiring.address(spec.name)
        log_path = self._run_dir / "logs" / f"{spec.name}.log"
        container = Container(spec.name, self._client, socket_path(), log_path, spec.memory_mb)
        self._containers[spec.name] = container
        try:
            folder = self._write_files(spec)
            await call(container.create, self._options(spec, address, folder))
            self._events.watch(container)
            await container.attach()
            await call(container.start)
            if container.pid:
                await self._wire(spec, container)
            container.begin()
            return DockerNode(container, address, await container.wait_ready(timeout_s))
        except BaseException as error:
            await in_full(container.destroy())
            if isinstance(error, (DockerException, OSError)):
                raise RuntimeFailed(self._what_failed(spec, error)) from None
            raise

    async def _wire(self, spec: NodeSpec, container: Container) -> None:
        try:
            await self._wiring.attach(spec.name, container.pid)
        except LinkError:
            await container.control.ended(WIRING_END_S)
            raise

    def _what_failed(self, spec: NodeSpec, error: Exception) -> str:
        name = self._container_name(spec)
        if getattr(error, "status_code", None) == 409 and "already in use" in str(error):
            return f"{spec.name}: there is a container {name} already: docker rm -f {name}"
        return f"{spec.name}: docker: {one_line(error)}"

    def _container_name(self, spec: NodeSpec) -> str:
        return f"dsdlab-{self._run_id}-{spec.name}"

    def _write_files(self, spec: NodeSpec) -> Path:
        assert self._run_dir is not None
        folder = self._run_dir / "nodes" / spec.name
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in spec.files.items():
            descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(content)
        return folder

    def _options(self, spec: NodeSpec, address: str, folder: Path) -> dict[str, Any]:
        """Arguments of the client's `create_container`."""
        from docker.types import LogConfig, Mount

        assert self._client is not None
        cache = Path.cwd() / cache_dir()
        environment = {"HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": SOURCE}
        mounts = {
            f"{SOURCE}/dsdlab": ROOT / "dsdlab",
            f"{SOURCE}/testbed": ROOT / "testbed",
            NODE_FOLDER: folder,
            **{str(path): path for path in model_paths(spec.args)},
        }
        if cache.is_dir():
            mounts[str(cache)] = cache
            environment["DSDLAB_CACHE"] = str(cache)
        limits: dict[str, Any] = {}
        if spec.cpus is not None:
            limits["cpuset_cpus"] = ",".join(map(str, spec.cpus))
        if spec.cpu_quota is not None:
            n_cpus = len(spec.cpus) if spec.cpus is not None else len(os.sched_getaffinity(0))
            limits["cpu_period"], limits["cpu_quota"] = quota_us(spec.cpu_quota, n_cpus)
        if spec.memory_mb is not None:  # without swap
            limits["mem_limit"] = limits["memswap_limit"] = spec.memory_mb * 10**6
        launcher = ("python3", "-I", "-S", f"{SOURCE}/testbed/launch.py", "--wait", "--", "python3")
        return {
            "image": image_name(),
            "name": self._container_name(spec),
            "hostname": spec.name,
            "command": [*launcher, *spec.resolved_args(address, NODE_FOLDER)],
            "environment": {**environment, **thread_env(spec.cpus), **spec.env},
            "labels": {RUN_LABEL: self._run_id, NODE_LABEL: spec.name, OWNER_LABEL: owner_label()},
            "stdin_open": True,  # and, as it is not detached, open once
            "user": f"{os.getuid()}:{os.getgid()}",  # whose files it has to read
            "working_dir": str(Path.cwd()),  # where relative paths in its arguments start
            "healthcheck": self._health_check(spec),
            "stop_signal": "SIGINT",  # the first process ignores a SIGTERM that it has no handler for
            "host_config": self._client.api.create_host_config(
                network_mode="none",
                auto_remove=True,
                init=False,
                mounts=[Mount(to, str(path), type="bind", read_only=True) for to, path in mounts.items()],
                log_config=LogConfig(type="none"),  # or the engine would keep a copy of every result
                cap_drop=["ALL"],
                security_opt=["no-new-privileges"],
                **limits,
            ),
        }

    def _health_check(self, spec: NodeSpec) -> dict[str, Any]:
        """A node that dials is well when a connection stands, any other when a port is open."""
        state = "01" if "--connect" in spec.args else "0A"
        pattern = rf"^ *[0-9]+: [0-9A-F]+:[0-9A-F]+ [0-9A-F]+:[0-9A-F]+ {state} "
        return {
            "test": ["CMD", "grep", "-Eqs", pattern, "/proc/net/tcp", "/proc/net/tcp6"],
            "interval": int(self.health_interval_s * NANO),
            "timeout": 5 * NANO,
            "retries": 3,
            "start_period": 600 * NANO,  # loading a model takes its time
        }

    async def stop(self) -> None:
        containers = list(self._containers.values())
        await in_full(_stop_all(containers))
        self._containers.clear()
        if self._client is not None:
            with contextlib.suppress(Exception):  # each has been removed already, unless the engine is gone
                await call(self._sweep, self._client)
        if self._events is not None:
            await self._events.stop()
            self._events = None
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._run_dir is not None:
            shutil.rmtree(self._run_dir / "nodes", ignore_errors=True)

    def _sweep(self, client: DockerClient) -> None:
        filters = {"label": [f"{RUN_LABEL}={self._run_id}", f"{OWNER_LABEL}={owner_label()}"]}
        for container in client.api.containers(all=True, filters=filters):
            remove(client, container["Id"])


async def _stop_all(containers: list[Container]) -> None:
    await asyncio.gather(*(container.stop(5.0) for container in containers))


def _check(spec: NodeSpec) -> None:
    check_cpus(spec)
    if spec.cpu_quota is not None and not 0.0 < spec.cpu_quota <= 1.0:
        raise RuntimeFailed(f"{spec.name}: cpu_quota {spec.cpu_quota:g} (allowed: above 0, up to 1)")
    if spec.memory_mb is not None and spec.memory_mb < MIN_MEMORY_MB:
        raise RuntimeFailed(f"{spec.name}: memory_mb {spec.memory_mb} (allowed: {MIN_MEMORY_MB} and more)")


def quota_us(share: float, n_cpus: int) -> tuple[int, int]:
    """(period, quota) in µs that give this share of the cores' time; the period is longer than usual only
    where the quota would be too short for the kernel."""
    period_us = max(PERIOD_US, math.ceil(MIN_QUOTA_US / (share * n_cpus)))
    period_us = min(period_us, 1_000_000)
    return period_us, max(MIN_QUOTA_US, round(share * n_cpus * period_us))


def model_paths(args: tuple[str, ...]) -> Iterator[Path]:
    """Files and folders of the host that arguments name, also behind "hf:" and "lookup+"; absolute. With
    them, where files in a folder are links (to a cache's blobs), the folders those are in."""
    for before, arg in pairwise(("", *args)):
        if before in ("-m", "-c"):
            continue
        text = arg.partition("=")[2] if arg.startswith("--") else arg
        for prefix in MODEL_PREFIXES:
            text = text.removeprefix(prefix)
        path = Path(os.path.normpath(Path.cwd() / text))
        with contextlib.suppress(OSError, ValueError):
            if text and path.exists() and str(path) not in SYSTEM_FOLDERS:
                yield path
                if path.is_dir():
                    yield from {file.resolve().parent for file in path.iterdir() if file.is_symlink()} - {
                        path
                    }
