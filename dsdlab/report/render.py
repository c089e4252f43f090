"""Rows and provenance in, one self-contained HTML file out."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from dsdlab import __version__
from dsdlab.nodes.request import STREAMING_MODES
from dsdlab.report import plots, simulator, timeline
from dsdlab.report.links import link_table, tcp_table
from dsdlab.report.plots import Mark, Panel, Point, Series
from dsdlab.report.svg import mode_class
from dsdlab.sim.prediction import Prediction
from dsdlab.sweep import stats
from dsdlab.sweep.breakeven import BreakEven
from dsdlab.sweep.closed_form import Inputs, plain_conditions
from dsdlab.sweep.compare import compare
from dsdlab.sweep.comparison import Comparison, signed_pct
from dsdlab.sweep.keys import Condition, Variant, condition_of, pair_of, variant_of
from dsdlab.sweep.rows import Row
from dsdlab.sweep.stats import CellSummary, Summary
from dsdlab.sweep.verdict import best_of

CURVE_STEPS = 12
MOST_SERIES = 9  # beyond this many variants a mode is drawn at its best setting
MOST_POSITIONS = 16  # of the acceptance table
MOST_DECISIONS = 12
MANY_PANELS = 4  # beyond this one drawing serves wide and narrow screens
CLAUSE = "; the simulator"  # how the verdict's last clause begins
UNBROKEN = re.compile(r"([a-z]+-[a-z]+(?: \+ free run)?(?: \(γ = \d+)?|\d+ ms(?: RTT)?|\[[^\]]*\])")


class ByteRow(NamedTuple):
    variant: Variant
    direction: str
    total: float  # bytes per committed token
    frames: list[Frame]


class Frame(NamedTuple):
    name: str
    per_token: float
    width: float  # percent of the widest row


class Failure(NamedTuple):
    variant: Variant
    rtt_ms: float
    status: str
    error: str
    times: int


def fixed(value: float) -> str:
    """Two decimals, a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.2f}"


class Line(NamedTuple):
    """One curve of every figure: a variant, or all settings of a mode of which the best is drawn at each RTT.

    rank: its place among the curves of its mode.
    """

    mode: str
    label: str
    rank: int
    members: list[Variant]


def _lines(variants: Sequence[Variant]) -> list[Line]:
    groups: dict[object, list[Variant]] = {}
    for variant in variants:
        way = (variant.mode, variant.free_run, variant.beside > 0)
        groups.setdefault(way if len(variants) > MOST_SERIES else variant, []).append(variant)
    seen: Counter[str] = Counter()
    lines = []
    for members in groups.values():
        first, label = members[0], members[0].label
        if len(members) > 1:
            what = "γ" if "windows" in best_of(members) else "setting"
            beside = first.beside if len({m.beside for m in members}) == 1 else 0
            alike = Variant(first.mode, "", 0, free_run=first.free_run, beside=beside)
            label = f"{alike.label}, best {what}"
        lines.append(Line(first.mode, label, seen[first.mode], members))
        seen[first.mode] += 1
    return lines


def _best_cells(summary: Summary, line: Line, condition: Condition) -> list[CellSummary]:
    """A line's cell at each RTT, in rising order: the fastest where it has several."""
    best: dict[float, CellSummary] = {}
    for cell in summary.cells:
        if cell.condition == condition and cell.variant in line.members:
            rival = best.get(cell.rtt_ms)
            if rival is None or not cell.tpot_ms.value >= rival.tpot_ms.value:  # NaN loses
                best[cell.rtt_ms] = cell if rival is None or not math.isnan(cell.tpot_ms.value) else rival
    return [best[rtt] for rtt in sorted(best)]


def _theory(own: Sequence[Inputs], rtts: Sequence[float], condition: Condition) -> list[tuple[float, float]]:
    """The closed form over the span of the RTTs; of several settings the least."""
    if not own or not rtts:
        return []
    low, high = min(rtts), max(rtts)
    grid = [low + (high - low) * k / CURVE_STEPS for k in range(CURVE_STEPS + 1)]
    curves = [values for inputs in own if (values := inputs.tpot_ms(grid, condition.rate_mbit))]
    return list(zip(grid, map(min, *curves, curves[0]), strict=True)) if curves else []


