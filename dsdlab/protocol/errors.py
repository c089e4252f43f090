"""What can go wrong on the wire: exceptions, and the codes that travel in Error frames."""

from __future__ import annotations

ERROR_CODES: dict[str, str] = {
    "bad-frame": "bytes that are no frame, a value out of range, or a frame out of place",
    "frame-too-large": "a frame longer than MAX_FRAME_BYTES",
    "version": "the peer speaks another protocol version",
    "token": "the shared token is missing or wrong",
    "target": "the verifier serves another target model",
    "tokenizer": "the two ends use different tokenizers",
    "mode": "the verifier does not offer this mode",
    "prompt": "the prompt is empty, or holds an id outside the vocabulary",
    "sampling": "a sampling parameter, window or token limit out of range",
    "context": "prompt and output do not fit the target's context",
    "busy": "no room at present; try again after retry_after_ms",
    "unknown-session": "the verifier does not hold this session, or holds other tokens; re-open it",
    "internal": "the verifier failed; its log says why",
    "timeout": "the peer kept silent for too long",
}


class ChannelClosed(Exception):
    """The other side is gone (or the transport failed); frames not yet received may be lost."""


class ProtocolError(Exception):
    """A peer broke the protocol. `code` travels in an Error frame; the message is one line."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class BadIds(ProtocolError, ValueError):
    """Packed token ids that cannot be unpacked."""

    def __init__(self, message: str) -> None:
        super().__init__("bad-frame", message)


class Refused(Exception):
    """A handshake ended in an Error frame: received by a client, or sent by a server."""

    def __init__(self, code: str, message: str, retry_after_ms: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_ms = retry_after_ms


class ConnectFailed(Exception):
    """No connection could be made; the message is one line that names the URL."""


class ListenFailed(Exception):
    """A server could not listen; the message is one line that names host and port."""


def one_line(text: str, limit: int = 400) -> str:
    """`text` fit for a log line or a terminal: control characters become spaces, the rest is cut."""
    clean = "".join(c if c.isprintable() else " " for c in text[: limit + 1])
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"
