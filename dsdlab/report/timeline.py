"""Timelines of single generations: edge above, cloud below, flights between, and what the link did."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from markupsafe import Markup

from dsdlab.report.plots import short
from dsdlab.report.svg import Scale, element, mode_class, number, path, text
from dsdlab.sweep.rows import Row

LANE_KINDS = {"draft": "edge", "beside": "cloud", "verify": "cloud", "decode": "cloud"}
MANY_EVENTS = 240  # beyond it bars and flights share a path, and no two are drawn on one pixel
MOST_FLIGHTS = 240  # each way; of more, evenly spread ones are drawn
STALL_S, STALL_FACTOR = 0.3, 4.0
STALLS_SHOWN = 4
IN_SECONDS_S = 3.0  # from this length on the axis is in seconds
CHAR_PX = 6.3  # about, of a 12 px label


@dataclass(frozen=True, slots=True)
class Arrival:
    """Tokens that reached the user at `t_s`."""

    t_s: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Change:
    """What the link was from t0_s to t1_s (infinite: to the end); `cut`: nothing got through."""

    t0_s: float
    t1_s: float
    label: str

    @property
    def cut(self) -> bool:
        return self.label.startswith("partition")


def lane_of(kind: str, mode: str) -> str:
    """Where an event happens: "edge", "cloud", "up", "down"; "" for a kind this version does not know."""
    if kind in ("flight_up", "flight_down"):
        return kind.removeprefix("flight_")
    lane = LANE_KINDS.get(kind, "")
    if lane and mode in ("cloud-ar", "cloud-sd"):
        return "cloud"
    return "edge" if lane and mode == "edge-sd" else lane


def arrivals(row: Row) -> list[Arrival]:
    """When how many tokens arrived, from events and windows; empty where the two do not match."""
    ends = [t1 for kind, _, t1 in row.events if kind == "flight_down"]
    if not ends:
        ends = [t1 for kind, _, t1 in row.events if kind in ("verify", "decode")]
    extra = len(ends) - len(row.windows)
    if extra not in (0, 1):
        return []
    counts = [1] * extra + [accepted + 1 for _, accepted in row.windows]
    return [Arrival(t, n) for t, n in zip(ends, counts, strict=True)]


def changes_of(row: Row) -> list[Change]:
    """The link's changes as they were really applied, each with its end where it had one."""
    found: list[Change] = []
    for t_s, what in sorted(row.link_changes):
        for part in what.split("; "):
            label = part.removeprefix("end of ")
            if part == label:
                found.append(Change(t_s, math.inf, label))
                continue
            for index, change in enumerate(found):
                if change.label == label and math.isinf(change.t1_s):
                    found[index] = Change(change.t0_s, t_s, label)
                    break
    return found


def stalls_of(row: Row) -> list[tuple[float, float]]:
    """The longest times without a token: over 0.3 s, and four times the usual gap of the generation."""
    times = [a.t_s for a in arrivals(row)]
    gaps = list(pairwise(times))
    if not gaps:
        return []
    least_s = max(STALL_S, STALL_FACTOR * median(b - a for a, b in gaps))
    longest = sorted((gap for gap in gaps if gap[1] - gap[0] > least_s), key=lambda g: g[0] - g[1])
    return sorted(longest[:STALLS_SHOWN])


def span_s(rows: Sequence[Row], cycles: int = 6) -> float:
    """A common time axis, s: long enough for the slowest row's first `cycles` answers.

    Where the link changed, long enough for tokens after the last change too.
    """
    ends, recovered, last = [], [], 0.0
    for row in rows:
        lane = sorted(t1 for kind, _, t1 in row.events if kind in ("verify", "decode", "flight_down"))
        compute = [t for kind, _, t in row.events if kind in ("verify", "decode")]
        if lane:
            ends.append(compute[min(cycles, len(compute)) - 1] if compute else lane[-1])
            last = max(last, lane[-1])
        if row.link_changes and lane:
            changed_s = max(t for t, _ in row.link_changes)
            recovered.append(next((t for t in lane if t > changed_s), lane[-1]))
    if recovered:
        return min(last, max(*recovered, *ends) * 1.25) * 1.02
    return max(ends, default=0.0) * 1.02


