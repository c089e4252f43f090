"""The same scenario under every runtime and link, TPOT side by side: `make bench-runtimes`.

Runs `scenarios/agreement.toml` (the real pair) once per combination, and compares each cell's median TPOT
with the first combination's. Bar: containers and namespaces over real netem agree within 5 %. The modelled
link is printed beside them, without a bar: how far a model is off is a result.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from testbed.host import choose, docker_problem

SCENARIO = Path("scenarios/agreement.toml")
BAR = 0.05
Key = tuple[str, int, float, float]


def sweep(runtime: str, link: str, scenario: Path) -> dict[Key, float]:
    """Median TPOT in ms by (mode, γ, RTT, loss). Raises SystemExit when the sweep fails."""
    command = [sys.executable, "-m", "dsdlab", "sweep", str(scenario), "--runtime", runtime, "--link", link]
    done = subprocess.run([*command, "--fresh", "--json"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    print(f"{runtime} + {link}: {result['exact']}", flush=True)
    cells = result["cells"]
    return {(c["mode"], c["gamma"], c["rtt_ms"], c["loss_pct"]): c["tpot_ms"] for c in cells if c["tpot_ms"]}


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
    names = list(measured)
    first, second = names[0], names[1]
    print(f"{'TPOT, ms (ratio to the first)':<34}" + "".join(f"{name:>24}" for name in names))
    worst = 0.0
    for key in sorted(measured[first]):
        mode, gamma, rtt_ms, loss_pct = key
        base = measured[first][key]
        line = f"{mode} γ {gamma} RTT {rtt_ms:g} ms loss {loss_pct:g} %"
        for name in names:
            value = measured[name].get(key, math.nan)
            line = f"{line:<34}" if name == first else line
            line += f"{value:>15.1f} ({value / base:5.3f})"
            if name == second:
                worst = max(worst, abs(value / base - 1.0)) if not math.isnan(value) else math.inf
        print(line)
    print(f"{second} against {first}: at most {worst:.1%} apart (bar: {BAR:.0%})")
    out = Path("results/bench/runtimes.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    table = {name: [[*key, tpot] for key, tpot in cells.items()] for name, cells in measured.items()}
    out.write_text(json.dumps(table))
    return 0 if worst <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
