"""The frames of the wire protocol; PROTOCOL.md is their public specification.

Every frame is a msgpack array whose first element is the frame's tag. Token ids travel as packed
24-bit little-endian integers, so a window of γ ids costs 3γ bytes whatever the vocabulary.
Ranges in the annotations are checked when a frame is decoded (see `codec`), not when it is made.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from dsdlab.protocol.errors import BadIds, one_line

PROTOCOL_VERSION = 2
MAX_FRAME_BYTES = 1 << 20
MAX_WINDOW = 256  # ids in one Draft
MAX_POSITION = (1 << 20) - 1
MAX_MESSAGE_CHARS = 1000
HOLD_FOREVER_US = 0xFFFFFFFF

SessionId: TypeAlias = Annotated[int, Meta(ge=1, le=0xFFFF)]  # 0 means the connection, in Error alone
Epoch: TypeAlias = Annotated[int, Meta(ge=0, le=0xFFFF)]
Position: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_POSITION)]
TokenId: TypeAlias = Annotated[int, Meta(ge=0, le=0xFFFFFF)]
WindowCount: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_WINDOW)]
Microseconds: TypeAlias = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
Natural: TypeAlias = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
PackedIds: TypeAlias = bytes  # 3 bytes an id; bounded by the frame
PackedWindow: TypeAlias = Annotated[bytes, Meta(max_length=3 * MAX_WINDOW)]
Name: TypeAlias = Annotated[str, Meta(max_length=256)]


def pack_ids(ids: Iterable[int]) -> bytes:
    """Token ids as 3 bytes each, little-endian. Raises ValueError for an id outside 0 … 2^24 - 1.

    `struct` takes 1 µs for a window where numpy's calls alone take 3, and is no slower for a long prompt.
    """
    values = list(ids)
    try:
        quads = bytearray(struct.pack(f"<{len(values)}I", *values))
    except struct.error:
        raise ValueError("token ids must be in 0 … 16777215") from None
    if quads[3::4].strip(b"\0"):
        raise ValueError("token ids must be in 0 … 16777215")
    del quads[3::4]
    return bytes(quads)


def unpack_ids(packed: bytes) -> list[int]:
    """The inverse of `pack_ids`. Raises BadIds (a ValueError) if the length is no multiple of three."""
    n, rest = divmod(len(packed), 3)
    if rest:
        raise BadIds(f"packed ids are {len(packed)} bytes; allowed: a multiple of 3")
    quads = bytearray(4 * n)
    quads[0::4] = packed[0::3]
    quads[1::4] = packed[1::3]
    quads[2::4] = packed[2::3]
    return list(struct.unpack(f"<{n}I", quads))


def digest_ids(packed: bytes) -> bytes:
    """Resume's digest: the first 8 bytes of SHA-256 over packed ids."""
    return hashlib.sha256(packed).digest()[:8]


def microseconds(t_s: float) -> int:
    """Seconds as a frame's `_us` field: rounded, clamped to 0 … 2^32 - 1 (71 minutes)."""
    return min(max(round(t_s * 1e6), 0), 0xFFFFFFFF)


class Frame(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, gc=False):
    """Base of all frames."""


class Hello(Frame, frozen=True, tag=1):
    """First frame of a connection, drafter → verifier."""

    version: Natural
    node_id: Name  # random, 16 hex digits; the same after a reconnect: sessions belong to it
    token: Name  # shared secret; "" where the verifier asks for none
    target: Name  # the target model wanted; "" accepts any
    tokenizer: Name  # tokenizer fingerprint; "" for a client that sends text it never decodes
    t_s: float  # sender's clock

    def __repr__(self) -> str:  # the token stays out of logs and tracebacks
        token = "***" if self.token else ""
        return (
            f"Hello(version={self.version}, node_id={self.node_id!r}, token={token!r}, "
            f"target={self.target!r}, tokenizer={self.tokenizer!r}, t_s={self.t_s})"
        )


