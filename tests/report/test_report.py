"""The report as text: structure, promises, escaping, and data that is missing or odd."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from synthetic_rows import VARIANTS, generation, grid, run_record

from dsdlab.report import render
from dsdlab.report.render import page
from dsdlab.sweep import stats
from dsdlab.sweep.rows import Row

COMMAND = "dsdlab sweep scenarios/quickstart.toml"
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Outline(HTMLParser):
    """Checks nesting, collects sections, text, tags, classes and whatever could fetch something."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.sections: list[str] = []
        self.tags: list[str] = []
        self.classes: list[str] = []
        self.fetches: list[str] = []
        self.styles: list[str] = []
        self.words: dict[str, list[str]] = {}
        self.ids: list[str] = []
        self._open_ids: list[str | None] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.classes += (values.get("class") or "").split()
        if tag == "section":
            self.sections.append(values.get("id") or "")
        for name, value in attrs:
            assert not name.startswith("on"), f"inline handler {name}"
            if name in ("src", "href", "xlink:href", "srcset", "action", "poster", "data"):
                self.fetches.append(value or "")
            if name == "style":
                self.styles.append(value or "")
        if values.get("id"):
            self.ids.append(values["id"] or "")
        if tag not in VOID:
            self.stack.append(tag)
            self._open_ids.append(values.get("id"))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag
        self._open_ids.pop()

    def handle_data(self, data: str) -> None:
        for name in self._open_ids:
            if name:
                self.words.setdefault(name, []).append(data)
        if self.stack and self.stack[-1] == "style":
            self.styles.append(data)

    def text(self, name: str) -> str:
        return " ".join("".join(self.words.get(name, [])).split())


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return grid(reps=2)


@pytest.fixture(scope="module")
def outline(rows: list[Row]) -> Outline:
    return Outline(page(run_record(), rows, COMMAND))


def test_structure(outline: Outline, rows: list[Row]) -> None:
    """The golden outline: which sections, in which order, with how many drawings and rows."""
    assert outline.sections == [
        "latency",
        "break-even",
        "ttft",
        "timeline",
        "acceptance",
        "bytes",
        "inputs",
        "cells",
        "links",
        "exclusions",
        "failures",
        "provenance",
    ]
    assert len(outline.ids) == len(set(outline.ids))
    assert outline.text("verdict") == stats.summarise(rows).verdict
    assert outline.text("exact") == "exact: 192 of 192 generations"
    assert outline.text("command") == COMMAND
    assert outline.classes.count("chart") == 4  # TPOT and TTFT, wide and narrow
    assert outline.classes.count("timeline") == 2 * len(VARIANTS)
    assert outline.classes.count("pt") == 4 * 24  # every cell in every chart
    assert outline.classes.count("theory") == 2 * len(VARIANTS) + 1  # and the legend's sample
    assert "every generation of the grid that was run finished" in outline.text("failures")


def test_numbers_of_a_modelled_link_say_so(outline: Outline) -> None:
    for section in ("latency", "break-even", "ttft", "timeline", "cells", "links"):
        assert "modelled" in outline.text(section), section
    assert "modelled link" in outline.text("verdict")


def test_a_real_link_is_not_called_modelled(rows: list[Row]) -> None:
    import msgspec

    real = [msgspec.structs.replace(row, link="netem") for row in rows]
    text = page(run_record() | {"link": "netem"}, real, COMMAND)
    assert "modelled" not in text.replace("svg.dataset", "")


def test_small_offline_and_atomic(rows: list[Row], tmp_path: Path) -> None:
    out = render(run_record(), rows, tmp_path / "report.html", COMMAND)
    assert out == tmp_path / "report.html"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert out.stat().st_size < 400_000


def test_nothing_can_be_fetched(outline: Outline, rows: list[Row]) -> None:
    text = page(run_record(), rows, COMMAND)
    assert outline.fetches == ["data:,"]
    assert not any("url(" in style or "@import" in style for style in outline.styles)
    assert not re.search(r"\bfetch\(|XMLHttpRequest|WebSocket\(|import\(", text)
    assert not re.search(r"https?://", text)
    assert not {"iframe", "img", "object", "embed", "image", "use"} & set(outline.tags)
    assert "default-src 'none'" in text


