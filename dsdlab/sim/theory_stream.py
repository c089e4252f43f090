"""The closed form of streaming drafts: scalars and plain floats, fast enough for a live controller.

A *cycle* begins where the target has just decided a token that differs from the draft in its place: all
drafts on their way are void. Half a round trip later the drafter knows, starts anew, and another half later
its drafts begin to reach the target. As long as no draft differs, nothing is left to chance: at which
instant the target becomes free, how many drafts it then finds and judges, and when the drafter hears of it
follow from the costs alone. Every token in whose place there is a draft goes on with that *trajectory* with
probability α and ends it with 1 − α. So

    TPOT = Σ_i s_i (wait_i + t_v(k_i)) / Σ_i s_i E(k_i),   s_{i+1} = s_i α^(k_i + 1),

where step i finds k_i drafts, s_i is the probability that the cycle lasts until then, and E(k) =
(1 − α^(k+1))/(1 − α) tokens come of it (Leviathan et al., ICML 2023, eq. 1). The sum of the denominators is
1/(1 − α). Where a drafter is so slow that the target has passed a place before there is a draft for it, that
place cannot end the cycle: s_{i+1} = s_i α^(k_i). The rest of this module is the bookkeeping of the k_i.

This is the project's own; drafts of one cycle agree independently with probability α, and loss, transfer
times and queueing behind other sessions are left out.
"""

from __future__ import annotations

import math

from dsdlab.policies.base import FOREVER_S, RUN_AHEAD
from dsdlab.protocol.frames import MAX_WINDOW

NEGLIGIBLE = 1e-3  # the sum ends where a cycle lasts that long with no more than this probability
MOST_STEPS = 200  # or after so many: α near 1, or a drafter that never catches up
FIRST_FRAMES = (1, 2, 3, 4, 6, 8, 12)
LEAST_S = 1e-6  # for a draft that costs nothing