class Welcome(Frame, frozen=True, tag=2):
    """The verifier's answer to an accepted Hello."""

    version: Natural
    node_id: Name
    target: Name
    tokenizer: Name
    vocab_size: Annotated[int, Meta(ge=1, le=1 << 24)]
    max_context: Annotated[int, Meta(ge=1, le=MAX_POSITION + 1)]
    eos_ids: Annotated[tuple[TokenId, ...], Meta(max_length=64)]
    modes: Annotated[tuple[Name, ...], Meta(max_length=64)]
    t_s: float


class Open(Frame, frozen=True, tag=3):
    """Start a session, or re-open one at a verifier that no longer holds it (`committed` not empty)."""

    session: SessionId
    mode: Name
    prompt: PackedIds
    committed: PackedIds
    gamma: WindowCount  # window of a drafter that stands beside the target; 0 elsewhere
    max_new_tokens: Position
    stop_at_eos: bool
    temperature: float
    top_k: Natural
    top_p: float
    seed: Annotated[int, Meta(ge=0)]


class Resume(Frame, frozen=True, tag=4):
    """After a reconnect: go on with a session that the verifier may still hold."""

    session: SessionId
    length: Position  # prompt + committed tokens the sender holds
    digest: Annotated[bytes, Meta(min_length=8, max_length=8)]  # `digest_ids` of those tokens


class Draft(Frame, frozen=True, tag=5):
    """A window of drafted tokens."""

    session: SessionId
    epoch: Epoch
    base: Position  # absolute position of ids[0]
    ids: PackedWindow


class Verdict(Frame, frozen=True, tag=6):
    """What became of a Draft: `accepted` of its ids stand, then comes `next_id`."""

    session: SessionId
    epoch: Epoch
    base: Position
    accepted: WindowCount
    next_id: TokenId  # the correction or bonus token
    queue_us: Microseconds
    compute_us: Microseconds


class Commit(Frame, frozen=True, tag=7):
    """Tokens decided by the target without (or before) a Draft; `base` is the position of ids[0]."""

    session: SessionId
    base: Position
    ids: PackedIds
    drafted: (
        WindowCount  # drafts that this step judged, streamed ones or those of a drafter beside the target
    )
    accepted: WindowCount
    draft_us: Microseconds  # that drafter's compute time
    queue_us: Microseconds
    compute_us: Microseconds
    beside: WindowCount = 0  # of `drafted`, the last so many came from a drafter beside the target


class Close(Frame, frozen=True, tag=8):
    """The session is over; both sides forget it."""

    session: SessionId


class Error(Frame, frozen=True, tag=9):
    """A refusal. `session` 0 concerns the connection, which is then closed."""

    session: Annotated[int, Meta(ge=0, le=0xFFFF)]
    code: Annotated[str, Meta(max_length=32)]
    message: Annotated[str, Meta(max_length=MAX_MESSAGE_CHARS)]
    retry_after_ms: Natural = 0


class Ping(Frame, frozen=True, tag=10):
    nonce: Natural
    t_s: float


class Pong(Frame, frozen=True, tag=11):
    nonce: Natural
    t_s: float  # the answering side's clock


class Steer(Frame, frozen=True, tag=12):
    """How the target is to go on in a streaming session: see `dsdlab.policies.Pace`."""

    session: SessionId
    number: Natural  # counts up within a session; a lower or equal one is late and changes nothing
    drafting: bool
    hold_us: Microseconds  # `HOLD_FOREVER_US`: never decode alone
    max_window: Annotated[int, Meta(ge=1, le=MAX_WINDOW)]
    beside: WindowCount


class DraftQ(Frame, frozen=True, tag=13):
    """A window of drafted tokens with what they were drawn from; only in a session that asked for it."""

    session: SessionId
    epoch: Epoch
    base: Position  # absolute position of ids[0]
    ids: PackedWindow
    q: bytes  # `q_rows.pack_q`: a row for each id; bounded by the frame


AnyFrame = (
    Hello | Welcome | Open | Resume | Draft | Verdict | Commit | Close | Error | Ping | Pong | Steer | DraftQ
)


def refusal(code: str, message: str, *, session: int = 0, retry_after_ms: int = 0) -> Error:
    """An Error frame whose message is made one line and cut to what the protocol allows."""
    return Error(session, code, one_line(message, MAX_MESSAGE_CHARS), retry_after_ms)
