"""The target's side of a streaming session: which step it takes next, and when."""

from __future__ import annotations

import asyncio
import math

from dsdlab.nodes.chain import Chain
from dsdlab.nodes.slack import Slack
from dsdlab.nodes.text import Text
from dsdlab.policies.base import Pace
from dsdlab.protocol.frames import HOLD_FOREVER_US, Steer

ALONE = Pace(hold_s=0.0, drafting=False)
"""The pace of a session before its client asks for another: it decodes like `cloud-ar`."""


class TargetStream:
    """Drafts that wait for the target, the pace that the client asks for, and the next step.

    INVARIANT F1: with a finite `hold_s` the target never waits for the network longer than that.
    """

    __slots__ = ("_asked_at", "_number", "_slack", "_waiter", "chain", "pace")

    def __init__(self, slack: Slack) -> None:
        self.chain = Chain()
        self.pace = ALONE
        self._number = -1  # of the Steer that holds
        self._asked_at = -1  # position for which an empty draft asks
        self._slack = slack
        self._waiter: asyncio.Future[None] | None = None

    def steer(self, frame: Steer) -> None:
        """Take a new pace; one that was overtaken by a later one changes nothing."""
        if frame.number > self._number:
            self._number = frame.number
            hold_s = math.inf if frame.hold_us == HOLD_FOREVER_US else frame.hold_us / 1e6
            self.pace = Pace(hold_s, frame.max_window, frame.beside, frame.drafting)
            self.wake()

    def receive(self, epoch: int, base: int, ids: list[int], text: Text) -> bool:
        """Take a frame's drafts; whether any of them may be judged. An empty frame asks for a step."""
        if ids:
            fresh = self.chain.receive(epoch, base, ids, text)
        else:
            fresh = base >= len(text)
            self._asked_at = max(self._asked_at, base)
        if fresh:
            self.wake()
        return fresh

    def wake(self) -> None:
        """Let a waiting `next_window` look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next_window(self, text: Text) -> tuple[list[int], bool]:
        """The drafts of the next step, none to decode alone; and whether anybody asked for that step."""
        clock = asyncio.get_running_loop()
        free_s = clock.time()
        try:
            while True:
                window = self.chain.window(text, min(self.pace.max_window, text.room - 1))
                if window or text.room == 1 or self._asked_at >= len(text):
                    return window, True
                if not self.pace.drafting:
                    return window, True
                left_s = free_s + self.pace.hold_s - clock.time()
                if left_s > 0.0:
                    self._slack.forget(self.wake)
                elif self._slack.ready(self.wake):
                    return window, False
                else:
                    self._slack.wait(self.wake)
                await self._change(left_s, clock)
        finally:
            self._slack.forget(self.wake)

    async def _change(self, left_s: float, clock: asyncio.AbstractEventLoop) -> None:
        """Until a frame comes, `left_s` is over or, where it is over already, there may be slack."""
        self._waiter = clock.create_future()
        timer = clock.call_later(left_s, self.wake) if 0.0 < left_s < math.inf else None
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()
