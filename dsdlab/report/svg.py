"""Small tools for hand-written SVG: escaped elements, axis scales, round ticks, markers.

Colours are never written here: elements carry a class and the page's CSS variables colour it, so one
drawing serves light, dark and print.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from dsdlab.sweep.keys import MODE_ORDER

# One shape per mode, so that colour is never the only difference. Radius 1, centred on 0.
_SHAPES = {
    "cloud-ar": "M-.9-.9H.9V.9H-.9Z",
    "cloud-sd": "M0-1.2L1.1.8H-1.1Z",
    "edge-sd": "M0-1.3L1.1 0L0 1.3L-1.1 0Z",
    "dsd-sync": "M-1 0A1 1 0 1 1 1 0A1 1 0 1 1-1 0Z",
    "dsd-pipelined": "M0 1.2L1.1-.8H-1.1Z",
    "dsd-stream": "M-.35-1.1H.35V-.35H1.1V.35H.35V1.1H-.35V.35H-1.1V-.35H-.35Z",
    "dsd-adaptive": "M0-1.3L.4-.4 1.3-.4 .6.25 .85 1.2 0 .65-.85 1.2-.6.25-1.3-.4-.4-.4Z",
}

EMPTY = ("path", "line", "rect")


def element(name: str, *children: Markup | str, **attributes: object) -> Markup:
    """One escaped element; `class_` is class, underscores become dashes, None drops an attribute.

    Numbers are written with at most two decimals. A plain string child is escaped.
    """
    written = []
    for key, value in attributes.items():
        if value is None:
            continue
        text = number(value) if isinstance(value, float) else value
        written.append(Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), text))
    body = Markup("").join(children)
    tag = Markup(name)
    if not body and name in EMPTY:
        return Markup("<{}{}/>").format(tag, Markup("").join(written))
    return Markup("<{}{}>{}</{}>").format(tag, Markup("").join(written), body, tag)


def number(value: float, decimals: int = 2) -> str:
    """At most so many decimals (1 or more), no trailing zeros, no minus zero."""
    text = f"{value:.{decimals}f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def spot(value: float) -> str:
    """A coordinate of a point: a tenth of a pixel is as fine as anybody sees."""
    return number(value, 1)


def path(points: Iterable[tuple[float, float]]) -> str:
    """The d attribute of a polyline."""
    return "M" + "L".join(f"{spot(x)} {spot(y)}" for x, y in points)


def mode_class(mode: str) -> str:
    """The CSS class that colours a mode."""
    return f"m-{mode}" if mode in MODE_ORDER else "m-other"


def marker(
    mode: str, x: float, y: float, size: float = 4.2, *, hollow: bool = False, **data: object
) -> Markup:
    """The mode's shape at (x, y); with data, a point that says something of itself."""
    return element(
        "path",
        d=_SHAPES.get(mode, _SHAPES["cloud-ar"]),
        transform=f"translate({spot(x)} {spot(y)}) scale({size:g})",
        class_=f"{'pt ' if data else ''}mark{' hollow' if hollow else ''}",
        **data,
    )


@dataclass(frozen=True, slots=True)
class Scale:
    """Data to picture coordinates, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, v = self.low, self.high, value
        if self.log:
            low, high, v = math.log(low), math.log(high), math.log(max(value, 1e-12))
        share = (v - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self, about: int) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high, about)


def linear_ticks(low: float, high: float, about: int) -> list[float]:
    """Round values (1, 2, 2.5 or 5 times a power of ten apart) inside [low, high], about so many."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    raw = span / max(about, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten inside [low, high]."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    values = [f * 10.0**e for e in range(first, last + 1) for f in (1, 2, 5)]
    return [v for v in values if low * 0.999 <= v <= high * 1.001]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move label positions apart to at least `gap`, as little as possible, inside [low, high]."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [wanted[i] for i in order]
    for _ in range(60):  # push neighbours apart evenly, so that a crowd stays centred
        moved = False
        for k in range(1, len(placed)):
            short = gap - (placed[k] - placed[k - 1])
            if short > 0.01:
                placed[k - 1] -= short / 2
                placed[k] += short / 2
                moved = True
        if not moved:
            break
    for k, at in enumerate(placed):  # then keep the gap exactly, and the ends inside
        placed[k] = max(at, placed[k - 1] + gap if k else low)
    for k in reversed(range(len(placed))):
        placed[k] = min(placed[k], placed[k + 1] - gap if k + 1 < len(placed) else high)
    answer = [0.0] * len(wanted)
    for k, i in enumerate(order):
        answer[i] = placed[k]
    return answer


def text(x: float, y: float, content: str, class_: str = "", anchor: str | None = None) -> Markup:
    return element("text", escape(content), x=float(x), y=float(y), class_=class_ or None, text_anchor=anchor)
