"""Channel: an ordered, reliable stream of frames between two nodes, whatever carries it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter

from dsdlab.protocol.errors import ChannelClosed, ProtocolError
from dsdlab.protocol.frames import AnyFrame

__all__ = ["Channel", "ChannelClosed", "ProtocolError"]


class Channel(ABC):
    """Send and receive whole frames; count their encoded bytes by frame name.

    Rules that every transport keeps:

    1. Frames arrive whole and in the order they were sent. A `send` that returned is no promise of
       arrival: the connection may break first.
    2. After the peer closed or the connection broke, `recv` yields the frames that had arrived, then
       raises ChannelClosed, and again on every later call. `send` raises ChannelClosed.
    3. After a local `close`, `recv` and `send` raise ChannelClosed at once, a waiting `recv` included.
    4. `recv` may be cancelled: no frame is lost. One task at a time may wait in `recv`; any number may
       `send`.
    5. After a ProtocolError from `recv` the channel is open unless code is "frame-too-large".
    """

    def __init__(self, peer: str = "") -> None:
        self.peer = peer  # for logs: the other side's address
        self.bytes_sent: Counter[str] = Counter()  # payload bytes by frame name, transport headers excluded
        self.bytes_received: Counter[str] = Counter()

    @abstractmethod
    async def send(self, frame: AnyFrame) -> None:
        """Write one frame at once. Raises ChannelClosed; ProtocolError for a frame too large to send."""

    @abstractmethod
    async def recv(self) -> AnyFrame:
        """The next frame. Raises ChannelClosed, or ProtocolError for bytes that are no frame."""

    @abstractmethod
    async def close(self) -> None:
        """Close; idempotent, raises nothing."""
