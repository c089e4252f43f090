"""Profiles for `dsdlab simulate` from what `python -m bench.gpu_shapes` measured on a GPU.

    python -m bench.gpu_profiles measured.json

writes one profile a pair into the folder of shipped profiles and prints how well each form fits.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import dsdlab.sim
from dsdlab.models.measures import Sample
from dsdlab.sim.costs import ForwardCost, NodeCosts, SystemProfile
from dsdlab.sim.fit import fit_forward
from dsdlab.sim.profiles import save_profile

PAIRS = {
    # profile: target, drafter beside it, drafter at the edge
    "8b-{gpu}": ("llama-3.1-8b", "llama-3.2-1b", "llama-3.2-1b"),
    "8b-{gpu}-small-drafter": ("llama-3.1-8b", "smollm2-135m", "smollm2-135m"),
    "32b-{gpu}": ("qwen2.5-32b", "qwen2.5-0.5b", "qwen2.5-0.5b"),
}
MOST_PAIRS = 16_384
"""Rows in all × positions of a session, up to which windows of several sessions are fitted. Beyond it the
attention kernel that was measured reads a session's cache once a row, as kernels of servers do not: it took
twice as long, and the form has no term for it. The points are in the file all the same."""


def fitted(model: dict[str, Any]) -> ForwardCost:
    """The form of one shape's points."""
    samples = [
        Sample(rows, batch, context, seconds)
        for rows, batch, context, seconds in model["points"]
        if batch == 1 or rows == batch or rows * (context // batch) <= MOST_PAIRS
    ]
    return fit_forward(samples, model["shape"]["name"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measured", type=Path)
    parser.add_argument("--out", type=Path, default=Path(dsdlab.sim.__file__).parent / "profiles")
    asked = parser.parse_args()
    found = json.loads(asked.measured.read_text())
    gpu = found["device"].lower().replace("nvidia ", "").replace(" ", "-")
    costs = {}
    for model in found["models"]:
        name = model["shape"]["name"]
        costs[name] = cost = fitted(model)
        assert cost.fit is not None
        one_ms = 1e3 * cost.cost_s(1, 1, 128)
        fit = f"error p50 {cost.fit.error_p50:.1%}, p95 {cost.fit.error_p95:.1%}"
        print(f"{name}: {cost.fit.n} forwards, one row after 128 positions {one_ms:.2f} ms, {fit}")
    how = (
        f"random weights of its sizes in bfloat16 on one {found['device']} ({found['memory_gib']} GiB), "
        f"torch {found['torch']}, {found['date']}: one CUDA graph a forward, greedy choice included, median "
        "of 8 replays (python -m bench.gpu_shapes)"
    )
    for template, (target, beside, edge) in PAIRS.items():
        name = template.format(gpu=gpu)
        profile = SystemProfile(
            name=name,
            origin="measured",
            source=f"{target} and {beside} shapes, {how}",
            target="",
            drafter="",
            precision="",
            cloud=NodeCosts(target=costs[target], drafter=costs[beside]),
            edge=NodeCosts(drafter=costs[edge]),
            provenance={
                "cloud.target": f"{target}: {how}",
                "cloud.drafter": f"{beside}: {how}",
                "edge.drafter": f"{edge}, on a GPU of the same kind at the edge: {how}",
                "nodes": "hop_s, send_s and recv_s are 0: no node of this program ran there.",
            },
        )
        save_profile(asked.out / f"{name}.json", profile)
        print(f"wrote {asked.out / name}.json")


if __name__ == "__main__":
    main()