def _mark(break_evens: Sequence[BreakEven], condition: Condition) -> list[Mark]:
    """The break-even of the distributed mode that tolerates most, if it crosses at all."""
    crossing = [
        b
        for b in break_evens
        if b.condition == condition
        and b.baseline.mode == "cloud-ar"
        and b.variant.mode.startswith("dsd-")
        and b.state == "crosses"
    ]
    if not crossing:
        return []
    best = max(crossing, key=lambda b: b.rtt_ms)
    label = f"break-even {best.bound(best.rtt_ms)} ms {best.interval_text}".strip()
    return [Mark(best.variant.mode, best.rtt_ms, best.lo_ms, best.hi_ms, label)]


def _simulated(
    comparison: Comparison | None,
    cells: Sequence[CellSummary],
    line: Line,
    condition: Condition,
    measure: str,
) -> tuple[list[Point], dict[float, str]]:
    """The simulator's points of one line, and what hovering says of each: "36.2 ms, −2.1 %".

    Those of the cells that are drawn; what was only simulated is drawn too, where a line has one setting.
    """
    points, said = [], {}
    drawn = {(cell.variant, cell.rtt_ms) for cell in cells}
    for cell in comparison.cells if comparison is not None else ():
        alone = len(line.members) == 1 and cell.variant == line.members[0]
        if cell.condition != condition or not (alone or (cell.variant, cell.rtt_ms) in drawn):
            continue
        compared = cell.tpot if measure == "tpot_ms" else cell.ttft
        value = compared.predicted
        if math.isnan(value.value):
            continue
        points.append(Point(cell.rtt_ms, value.value, value.lo, value.hi, value.n))
        error = f", {signed_pct(compared.error_pct)} %" if not math.isnan(compared.error_pct) else ""
        said[cell.rtt_ms] = f"{plots.short(value.value)} ms{error}{' †' if cell.outside else ''}"
    return sorted(points, key=lambda p: p.x), said


def _panels(
    summary: Summary, measure: str, plain: set[Condition], comparison: Comparison | None
) -> list[dict[str, Any]]:
    """Drawn panels of "tpot_ms" or "ttft_ms", one per condition that has data."""
    inputs = {(i.variant, i.temperature): i for i in summary.inputs}
    panels = []
    for condition in summary.conditions:
        series = []
        for line in _lines(summary.variants):
            cells = _best_cells(summary, line, condition)
            estimates = [(c.rtt_ms, getattr(c, measure)) for c in cells]
            points = [Point(x, e.value, e.lo, e.hi, e.n) for x, e in estimates if not math.isnan(e.value)]
            if not points:
                continue
            theory = []
            if measure == "tpot_ms" and condition in plain:
                keys = ((member, condition.temperature) for member in line.members)
                own = [inputs[key] for key in keys if key in inputs]
                theory = _theory(own, [p.x for p in points], condition)
            simulated, errors = _simulated(comparison, cells, line, condition, measure)
            series.append(Series(line.mode, line.label, line.rank, points, theory, simulated, errors))
        if series:
            marks = _mark(summary.break_evens, condition) if measure == "tpot_ms" else []
            panels.append(
                Panel(condition.label, series, condition.modelled, marks, simulated=condition.simulated)
            )
    alone, many = len(panels) == 1, len(panels) > MANY_PANELS
    size = (960, 430) if alone and measure == "tpot_ms" else (960, 330) if alone else (470, 320)
    unit = "TPOT, ms per token" if measure == "tpot_ms" else "TTFT, ms"
    extent = plots.y_range(panels) if panels else (0.0, 1.0)

    def draw(panel: Panel, width: int, height: int, labels: bool, class_: str) -> Markup:
        return plots.curves(
            panel,
            width=width,
            height=height,
            unit=unit,
            extent=extent,
            direct_labels=labels,
            class_=class_,
        )

    return [
        {
            "title": panel.title,
            "modelled": panel.modelled,
            "wide": draw(panel, 400, 300, False, "") if many else draw(panel, *size, alone, "wide"),
            "narrow": "" if many else draw(panel, 360, 310, False, "narrow"),
        }
        for panel in panels
    ]