def test_a_large_grid_stays_under_a_megabyte() -> None:
    rates: tuple[float | None, ...] = (None, 20.0, 5.0, 1.0)
    variants = (*VARIANTS, ("dsd-sync", 2), ("dsd-sync", 8))
    large = grid(
        rates_mbit=rates,
        losses_pct=(0.0, 1.0),
        temperatures=(0.0, 0.8),
        variants=variants,
        prompts=("p",),
        reps=2,
    )
    text = page(run_record(), large, COMMAND)
    assert len({row.cell for row in large}) == 576
    assert len(text.encode()) < 1_000_000
    assert Outline(text).classes.count("chart") == 2 * 16


def test_everything_the_user_supplies_is_escaped() -> None:
    evil = "</style></script><script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}"
    run: dict[str, Any] = run_record() | {
        "name": evil,
        "scenario_text": evil,
        "kernel": evil,
        "packages": {evil: evil},
        "sysctls": {evil: evil},
        "cpu": evil,
    }
    run["models"] = {"target": {"model_id": evil}, "drafter": {"model_id": evil}}
    rows = [generation(mode, g, rtt, prompt=evil) for mode, g in VARIANTS for rtt in (0.0, 50.0)]
    rows += [generation("dsd-sync", 4, 50.0, prompt=evil, rep=k) for k in (1, 2)]
    for row in rows:
        row.policy = row.runtime = row.link = evil
        row.bytes_up = {evil: 10}
    rows[-1].status, rows[-1].error = "failed", evil
    rows[-2].mode = evil
    text = page(run, rows, evil)
    outline = Outline(text)
    assert outline.tags.count("script") == 1
    assert "img" not in outline.tags
    assert "49" not in outline.text("command")
    assert evil in "".join(outline.words["command"])


def test_failures_and_gaps_are_shown(rows: list[Row]) -> None:
    import msgspec

    broken = [msgspec.structs.replace(row) for row in rows]
    broken[0].status, broken[0].error = "timeout", "no answer within 120 s"
    broken[1].status, broken[1].error = "failed", "verifier refused: no free slot"
    broken[2].exact = False
    broken[3].reconnects = 2
    outline = Outline(page(run_record(), broken, COMMAND))
    assert "1 of 8" in outline.text("incomplete")
    failures = outline.text("failures")
    assert "no answer within 120 s" in failures
    assert "verifier refused: no free slot" in failures
    assert "2 reconnections" in failures
    assert outline.text("exact") == "exact: 189 of 190 generations"
    assert "bad" in outline.classes


def test_expected_cells_of_the_run_are_checked(rows: list[Row]) -> None:
    cells = [{"id": row.cell, "generations": 8} for row in rows] + [{"id": "feedbeef", "generations": 8}]
    outline = Outline(page(run_record() | {"cells": cells}, rows, COMMAND))
    assert "8 of 8 in cell feedbeef" in outline.text("incomplete")


@pytest.mark.parametrize(
    "variants",
    [(("cloud-ar", 0),), (("dsd-sync", 4),), (("edge-sd", 4),), (("dsd-stream", 0), ("cloud-ar", 0))],
)
@pytest.mark.parametrize("rtts", [(0.0,), (50.0,), (1.0, 500.0)])
def test_partial_sweeps_still_give_a_page(variants: Any, rtts: Any) -> None:
    rows = grid(variants=variants, rtts_ms=rtts, prompts=("p",), reps=1, tokens=12)
    outline = Outline(page({}, rows, COMMAND))
    assert outline.text("verdict")
    assert "nan" not in outline.text("cells")


def test_a_single_token_and_only_failures() -> None:
    one = generation("dsd-sync", 4, 20.0)
    one.tokens, one.tpot_ms, one.itl_p95_ms = 1, None, None
    assert "–" in Outline(page({}, [one], COMMAND)).text("cells")
    failed = Row(
        cell="c", rep=0, status="failed", error="x", mode="dsd-sync", policy="static", gamma=4,
        runtime="process", link="modelled", rtt_ms=5.0,
    )  # fmt: skip
    outline = Outline(page(run_record(), [failed], COMMAND))
    assert outline.text("verdict").startswith("No generation of this sweep succeeded")
    assert "chart" not in outline.classes


def test_no_rows_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no results"):
        render(run_record(), [], tmp_path / "report.html", COMMAND)
    assert list(tmp_path.iterdir()) == []


def test_coordinates_are_finite(rows: list[Row]) -> None:
    text = page(run_record(), rows, COMMAND)
    for match in re.finditer(r'\b(?:x1|x2|y1|y2|x|y|cx|cy|width|height)="([^"]+)"', text):
        assert math.isfinite(float(match[1]))
    assert not re.search(r"(?i)\b(nan|inf)\b", "".join(re.findall(r'\bd="[^"]*"', text)))
