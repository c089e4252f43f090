"""The closed form of streaming drafts against hand sums, the other closed forms and a walk through time."""

from __future__ import annotations

import math
import random
from collections import deque
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsdlab.sim import theory
from dsdlab.sim.theory_stream import stream_tpot_s

ALPHA, T_D, T_V0, T_ROW = 0.8, 0.005, 0.05, 0.001
TICK_S = 0.001


def walk_tpot_s(alpha: float, t_d: int, t_v0: int, t_row: int, rtt: int, **kw: Any) -> float:
    """A long streaming session, played tick by tick with drawn mismatches; times in ticks, rtt even."""
    hold, run_ahead = kw.get("hold", math.inf), kw.get("run_ahead", 32)
    first, frame = kw.get("first", 1), kw.get("frame", 1)
    most, beside, t_beside = kw.get("max_window", 256), kw.get("beside", 0), kw.get("t_beside", 0)
    rng = random.Random(7)
    agrees: list[bool] = []  # for each position whether a draft there would be the target's token

    def agree(position: int) -> bool:
        while len(agrees) <= position:
            agrees.append(rng.random() < alpha)
        return agrees[position]

    up: deque[tuple[int, int, int, list[int]]] = deque()  # (arrives, epoch, base, positions' agreement)
    down: deque[tuple[int, int]] = deque()  # (arrives, length of the text)
    text = 0  # at the target
    chain: dict[int, bool] = {}
    chain_epoch, alive = 0, True
    known, epoch, tail, sent, fresh = 0, 0, 0, 0, True  # at the drafter: text, drafts behind it, sent of them
    wrong_at: int | None = None  # position in the tail that will turn out wrong
    drafting: tuple[int, int, int] | None = None  # (done, epoch, position)
    busy_until, free_since, window = 0, 0, -1
    for now in range(400_000):
        while down and down[0][0] == now:
            length = down.popleft()[1]
            new = length - known
            if wrong_at is not None and wrong_at < length:
                epoch, tail, sent, fresh, wrong_at = epoch + 1, 0, 0, True, None
            else:
                tail, sent = max(tail - new, 0), max(sent - new, 0)
            known = length
        while up and up[0][0] == now:
            _, its_epoch, base, drafts = up.popleft()
            if its_epoch > chain_epoch:
                chain_epoch, alive, chain = its_epoch, True, {}
            if its_epoch == chain_epoch and alive:
                for i, good in enumerate(drafts):
                    if base + i >= text:
                        chain[base + i] = bool(good)
                    elif not good:
                        alive, chain = False, {}
                        break
        if drafting and drafting[0] == now:
            _, its_epoch, position = drafting
            drafting = None
            if its_epoch == epoch and position >= known:
                if not agree(position) and wrong_at is None:
                    wrong_at = position
                tail = position - known + 1
        room = run_ahead - tail
        size = first if fresh else frame
        if tail - sent >= size or (room < 1 and tail > sent):
            goods = [int(wrong_at is None or known + i < wrong_at) for i in range(sent, tail)]
            up.append((now + rtt // 2, epoch, known + sent, goods))
            sent, fresh = tail, False
        if drafting is None and room >= 1:
            drafting = (now + t_d, epoch, known + tail)
        if busy_until == now and window >= 0:  # a step ends
            drafts = max(window, beside)
            accepted = 0
            while accepted < drafts and agree(text + accepted):
                accepted += 1
            before, text = text, text + accepted + 1
            for position in range(before, text):
                if not chain.pop(position, True):
                    alive, chain = False, {}
            down.append((now + rtt // 2, text))
            window, free_since = -1, now
        if window < 0:
            there = 0
            while text + there in chain and there < most:
                there += 1
            if there or now >= free_since + hold:
                window = there
                drafts = max(there, beside)
                busy_until = now + t_v0 + t_row * drafts + t_beside * (drafts - there)
    return now / text * TICK_S


def closed_s(alpha: float, t_d: int, t_v0: int, t_row: int, rtt: int, **kw: Any) -> float:
    """The closed form, asked like the walk."""
    seconds = {f"{k}_s": v * TICK_S for k, v in kw.items() if k in ("hold", "t_beside")}
    counts = {k: v for k, v in kw.items() if k not in ("hold", "t_beside")}
    times = [t * TICK_S for t in (t_d, t_v0, t_row, rtt)]
    return stream_tpot_s(alpha, *times, **seconds, **counts)


def test_the_design_table() -> None:
    """t_d = 5 ms, t_v(k) = 50 + k ms, α = 0.8: the design's worked example."""
    rtts_s = [rtt / 1e3 for rtt in (0, 20, 50, 100, 150, 200, 300)]
    stream = [1e3 * stream_tpot_s(ALPHA, T_D, T_V0, T_ROW, rtt) for rtt in rtts_s]
    assert stream == pytest.approx([19.8, 23.9, 30.0, 40.3, 50.5, 60.8, 81.3], rel=0.03)
    free = [1e3 * stream_tpot_s(ALPHA, T_D, T_V0, T_ROW, rtt, hold_s=0.0) for rtt in rtts_s]
    assert free == pytest.approx([20.9, 21.8, 26.7, 31.9, 36.0, 39.2, 43.6], rel=0.03)


def test_a_stream_by_hand() -> None:
    """RTT 100 ms, t_d 10 ms, t_v(k) = 50 ms, α = 0.5.

    The first draft is there at 100 + 5 (half a token under way) + 10 = 115; its step ends at 165, when six
    drafts have come and two tokens are decided: k = 4. That step ends at 215 with eleven drafts come and
    seven tokens decided: k = 4 ever after.
    """
    lasts = [0.5**2, 0.5**7, 0.5**12]
    hand_s = 0.165 + 0.05 * sum(lasts)
    tokens = (1 + 0.5) + lasts[0] * (1 - 0.5**5) / 0.5 + lasts[1] * (1 - 0.5**5) / 0.5
    assert stream_tpot_s(0.5, 0.01, 0.05, 0.0, 0.1) == pytest.approx(hand_s / tokens, rel=0.01)


def test_a_free_run_by_hand() -> None:
    """RTT 100 ms, t_d 30 ms, t_v(k) = 50 ms, α = 0.5: three steps alone, the third draft has come by then.

    Drafts are there at 100 + 15 + 30 j: 145, 175, 205, 235 ... Steps alone end at 50, 100, 150 with one, two,
    three tokens; at 150 only the first draft is there, which is passed; likewise at 200 (2 drafts, 4 tokens).
    Drafts never catch up by more than 5 in 8: 0.03 against 0.05 a token. At 50 n the target has n tokens and
    finds 1 + int((50 n - 145)/30) drafts: more than n first at n = 6, where 6 + ... is still 6; at n = 7, 7.
    At n = 8, 9 drafts: k = 1.
    """
    early = 0.05 * sum(0.5**i for i in range(8))
    cycle_s = early + 0.05 * 0.5**8
    tokens = sum(0.5**i for i in range(8)) + 0.5**8 * 1.5
    assert stream_tpot_s(0.5, 0.03, 0.05, 0.0, 0.1, hold_s=0.0) == pytest.approx(cycle_s / tokens, rel=1e-3)


@pytest.mark.parametrize("rtt_s", [0.0, 0.02, 0.1, 0.3])
def test_one_window_at_a_time_is_sync(rtt_s: float) -> None:
    """With a run-ahead of one window nothing overlaps."""
    gamma, t_v = 4, T_V0 + 4 * T_ROW
    sync_s = float(theory.sync_tpot_s(ALPHA, gamma, T_D, t_v, rtt_s))
    got_s = stream_tpot_s(ALPHA, T_D, T_V0, T_ROW, rtt_s, first=gamma, frame=gamma, run_ahead=gamma)
    assert got_s == pytest.approx(sync_s, rel=2e-3)


def test_useless_drafts_cost_a_free_run_nothing_and_a_stream_the_round_trip() -> None:
    assert stream_tpot_s(0.0, T_D, T_V0, 0.0, 0.2, hold_s=0.0) == pytest.approx(T_V0)
    assert stream_tpot_s(0.0, T_D, T_V0, 0.0, 0.2) == pytest.approx(0.2 + T_D + T_V0)  # its run-ahead used up
    busy_s = stream_tpot_s(0.0, T_D, T_V0, 0.0, 0.2, run_ahead=64)
    assert busy_s == pytest.approx(0.2 + 1.5 * T_D + T_V0)  # half a token of the old drafts comes first


def test_a_drafter_slower_than_the_target_alone_leaves_it_alone() -> None:
    assert stream_tpot_s(0.9, 0.06, T_V0, T_ROW, 0.01, hold_s=0.0) == pytest.approx(T_V0)


@pytest.mark.parametrize("rtt_s", [0.05, 5.0])
def test_beside_a_free_target_is_at_least_cloud_sd(rtt_s: float) -> None:
    """Far away the drafter beside it is all there is; nearer the edge's drafts come on top."""
    alone = float(theory.cloud_sd_tpot_s(ALPHA, 4, T_D, T_V0 + 4 * T_ROW))
    got = stream_tpot_s(ALPHA, T_D, T_V0, T_ROW, rtt_s, hold_s=0.0, beside=4, t_beside_s=T_D)
    assert got == pytest.approx(alone, rel=1e-3) if rtt_s == 5.0 else got < alone


@given(
    st.floats(0.0, 0.95),
    st.floats(1e-3, 0.04),
    st.floats(0.0, 0.4),
    st.sampled_from([0.0, 0.02, math.inf]),
)
def test_a_shorter_round_trip_is_no_slower_and_a_held_target_at_most_so_much(
    alpha: float, t_d_s: float, rtt_s: float, hold_s: float
) -> None:
    here = stream_tpot_s(alpha, t_d_s, T_V0, 0.0, rtt_s, hold_s=hold_s, run_ahead=64)
    assert stream_tpot_s(alpha, t_d_s, T_V0, 0.0, rtt_s + 0.5, hold_s=hold_s, run_ahead=64) >= 0.999 * here
    assert here <= T_V0 + hold_s + 1e-9


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"hold": 0},
        {"hold": 30},
        {"run_ahead": 6},
        {"run_ahead": 6, "hold": 0},
        {"first": 4, "frame": 4},
        {"first": 4, "frame": 4, "run_ahead": 8},
        {"first": 6},
        {"max_window": 3, "hold": 0},
        {"beside": 3, "t_beside": 5, "hold": 0},
    ],
)
@pytest.mark.parametrize("rtt", [2, 20, 100, 300])
def test_against_a_walk_through_time(rtt: int, case: dict[str, int]) -> None:
    assert closed_s(0.7, 5, 40, 1, rtt, **case) == pytest.approx(
        walk_tpot_s(0.7, 5, 40, 1, rtt, **case), rel=0.03
    )


@pytest.mark.parametrize("hold", [0, 60])
def test_a_slow_drafter_against_the_walk(hold: int) -> None:
    """The target passes places before there is a draft for them: the drafter leaps."""
    walked_s = walk_tpot_s(0.7, 45, 50, 1, 20, hold=hold)
    assert closed_s(0.7, 45, 50, 1, 20, hold=hold) == pytest.approx(walked_s, rel=0.03)


@pytest.mark.parametrize(
    "bad",
    [{"alpha": 1.5}, {"alpha": math.nan}, {"rtt_s": -1.0}, {"run_ahead": 0}, {"hold_s": -1.0}, {"frame": 0}],
)
def test_what_cannot_be_is_refused(bad: dict[str, Any]) -> None:
    args: dict[str, Any] = {"alpha": 0.8, "t_d_s": 0.01, "t_v0_s": 0.05, "t_row_s": 0.0, "rtt_s": 0.1}
    with pytest.raises(ValueError, match="allowed"):
        stream_tpot_s(**(args | bad))
