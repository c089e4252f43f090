"""WebSocket transport over aiohttp: one binary message a frame, TCP_NODELAY, no compression.

A task per connection reads ahead, so that heartbeats are answered and a lost connection is noticed while
a node computes; past QUEUE_FRAMES frames or QUEUE_BYTES bytes it stops, and TCP holds the sender back.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import aiohttp
from aiohttp import WSCloseCode, WSMsgType, web

from dsdlab.protocol.channel import Channel
from dsdlab.protocol.codec import decode, encode
from dsdlab.protocol.errors import (
    ChannelClosed,
    ConnectFailed,
    ListenFailed,
    ProtocolError,
    Refused,
    one_line,
)
from dsdlab.protocol.frames import MAX_FRAME_BYTES, AnyFrame, refusal

log = logging.getLogger(__name__)

HEARTBEAT_S = 15.0  # a ping after so long without a byte; a pong is due after half of it again
CONNECT_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 2.0  # how long to wait for the peer's half of the closing handshake
GRACE_S = 1.0  # how long handlers may tidy up when the server stops
QUEUE_FRAMES = 4096
QUEUE_BYTES = 4 * MAX_FRAME_BYTES
# aiohttp refuses messages of max_msg_size bytes and longer
_MAX_MSG_SIZE = MAX_FRAME_BYTES + 1

_WebSocket = aiohttp.ClientWebSocketResponse | web.WebSocketResponse
Handler = Callable[[Channel], Awaitable[None]]


class WebSocketChannel(Channel):
    """A Channel over one WebSocket; made by `connect` and `serve`."""

    def __init__(
        self,
        ws: _WebSocket,
        peer: str,
        session: aiohttp.ClientSession | None = None,
        *,
        nodelay: bool = True,
    ) -> None:
        super().__init__(peer)
        _set_nodelay(ws, nodelay)
        self._ws = ws
        self._session = session
        self._queue: deque[bytes | ProtocolError] = deque()
        self._queued_bytes = 0
        self._waiter: asyncio.Future[None] | None = None  # recv waits for a frame
        self._room: asyncio.Future[None] | None = None  # the reader waits for room
        self._closed = ""  # why
        self._closing: asyncio.Task[None] | None = None
        self._reader = asyncio.get_running_loop().create_task(self._read())

    async def send(self, frame: AnyFrame) -> None:
        data = encode(frame)
        if self._closed:
            raise ChannelClosed(self._closed)
        try:
            await self._ws.send_bytes(data)
        except (OSError, aiohttp.ClientError, RuntimeError) as error:
            raise ChannelClosed(self._closed or f"connection lost: {one_line(str(error))}") from None
        self.bytes_sent[type(frame).__name__] += len(data)

    async def recv(self) -> AnyFrame:
        if self._waiter is not None:
            raise RuntimeError("another task waits in recv of this channel")
        while not self._queue:
            if self._closed:
                raise ChannelClosed(self._closed)
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        item = self._queue.popleft()
        if isinstance(item, bytes):
            self._queued_bytes -= len(item)
        if not self._full():
            _wake(self._room)
        if isinstance(item, ProtocolError):
            raise item
        frame = decode(item)
        self.bytes_received[type(frame).__name__] += len(item)
        return frame

    def tcp_state(self) -> dict[str, bool | str | float]:
        """The connection's TCP as its kernel has it: nodelay, congestion, rto_ms; empty once it is closed."""
        sock = self._ws.get_extra_info("socket")
        state: dict[str, bool | str | float] = {}
        if sock is None:
            return state
        with suppress(OSError):
            state["nodelay"] = bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        with suppress(OSError, AttributeError):  # Linux
            name = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
            state["congestion"] = name.partition(b"\0")[0].decode()
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
            state["rto_ms"] = int.from_bytes(info[8:12], sys.byteorder) / 1e3  # tcpi_rto, microseconds
        return state

    async def close(self) -> None:
        await self.close_with(WSCloseCode.OK)

    async def close_with(self, code: int) -> None:
        """`close`, telling the peer a WebSocket close code."""
        if self._closing is None:
            self._closed = self._closed or "closed here"
            self._queue.clear()
            _wake(self._waiter)
            self._closing = asyncio.get_running_loop().create_task(self._close(code))
        await asyncio.shield(self._closing)

    async def _close(self, code: int) -> None:
        with suppress(Exception):  # whatever the transport says, the connection is over
            await self._ws.close(code=code)
        self._reader.cancel()
        await asyncio.wait([self._reader])
        if self._session is not None:
            await self._session.close()

    async def _read(self) -> None:
        why = "connection lost"
        try:
            while True:
                message = await self._ws.receive()
                if message.type is WSMsgType.BINARY:
                    self._push(message.data)
                    self._queued_bytes += len(message.data)
                elif message.type is WSMsgType.TEXT:
                    self._push(ProtocolError("bad-frame", "text message; allowed: binary"))
                else:
                    why = self._why(message)
                    return
                if self._full():
                    self._room = asyncio.get_running_loop().create_future()
                    await self._room
                    self._room = None
        except Exception as error:
            why = f"connection lost: {one_line(str(error))}"
        finally:
            self._closed = self._closed or why
            _wake(self._waiter)

    def _push(self, item: bytes | ProtocolError) -> None:
        if self._closing is None:
            self._queue.append(item)
            _wake(self._waiter)

    def _full(self) -> bool:
        return len(self._queue) >= QUEUE_FRAMES or self._queued_bytes >= QUEUE_BYTES

    def _why(self, message: aiohttp.WSMessage) -> str:
        """Why the connection ended, from the last thing aiohttp said."""
        if message.type is WSMsgType.ERROR:
            error = message.data
            if isinstance(error, aiohttp.WebSocketError):
                if error.code == WSCloseCode.MESSAGE_TOO_BIG:
                    text = f"message too long; allowed: {MAX_FRAME_BYTES} bytes"
                    self._push(ProtocolError("frame-too-large", text))
                else:
                    self._push(ProtocolError("bad-frame", f"not WebSocket: {one_line(str(error))}"))
            return f"connection lost: {one_line(str(error))}"
        code = self._ws.close_code
        if code is None or code == WSCloseCode.ABNORMAL_CLOSURE:
            return "connection lost"
        name = WSCloseCode(code).name.lower().replace("_", " ") if code in set(WSCloseCode) else "unknown"
        return f"closed by the peer (code {code}, {name})"


