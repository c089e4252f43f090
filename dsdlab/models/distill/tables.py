"""A distillation's numbers as Markdown."""

from __future__ import annotations

from typing import Any


def _row(*cells: object) -> str:
    return "| " + " | ".join(f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells) + " |"


def acceptance(found: dict[str, Any]) -> str:
    """One row per task and their mean."""
    gamma = found["gamma"]
    lines = [
        _row("task", "answers", "α greedy", "95 %", "α lookup first", f"τ (γ = {gamma})", "τ lookup first",
             "Σ min(p, q)", "coupled"),
        "|" + "---|" * 9,
    ]  # fmt: skip
    for task, t in found["tasks"].items():
        low, high = t["alpha_95"] or (float("nan"), float("nan"))
        lines.append(
            _row(task, t["answers"], t["alpha"], f"{low:.3f}–{high:.3f}", t["alpha_lookup_first"], t["tau"],
                 t["tau_lookup_first"], t["overlap"], t["coupled"])
        )  # fmt: skip
    lines.append(
        _row("mean", sum(t["answers"] for t in found["tasks"].values()), found["alpha"], "",
             found["alpha_lookup_first"], found["tau"], found["tau_lookup_first"], found["overlap"],
             found["coupled"])
    )  # fmt: skip
    return "\n".join(lines)


def positions(found: dict[str, Any], key: str = "by_position") -> str:
    """Acceptance at each place of the window, given that all places before it were accepted (95 %)."""
    gamma = found["gamma"]
    lines = [_row("task", *range(1, gamma + 1)), "|" + "---|" * (gamma + 1)]
    for task, t in found["tasks"].items():
        spans = t[key + "_95"] or [(float("nan"), float("nan"))] * gamma
        cells = [f"{x:.2f} ({low:.2f}–{high:.2f})" for x, (low, high) in zip(t[key], spans, strict=True)]
        lines.append(_row(task, *cells))
    return "\n".join(lines)


def shapes(candidates: list[dict[str, Any]]) -> str:
    """One row per shape that was trained."""
    rtts = list(candidates[0]["tpot_ms"])
    head = ["shape", "parameters", "MB", "ms per drafted token", "positions", "α", "α lookup first"]
    lines = [_row(*head, *(f"ms per token, RTT {r}" for r in rtts)), "|" + "---|" * (len(head) + len(rtts))]
    for c in candidates:
        v = c["validation"]
        lines.append(
            _row(c["shape"], f"{c['parameters'] / 1e6:.1f} M", f"{c['bytes'] / 1e6:.1f}",
                 f"{c['t_draft_ms']:.2f}",
                 f"{c['recipe']['positions']:,}", v["alpha"], v["alpha_lookup_first"],
                 *(f"{c['tpot_ms'][r]:.1f}" for r in rtts))
        )  # fmt: skip
    return "\n".join(lines)


def curve(points: list[dict[str, Any]]) -> str:
    """The learning curve of one shape on validation prompts."""
    lines = [_row("positions", "minutes", "α", "α lookup first"), "|---|---|---|---|"]
    lines += [
        _row(f"{p['positions']:,}", f"{p['seconds'] / 60:.0f}", p["alpha"], p["lookup_first"]) for p in points
    ]
    return "\n".join(lines)


def report(result: dict[str, Any]) -> str:
    """The whole report."""
    parts = [
        f"# Distillation: {result['chosen']}",
        "## Held-out test prompts, the exported file",
        acceptance(result["test"]),
        "## By place in the window, the drafter alone",
        positions(result["test"]),
        "## By place in the window, prompt lookup first",
        positions(result["test"], "by_position_lookup_first"),
        "## Shapes (validation prompts)",
        shapes(result["candidates"]),
    ]
    for c in result["candidates"]:
        parts += [f"## Learning curve of {c['shape']} (validation prompts)", curve(c["curve"])]
    return "\n\n".join(parts) + "\n"
