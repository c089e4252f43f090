"""Scales, ticks, label placement, timelines."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_rows import generation

from dsdlab.report import svg, timeline


@given(st.floats(0.001, 1e5), st.floats(1.001, 1e4), st.integers(2, 9))
def test_linear_ticks_are_round_inside_and_about_as_many(low: float, factor: float, about: int) -> None:
    high = low * factor
    ticks = svg.linear_ticks(low, high, about)
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert all(low * (1 - 1e-6) <= t <= high * (1 + 1e-6) for t in ticks)
    assert len(ticks) <= about + 1
    assert max(steps, default=0.0) - min(steps, default=0.0) <= 1e-6 * high


def test_ticks_by_example() -> None:
    assert svg.linear_ticks(0, 136, 6) == [0, 25, 50, 75, 100, 125]
    assert svg.log_ticks(3, 210) == [5, 10, 20, 50, 100, 200]


@given(st.lists(st.floats(0, 300), min_size=1, max_size=7))
def test_labels_keep_their_distance_and_their_order(wanted: list[float]) -> None:
    placed = svg.spread(wanted, 17, 0, 300)
    ordered = sorted(range(len(wanted)), key=lambda i: wanted[i])
    for a, b in itertools.pairwise(ordered):
        assert placed[b] - placed[a] > 16
    assert min(placed) >= -1
    assert max(placed) <= 301


@pytest.mark.parametrize(
    ("value", "text"), [(-0.0, "0"), (-0.001, "0"), (-0.5, "-0.5"), (10.0, "10"), (1.234, "1.23")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert svg.number(value) == text


def test_elements_escape() -> None:
    drawn = svg.element("text", "<b>&", data_name='"><script>', x=1.5, y=None)
    assert drawn == '<text data-name="&#34;&gt;&lt;script&gt;" x="1.5">&lt;b&gt;&amp;</text>'


@pytest.mark.parametrize("mode", ["cloud-ar", "cloud-sd", "edge-sd", "dsd-sync"])
def test_arrivals_hold_every_token(mode: str) -> None:
    row = generation(mode, 0 if mode == "cloud-ar" else 4, 50.0)
    found = timeline.arrivals(row)
    assert sum(a.tokens for a in found) == row.tokens
    assert [a.t_s for a in found] == sorted(a.t_s for a in found)
    assert row.ttft_ms == pytest.approx(found[0].t_s * 1e3)


def test_arrivals_are_left_out_where_events_do_not_match_windows() -> None:
    row = generation("dsd-sync", 4, 50.0)
    row.windows = row.windows[:-3]
    assert timeline.arrivals(row) == []


@pytest.mark.parametrize(
    ("kind", "mode", "lane"),
    [
        ("draft", "dsd-sync", "edge"),
        ("verify", "dsd-sync", "cloud"),
        ("draft", "cloud-sd", "cloud"),
        ("verify", "edge-sd", "edge"),
        ("decode", "cloud-ar", "cloud"),
        ("flight_up", "dsd-sync", "up"),
        ("flight_down", "cloud-ar", "down"),
        ("a later version's", "dsd-sync", ""),
    ],
)
def test_lanes(kind: str, mode: str, lane: str) -> None:
    assert timeline.lane_of(kind, mode) == lane
