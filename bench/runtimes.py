"""The same scenario under every runtime and link, TPOT side by side: `make bench-runtimes`.

Runs `scenarios/agreement.toml` (the real pair) once per combination. A cell's ratio to the first combination
is the median over paired generations: same prompt, same seed, same repetition. Bar: containers and namespaces
over real netem agree within 5 %. The modelled link is printed beside them, without a bar: how far a model is
off is a result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from dsdlab.sweep.exclusions import counted_rows
from dsdlab.sweep.store import read_rows
from testbed.host import choose, docker_problem

SCENARIO = Path("scenarios/agreement.toml")
BAR = 0.05
Cell = tuple[str, int, float, float]
"""Mode, γ, RTT in ms, loss in per cent."""
Tpots = dict[Cell, dict[int, float]]
"""TPOT in ms by repetition."""


def sweep(runtime: str, link: str, scenario: Path) -> Tpots:
    """Run the scenario anew. Raises SystemExit when the sweep fails."""
    command = [sys.executable, "-m", "dsdlab", "sweep", str(scenario), "--runtime", runtime, "--link", link]
    done = subprocess.run([*command, "--fresh", "--json"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    print(f"{runtime} + {link}: {result['exact']}, {result['excluded']} excluded", flush=True)
    rows, _ = read_rows(Path(result["folder"]))
    out: Tpots = {}
    for row in counted_rows(rows):
        if row.tpot_ms is not None:
            out.setdefault((row.mode, row.gamma, row.rtt_ms, row.loss_pct), {})[row.rep] = row.tpot_ms
    return out


def paired_ratio(ours: dict[int, float], theirs: dict[int, float]) -> float:
    """Median of ours/theirs over the repetitions that both have; NaN without any."""
    ratios = [ours[rep] / theirs[rep] for rep in ours.keys() & theirs.keys()]
    return statistics.median(ratios) if ratios else float("nan")


def main() -> int:
    """Print the table, write results/bench/runtimes.json."""
    parser = argparse.ArgumentParser(prog="python -m bench.runtimes", description=__doc__)
    parser.add_argument("--scenario", type=Path, default=SCENARIO)
    args = parser.parse_args()
    netem = choose("netns", "auto").link
    if problem := "no netem on this host" if netem == "modelled" else docker_problem():
        print(f"bench-runtimes needs containers and netem: {problem}", file=sys.stderr)
        return 2
    combinations = [("netns", netem), ("docker", netem), ("netns", "modelled"), ("process", "modelled")]
    measured = {f"{runtime}+{link}": sweep(runtime, link, args.scenario) for runtime, link in combinations}
    first, second, *_ = measured
    print(f"{'median TPOT, ms (paired ratio)':<34}" + "".join(f"{name:>24}" for name in measured))
    worst = 0.0
    table = []
    for cell, base in sorted(measured[first].items()):
        mode, gamma, rtt_ms, loss_pct = cell
        line = f"{f'{mode} γ {gamma} RTT {rtt_ms:g} ms loss {loss_pct:g} %':<34}"
        for name, cells in measured.items():
            here = cells.get(cell, {})
            ratio = paired_ratio(here, base)
            tpot_ms = statistics.median(here.values()) if here else float("nan")
            line += f"{tpot_ms:>15.1f} ({ratio:5.3f})"
            table.append(
                {"cell": cell, "under": name, "tpot_ms": tpot_ms, "ratio": ratio, "pairs": len(here)}
            )
            if name == second:
                worst = max(worst, abs(ratio - 1.0)) if here else float("inf")
        print(line)
    print(f"{second}: {worst:.1%} from {first} at worst (bar: {BAR:.0%})")
    out = Path("results/bench/runtimes.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(table))
    return 0 if worst <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