def _bands(changes: Sequence[Change], x: Scale, until_s: float, bottom: float) -> list[Markup]:
    """Shaded from change to end, with a line and a label at each beginning; crowded labels are left out."""
    drawn: list[Markup] = []
    free = -math.inf
    for change in changes:
        if change.t0_s >= until_s:
            continue
        start, end = x(change.t0_s), x(min(change.t1_s, until_s))
        lasted = "" if math.isinf(change.t1_s) else f" to {change.t1_s:.2f} s"
        title = element("title", f"{change.label}, from {change.t0_s:.2f} s{lasted}")
        kind = "cut" if change.cut else "shift"
        drawn.append(
            element(
                "rect", title, x=start, y=2.0, width=max(end - start, 1.0), height=bottom - 2, class_=kind
            )
        )
        drawn.append(element("line", x1=start, x2=start, y1=2.0, y2=bottom, class_=f"edge-of {kind}"))
        if not math.isinf(change.t1_s) and change.t1_s < until_s:
            drawn.append(element("line", x1=end, x2=end, y1=2.0, y2=bottom, class_=f"edge-of {kind}"))
        length = CHAR_PX * len(change.label)
        at, anchor = (start + 4, None) if start + 4 + length <= x.end else (x.end, "end")
        left = at if anchor is None else at - length
        if left > free and left >= x.start - 40:
            drawn.append(text(at, 12, change.label, "what", anchor))
            free = left + length + 6
    return drawn


def _merged(spans: Sequence[tuple[float, float]], gap: float) -> list[tuple[float, float]]:
    """Spans that touch, or nearly, as one."""
    out: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if out and start - out[-1][1] < gap:
            out[-1] = out[-1][0], max(out[-1][1], end)
        else:
            out.append((start, end))
    return out


class _Lanes:
    """Where things are in a timeline, from the top: changes, arrivals, edge, flights, cloud, axis."""

    def __init__(self, width: int, until_s: float, head: float) -> None:
        self.x = Scale(0.0, until_s or 1.0, 46.0, float(width - 8))
        self.until_s = until_s
        self.edge, self.cloud, self.thick = head + 24.0, head + 66.0, 12.0
        self.bottom = head + 84.0

    def flight(self, lane: str, t0_s: float, t1_s: float) -> tuple[tuple[float, float], tuple[float, float]]:
        """Both ends of a flight's line, cut off at the end of the axis."""
        y0, y1 = self.edge + self.thick / 2, self.cloud - self.thick / 2
        if lane == "down":
            y0, y1 = y1, y0
        share = min(1.0, (self.until_s - t0_s) / (t1_s - t0_s)) if t1_s > t0_s else 1.0
        return (self.x(t0_s), y0), (self.x(min(t1_s, self.until_s)), y0 + share * (y1 - y0))

    def bar(self, lane: str) -> float:
        """The top of a lane's bars."""
        return (self.edge if lane == "edge" else self.cloud) - self.thick / 2


def _few_events(row: Row, lanes: _Lanes) -> list[Markup]:
    """Every event an element of its own, bars with a title."""
    flights: list[Markup] = []
    bars: list[Markup] = []
    for kind, t0, t1 in row.events:
        lane = lane_of(kind, row.mode)
        if not lane or t0 >= lanes.until_s:
            continue
        if lane in ("up", "down"):
            flights.append(element("path", d=path(lanes.flight(lane, t0, t1)), class_=f"flight {lane}"))
            continue
        start, end = lanes.x(t0), lanes.x(min(t1, lanes.until_s))
        bars.append(
            element(
                "rect",
                element("title", f"{kind}, {short((t1 - t0) * 1e3)} ms"),
                x=start,
                y=lanes.bar(lane),
                width=max(end - start - 0.6, 0.8),
                height=lanes.thick,
                class_=f"do {kind}",
            )
        )
    return flights + bars


