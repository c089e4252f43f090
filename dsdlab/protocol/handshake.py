"""Hello and Welcome: who is there, may they come in, and do both ends mean the same models."""

from __future__ import annotations

import asyncio
import hmac
import math
import secrets
from contextlib import suppress
from dataclasses import dataclass, field

from dsdlab.protocol.channel import Channel
from dsdlab.protocol.codec import other_version
from dsdlab.protocol.errors import ChannelClosed, ProtocolError, Refused, one_line
from dsdlab.protocol.frames import PROTOCOL_VERSION, AnyFrame, Error, Hello, Welcome, refusal

HANDSHAKE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class HandshakePolicy:
    """What a verifier says of itself and whom it lets in.

    token: the shared secret; "" lets everyone in.
    target, target_digest: what a client may name as its target (either, or "").
    tokenizer: fingerprint; a client's must be equal, or "".
    timeout_s: for the client's Hello.
    """

    node_id: str
    target: str
    tokenizer: str
    vocab_size: int
    max_context: int
    eos_ids: tuple[int, ...]
    modes: tuple[str, ...]
    target_digest: str = ""
    token: str = field(default="", repr=False)
    timeout_s: float = HANDSHAKE_TIMEOUT_S


def new_node_id() -> str:
    """16 random hex digits."""
    return secrets.token_hex(8)


async def client_handshake(
    channel: Channel, hello: Hello, *, timeout_s: float = HANDSHAKE_TIMEOUT_S
) -> Welcome:
    """Say Hello, return the Welcome.

    Raises Refused(code, message) if the verifier answers with an Error, or speaks another version;
    ProtocolError for any other answer; ChannelClosed if it hangs up or is silent for `timeout_s`.
    Whatever is raised, the channel is closed.
    """
    try:
        await channel.send(hello)
        try:
            async with asyncio.timeout(timeout_s):
                answer = await channel.recv()
        except TimeoutError:
            raise ChannelClosed(f"no answer to Hello within {timeout_s:g} s") from None
        if isinstance(answer, Error):
            raise Refused(answer.code, one_line(answer.message), answer.retry_after_ms)
        if not isinstance(answer, Welcome):
            raise ProtocolError("bad-frame", f"answer to Hello is {type(answer).__name__}; allowed: Welcome")
        if answer.version != hello.version:
            error = other_version(answer.version)
            raise Refused(error.code, str(error))
        return answer
    except BaseException:
        await channel.close()
        raise


async def server_handshake(channel: Channel, policy: HandshakePolicy) -> Hello:
    """Wait for a Hello, check it, answer with a Welcome.

    A peer that fails a check gets an Error frame with the reason, the channel is closed, and Refused is
    raised with the same code and message. Raises ChannelClosed if the peer hangs up first.
    """
    try:
        try:
            async with asyncio.timeout(policy.timeout_s):
                frame = await channel.recv()
        except TimeoutError:
            raise ProtocolError("timeout", f"no Hello within {policy.timeout_s:g} s") from None
        hello = check_hello(frame, policy)
    except ProtocolError as error:
        with suppress(ChannelClosed):
            await channel.send(refusal(error.code, str(error)))
        await channel.close()
        raise Refused(error.code, str(error)) from None
    await channel.send(
        Welcome(
            version=PROTOCOL_VERSION,
            node_id=policy.node_id,
            target=policy.target,
            tokenizer=policy.tokenizer,
            vocab_size=policy.vocab_size,
            max_context=policy.max_context,
            eos_ids=policy.eos_ids,
            modes=policy.modes,
            t_s=asyncio.get_running_loop().time(),
        )
    )
    return hello


def check_hello(frame: AnyFrame, policy: HandshakePolicy) -> Hello:
    """The Hello that `frame` is, if `policy` lets it in; raises ProtocolError with the reason.

    The token is checked before anything about the models is said, and no message repeats it.
    """
    if not isinstance(frame, Hello):
        raise ProtocolError("bad-frame", f"first frame is {type(frame).__name__}; allowed: Hello")
    if frame.version != PROTOCOL_VERSION:
        raise other_version(frame.version)
    if policy.token and not hmac.compare_digest(frame.token.encode(), policy.token.encode()):
        problem = "wrong token" if frame.token else "no token given"
        raise ProtocolError("token", f"{problem}; allowed: the one this verifier was started with")
    if not math.isfinite(frame.t_s):
        raise ProtocolError("bad-frame", f"t_s is {frame.t_s}; allowed: a finite number")
    targets = [name for name in (policy.target, policy.target_digest) if name]
    if frame.target and frame.target not in targets:
        raise ProtocolError("target", f"target {frame.target!r} asked for; served: {policy.target!r}")
    if frame.tokenizer and frame.tokenizer != policy.tokenizer:
        raise ProtocolError(
            "tokenizer", f"tokenizer {frame.tokenizer!r} offered; allowed: {policy.tokenizer!r}"
        )
    return frame
