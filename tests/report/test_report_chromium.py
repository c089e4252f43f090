"""The report in a real browser: silent, offline, and working."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from devtools import browse
from synthetic_rows import grid, prediction, run_record

from dsdlab.report import render
from dsdlab.sweep import stats

pytestmark = pytest.mark.chromium


def test_opens_without_error_or_request(tmp_path: Path) -> None:
    rows = grid(reps=1)
    file = render(run_record(), rows, tmp_path / "report.html", "dsdlab sweep scenarios/quickstart.toml")
    verdict = stats.summarise(rows).verdict

    async def visit() -> None:
        async with browse(file.as_uri()) as page:
            shown = await page.look("document.getElementById('verdict').textContent")
            assert " ".join(shown.split()) == verdict
            count = await page.look("document.getElementById('exact').innerText")
            assert count == "exact: 96 of 96 generations"
            assert await page.look(
                "[...document.querySelectorAll('svg.wide')].every(s => s.clientHeight > 60)"
            )

            # hover: the tooltip names every mode at that RTT
            box = await page.look(
                "(() => { const s = document.querySelector('svg.chart.wide'); s.scrollIntoView();"
                "const b = s.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2] })()"
            )
            await page.hover(*box)
            tip = await page.look("document.getElementById('tip').innerText")
            assert "100 ms RTT" in tip
            assert "modelled" in tip
            assert all(mode in tip for mode in ("cloud-ar", "cloud-sd", "edge-sd", "dsd-sync"))
            await page.hover(2, 2)
            assert await page.look("document.getElementById('tip').hidden")

            # sort by TPOT: ascending, then descending
            column = (
                "[...document.querySelectorAll('#cells tbody tr')]"
                ".map(r => parseFloat(r.cells[3].textContent.replaceAll(',', '')))"
            )
            press = "document.querySelectorAll('#cells th button')[3].click()"
            before = await page.look(column)
            await page.look(press)
            assert await page.look(column) == sorted(before) != before
            await page.look(press)
            assert await page.look(column) == sorted(before, reverse=True)

            # phone: only boxes scroll sideways, never the page
            await page.resize(390, 844)
            assert await page.look("document.documentElement.scrollWidth") <= 390
            assert await page.look("document.querySelector('svg.chart.wide').clientHeight") == 0
            assert await page.look("document.querySelector('svg.chart.narrow').clientWidth") > 300

            outside = [url for url in page.requests if not url.startswith(("file:", "data:"))]
            assert (outside, page.complaints) == ([], [])
            assert [url for url in page.requests if url.startswith("file:")] == [file.as_uri()]

    asyncio.run(visit())


def test_simulated_and_measured_together(tmp_path: Path) -> None:
    """Hovering compares both; errors sort as numbers; a phone has room for it, the dark its own colours."""
    rows = grid(reps=1, rates_mbit=(None, 5.0), losses_pct=(0.0, 1.0))
    file = render(run_record(), rows, tmp_path / "report.html", "dsdlab sweep x.toml", prediction(rows))

    async def visit() -> None:
        async with browse(file.as_uri()) as page:
            box = await page.look(
                "(() => { const s = document.querySelector('svg.chart.wide'); s.scrollIntoView();"
                "const b = s.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2] })()"
            )
            await page.hover(*box)
            tip = await page.look("document.getElementById('tip').innerText")
            assert "measured median" in tip
            assert len(re.findall(r"\d ms, [+−]?\d+\.\d %", tip)) == 4
            line = "document.querySelector('svg.chart.wide .sim')"
            assert await page.look(f"{line}.getBoundingClientRect().width") > 100
            light = await page.look(f"getComputedStyle({line}).stroke")

            # errors sort by value, the true minus sign included
            column = (
                "[...document.querySelectorAll('#simulator .errors tbody tr')]"
                ".map(r => parseFloat(r.cells[6].textContent.replace('−', '-')))"
            )
            press = "document.querySelectorAll('#simulator .errors th button')[6].click()"
            assert (
                await page.look("document.querySelectorAll('.errors th')[6].innerText.trim()") == "error, %"
            )
            before = await page.look(column)
            await page.look(press)
            assert await page.look(column) == sorted(before) != before

            features = [{"name": "prefers-color-scheme", "value": "dark"}]
            await page.call("Emulation.setEmulatedMedia", features=features)
            assert await page.look(f"getComputedStyle({line}).stroke") != light
            slow = "getComputedStyle(document.querySelector('.map .slow')).backgroundColor"
            assert "rgba(0, 0, 0, 0)" not in await page.look(slow)

            await page.resize(390, 844)
            assert await page.look("document.documentElement.scrollWidth") <= 390
            assert await page.look(
                "[...document.querySelectorAll('.map, .totals')].every(t => t.offsetWidth <= 360)"
            )
            assert page.complaints == []

    asyncio.run(visit())


def test_the_browser_test_would_notice(tmp_path: Path) -> None:
    """A page with an error and a foreign image is caught by the same instruments."""
    file = tmp_path / "bad.html"
    file.write_text(
        '<!doctype html><meta charset="utf-8"><img src="http://127.0.0.1:9/x.png">'
        "<script>console.error('loud'); throw new Error('broken')</script>"
    )

    async def visit() -> None:
        async with browse(file.as_uri()) as page:
            assert "http://127.0.0.1:9/x.png" in page.requests
            assert any("loud" in c for c in page.complaints)
            assert any("broken" in c for c in page.complaints)

    asyncio.run(visit())