PRICES = (
    ("target_ms", "Target time, ms per committed token", " ms"),
    ("wasted", "Drafts wasted per committed token", ""),
)


def _price_panels(summary: Summary) -> list[dict[str, Any]]:
    """What a committed token costs besides time, under the least constrained condition that has data."""
    drawn = []
    for measure, title, suffix in PRICES:
        for condition in summary.conditions:
            series = []
            for line in _lines(summary.variants):
                known = [(c, getattr(c, measure)) for c in _best_cells(summary, line, condition)]
                points = [
                    Point(c.rtt_ms, y, math.nan, math.nan, c.generations - c.excluded)
                    for c, y in known
                    if not math.isnan(y)
                ]
                if points and any(p.y for p in points):
                    series.append(Series(line.mode, line.label, line.rank, points))
            if not series:
                continue
            panel = Panel(title, series, condition.modelled, simulated=condition.simulated)
            _, most = plots.y_range([panel])

            style: dict[str, Any] = {"height": 290, "unit": "", "extent": (most, most), "suffix": suffix}
            drawn.append(
                {
                    "title": title,
                    "modelled": panel.modelled,
                    "wide": plots.curves(panel, width=470, direct_labels=False, class_="wide", **style),
                    "narrow": plots.curves(panel, width=360, direct_labels=False, class_="narrow", **style),
                }
            )
            break
    return drawn


def _best_windows(cells: Sequence[CellSummary], rtt_ms: float, condition: Condition) -> list[Variant]:
    """Per mode, and for a free run apart, the fastest variant at that RTT."""
    best: dict[tuple[str, bool], CellSummary] = {}
    for cell in cells:
        if cell.rtt_ms == rtt_ms and cell.condition == condition and not math.isnan(cell.tpot_ms.value):
            way = (cell.variant.mode, cell.variant.free_run)
            rival = best.get(way)
            if rival is None or cell.tpot_ms.value < rival.tpot_ms.value:
                best[way] = cell
    return sorted((c.variant for c in best.values()), key=lambda v: v.order)