def _many_events(row: Row, lanes: _Lanes) -> list[Markup]:
    """One path for each kind: the same picture, in a fraction of the bytes."""
    flights: dict[str, list[str]] = {}
    latest: dict[str, float] = {}
    crowd = Counter(lane_of(kind, row.mode) for kind, t0, _ in row.events if t0 < lanes.until_s)
    width = lanes.x.end - lanes.x.start
    gaps = {lane: width / MOST_FLIGHTS if crowd[lane] > MOST_FLIGHTS else 0.0 for lane in ("up", "down")}
    spans: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for kind, t0, t1 in row.events:
        lane = lane_of(kind, row.mode)
        if not lane or t0 >= lanes.until_s:
            continue
        if lane in ("up", "down"):
            (x0, y0), (x1, y1) = lanes.flight(lane, t0, t1)
            since = x0 - latest.get(lane, -math.inf)
            if since >= gaps[lane] and (since >= 1.0 or x1 - x0 > 6.0):
                flights.setdefault(lane, []).append(path([(x0, y0), (x1, y1)]))
                latest[lane] = x0
        else:
            spans.setdefault((kind, lane), []).append((lanes.x(t0), lanes.x(min(t1, lanes.until_s))))
    drawn = [element("path", d="".join(lines), class_=f"flight {lane}") for lane, lines in flights.items()]
    for (kind, lane), found in spans.items():
        boxes = [
            f"M{number(a)} {number(lanes.bar(lane))}h{number(max(b - a, 0.8))}v12h-{number(max(b - a, 0.8))}z"
            for a, b in _merged(found, 0.6)
        ]
        drawn.append(element("path", d="".join(boxes), class_=f"do {kind}"))
    return drawn


def _arrivals(row: Row, lanes: _Lanes) -> list[Markup]:
    """Dots for tokens that reached the user, with counts where there is room, and lines over stalls."""
    drawn: list[Markup] = []
    together: list[tuple[float, int]] = []  # (x, tokens) of what arrived within one pixel
    for arrival in arrivals(row):
        at = lanes.x(arrival.t_s)
        if arrival.t_s > lanes.until_s:
            break
        if together and at - together[-1][0] < 1.0:
            together[-1] = together[-1][0], together[-1][1] + arrival.tokens
        else:
            together.append((at, arrival.tokens))
    dots = [f"M{number(at)} {number(lanes.edge - 11)}h0" for at, _ in together]
    last = -math.inf
    for at, tokens in together:
        if at - last >= 22:
            drawn.append(text(at, lanes.edge - 15, f"+{tokens}", "tiny", "middle"))
            last = at
    if dots:
        drawn.append(element("path", d="".join(dots), class_="arrived"))
    for t0, t1 in stalls_of(row):
        if t1 > lanes.until_s:
            continue
        start, end, y = lanes.x(t0), lanes.x(t1), lanes.edge - 11
        drawn.append(
            element(
                "path",
                element("title", f"{t1 - t0:.2f} s without a token"),
                d=path([(start + 4, y), (end - 4, y)]),
                class_="stall",
            )
        )
        words = f"{t1 - t0:.1f} s without a token" if end - start > 130 else f"{t1 - t0:.1f} s"
        if end - start > 60:
            drawn.append(text((start + end) / 2, y - 4, words, "tiny", "middle"))
    return drawn


def timeline(row: Row, until_s: float, *, width: int, class_: str, axis: bool) -> Markup:
    """Space-time diagram: edge above, cloud below, each flight a slanted line between them.

    What the link did is shaded behind, from top to bottom.
    """
    changes = changes_of(row)
    lanes = _Lanes(width, until_s, 16.0 if changes else 0.0)
    x, bottom = lanes.x, lanes.bottom
    drawn = _bands(changes, x, until_s, bottom)
    for name, at in (("edge", lanes.edge), ("cloud", lanes.cloud)):
        drawn.append(element("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="lane"))
        drawn.append(text(x.start - 8, at + 4, name, "tick", "end"))
    seen = sum(t0 < until_s for _, t0, _ in row.events)
    drawn += (_many_events if seen > MANY_EVENTS else _few_events)(row, lanes)
    drawn += _arrivals(row, lanes)
    if axis:
        seconds = until_s >= IN_SECONDS_S
        for value in x.ticks(6 if width > 500 else 4):
            drawn.append(element("line", x1=x(value), x2=x(value), y1=bottom, y2=bottom + 4, class_="axis"))
            label = f"{value if seconds else value * 1e3:g}"
            unit = (" s" if seconds else " ms") if value == 0 else ""
            drawn.append(text(x(value), bottom + 17, label + unit, "tick", "middle"))
        drawn.append(element("line", x1=x.start, x2=x.end, y1=bottom, y2=bottom, class_="axis"))
    return element(
        "svg",
        element("title", f"timeline of {row.mode}"),
        *drawn,
        viewBox=f"0 0 {width} {number(bottom + (26 if axis else 0))}",
        class_=f"timeline {class_} {mode_class(row.mode)}",
        role="img",
    )
