"""The curves over RTT of the report, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from dsdlab.report.svg import Scale, element, marker, mode_class, number, path, spot, spread, text

Box = tuple[float, float, float, float]  # left, top, right, bottom

LABEL_PX = 7.6  # about, a character of a curve's own label
DASHES = ("", "7 3", "2 3", "9 3 2 3")


@dataclass(frozen=True, slots=True)
class Point:
    """One measured cell: milliseconds on both axes; lo and hi NaN where there is no interval."""

    x: float
    y: float
    lo: float
    hi: float
    n: int


@dataclass(frozen=True, slots=True)
class Series:
    """One variant in a panel. `rank` counts the variants of its mode: 0 is drawn solid and filled.

    simulated: what the simulator predicted, lo and hi of its draws. errors: of the simulator at each RTT, for
    people.
    """

    mode: str
    label: str
    rank: int
    points: Sequence[Point]
    theory: Sequence[tuple[float, float]] = ()
    simulated: Sequence[Point] = ()
    errors: Mapping[float, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Mark:
    """A break-even RTT on the x axis: NaN or infinite bounds are clipped to the panel."""

    mode: str
    x: float
    lo: float
    hi: float
    label: str


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves over RTT under one condition. simulated: even its points are the simulator's, not measured."""

    title: str
    series: Sequence[Series]
    modelled: bool
    marks: Sequence[Mark] = field(default=())
    simulated: bool = False

    @property
    def note(self) -> str:
        """What must be said of its numbers; empty for a real link."""
        return "simulated" if self.simulated else "modelled link" if self.modelled else ""


def short(value: float) -> str:
    """Three significant digits, without an exponent."""
    if math.isnan(value):
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def with_interval(value: float, lo: float, hi: float) -> str:
    return short(value) if math.isnan(lo) else f"{short(value)} [{short(lo)}, {short(hi)}]"


def y_range(panels: Sequence[Panel]) -> tuple[float, float]:
    """Smallest and largest value drawn in any panel, so that panels can share an axis."""
    series = [s for panel in panels for s in panel.series]
    points = [p for s in series for p in (*s.points, *s.simulated)]
    ys = [v for p in points for v in (p.y, p.lo, p.hi) if not math.isnan(v)]
    ys += [y for s in series for _, y in s.theory]
    return max(min(ys), 1e-6), max(max(ys), 1e-6)


def _scales(panel: Panel, box: Box, smallest: float, largest: float) -> tuple[Scale, Scale]:
    left, top, right, bottom = box
    xs = [p.x for s in panel.series for p in (*s.points, *s.simulated)]
    low, high = min(xs), max(xs)
    log_x = low > 0 and high / low >= 100
    pad = 0.03 * (high - low) if high > low else max(1.0, abs(high) * 0.1)
    low, high = (low / 1.1, high * 1.1) if log_x else (low - pad, high + pad)
    x = Scale(low, high, left, right, log=log_x)
    if largest / smallest > 15:
        return x, Scale(smallest / 1.3, largest * 1.2, bottom, top, log=True)
    return x, Scale(0.0, largest * 1.06, bottom, top)


