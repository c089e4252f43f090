"""Real processes for the end-to-end tests: emulated engines where the model does not matter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from dsdlab.decoding import Sampling
from dsdlab.models.alone import generate_alone
from dsdlab.models.emulated import EmulatedEngine, parse_profile

TARGET = "emulated:base_s=0.01,per_token_s=0.0005"
DRAFTER = "emulated:base_s=0.001,alpha=0.8"

SCENARIO = f"""
name = "small"
[models]
target = "{TARGET}"
drafter = "{DRAFTER}"
[workload]
n_prompts = 2
max_new_tokens = 16
[sampling]
temperature = [0.0, 0.8]
[grid]
mode = ["cloud-ar", "cloud-sd", "edge-sd", "dsd-sync"]
gamma = [1, 4]
rtt_ms = [1, 15]
[run]
repeats = 2
"""


def dsdlab(*args: str, cwd: Path, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Run the command line; its output as text."""
    return subprocess.run(
        [sys.executable, "-m", "dsdlab", *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )


def alone(prompt_ids: list[int], seed: int, n: int) -> list[int]:
    """The emulated target alone."""
    engine = EmulatedEngine(parse_profile(TARGET.removeprefix("emulated:")), wait=lambda _: None)
    return generate_alone(engine, prompt_ids, Sampling(seed=seed), n, engine.info.eos_ids)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def children_of_run(folder: Path) -> list[str]:
    """Command lines of live processes that mention a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(folder) in line:
                found.append(line)
    return found


def kill_group(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(10)