def _wake(future: asyncio.Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)


def _set_nodelay(ws: _WebSocket, nodelay: bool) -> None:
    """Switch Nagle's algorithm off (or on) and make sure that it is; raises OSError."""
    sock = ws.get_extra_info("socket")
    if sock is None:  # closed already: the first send or recv will say so
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, int(nodelay))
    if bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)) != nodelay:
        raise OSError("TCP_NODELAY cannot be set")


async def connect(
    url: str,
    *,
    timeout_s: float = CONNECT_TIMEOUT_S,
    heartbeat_s: float = HEARTBEAT_S,
    nodelay: bool = True,
) -> WebSocketChannel:
    """Dial a verifier at ws://HOST:PORT/ (or wss://). Raises ConnectFailed, naming the URL and the reason.

    timeout_s: for name look-up, TCP and WebSocket handshake together.
    heartbeat_s: see HEARTBEAT_S; at most 1.5 times as long, and a dead peer is noticed.
    nodelay: False leaves Nagle's algorithm on, to measure what it costs.
    """
    if not url.startswith(("ws://", "wss://")):
        raise ConnectFailed(f"cannot connect to {url}: allowed: ws://HOST:PORT/ or wss://HOST:PORT/")
    session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
    try:
        async with asyncio.timeout(timeout_s):
            ws = await session.ws_connect(
                url,
                heartbeat=heartbeat_s,
                compress=0,
                max_msg_size=_MAX_MSG_SIZE,
                timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_TIMEOUT_S),
            )
        return WebSocketChannel(ws, url, session, nodelay=nodelay)
    except BaseException as error:
        await session.close()
        reason = _why_not(error, timeout_s)
        if reason is None:
            raise
        raise ConnectFailed(f"cannot connect to {url}: {reason}") from None