def _timelines(summary: Summary, rows: Sequence[Row]) -> dict[str, Any]:
    """One generation per mode, all of the same prompt, seed and repetition, near the middle of the grid.

    Among the pairs that every mode has, the one whose distributed TPOT is nearest to its cell's median.
    """
    condition = summary.conditions[0]
    usable = [c for c in summary.cells if c.condition == condition and c.generations > c.excluded]
    rtts = sorted({c.rtt_ms for c in usable})
    if not rtts:
        return {}
    rtt_ms = rtts[len(rtts) // 2]
    variants = _best_windows(summary.cells, rtt_ms, condition)
    found: dict[Variant, dict[tuple[str, int, int], Row]] = {v: {} for v in variants}
    for row in rows:
        here = (condition_of(row), row.rtt_ms) == (condition, rtt_ms)
        if here and row.usable and row.events and variant_of(row) in found:
            found[variant_of(row)][pair_of(row)] = row
    found = {v: pairs for v, pairs in found.items() if pairs}
    shared = set.intersection(*(set(pairs) for pairs in found.values())) if found else set()
    if not shared:
        return {}
    judge = next((v for v in found if v.mode.startswith("dsd-")), next(iter(found)))
    median = next(c.tpot_ms.value for c in usable if (c.variant, c.rtt_ms) == (judge, rtt_ms))
    pair = min(sorted(shared), key=lambda p: abs((found[judge][p].tpot_ms or math.inf) - median))
    chosen = {v: pairs[pair] for v, pairs in found.items()}
    until_s = timeline.span_s(list(chosen.values()))
    drawn = []
    for index, (variant, row) in enumerate(chosen.items()):
        tokens = sum(a.tokens for a in timeline.arrivals(row) if a.t_s <= until_s)
        axis = index == len(chosen) - 1
        drawn.append(
            {
                "variant": variant,
                "decisions": row.decisions[:MOST_DECISIONS],
                "more_decisions": max(len(row.decisions) - MOST_DECISIONS, 0),
                "note": f"{tokens} token{'' if tokens == 1 else 's'} in {plots.short(until_s * 1e3)} ms",
                "wide": timeline.timeline(row, until_s, width=960, class_="wide", axis=axis),
                "narrow": timeline.timeline(row, until_s, width=360, class_="narrow", axis=axis),
            }
        )
    return {
        "timelines": drawn,
        "timeline_rtt": rtt_ms,
        "timeline_prompt": pair[0],
        "timeline_modelled": condition.modelled,
        "timeline_changes": {
            "cut" if change.cut else "shift" for row in chosen.values() for change in timeline.changes_of(row)
        },
        "timeline_stalls": any(timeline.stalls_of(row) for row in chosen.values()),
    }


def _byte_rows(rows: Sequence[Row], variants: Sequence[Variant]) -> list[ByteRow]:
    found: list[tuple[Variant, str, dict[str, float]]] = []
    for variant in variants:
        own = [row for row in rows if row.usable and variant_of(row) == variant]
        tokens = sum(row.tokens for row in own)
        for direction, field in (("up", "bytes_up"), ("down", "bytes_down")):
            totals: Counter[str] = Counter()
            for row in own:
                totals.update(getattr(row, field))
            if tokens and sum(totals.values()):
                found.append((variant, direction, {n: b / tokens for n, b in totals.most_common() if b}))
    widest = max((sum(frames.values()) for _, _, frames in found), default=1.0)
    return [
        ByteRow(
            variant,
            direction,
            sum(frames.values()),
            [Frame(name, share, 100 * share / widest) for name, share in frames.items()],
        )
        for variant, direction, frames in found
    ]


def _failures(rows: Sequence[Row]) -> list[Failure]:
    counts: Counter[tuple[Variant, float, str, str]] = Counter()
    for row in rows:
        if row.status != "ok":
            counts[variant_of(row), row.rtt_ms, row.status, row.error or "no reason recorded"] += 1
    ordered = sorted(counts.items(), key=lambda f: (f[0][0].order, f[0][1:]))
    return [Failure(*key, count) for key, count in ordered]


def _break_rows(
    summary: Summary, plain: set[Condition], comparison: Comparison | None
) -> list[dict[str, Any]]:
    inputs = {(i.variant, i.temperature): i for i in summary.inputs}
    rows = []
    for item in summary.break_evens:
        value = "none" if item.state == "never" else item.bound(item.rtt_ms)
        other = comparison.break_even(item) if comparison is not None else None
        simulated = "–" if other is None else "none" if other.state == "never" else other.bound(other.rtt_ms)
        theory = "–"
        own = inputs.get((item.variant, item.condition.temperature))
        base = inputs.get((item.baseline, item.condition.temperature))
        if own is not None and base is not None and item.condition in plain:
            flat = base.tpot_ms([0.0], item.condition.rate_mbit)
            solved = own.break_even_ms(flat[0], item.condition.rate_mbit) if flat else None
            if solved is not None:
                theory = "∞" if math.isinf(solved) else plots.short(solved) if solved >= 0 else "none"
        rows.append({"item": item, "value": value, "theory": theory, "simulated": simulated})
    return rows


def _model_text(info: Any) -> str:
    if not isinstance(info, Mapping):
        return str(info)
    parts = [str(info.get("model_id", ""))]
    params = info.get("n_params")
    if isinstance(params, int | float) and params:
        parts.append(f"{params / 1e6:,.1f} M parameters")
    parts += [str(info[key]) for key in ("precision",) if info.get(key)]
    if info.get("digest"):
        parts.append(f"sha256 {str(info['digest'])[:16]}…")
    return ", ".join(part for part in parts if part)


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_flat(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_flat(inner) for inner in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _provenance(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    models = run.get("models") or {}
    git = run.get("git") or {}
    cores = f", {run['cores']} cores" if run.get("cores") else ""
    items: Iterable[tuple[str, str]] = (
        ("target", _model_text(models["target"]) if models.get("target") else ""),
        ("drafter", _model_text(models["drafter"]) if models.get("drafter") else ""),
        ("runtime", _flat(run.get("runtime", ""))),
        ("link", _flat(run.get("link", ""))),
        ("bed", _flat(run.get("bed") or "")),
        ("references", str(run.get("references", ""))),
        ("bit-exactness self-test", _flat(run.get("selftest") or "")),
        ("started", str(run.get("started_at", ""))),
        ("code", f"{git.get('sha', '')}{' + local changes' if git.get('dirty') else ''}"),
        ("processor", f"{run.get('cpu', '')}{cores}"),
        ("kernel", str(run.get("kernel", ""))),
        ("packages", _flat(run.get("packages") or "")),
        ("sysctls", _flat(run.get("sysctls") or "")),
    )
    return [(key, value) for key, value in items if value]


def expected_generations(run: Mapping[str, Any]) -> dict[str, int] | None:
    """Good generations wanted per cell id, where run.json's cells say so ("id" or "cell", "generations")."""
    expected = {}
    for cell in run.get("cells") or []:
        if isinstance(cell, Mapping) and isinstance(cell.get("generations"), int):
            expected[str(cell.get("id", cell.get("cell", "")))] = cell["generations"]
    return expected or None


def _split(verdict: str) -> list[tuple[bool, Markup]]:
    """The verdict in pieces: what was found, and (True) the parentheses that say for what it holds.

    Those are the last one of the finding and that of the simulator's clause. Names and intervals stay whole.
    """
    main, clause, last = verdict.removesuffix(".").partition(CLAUSE)
    whole = Markup('<span class="nb">{}</span>')
    pieces: list[tuple[bool, str]] = []
    for part in (main, clause + last):
        if not part:
            continue
        head, bracket, tail = part.rpartition(" (")
        if bracket and tail.endswith(")"):
            pieces += [(False, head), (True, f" ({tail}")]
        else:
            pieces.append((False, part))
    pieces.append((pieces[-1][0], "."))
    return [
        (
            aside,
            Markup("").join(
                whole.format(p) if k % 2 else escape(p) for k, p in enumerate(UNBROKEN.split(text))
            ),
        )
        for aside, text in pieces
    ]


def _template(name: str) -> str:
    return (resources.files("dsdlab.report") / "templates" / name).read_text(encoding="utf-8")


def page(
    run: Mapping[str, Any], rows: Sequence[Row], command: str, prediction: Prediction | None = None
) -> str:
    """The report as HTML text. Raises ValueError where there are no rows, CompareError (one line) for a
    prediction that cannot be held against them."""
    from jinja2 import Environment, StrictUndefined

    simulated = any(condition_of(row).simulated for row in rows)
    comparison = compare(rows, prediction) if prediction is not None and not simulated else None
    summary = stats.summarise(
        rows, expected=expected_generations(run), allow_incomplete=True, comparison=comparison
    )
    rows = stats.counted_rows(rows)
    plain = plain_conditions(rows)
    links = link_table(rows)
    lines = _lines(summary.variants)
    priced = any(row.wasted is not None for row in rows)
    models = run.get("models") or {}
    names = [(models.get(role) or {}).get("model_id") for role in ("target", "drafter")]
    conditions = summary.conditions
    show = {
        "rate": any(c.rate_mbit is not None for c in conditions),
        "loss": any(c.loss_pct for c in conditions),
        "temperature": any(c.temperature for c in conditions),
        "extra": any(c.extra for c in conditions),
    }
    differing = [
        title
        for key, title in (
            ("rate", "Mbit/s"),
            ("loss", "loss, %"),
            ("extra", "also"),
            ("temperature", "temp."),
        )
        if show[key]
    ]
    columns = ["mode", "RTT", "link", *differing]
    columns += ["TPOT", "p95", "p99", "× cloud-ar", "TTFT", "ITL p95", "α", "τ"]
    columns += ["target", "wasted", "exact"] if priced else ["exact"]
    columns += ["failed"] if summary.failures else []
    columns += ["excluded"] if summary.excluded else []
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    sim = simulator.section(comparison, prediction, run) if comparison and prediction else None
    tpot_panels = _panels(summary, "tpot_ms", plain, comparison)
    context: dict[str, Any] = {
        "timelines": [],
        "timeline_changes": set(),
        "timeline_stalls": False,
        **_timelines(summary, rows),
        "s": summary,
        "verdict": _split(summary.verdict),
        "title": str(run.get("name", "sweep")),
        "started": str(run.get("started_at", ""))[:16].replace("T", " "),
        "css": Markup(_template("style.css")),
        "js": Markup(_template("script.js")),
        "version": __version__,
        "command": command,
        "scenario_text": str(run.get("scenario_text", "")),
        "provenance": _provenance(run),
        "pair": " / ".join(str(name) for name in names if name),
        "all_exact": summary.exact == summary.generations > 0,
        "compared_some_wrong": summary.exact < summary.compared,
        "any_modelled": any(c.modelled for c in conditions),
        "lossy": show["loss"],
        "closed_form": bool(plain) and any(i.tpot_ms([0.0], None) for i in summary.inputs),
        "legend_items": [
            {"symbol": plots.key_symbol(line.mode, line.rank, simulated=simulated), "label": line.label}
            for line in lines
        ],
        "best_drawn": any(len(line.members) > 1 for line in lines),
        "priced": priced,
        "price_panels": _price_panels(summary) if priced else [],
        "tpot_panels": tpot_panels,
        "ttft_panels": _panels(summary, "ttft_ms", plain, comparison),
        "break_rows": _break_rows(summary, plain, comparison),
        "positions": min(max((len(a.per_position) for a in summary.acceptance), default=0), MOST_POSITIONS),
        "more_positions": any(len(a.per_position) > MOST_POSITIONS for a in summary.acceptance),
        "byte_rows": _byte_rows(rows, summary.variants),
        "links": links,
        "link_columns": {
            "rate": any(way.rate_asked_mbit is not None for link in links for way in (link.up, link.down)),
            "probed": any(link.probed for link in links),
            "bursts": any(way.lost for link in links for way in (link.up, link.down)),
            "counted": any(link.counted for link in links),
        },
        "tcp": tcp_table(rows),
        "failures": _failures(rows),
        "reconnects": sum(row.reconnects for row in rows),
        "stale": sum(row.stale_frames for row in rows),
        "show": show,
        "cell_columns": columns,
        "mode_class": mode_class,
        "short": plots.short,
        "fixed": fixed,
        "simulated": simulated,
        "sim": sim,
        "error_columns": ["mode", "RTT", *differing, *(sim["columns"] if sim is not None else ())],
        "simulation": simulator.provenance(prediction, run) if simulated and prediction else [],
        "note_of": simulator.note_of,
        "signed_pct": signed_pct,
        "streams": any(i.variant.mode in STREAMING_MODES for i in summary.inputs),
        "inputs": [i for i in summary.inputs if not math.isnan(i.t_verify_s)],
    }
    return environment.from_string(_template("report.html.j2")).render(context)


def render(
    run: Mapping[str, Any],
    rows: Sequence[Row],
    out: Path,
    command: str,
    prediction: Prediction | None = None,
) -> Path:
    """Write the report of a sweep to `out`, one self-contained HTML file, and return `out`.

    run: the provenance of run.json; missing entries are left out. command: how to repeat the sweep.
    prediction: the simulation to hold the rows against, or, where the rows are a simulation themselves
    (`dsdlab.sweep.compare.prediction_rows`), what they were made from.
    An incomplete grid is reported on the page, not refused. The file appears whole or not at all.
    Raises ValueError where there are no rows, CompareError where the prediction does not fit them.
    """
    text = page(run, rows, command, prediction)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return out
