"""Slack: a target's time that nobody waits for. Who decodes ahead of any request takes no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Slack:
    """Counts the work that somebody waits for, and lets one step at a time go ahead where there is none.

    INVARIANT K1: while work that was asked for waits for the target or is under way, no step that was not
    asked for begins. (One that has begun is not broken off: it delays others by one step at most.)
    INVARIANT K2: who waits for slack gets it in the order of asking: none goes ahead twice meanwhile.
    """

    __slots__ = ("_ahead", "_asked", "_waiting")

    def __init__(self) -> None:
        self._asked = 0
        self._ahead = False
        self._waiting: dict[Callable[[], None], None] = {}  # a set that keeps its order

    @property
    def free(self) -> bool:
        """Whether nobody has the target or waits for it."""
        return not self._asked and not self._ahead

    def ready(self, wake: Callable[[], None]) -> bool:
        """Whether a step ahead may begin now: there is slack, and nobody else has waited for it longer."""
        return self.free and next(iter(self._waiting), wake) == wake

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
        """For the length of a block, a step goes ahead. Only where `ready`."""
        self._ahead = True
        try:
            yield
        finally:
            self._ahead = False
            self._tell()

    def wait(self, wake: Callable[[], None]) -> None:
        """Call `wake` when it is `ready`, until `forget`; who waits already keeps the place."""
        self._waiting.setdefault(wake)

    def forget(self, wake: Callable[[], None]) -> None:
        """Wait no longer, be it that a step ahead begins now; the next one in the queue moves up."""
        if wake in self._waiting:
            del self._waiting[wake]
            self._tell()

    def _tell(self) -> None:
        if self._waiting and self.free:
            next(iter(self._waiting))()