def _why_not(error: BaseException, timeout_s: float) -> str | None:
    """Why `connect` failed, for people; None for what is not about connecting."""
    match error:
        case TimeoutError():
            return f"no answer within {timeout_s:g} s"
        case aiohttp.WSServerHandshakeError():
            return f"no WebSocket there (HTTP status {error.status})"
        case aiohttp.InvalidURL():
            return "not a URL"
        case aiohttp.ClientConnectorDNSError():
            return f"host name {error.host!r} not found"
        case aiohttp.ClientConnectorError():
            number = error.os_error.errno
            return os.strerror(number).lower() if number and number > 0 else one_line(str(error.os_error))
        case aiohttp.ServerDisconnectedError():
            return "no WebSocket there (the connection was closed at once)"
        case aiohttp.ClientError() | OSError() | ValueError():
            return one_line(f"no WebSocket there ({error or type(error).__name__})")
    return None


@asynccontextmanager
async def serve(
    handler: Handler,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    heartbeat_s: float = HEARTBEAT_S,
    max_connections: int = 64,
    nodelay: Callable[[], bool] = lambda: True,
) -> AsyncIterator[int]:
    """Listen, and run `handler(channel)` for each connection; yields the bound port (0 asks for a free one).

    A connection ends when its handler returns. A ProtocolError out of the handler is told to the peer in an
    Error frame, any other exception is logged and told as "internal"; the server lives on. Leaving the
    context closes every connection (close code 1001), waits a moment for the handlers and cancels the rest.
    nodelay: asked for each new connection; see `connect`. Raises ListenFailed.
    """
    running: dict[WebSocketChannel, asyncio.Task[None]] = {}

    async def on_request(request: web.Request) -> web.StreamResponse:
        if "Origin" in request.headers:  # a web page in someone's browser, not a node
            return web.Response(status=403, text="browsers may not connect\n")
        ws = web.WebSocketResponse(
            timeout=CLOSE_TIMEOUT_S, heartbeat=heartbeat_s, max_msg_size=_MAX_MSG_SIZE, compress=False
        )
        if not ws.can_prepare(request).ok:
            return web.Response(
                status=426,
                text="this is a dsdlab verifier: WebSocket only\n",
                headers={"Upgrade": "websocket"},
            )
        if len(running) >= max_connections:
            return web.Response(status=503, text=f"{max_connections} connections already\n")
        await ws.prepare(request)
        channel = WebSocketChannel(ws, request.remote or "?", nodelay=nodelay())
        running[channel] = asyncio.get_running_loop().create_task(_run_handler(handler, channel))
        await asyncio.wait([running[channel]])
        del running[channel]
        return ws

    app = web.Application()
    app.router.add_get("/", on_request)
    if not 0 <= port <= 65535:
        raise ListenFailed(f"cannot listen on {host}:{port}: allowed ports: 0 (any free one) to 65535")
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=CLOSE_TIMEOUT_S)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise ListenFailed(f"cannot listen on {host}:{port}: {_why_not_listen(error)}") from None
        yield runner.addresses[0][1]
    finally:
        tasks = set(running.values())
        await asyncio.gather(*(channel.close_with(WSCloseCode.GOING_AWAY) for channel in list(running)))
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=GRACE_S)
            for task in late:
                task.cancel()
            await asyncio.wait(tasks)
        await runner.cleanup()


def _why_not_listen(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return "host name not found"
    if error.errno == errno.EADDRINUSE:
        return "the port is in use"
    return errno.errorcode.get(error.errno or 0) or one_line(str(error))


async def _run_handler(handler: Handler, channel: WebSocketChannel) -> None:
    """One connection from start to end; nothing but cancellation gets out."""
    code: int = WSCloseCode.OK
    error_frame = None
    try:
        await handler(channel)
    except ChannelClosed as error:
        log.info("peer=%s closed reason=%r", channel.peer, str(error))
    except Refused as error:
        log.warning("peer=%s refused code=%s reason=%r", channel.peer, error.code, str(error))
    except ProtocolError as error:
        log.warning("peer=%s protocol error code=%s reason=%r", channel.peer, error.code, str(error))
        code = WSCloseCode.PROTOCOL_ERROR
        error_frame = refusal(error.code, str(error))
    except Exception:
        log.exception("peer=%s handler failed", channel.peer)
        code = WSCloseCode.INTERNAL_ERROR
        error_frame = refusal("internal", "the verifier failed; its log says why")
    finally:
        if error_frame is not None:
            with suppress(ChannelClosed):
                await channel.send(error_frame)
        await channel.close_with(code)