def stream_tpot_s(
    alpha: float,
    t_d_s: float,
    t_v0_s: float,
    t_row_s: float,
    rtt_s: float,
    *,
    hold_s: float = FOREVER_S,
    first: int = 1,
    frame: int = 1,
    run_ahead: int = RUN_AHEAD,
    max_window: int = MAX_WINDOW,
    beside: int = 0,
    t_beside_s: float = 0.0,
) -> float:
    """TPOT of `dsd-stream` and `dsd-pipelined`, s per token.

    alpha: acceptance, 0 to 1. t_d_s: a drafted token at the edge. t_v0_s: a step of the target without
    drafts; each draft in it costs t_row_s more. rtt_s: both directions alike. hold_s: how long a target
    that is free waits for drafts before it decodes alone; infinite: always, 0: free run. first, frame:
    tokens of the first frame of a cycle and of each later one. run_ahead: tokens drafted and not judged as
    far as the drafter knows; it sends what it has and stops there. max_window: drafts judged in one step.
    beside: a drafter at the target fills each step up to so many drafts, t_beside_s each; it proposes what
    the edge's proposes. Raises ValueError, naming the argument.
    """
    if not (
        0.0 <= alpha <= 1.0
        and 0.0 <= t_d_s < math.inf
        and 0.0 <= t_v0_s < math.inf
        and 0.0 <= t_row_s < math.inf
        and 0.0 <= rtt_s < math.inf
        and hold_s >= 0.0
        and t_beside_s >= 0.0
        and min(first, frame, run_ahead, max_window) >= 1
        and beside >= 0
    ):
        raise ValueError(
            f"alpha is {alpha}, t_d_s {t_d_s}, t_v0_s {t_v0_s}, t_row_s {t_row_s}, rtt_s {rtt_s}, hold_s "
            f"{hold_s}, first {first}, frame {frame}, run_ahead {run_ahead}, max_window {max_window}, beside "
            f"{beside}, t_beside_s {t_beside_s}; allowed: alpha 0 to 1, times and beside 0 or more, others "
            "1 or more"
        )
    t_d = t_d_s if t_d_s > LEAST_S else LEAST_S
    # The drafter's clock is ahead of the target's by the way up, so that a draft "is made" when it arrives;
    # what the target decides at an instant reaches the drafter one rtt_s later on that clock. When it hears
    # of the mismatch it is in the middle of a token, unless its run-ahead has stopped it before.
    stopped = run_ahead * t_d <= min(first, run_ahead) * t_d + t_v0_s + rtt_s
    # A stretch of drafting: from since_s on (when a commit changed something), `count` drafts were there at
    # at_s and one more every t_d; the next frame has `size` tokens; it stops at `limit`.
    since_s, at_s, count, limit, size = 0.0, (rtt_s if stopped else rtt_s + 0.5 * t_d), 0, run_ahead, first
    stretches = [(since_s, at_s, count, limit, size)]
    place = 0  # of the stretch that the target is at
    last_at_s, last_count, last_limit, last_size = at_s, count, limit, size
    t_s = total_s = tokens = 0.0
    judged = 0  # tokens committed in this cycle
    lasts = 1.0  # s_i
    for _ in range(MOST_STEPS):
        free_s = t_s
        while True:
            while place + 1 < len(stretches) and stretches[place + 1][0] <= t_s:
                place += 1
                since_s, at_s, count, limit, size = stretches[place]
            there = count + int((t_s - at_s) / t_d + 1e-6) if t_s > at_s else count
            if there >= limit:
                there = limit
            elif there - count < size:
                there = count
            elif frame > 1:
                there -= (there - count - size) % frame
            k = there - judged
            if k > 0 or t_s >= free_s + hold_s:
                break
            # the frame that brings the next draft wanted, if this stretch lasts until then
            ends = count + size
            if ends <= judged:
                ends += -(-(judged + 1 - ends) // frame) * frame
            ends = min(ends, limit)
            comes_s = at_s + (ends - count) * t_d if ends > judged else math.inf
            if place + 1 < len(stretches):
                comes_s = min(comes_s, stretches[place + 1][0])
            t_s = min(max(comes_s, t_s), free_s + hold_s)
        k = max(min(k, max_window), 0)
        drafts = k if k > beside else beside
        t_s += t_v0_s + t_row_s * drafts + t_beside_s * (drafts - k)
        judged += drafts + 1
        # what the drafter makes of it
        since = t_s + rtt_s
        made = last_count + int((since - last_at_s) / t_d) if since > last_at_s else last_count
        stopped = made >= last_limit
        made = min(made, last_limit)
        left = lasts * alpha**drafts
        tokens += (lasts - left * alpha) / (1.0 - alpha) if alpha < 1.0 else drafts + 1.0
        total_s += lasts * (t_s - free_s)
        if made >= judged:  # there is a draft in the place of the bonus token
            left *= alpha
            if stopped:
                last_at_s, last_count, last_size = since, last_limit, frame
        else:
            last_at_s, last_count = (since if stopped else since + 0.5 * t_d), judged
            last_size = frame if made else last_size
        last_limit = judged + run_ahead
        stretches.append((since, last_at_s, last_count, last_limit, last_size))
        lasts = left
        if lasts < NEGLIGIBLE:
            break
    return total_s / tokens


def best_stream_tpot_s(
    alpha: float,
    t_d_s: float,
    t_v0_s: float,
    t_row_s: float,
    rtt_s: float,
    beside: int = 0,
    t_beside_s: float = 0.0,
) -> float:
    """The least TPOT that any setting of a streaming session reaches, s per token.

    The settings: the target alone; drafts that it waits for, the first of them in a larger frame; a free run;
    with a drafter beside the target (`beside`: its largest window) that one too, alone and under a free run.
    """
    costs = (alpha, t_d_s, t_v0_s, t_row_s, rtt_s)
    found = [t_v0_s, stream_tpot_s(*costs, hold_s=0.0)]
    found += [stream_tpot_s(*costs, first=first) for first in FIRST_FRAMES]
    for window in range(1, beside + 1):
        expected = sum(alpha**i for i in range(window + 1))
        found.append((t_v0_s + window * (t_row_s + t_beside_s)) / expected)
        found.append(stream_tpot_s(*costs, hold_s=0.0, beside=window, t_beside_s=t_beside_s))
    return min(found)
