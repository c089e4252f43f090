"""The report's tables about the network: what was asked, what was measured, what the kernel made of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from dsdlab.sweep.calibration import DirectionMeasure, LinkMeasure, binomial_interval, burst_interval
from dsdlab.sweep.exclusions import measures_of
from dsdlab.sweep.keys import condition_of
from dsdlab.sweep.rows import Row

WAYS = ("up", "down")
PROBES = {"packets": "UDP probes", "frames": "pings"}


class Way(NamedTuple):
    """One direction of a group of links."""

    rate_asked_mbit: float | None
    rate_mbit: float  # median of what was measured; NaN: not measured
    sent: int
    lost: int
    loss_pct: tuple[float, float, float]  # share, and its 95 % interval
    bursts: tuple[float, float, float]  # mean length, and its 95 % interval; NaN without losses
    packets: int  # of the qdisc, during generations
    drops: int


class Link(NamedTuple):
    """All calibrations of one link profile: medians over them of each one's p50 and p99, ms."""

    link: str
    runtime: str
    network: str
    rtt_ms: float
    instrument: str
    before_ms: tuple[float, float]
    after_ms: tuple[float, float]
    up: Way
    down: Way
    generations: int
    calibrations: int
    excluded: int

    @property
    def probed(self) -> bool:
        return self.up.sent + self.down.sent > 0

    @property
    def counted(self) -> bool:
        return self.up.packets + self.down.packets > 0


def _middle(values: Iterable[float | None]) -> float:
    known = [v for v in values if v is not None]
    return median(known) if known else math.nan


def _rtts(measures: Iterable[LinkMeasure | None]) -> tuple[float, float]:
    known = [m for m in measures if m is not None and m.n]
    return _middle(m.rtt_p50_ms for m in known), _middle(m.rtt_p99_ms for m in known)


def _way(name: str, rows: Sequence[Row]) -> Way:
    found: list[DirectionMeasure] = [getattr(m, name) for m in measures_of(rows)]
    sent, lost = sum(d.sent for d in found), sum(d.lost for d in found)
    bursts = [length for d in found for length in d.bursts]
    low, high = binomial_interval(lost, sent)
    mean = sum(bursts) / len(bursts) if bursts else math.nan
    counters = [c for row in rows if isinstance(c := row.link_counters.get(name), Mapping)]
    return Way(
        rate_asked_mbit=rows[0].profile.rate_up_mbit if name == "up" else rows[0].profile.rate_down_mbit,
        rate_mbit=_middle(d.rate_mbit for d in found),
        sent=sent,
        lost=lost,
        loss_pct=(100 * lost / sent if sent else math.nan, 100 * low, 100 * high),
        bursts=(mean, *burst_interval(bursts)),
        packets=sum(int(c.get("packets", 0)) for c in counters),
        drops=sum(int(c.get("drops", 0)) for c in counters),
    )


def link_table(rows: Sequence[Row]) -> list[Link]:
    """One line per link that was calibrated, whoever used it; excluded generations' links are in it too."""
    groups: dict[tuple[tuple[Any, ...], float], list[Row]] = {}
    for row in rows:
        if measures_of([row]):
            condition = condition_of(row)._replace(temperature=0.0)
            groups.setdefault((condition.order, row.rtt_ms), []).append(row)
    links = []
    for _, members in sorted(groups.items(), key=lambda g: g[0]):
        first, measures = members[0], measures_of(members)
        links.append(
            Link(
                link=first.link,
                runtime=first.runtime,
                network=condition_of(first).network,
                rtt_ms=first.rtt_ms,
                instrument=", ".join(sorted({PROBES.get(m.instrument, m.instrument) for m in measures})),
                before_ms=_rtts(row.link_before for row in members),
                after_ms=_rtts(row.link_after for row in members),
                up=_way("up", members),
                down=_way("down", members),
                generations=len(members),
                calibrations=len(measures),
                excluded=sum(bool(row.excluded) for row in members),
            )
        )
    return links


class Tcp(NamedTuple):
    """One TCP regime: as asked, and everything that was read back of it."""

    asked: list[str]
    read_back: list[str]
    generations: int


def _leaves(value: Mapping[str, Any], where: str = "") -> Iterable[tuple[str, str, Any]]:
    """(where, name, value) of everything in nested tables; `where` is the path to its table."""
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _leaves(inner, f"{where} {key}".strip())
        else:
            yield where, key, inner


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _spread(values: Sequence[Any]) -> str:
    """One text for what many generations read back: a value, a range of numbers, or all the words."""
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        low, high = min(values), max(values)
        return _text(low) if low == high else f"{low:.4g}–{high:.4g}"
    return " or ".join(dict.fromkeys(map(_text, values)))


def tcp_table(rows: Sequence[Row]) -> list[Tcp]:
    """One line per regime that was asked for; empty where no row says (they are of an earlier version)."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.tcp:
            groups.setdefault(repr(row.tcp_asked), []).append(row)
    table = []
    for members in groups.values():
        asked = members[0].tcp_asked
        found: dict[tuple[str, str], list[Any]] = {}
        for row in members:
            back = row.tcp.get("read_back")
            for where, name, value in _leaves(back if isinstance(back, Mapping) else {}):
                found.setdefault((where, name), []).append(value)
        said: dict[str, list[str]] = {}
        for (where, name), values in found.items():
            said.setdefault(where, []).append(f"{name.replace('_', ' ')} {_spread(values)}")
        table.append(
            Tcp(
                asked=[
                    f"congestion {asked.congestion}",
                    f"slow start after idle {_text(asked.slow_start_after_idle)}",
                    f"RTO floor {asked.rto_min_ms:g} ms",
                    f"NODELAY {_text(asked.nodelay)}",
                ],
                read_back=[
                    f"{where}: {', '.join(words)}" if where else ", ".join(words)
                    for where, words in said.items()
                ],
                generations=len(members),
            )
        )
    return table
