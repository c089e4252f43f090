"""Slack: a target's time that nobody waits for. Who decodes ahead of any request takes no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Slack:
    """Counts the work that somebody waits for, and lets one step at a time go ahead where there is none.

    INVARIANT K1: while work that was asked for waits for the target or is under way, no step that was not
    asked for begins. (One that has begun is not broken off: it delays others by one step at most.)
    """

    __slots__ = ("_ahead", "_asked", "_waiting")

    def __init__(self) -> None:
        self._asked = 0
        self._ahead = False
        self._waiting: dict[Callable[[], None], None] = {}  # a set that keeps its order

    @property
    def free(self) -> bool:
        """Whether a step ahead may begin now."""
        return not self._asked and not self._ahead

    @contextmanager
    def asked(self) -> Iterator[None]:
        """For the length of a block, somebody waits for the target."""
        self._asked += 1
        try:
            yield
        finally:
            self._asked -= 1
            self._tell()

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """For the length of a block, a step goes ahead. Only where `free`."""
        self._ahead = True
        try:
            yield
        finally:
            self._ahead = False
            self._tell()

    def wait(self, wake: Callable[[], None]) -> None:
        """Call `wake` once when there is slack, unless `forget` comes first."""
        self._waiting[wake] = None

    def forget(self, wake: Callable[[], None]) -> None:
        self._waiting.pop(wake, None)

    def _tell(self) -> None:
        if self._waiting and self.free:
            waiting, self._waiting = self._waiting, {}
            for wake in waiting:
                wake()
