"""Dialer: a client's one connection to a verifier: handshake, reconnection, round trips."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import count, islice

from dsdlab.protocol.channel import Channel
from dsdlab.protocol.errors import ChannelClosed, ConnectFailed
from dsdlab.protocol.frames import PROTOCOL_VERSION, Hello, Ping, Pong, Welcome
from dsdlab.protocol.handshake import client_handshake, new_node_id

RETRY_FIRST_S = 0.05
RETRY_MOST_S = 1.0
PATIENCE_S = 60.0

Dial = Callable[[], Awaitable[Channel]]


class Dialer:
    """Dials a verifier, greets it, and dials again when the connection is lost.

    dial: opens a new Channel; raises ConnectFailed. target_name: asked for at the handshake.
    patience_s: how long to look for a verifier that went away before giving up.
    """

    __slots__ = (
        "_channel", "_dial", "_goodbye", "_node_id", "_nonces", "_patience_s", "_target_name", "_token",
        "_tokenizer", "rtt_s", "welcome",
    )  # fmt: skip

    def __init__(
        self,
        dial: Dial,
        *,
        target_name: str = "",
        tokenizer: str = "",
        token: str = "",
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._dial = dial
        self._target_name, self._tokenizer, self._token = target_name, tokenizer, token
        self._patience_s = patience_s
        self._node_id = new_node_id()
        self._channel: Channel | None = None
        self._goodbye: asyncio.Task[None] | None = None  # of a connection that `renew` gave up
        self._nonces = count()  # never used again: a late Pong must not pass for a new one's
        self.welcome: Welcome | None = None
        self.rtt_s: float | None = None  # of the handshake or the last ping; places flights on the timeline

    async def connect(self) -> Channel:
        """The connection, dialled if need be. Raises ConnectFailed, ChannelClosed, Refused, ProtocolError."""
        if self._channel is None:
            channel = await self._dial()
            hello = Hello(
                version=PROTOCOL_VERSION,
                node_id=self._node_id,
                token=self._token,
                target=self._target_name,
                tokenizer=self._tokenizer,
                t_s=asyncio.get_running_loop().time(),
            )
            self.welcome = await client_handshake(channel, hello)
            self.rtt_s = asyncio.get_running_loop().time() - hello.t_s
            self._channel = channel
        return self._channel

    async def disconnect(self) -> None:
        """Drop the connection; the next use dials anew."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def renew(self) -> Channel:
        """A fresh connection; the old one says goodbye meanwhile. Raises what `connect` raises."""
        old, self._channel = self._channel, None
        if old is not None:
            self._goodbye = asyncio.get_running_loop().create_task(old.close())
        return await self.connect()

    async def reconnect(self) -> None:
        """Dial until somebody answers, for `patience_s` at most."""
        await self.disconnect()
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + self._patience_s
        delay_s = RETRY_FIRST_S
        while True:
            try:
                await self.connect()
                return
            except (ConnectFailed, ChannelClosed) as e:
                if loop.time() + delay_s > give_up_s:
                    raise ConnectFailed(f"{e} (tried for {self._patience_s:g} s)") from None
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, RETRY_MOST_S)

    def new_nonce(self) -> int:
        """A Ping's nonce, unlike any before."""
        return next(self._nonces)

    async def ping(self, n: int) -> list[float]:
        """n round trips over the connection, one after the other: seconds each.

        A connection that was lost while idle is dialled anew.
        """
        try:
            return await self._ping(await self.connect(), n)
        except ChannelClosed:
            await self.disconnect()
            return await self._ping(await self.connect(), n)

    async def _ping(self, channel: Channel, n: int) -> list[float]:
        loop = asyncio.get_running_loop()
        out: list[float] = []
        for nonce in islice(self._nonces, n):
            sent_s = loop.time()
            await channel.send(Ping(nonce, sent_s))
            while True:
                frame = await channel.recv()
                if isinstance(frame, Pong) and frame.nonce == nonce:
                    break
            out.append(loop.time() - sent_s)
        if out:
            self.rtt_s = sorted(out)[len(out) // 2]
        return out