def _axes(panel: Panel, x: Scale, y: Scale, box: Box, unit: str) -> list[Markup]:
    left, top, right, bottom = box
    drawn: list[Markup] = []
    for value in y.ticks(6 if bottom - top > 260 else 4):
        at = y(value)
        drawn.append(element("line", x1=left, x2=right, y1=at, y2=at, class_="grid"))
        drawn.append(text(left - 8, at + 3.5, f"{value:g}", "tick", "end"))
    asked = sorted({p.x for s in panel.series for p in (*s.points, *s.simulated)})
    ticks = asked if len(asked) <= 12 else x.ticks(6)
    last = -math.inf
    for value in ticks:  # the RTTs asked for are the ticks; crowded labels are left out
        at = x(value)
        drawn.append(element("line", x1=at, x2=at, y1=bottom, y2=bottom + 4, class_="axis"))
        if at - last >= 24:
            drawn.append(text(at, bottom + 17, f"{value:g}", "tick", "middle"))
            last = at
    drawn.append(element("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
    if unit:
        drawn.append(text(2, top - 16, unit + (", log scale" if y.log else ""), "unit"))
    name = "RTT, ms" + (f" ({panel.note})" if panel.note else "") + (", log scale" if x.log else "")
    drawn.append(text(right, bottom + 34, name, "unit", "end"))
    return drawn


def _mark(mark: Mark, x: Scale, box: Box) -> Markup:
    left, top, right, bottom = box
    at = x(mark.x)
    inner: list[Markup] = []
    if not math.isnan(mark.lo):
        lo = left if math.isinf(mark.lo) else max(x(mark.lo), left)
        hi = right if math.isinf(mark.hi) else min(x(mark.hi), right)
        size = {"width": max(hi - lo, 1.0), "height": bottom - top}
        inner.append(element("rect", x=lo, y=top, class_="band", **size))
    inner.append(element("line", x1=at, x2=at, y1=top, y2=bottom, class_="even"))
    room_right = right - at > 7.0 * len(mark.label)
    inner.append(
        text(at + 6 if room_right else at - 6, top + 11, mark.label, "note", None if room_right else "end")
    )
    return element("g", *inner, class_=mode_class(mark.mode))


def _simulated(series: Series, x: Scale, y: Scale) -> Markup:
    """A broad pale line to lie under the measured one, and the band of its draws."""
    points, drawn = series.simulated, []
    banded = [p for p in points if not math.isnan(p.lo)]
    if len(banded) > 1:
        edge = [(x(p.x), y(p.hi)) for p in banded] + [(x(p.x), y(p.lo)) for p in reversed(banded)]
        drawn.append(element("path", d=path(edge) + "Z", class_="draws"))
    along = [(x(p.x), y(p.y)) for p in points]
    along = along if len(along) > 1 else [(a + d, b) for a, b in along for d in (-7.0, 7.0)]
    drawn.append(element("path", d=path(along), class_="sim"))
    return element("g", *drawn, class_=mode_class(series.mode))


def _series(series: Series, x: Scale, y: Scale, *, simulated: bool) -> Markup:
    hollow = series.rank > 0 or simulated
    dash = DASHES[series.rank % len(DASHES)] or None
    inner: list[Markup] = []
    if series.theory:
        inner.append(element("path", d=path((x(a), y(b)) for a, b in series.theory), class_="theory"))
    bars = [f"M{spot(x(p.x))} {spot(y(p.lo))}V{spot(y(p.hi))}" for p in series.points if not math.isnan(p.lo)]
    if bars:
        inner.append(element("path", d="".join(bars), class_="bar"))
    if len(series.points) > 1:
        curve = path((x(p.x), y(p.y)) for p in series.points)
        kind = "sim" if simulated else "curve"
        inner.append(element("path", d=curve, class_=kind, stroke_dasharray=None if simulated else dash))
    inner += [
        marker(
            series.mode,
            x(p.x),
            y(p.y),
            hollow=hollow,
            data_at=f"{p.x:g}",
            data_value=with_interval(p.y, p.lo, p.hi),
            data_sim=series.errors.get(p.x),
            data_n=p.n,
        )
        for p in series.points
    ]
    return element("g", *inner, class_=mode_class(series.mode), data_name=series.label)


def curves(
    panel: Panel,
    *,
    width: int,
    height: int,
    unit: str,
    extent: tuple[float, float],
    direct_labels: bool,
    class_: str,
    suffix: str = " ms",
) -> Markup:
    """One panel: measured medians with 95 % bars, joined.

    The closed form is a thin dashed line, the simulator's medians are a broad pale one.

    extent: smallest and largest value of the y axis' data (see `y_range`). suffix: of values that are said.
    """
    longest = max((len(s.label) for s in panel.series), default=0)
    margin_right = max(165.0, LABEL_PX * longest + 20) if direct_labels else 14.0
    box = (46.0, 34.0, float(width - margin_right), float(height - 44))
    x, y = _scales(panel, box, *extent)
    drawn = _axes(panel, x, y, box, unit)
    drawn += [_mark(mark, x, box) for mark in panel.marks]
    drawn.append(element("line", x1=0, x2=0, y1=box[1], y2=box[3], class_="guide"))
    drawn += [_simulated(series, x, y) for series in panel.series if series.simulated]  # under everything
    drawn += [_series(series, x, y, simulated=panel.simulated) for series in panel.series]
    if direct_labels:
        shown = [s for s in panel.series if s.points]
        wanted = [y(s.points[-1].y) for s in shown]
        for series, at, own in zip(shown, spread(wanted, 17, box[1], box[3]), wanted, strict=True):
            end = x(series.points[-1].x)
            leader = path([(end + 6, own), (box[2] + 4, at), (box[2] + 8, at)])
            drawn.append(
                element(
                    "g",
                    element("path", d=leader, class_="leader"),
                    text(box[2] + 12, at + 4, series.label, "name"),
                    class_=mode_class(series.mode),
                )
            )
    return element(
        "svg",
        element("title", f"{unit} against RTT: {panel.title}" if unit else f"{panel.title} against RTT"),
        *drawn,
        viewBox=f"0 0 {width} {height}",
        class_=f"chart {class_}".strip(),
        role="img",
        data_top=number(box[1]),
        data_bottom=number(box[3]),
        data_note=panel.note,
        data_suffix=suffix,
    )


def key_symbol(mode: str, rank: int, *, simulated: bool = False) -> Markup:
    """The legend's sample of a series."""
    dash = None if simulated else DASHES[rank % len(DASHES)] or None
    return element(
        "svg",
        element("path", d="M1 8H31", class_="sim" if simulated else "curve", stroke_dasharray=dash),
        marker(mode, 16, 8, hollow=rank > 0 or simulated),
        viewBox="0 0 32 16",
        class_=f"key {mode_class(mode)}",
        aria_hidden="true",
    )
