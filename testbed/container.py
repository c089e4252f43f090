"""A container that speaks control lines: created, attached, watched, logged, and certain to end.

The engine's client library blocks, so its calls run in threads (`call`). The two streams do not end for as
long as a run lasts, so they are read here directly from the engine's socket: the attached input and output of
each container, and one stream of events for all of them. Events tell how a container ended, which nobody can
ask any more once it has been removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from urllib.parse import quote

from testbed.child import LINE_BYTES, obituary, open_log, too_late
from testbed.control import ControlLines, NodeDied
from testbed.engine import REMOVAL_S, remove
from testbed.ledger import process_start
from testbed.runtimes.base import RuntimeFailed

if TYPE_CHECKING:
    from docker import DockerClient

__all__ = ["Container", "Events", "call", "finish", "in_full"]

P = ParamSpec("P")
T = TypeVar("T")
STDERR = 2  # of the stream's three
END_S = 30.0  # from SIGKILL to its end, on a host that is out of memory


async def call(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a blocking function in a thread. A cancellation waits for its end, so that nothing is made later
    behind the back of whoever cleans up."""
    task = asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs))
    return await finish(task)


async def finish(task: asyncio.Future[T]) -> T:
    """Await a task to its end, even when cancelled meanwhile; the cancellation is raised then."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        task.cancelled() or task.exception()  # seen
        raise cancelled
    return task.result()


async def open_stream(
    path: Path, method: str, target: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Ask the engine for something whose answer has no end. Raises RuntimeFailed or OSError."""
    reader, writer = await asyncio.open_unix_connection(str(path), limit=LINE_BYTES)
    try:
        writer.write(f"{method} {target} HTTP/1.0\r\nHost: docker\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split(maxsplit=2)[1])
        if status not in (101, 200):
            body = (await reader.read(4096)).decode("utf-8", "replace")
            raise RuntimeFailed(f"docker: {' '.join(body.split())}")
    except asyncio.IncompleteReadError:
        writer.close()
        raise RuntimeFailed("docker: the engine hung up") from None
    except BaseException:
        writer.close()
        raise
    return reader, writer


class Events:
    """What happens to the containers of one run, told to each `Container`."""

    def __init__(self, path: Path, label: str) -> None:
        self._path = path
        self._label = label
        self._containers: dict[str, Container] = {}
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen from now on. Raises RuntimeFailed or OSError."""
        filters = quote(json.dumps({"type": ["container"], "label": [self._label]}))
        reader, writer = await open_stream(self._path, "GET", f"/events?filters={filters}")
        self._task = asyncio.create_task(self._listen(reader, writer), name="docker events")

    def watch(self, container: Container) -> None:
        """Tell it from now on."""
        self._containers[container.ident] = container

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                event = json.loads(line)
                container = self._containers.get(event["Actor"]["ID"])
                if container is not None:
                    container.happened(event["Action"], event["Actor"]["Attributes"])
                    if event["Action"] == "destroy":
                        del self._containers[container.ident]
        except (OSError, ValueError):
            pass
        finally:
            writer.close()
            for container in self._containers.values():
                container.engine_lost()

    async def stop(self) -> None:
        """Stop listening; idempotent."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None


class Container:
    """One container. Its standard error, and what it prints besides control lines, go to `log_path`.

    Its input ends with the connection to the engine, so also when this process is killed.
    """

    def __init__(
        self, name: str, client: DockerClient, path: Path, log_path: Path, memory_mb: int | None
    ) -> None:
        self.name = name
        self.ident = ""
        self.pid = 0
        self.log_path = log_path
        self.returncode: int | None = None
        self.control = ControlLines(name, self._write)
        self._client = client
        self._path = path
        self._memory_mb = memory_mb
        self._log_from = open_log(log_path, name)
        self._start: int | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._code: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._removed = asyncio.Event()
        self._stopping = False
        self._out_of_memory = False
        self._lost = False

    # -- start ---------------------------------------------------------------------------------------------

    def create(self, options: dict[str, Any]) -> None:
        """Create it; blocking. Raises DockerException."""
        self.ident = self._client.api.create_container(**options)["Id"]

    async def attach(self) -> None:
        """Connect to its input and output, before `start`. Raises RuntimeFailed or OSError."""
        target = f"/containers/{self.ident}/attach?stream=1&stdin=1&stdout=1&stderr=1"
        reader, self._writer = await open_stream(self._path, "POST", target)
        self._watcher = asyncio.create_task(self._watch(reader), name=f"watch {self.name}")

    def start(self) -> None:
        """Start it and learn its process id (0: it has ended already); blocking. Raises DockerException."""
        from docker.errors import NotFound

        self._client.api.start(self.ident)
        with contextlib.suppress(NotFound):
            self.pid = int(self._client.api.inspect_container(self.ident)["State"]["Pid"])
            self._start = process_start(self.pid) if self.pid else None

    def begin(self) -> None:
        """Let the command run, which waits for a line."""
        self._write(b"\n")

    async def wait_ready(self, timeout_s: float) -> dict[str, Any]:
        """Its ready line. Raises NodeDied (also after `timeout_s`) or NodeError."""
        try:
            return await asyncio.wait_for(asyncio.shield(self.control.ready), timeout_s)
        except TimeoutError:
            raise too_late(self.name, timeout_s, self.log_path, self._log_from) from None

    def _write(self, data: bytes) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(data)

    # -- watch ---------------------------------------------------------------------------------------------

    async def _watch(self, reader: asyncio.StreamReader) -> None:
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, OSError):
                await self._read(reader)
            code = await self._code
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._removed.wait(), REMOVAL_S)
            if not self._removed.is_set():
                await self._force()
            self.returncode = -signal.SIGKILL if code is None else code
        finally:
            assert self._writer is not None
            self._writer.close()  # when cancelled by the end of the event loop, the end of it as well
            self.control.fail(NodeDied(self.obituary()))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Frames of output: 8 bytes (stream, 0, 0, 0, length), then data. Returns when a line is too long."""
        parts: list[bytes] = []  # of a line that is not complete
        n_bytes = 0
        with self.log_path.open("ab", buffering=0) as log:
            while True:
                head = await reader.readexactly(8)
                data = await reader.readexactly(int.from_bytes(head[4:], "big"))
                if head[0] == STDERR:
                    log.write(data)
                    continue
                *lines, rest = data.split(b"\n")
                for line in lines:
                    whole = b"".join((*parts, line))
                    parts, n_bytes = [], 0
                    if whole.strip() and not self.control.feed(whole):
                        log.write(b"stdout: " + whole + b"\n")
                parts.append(rest)
                n_bytes += len(rest)
                if n_bytes > LINE_BYTES:
                    await self._signal(signal.SIGKILL)
                    return

    def happened(self, action: str, attributes: dict[str, str]) -> None:
        """An event of the engine about it."""
        if action == "oom":
            self._out_of_memory = True
        elif action == "die" and not self._code.done():
            code = int(attributes.get("exitCode", "0"))
            by_signal = code > 128 and code - 128 in set(signal.Signals)
            self._code.set_result(128 - code if by_signal else code)
        elif action == "destroy":
            self._gone()

    def engine_lost(self) -> None:
        """No more events will come."""
        self._lost = True
        self._gone()

    def _gone(self) -> None:
        if not self._code.done():
            self._code.set_result(None)
        self._removed.set()

    def obituary(self) -> str:
        """One line on how it ended."""
        cause = None
        if self._lost:
            cause = "is lost: the docker engine went away"
        elif self._out_of_memory and self.returncode == -signal.SIGKILL:
            cause = f"was killed: out of memory (limit {self._memory_mb} MB)"
        return obituary(
            self.control, self.returncode, self.log_path, self._log_from, asked_to=self._stopping, cause=cause
        )

    # -- end -----------------------------------------------------------------------------------------------

    async def _signal(self, number: signal.Signals) -> None:
        from docker.errors import DockerException

        try:
            await call(self._client.api.kill, self.ident, number.name)
        except (DockerException, OSError):  # it has ended; or else the engine has, and then:
            if self._lost:
                self._kill_process()

    def _kill_process(self) -> None:
        """SIGKILL without the engine, where we may."""
        if self._start is not None and process_start(self.pid) == self._start:
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)

    async def _force(self) -> None:
        from docker.errors import DockerException

        if self.ident:
            with contextlib.suppress(DockerException, OSError):
                await call(remove, self._client, self.ident)
        if self._lost:
            self._kill_process()

    async def kill(self) -> None:
        """SIGKILL, and wait until it has been removed."""
        if self.returncode is None:
            self._stopping = True
            await self._signal(signal.SIGKILL)
            await self._wait(END_S)

    async def stop(self, grace_s: float) -> int:
        """Ask ("stop" and end of input), then SIGTERM after `grace_s`, then SIGKILL; its exit status."""
        if self._watcher is not None and not self._watcher.done():
            self._stopping = True
            with contextlib.suppress(Exception):  # whatever is wrong with it, the signals follow
                self.control.send({"op": "stop"})
                if self._writer is not None:
                    self._writer.write_eof()
            for last_resort in (signal.SIGTERM, signal.SIGKILL):
                done, _ = await asyncio.wait([self._watcher], timeout=grace_s)
                if done:
                    break
                await self._signal(last_resort)
        await self._wait(END_S)
        if self._lost:
            self._kill_process()
        return -signal.SIGKILL if self.returncode is None else self.returncode

    async def _wait(self, timeout_s: float) -> None:
        """Wait for its end; what has not ended by then is removed by force."""
        if self._watcher is None:
            return
        done, _ = await asyncio.wait([self._watcher], timeout=timeout_s)
        if not done:
            await self.destroy()

    async def destroy(self) -> None:
        """Remove it whatever its state, also half made; to be awaited to its end."""
        self._stopping = True
        await self._force()
        if self._watcher is not None:
            done, _ = await asyncio.wait([self._watcher], timeout=2.0)  # for the events
            if not done:  # it never ran
                self._gone()
                self._watcher.cancel()
                await asyncio.wait([self._watcher])
        if self.returncode is None:
            self.returncode = -signal.SIGKILL


def in_full(coroutine: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
    """`finish` for a coroutine."""
    return finish(asyncio.ensure_future(coroutine))
