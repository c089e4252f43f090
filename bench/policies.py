"""What a decision costs: microseconds of `observe` and the `decide` after it, for every window policy.

A simulated generation: windows of the policy's own size, judged by chance, at times that vary as links and
machines do. Measured where a session would spend the time: once for each step of the target. Prints a line
a policy with the median and the 99th percentile of rounds of generations against the bar, and writes
results/bench/policies.json. Exit code 1 if a median is above the bar.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from dsdlab.policies import Outcome, load_window_policy, window_policy_names
from dsdlab.protocol.frames import MAX_WINDOW
from dsdlab.sweep.provenance import cpu_name

BAR_US = 50.0
ALPHA, RTT_S, DRAFT_S, VERIFY_S, ROW_S = 0.75, 0.060, 0.006, 0.050, 0.001
WARM_STEPS = 20  # of each generation: estimates fill up, and the cache


def steps_us(name: str, gamma: int, steps: int, seed: int) -> list[float]:
    """Microseconds of each step of one generation."""
    rng = random.Random(seed)
    policy = load_window_policy(name, gamma)
    policy.begin(beside=4, rtt_s=RTT_S)
    streams = name == "adaptive"
    decision, now_s, context, out = policy.decide(), 0.0, 64, list[float]()
    for _ in range(steps):
        window = min(decision.gamma or 1, MAX_WINDOW)
        accepted = next((k for k in range(window) if rng.random() >= ALPHA), window)
        rtt_s = RTT_S * rng.uniform(0.95, 1.2)
        verify_s = (VERIFY_S + ROW_S * window) * rng.uniform(0.98, 1.05)
        token_s = DRAFT_S * rng.uniform(0.98, 1.05)
        now_s += rtt_s + verify_s + window * token_s
        context += accepted + 1
        outcome = Outcome(
            window,
            accepted,
            window * token_s,
            verify_s,
            0.0,
            math.nan if streams else rtt_s + verify_s,
            min(accepted + 1, window),
            accepted,
            rtt_s=rtt_s,
            context=context,
            now_s=now_s,
            t_token_s=token_s,
            overlap_s=0.9 * verify_s if streams else 0.0,
        )
        begun_ns = time.perf_counter_ns()
        policy.observe(outcome)
        decision = policy.decide()
        out.append((time.perf_counter_ns() - begun_ns) / 1e3)
    return out[WARM_STEPS:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--gamma", type=int, default=4)
    args = parser.parse_args()
    if args.rounds < 1 or args.steps <= WARM_STEPS or not 0 <= args.gamma <= MAX_WINDOW:
        print(f"allowed: --rounds 1 or more, --steps above {WARM_STEPS}, --gamma 0 to {MAX_WINDOW}")
        return 2
    names = window_policy_names()
    spent: dict[str, list[float]] = {name: [] for name in names}
    gc.disable()
    for seed in range(args.rounds):  # interleaved: a busy moment meets all
        for name in names:
            spent[name] += steps_us(name, args.gamma, args.steps, seed)
        gc.collect()
    rows: list[dict[str, Any]] = []
    for name in names:
        p50, p99 = (float(v) for v in np.quantile(spent[name], [0.5, 0.99]))
        met = "met" if p50 <= BAR_US else "MISSED"
        print(
            f"{name:9s} a decision takes {p50:.1f} µs, p99 {p99:.1f} (bar {BAR_US:g}: {met}; "
            f"{len(spent[name])} steps)"
        )
        rows.append({"policy": name, "p50_us": p50, "p99_us": p99, "steps": len(spent[name])})
    path = Path("results/bench/policies.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"cpu": cpu_name(), "bar_us": BAR_US, "gamma": args.gamma, "policies": rows}
    path.write_text(json.dumps(data, indent=1) + "\n")
    return 0 if all(row["p50_us"] <= BAR_US for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
