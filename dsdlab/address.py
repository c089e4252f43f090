"""Where a verifier is: ws://HOST:PORT/ taken apart."""

from __future__ import annotations

from urllib.parse import urlsplit

__all__ = ["ws_address"]


def ws_address(url: str) -> tuple[str, int]:
    """Host (a name or an address) and port of ws://HOST:PORT/. Raises ValueError with one line."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:  # a port out of range, half an IPv6 address
        host, port = None, None
    else:
        if (
            parts.scheme != "ws"
            or parts.path not in ("", "/")
            or parts.query
            or parts.fragment
            or parts.username
        ):
            host = None
    if not host or not port or any(c.isspace() for c in host):
        raise ValueError(f"{url!r} is no address of a verifier (allowed: ws://HOST:PORT/)")
    return host, port
