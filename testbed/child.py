"""A child process that speaks control lines: started, watched, logged, and certain to end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from testbed import launch
from testbed.control import ControlLines, NodeDied
from testbed.ledger import Ledger, process_start

__all__ = ["LINE_BYTES", "Child", "log_tail", "obituary", "open_log", "too_late"]

LINE_BYTES = 64 * 1024 * 1024  # a result with its events is one line
TAIL_LINES = 3


def log_tail(path: Path, lines: int = TAIL_LINES, from_byte: int = 0) -> str:
    """The last lines of a log in one line, joined by " | "; from `from_byte` on."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(from_byte, file.tell() - 8192))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return " | ".join([line.strip() for line in text.splitlines() if line.strip()][-lines:])


PLAIN_ERROR = "dsdlab: error: "  # how the command line says what the user can mend


def open_log(path: Path, name: str) -> int:
    """Add a line that `name` starts to a log, made with its folder; the log's size in bytes then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as log:
        log.write(f"--- {time.strftime('%Y-%m-%dT%H:%M:%S%z')} {name} starts\n".encode())
        return log.tell()


def obituary(
    control: ControlLines,
    code: int | None,
    log_path: Path,
    from_byte: int,
    *,
    asked_to: bool = False,
    cause: str | None = None,
) -> str:
    """One line on how something that speaks control lines ended.

    code: exit status, −N for signal N. asked_to: we wanted it. cause: said instead of what the code says.
    """
    if cause is not None:
        how = cause
    elif code is None:
        how = "closed its output"
    elif code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    else:
        how = f"ended with exit status {code}"
    ready = control.ready
    when = "" if ready.done() and ready.exception() is None else " before it was ready"
    if asked_to:
        when += " (asked to)"
    tail = log_tail(log_path, from_byte=from_byte)
    if PLAIN_ERROR in tail:  # it said in one line what is wrong: nothing else matters
        return f"{control.name}: {tail.rpartition(PLAIN_ERROR)[2]}"
    return f"{control.name} {how}{when}; {log_path}: {tail or '(nothing logged)'}"


def too_late(name: str, timeout_s: float, log_path: Path, from_byte: int) -> NodeDied:
    """It was not ready in time."""
    tail = log_tail(log_path, from_byte=from_byte) or "(nothing logged)"
    return NodeDied(f"{name} was not ready within {timeout_s:g} s; {log_path}: {tail}")


class Child:
    """One child. Its standard error, and what it prints besides control lines, go to `log_path`.

    The child is a session of its own (a terminal's Ctrl-C reaches the controller alone) and gets SIGKILL when
    the thread that started it ends, so start children from a thread that lives as long as they should.
    """

    def __init__(
        self, name: str, process: asyncio.subprocess.Process, log_path: Path, ledger: Ledger
    ) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.name = name
        self.pid = process.pid
        self.log_path = log_path
        self._log_from = log_path.stat().st_size
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout
        self._ledger = ledger
        self._stopping = False
        self.control = ControlLines(name, self._stdin.write)
        ledger.made("process", self.pid, name=name, start=process_start(self.pid))
        self._watcher = asyncio.create_task(self._watch(), name=f"watch {name}")

    @classmethod
    async def start(
        cls,
        name: str,
        argv: Sequence[str],
        *,
        log_path: Path,
        ledger: Ledger,
        env: Mapping[str, str] | None = None,
        cpus: Sequence[int] | None = None,
        launch_options: Sequence[str] = (),
        cwd: Path | None = None,
    ) -> Child:
        """Start `argv`. Raises NodeDied when the operating system refuses; wait for `ready` for the rest.

        launch_options: namespaces and more, in the words of `testbed.launch`.
        """
        options = ["--parent", str(os.getpid()), *launch_options]
        if cpus:
            options += ["--cpus", ",".join(map(str, cpus))]
        command = [sys.executable, "-I", "-S", launch.__file__, *options, "--", *argv]
        open_log(log_path, name)
        with log_path.open("ab") as log:
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=log,
                    env=None if env is None else dict(env),
                    cwd=cwd,
                    limit=LINE_BYTES,
                    start_new_session=True,
                )
            except OSError as error:
                raise NodeDied(f"{name} cannot start: {error.strerror}") from error
        return cls(name, process, log_path, ledger)

    async def _watch(self) -> None:
        try:
            while True:
                try:
                    line = await self._stdout.readline()
                except ValueError:  # longer than LINE_BYTES: the stream is lost
                    self.kill()
                    break
                if not line:
                    break
                if line.strip() and not self.control.feed(line):
                    with self.log_path.open("ab") as log:
                        log.write(b"stdout: " + line)
            await self._process.wait()
        finally:
            if self._process.returncode is None:  # cancelled by the end of the event loop
                self.kill()
            self.control.fail(NodeDied(self.obituary()))
            if self._process.returncode is not None:
                with contextlib.suppress(OSError):  # a full disk, or the run's folder is gone
                    self._ledger.gone("process", self.pid)

    def obituary(self) -> str:
        """One line on how it ended."""
        return obituary(self.control, self.returncode, self.log_path, self._log_from, asked_to=self._stopping)

    def write(self, data: bytes) -> None:
        """Raw bytes to its standard input, before it speaks control lines."""
        self._stdin.write(data)

    @property
    def returncode(self) -> int | None:
        """Exit status, −N for signal N, None while it runs."""
        return self._process.returncode

    async def wait_ready(self, timeout_s: float) -> dict[str, Any]:
        """Its ready line. Raises NodeDied (also after `timeout_s`, and then it is killed) or NodeError."""
        try:
            return await asyncio.wait_for(asyncio.shield(self.control.ready), timeout_s)
        except TimeoutError:
            self.kill()
            raise too_late(self.name, timeout_s, self.log_path, self._log_from) from None

    def kill(self) -> None:
        """SIGKILL, now; `wait` for the end."""
        self._stopping = True
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def wait(self) -> int:
        """Wait until it has ended and been crossed out of the ledger; its exit status."""
        await asyncio.shield(self._watcher)
        assert self._process.returncode is not None
        return self._process.returncode

    async def stop(self, grace_s: float = 5.0) -> int:
        """Ask ("stop" and end of input), then SIGTERM after `grace_s`, then SIGKILL; its exit status."""
        self._stopping = True
        if not self._watcher.done():
            with contextlib.suppress(Exception):  # whatever is wrong with the pipe, the signals follow
                self.control.send({"op": "stop"})
                self._stdin.close()
            for last_resort in (self._process.terminate, self._process.kill):
                try:
                    await asyncio.wait_for(asyncio.shield(self._watcher), grace_s)
                    break
                except TimeoutError:
                    with contextlib.suppress(ProcessLookupError):
                        last_resort()
        return await self.wait()
