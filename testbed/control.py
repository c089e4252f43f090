"""Control lines: JSON objects, one a line, to a child's standard input and from its standard output."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from typing import Any

__all__ = ["ControlLines", "NodeDied", "NodeError"]


class NodeError(Exception):
    """A node answered a request with an error. `code` is the node's; the message is one line."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class NodeDied(Exception):
    """A node ended at its start or in mid-run. One line: who, how, and the last lines of its log."""


class ControlLines:
    """Match answers to requests, whatever carries the lines.

    `write` takes one encoded line; the carrier calls `feed` for each line that comes back, and `fail` once
    when no more will. The first object must be {"op": "ready", …} and completes `ready`; later ones carry the
    `id` of their request.
    """

    def __init__(self, name: str, write: Callable[[bytes], None]) -> None:
        self.name = name
        self.ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._write = write
        self._ids = itertools.count(1)
        self._waiting: dict[Any, asyncio.Future[dict[str, Any]]] = {}
        self._failed: Exception | None = None
        # Nobody may be waiting when a child dies; that is no "exception was never retrieved".
        self.ready.add_done_callback(_look)

    def feed(self, line: bytes) -> bool:
        """Take one line; False when it is no control line (a library's print, say) but one for the log."""
        try:
            message = json.loads(line)
        except ValueError:
            return False
        if not isinstance(message, dict) or "op" not in message:
            return False
        if not self.ready.done():
            if message["op"] == "ready":
                self.ready.set_result(message)
            elif message["op"] == "error":
                self.ready.set_exception(_node_error(message))
            return True
        waiting = self._waiting.pop(message.get("id"), None)
        if waiting is not None and not waiting.done():
            waiting.set_result(message)
        return True

    def fail(self, error: Exception) -> None:
        """No more lines: everyone who waits, and every later request, gets `error`."""
        self._failed = error
        for future in (self.ready, *self._waiting.values()):
            if not future.done():
                future.set_exception(error)
        self._waiting.clear()

    async def ended(self, within_s: float) -> None:
        """Raises why the other side ended before it was ready, if it does within that time."""
        await asyncio.wait([self.ready], timeout=within_s)
        if self.ready.done():
            self.ready.result()

    def send(self, message: dict[str, Any]) -> None:
        """Write a line that has no answer. Raises NodeDied."""
        if self._failed is not None:
            raise self._failed
        self._write(json.dumps(message).encode() + b"\n")

    async def request(self, message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send and wait for the answer. Raises NodeError (it said "error"), NodeDied or TimeoutError."""
        ident = next(self._ids)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[ident] = future
        try:
            self.send({**message, "id": ident})
            answer = await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise TimeoutError(
                f"{self.name}: no answer to {message.get('op')!r} within {timeout_s:g} s"
            ) from None
        finally:
            self._waiting.pop(ident, None)
        if answer["op"] == "error":
            raise _node_error(answer)
        return answer


def _node_error(message: dict[str, Any]) -> NodeError:
    text = " ".join(str(message.get("message", "no message")).split())
    return NodeError(str(message.get("code", "error")), text)


def _look(future: asyncio.Future[dict[str, Any]]) -> None:
    if not future.cancelled():
        future.exception()
