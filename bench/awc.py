"""AWC beside static and threshold windows, in the simulator's fleet: 20 targets, hundreds of drafters.

For three tasks by their acceptance (measured with the default pair, greedy, prompt lookup first: GSM8K .66,
HumanEval .64, CNN/DM .36) and three loads. The real nodes run on the virtual clock. Each seed is a fleet, the
same one for all policies, so that ratios are paired. Prints throughput and TPOT relative to γ = 4, with 95 %
intervals over the seeds, beside what the paper published (arXiv 2511.21669: up to 9.7 % throughput), and
writes results/bench/awc.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from dsdlab.sim.costs import ForwardCost, NodeCosts
from dsdlab.sim.fleet import FleetSpec, run_fleet
from dsdlab.sim.profile import LinkProfile

TASKS = {"GSM8K": 0.66, "HumanEval": 0.64, "CNN/DM": 0.36}
TARGETS = 20
LOADS = {"light": 20, "middle": 60, "full": 200}  # drafters
INFORMED = 3.0  # how well a drafter knows when it is right
POLICIES = (("static", 4), ("threshold", 8), ("awc", 4))
PUBLISHED = "up to 9.7 %"
TOKENS = 96
RTTS_MS = (10.0, 100.0)
# a 70B-class target on data-centre GPUs, a 1B-class drafter on a device
TARGET_S, ROW_S, DRAFT_S = 0.030, 0.0006, 0.008


def fleet(task: str, rtt_ms: float, drafters: int, policy: str, gamma: int, seed: int) -> tuple[float, float]:
    """(tokens per second of the fleet, median TPOT in ms)."""
    spec = FleetSpec(
        policy=policy,
        gamma=gamma,
        alpha=TASKS[task],
        informed=INFORMED,
        link=LinkProfile(rtt_ms=rtt_ms, jitter_ms=4.0),
        edge=NodeCosts(drafter=ForwardCost(base_s=DRAFT_S)),
        cloud=NodeCosts(target=ForwardCost(base_s=TARGET_S - ROW_S, per_token_s=ROW_S)),
        drafters=drafters,
        verifiers=TARGETS,
        routing="jsq",
        max_new_tokens=TOKENS,
        generations_per_session=1,
        duration_s=16.0,
        warmup_s=2.0,
        seed=seed,
    )
    result = run_fleet(spec)
    assert not result.inexact
    return result.goodput_tps, result.tpot_ms.p50 or float("nan")


def interval(ratios: np.ndarray, rng: np.random.Generator) -> tuple[float, float, float]:
    """Mean of paired ratios and its bootstrap 95 % interval, as percent of change."""
    draws = rng.choice(ratios, (4000, len(ratios))).mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return tuple(100.0 * (float(v) - 1.0) for v in (ratios.mean(), low, high))  # type: ignore[return-value]


def told(change: tuple[float, float, float]) -> str:
    return f"{change[0]:+.1f} % [{change[1]:+.1f}, {change[2]:+.1f}]"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    work = [
        (task, rtt_ms, drafters, policy, gamma, seed)
        for task in TASKS
        for rtt_ms in RTTS_MS
        for drafters in LOADS.values()
        for policy, gamma in POLICIES
        for seed in range(args.seeds)
    ]
    with ProcessPoolExecutor(args.workers) as pool:
        found = dict(zip(work, pool.map(fleet, *zip(*work, strict=True)), strict=True))
    rng = np.random.default_rng(1)
    rows: list[dict[str, Any]] = []
    for task, rtt_ms in product(TASKS, RTTS_MS):
        for load, drafters in LOADS.items():
            base = np.array([found[task, rtt_ms, drafters, "static", 4, seed] for seed in range(args.seeds)])
            print(
                f"{task} (α {TASKS[task]}), RTT {rtt_ms:g} ms, {drafters} drafters on {TARGETS} targets "
                f"({load}): γ = 4 {base[:, 0].mean():,.0f} tokens/s, TPOT {base[:, 1].mean():.1f} ms"
            )
            for policy, gamma in POLICIES[1:]:
                mine = [found[task, rtt_ms, drafters, policy, gamma, seed] for seed in range(args.seeds)]
                ours = np.array(mine)
                throughput = interval(ours[:, 0] / base[:, 0], rng)
                tpot = interval(ours[:, 1] / base[:, 1], rng)
                paper = f" (published: {PUBLISHED})" if policy == "awc" else ""
                print(f"  {policy:9s} throughput {told(throughput)}{paper}, TPOT {told(tpot)}", flush=True)
                rows.append(
                    {
                        "task": task,
                        "alpha": TASKS[task],
                        "load": load,
                        "rtt_ms": rtt_ms,
                        "drafters": drafters,
                        "policy": policy,
                        "throughput_pct": throughput,
                        "tpot_pct": tpot,
                        "static_4_tps": float(base[:, 0].mean()),
                        "static_4_tpot_ms": float(base[:, 1].mean()),
                    }
                )
    path = Path("results/bench/awc.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"published": PUBLISHED, "targets": TARGETS, "seeds": args.seeds, "rows": rows}, indent=1)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
