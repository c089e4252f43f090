"""Frames to bytes and back: strict msgpack, one frame a message.

Sizes: msgpack spends 1 byte on the array, 1 on the tag, and on integers 1 (below 128), 2 (below 256),
3 (below 65536) or 5 bytes; on packed ids 2 bytes (3 from 256 bytes on) plus the ids. With the ranges that
`frames` annotates, a Draft of γ ids takes at most 16 + 3γ bytes and a Verdict at most 31.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from dsdlab.protocol.errors import ProtocolError, one_line
from dsdlab.protocol.frames import MAX_FRAME_BYTES, PROTOCOL_VERSION, AnyFrame

_encode = msgspec.msgpack.Encoder().encode
_decode: Callable[[bytes], AnyFrame] = msgspec.msgpack.Decoder(AnyFrame).decode


def encode(frame: AnyFrame) -> bytes:
    """One frame as bytes. Raises ProtocolError "frame-too-large"; ranges are the receiver's to check."""
    data = _encode(frame)
    if len(data) > MAX_FRAME_BYTES:
        raise _too_large(len(data), type(frame).__name__)
    return data


def decode(data: bytes) -> AnyFrame:
    """Bytes as a frame, types and ranges checked; packed ids are checked by `unpack_ids`.

    Raises ProtocolError: "frame-too-large", "version" (a Hello or Welcome of another protocol version,
    whatever its other fields are), "bad-frame" for all else.
    """
    if len(data) > MAX_FRAME_BYTES:
        raise _too_large(len(data), "frame")
    try:
        return _decode(data)
    except (ValueError, RecursionError) as error:  # msgspec's errors and UnicodeDecodeError are ValueErrors
        version = _greeting_version(data)
        if version is not None and version != PROTOCOL_VERSION:
            raise other_version(version) from None
        raise ProtocolError("bad-frame", f"not a frame: {one_line(str(error), 200)}") from None


def other_version(version: int) -> ProtocolError:
    """The error for a greeting of another protocol version."""
    return ProtocolError("version", f"protocol version {version} offered; allowed: {PROTOCOL_VERSION}")


def _too_large(n: int, what: str) -> ProtocolError:
    return ProtocolError("frame-too-large", f"{what} of {n} bytes; allowed: {MAX_FRAME_BYTES}")


def _greeting_version(data: bytes) -> int | None:
    """The version in bytes that begin like a Hello or Welcome; None for other bytes.

    Tag and version are the first two elements in every protocol version.
    """
    head = bytes(data[:12])
    if not head:
        return None
    at = 1 if head[0] & 0xF0 == 0x90 else {0xDC: 3, 0xDD: 5}.get(head[0], 0)  # array header
    if not at or head[at : at + 1] not in (b"\x01", b"\x02"):
        return None
    number = head[at + 1 : at + 2]
    if not number:
        return None
    if number[0] < 0x80:
        return number[0]
    width = {0xCC: 1, 0xCD: 2, 0xCE: 4}.get(number[0])
    return int.from_bytes(head[at + 2 : at + 2 + width], "big") if width else None
