"""Handshake: who gets in, who does not, and what they are told."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from dsdlab.protocol import (
    PROTOCOL_VERSION,
    ChannelClosed,
    Close,
    Error,
    HandshakePolicy,
    Hello,
    MemoryChannel,
    ProtocolError,
    Refused,
    Welcome,
    client_handshake,
    memory_pair,
    new_node_id,
    refusal,
    server_handshake,
)

Run = Callable[[Any], Any]
TOKEN = "correct horse battery staple"
POLICY = HandshakePolicy(
    node_id="00112233aabbccdd",
    target="tiny-target",
    target_digest="sha256:ab12",
    tokenizer="tok-1",
    vocab_size=49152,
    max_context=2048,
    eos_ids=(2, 7),
    modes=("cloud-ar", "dsd-sync"),
    token=TOKEN,
    timeout_s=5.0,
)
HELLO = Hello(PROTOCOL_VERSION, "0123456789abcdef", TOKEN, "tiny-target", "tok-1", 1.5)


async def meet(hello: Hello, policy: HandshakePolicy = POLICY) -> Any:
    """What each side of a handshake returned or raised: (client, server)."""
    client, server = memory_pair()
    return await asyncio.gather(
        client_handshake(client, hello), server_handshake(server, policy), return_exceptions=True
    )


@pytest.mark.parametrize(
    "hello",
    [
        HELLO,
        msgspec.structs.replace(HELLO, target=""),
        msgspec.structs.replace(HELLO, target="sha256:ab12"),
        msgspec.structs.replace(HELLO, tokenizer=""),
    ],
    ids=["same", "any target", "target by digest", "no tokenizer"],
)
def test_welcome(run: Run, hello: Hello) -> None:
    welcome, heard = run(meet(hello))
    assert heard == hello
    assert isinstance(welcome, Welcome)
    assert welcome.t_s >= 0
    told = msgspec.structs.replace(welcome, t_s=0.0)
    modes = ("cloud-ar", "dsd-sync")
    assert told == Welcome(
        PROTOCOL_VERSION, POLICY.node_id, "tiny-target", "tok-1", 49152, 2048, (2, 7), modes, 0.0
    )


def test_no_token_asked_for(run: Run) -> None:
    for token in ("", "whatever"):
        hello = msgspec.structs.replace(HELLO, token=token)
        welcome, _ = run(meet(hello, replace(POLICY, token="")))
        assert isinstance(welcome, Welcome)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"version": 1}, "version", ["1", "2"]),
        ({"version": 0}, "version", ["0", "2"]),
        ({"token": "guess"}, "token", ["wrong token"]),
        ({"token": ""}, "token", ["no token"]),
        ({"token": TOKEN[:-1]}, "token", ["wrong token"]),
        ({"token": "pässwörd"}, "token", ["wrong token"]),
        ({"target": "other"}, "target", ["'other'", "'tiny-target'"]),
        ({"tokenizer": "tok-2"}, "tokenizer", ["'tok-2'", "'tok-1'"]),
        ({"t_s": math.nan}, "bad-frame", ["nan"]),
        ({"target": "o\n\x1b[31mX"}, "target", ["tiny-target"]),
        ({"target": "other", "tokenizer": "tok-2", "token": "guess"}, "token", ["wrong"]),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_refusals(run: Run, change: dict[str, Any], code: str, words: list[str]) -> None:
    refused, server_side = run(meet(msgspec.structs.replace(HELLO, **change)))
    assert isinstance(refused, Refused)
    assert isinstance(server_side, Refused)
    assert refused.code == server_side.code == code
    message = str(refused)
    assert all(word in message for word in words), message
    assert message.isprintable()
    assert TOKEN not in message
    assert "guess" not in message
    if code == "token":  # an uninvited peer learns nothing of the models
        assert "tiny-target" not in message
        assert "tok-1" not in message


async def say(frame: Any, policy: HandshakePolicy = POLICY) -> tuple[MemoryChannel, BaseException | None]:
    client, server = memory_pair()
    if frame is not None:
        await client.send(frame)
    try:
        await server_handshake(server, policy)
    except Refused as error:
        return client, error
    return client, None


def test_first_frame_must_be_hello(run: Run) -> None:
    async def main() -> None:
        client, error = await say(Close(1))
        assert isinstance(error, Refused)
        assert error.code == "bad-frame"
        assert await client.recv() == Error(0, "bad-frame", "first frame is Close; allowed: Hello")
        with pytest.raises(ChannelClosed):
            await client.recv()

    run(main())


def test_silent_client_is_sent_away(run: Run) -> None:
    async def main() -> None:
        client, error = await say(None, replace(POLICY, timeout_s=0.05))
        assert isinstance(error, Refused)
        assert error.code == "timeout"
        assert await client.recv() == Error(0, "timeout", "no Hello within 0.05 s")
        with pytest.raises(ChannelClosed):
            await client.send(HELLO)

    run(main())


def test_silent_server(run: Run) -> None:
    async def main() -> None:
        client, server = memory_pair()
        with pytest.raises(ChannelClosed, match=r"no answer to Hello within 0\.05 s"):
            await client_handshake(client, HELLO, timeout_s=0.05)
        assert await server.recv() == HELLO
        with pytest.raises(ChannelClosed):
            await server.recv()

    run(main())


def test_server_hangs_up(run: Run) -> None:
    async def main() -> None:
        client, server = memory_pair()
        waiting = asyncio.ensure_future(client_handshake(client, HELLO))
        await server.recv()
        await server.close()
        with pytest.raises(ChannelClosed):
            await waiting

    run(main())


def test_client_hangs_up(run: Run) -> None:
    async def main() -> None:
        client, server = memory_pair()
        await client.close()
        with pytest.raises(ChannelClosed):
            await server_handshake(server, POLICY)

    run(main())


@pytest.mark.parametrize("answer", [Close(1), HELLO], ids=["Close", "Hello"])
def test_wrong_answer_to_hello(run: Run, answer: Any) -> None:
    async def main() -> None:
        client, server = memory_pair()
        await server.send(answer)
        with pytest.raises(ProtocolError, match="allowed: Welcome") as caught:
            await client_handshake(client, HELLO)
        assert caught.value.code == "bad-frame"
        with pytest.raises(ChannelClosed):
            await client.send(HELLO)

    run(main())


def test_welcome_of_another_version(run: Run) -> None:
    async def main() -> None:
        client, server = memory_pair()
        await server.send(Welcome(3, "n", "t", "k", 5, 5, (), (), 0.0))
        with pytest.raises(Refused, match="version 3 offered; allowed: 2") as caught:
            await client_handshake(client, HELLO)
        assert caught.value.code == "version"

    run(main())


def test_refusal_carries_retry_after(run: Run) -> None:
    async def main() -> None:
        client, server = memory_pair()
        await server.send(refusal("busy", "all slots\ntaken", retry_after_ms=250))
        with pytest.raises(Refused, match="all slots taken") as caught:
            await client_handshake(client, HELLO)
        assert (caught.value.code, caught.value.retry_after_ms) == ("busy", 250)

    run(main())


def test_node_ids() -> None:
    a, b = new_node_id(), new_node_id()
    assert a != b
    assert len(bytes.fromhex(a)) == 8


def test_policy_repr_hides_the_token() -> None:
    assert TOKEN not in repr(POLICY)
