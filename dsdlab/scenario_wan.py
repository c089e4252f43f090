"""What a scenario may say of link "wan": nothing, since nobody shapes it."""

from __future__ import annotations

from dsdlab.address import ws_address
from dsdlab.scenario_parts import Grid, LinkPart, Part, Run, Tcp

__all__ = ["check_wan"]

WAN = "wan"
# what would shape the link, or the verifier's TCP, which is not ours
_AXES = ("rate_mbit", "loss_pct", "loss_burst", "jitter_ms", "edges")


def check_wan(run: Run, grid: Grid, link: LinkPart, tcp: Tcp) -> None:
    """Raises ValueError, field first: link "wan" without a verifier, a verifier without it, a shaped WAN."""
    if run.link != WAN:
        for field in ("verifier", "token_file"):
            if value := getattr(run, field):
                raise ValueError(f"run.{field} is {value!r} with run.link {run.link!r}; needs run.link 'wan'")
        return
    if run.verifier is None:
        raise ValueError("run.verifier is missing; run.link 'wan' needs it: ws://HOST:PORT/")
    try:
        ws_address(run.verifier)
    except ValueError:
        raise ValueError(f"run.verifier is {run.verifier!r}; allowed: ws://HOST:PORT/") from None
    if run.runtime not in ("process", "auto"):
        raise ValueError(f"run.runtime is {run.runtime!r} with run.link 'wan'; allowed: process or auto")
    if len(grid.rtt_ms) != 1:
        raise ValueError(
            f"grid.rtt_ms is {grid.rtt_ms} with run.link 'wan'; allowed: one value, about what the link has"
        )
    for field in _AXES:
        _as_is(grid, "grid", field)
    for field in LinkPart.model_fields:
        _as_is(link, "link", field)
    for field in Tcp.model_fields:
        _as_is(tcp, "tcp", field)


def _as_is(part: Part, table: str, field: str) -> None:
    value, default = getattr(part, field), type(part).model_fields[field].default
    if value != default:
        said = "not empty" if field == "steps" else f"{value!r}"
        raise ValueError(
            f"{table}.{field} is {said} with run.link 'wan'; allowed: nothing, the link is what it is"
        )
