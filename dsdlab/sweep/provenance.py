"""Where a number came from: code, packages, machine, settings."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = (
    "dsdlab", "torch", "transformers", "numpy", "aiohttp", "uvloop", "msgspec", "safetensors", "tokenizers",
)  # fmt: skip
_SYSCTLS = (
    "net/ipv4/tcp_congestion_control",
    "net/ipv4/tcp_slow_start_after_idle",
    "net/ipv4/tcp_no_metrics_save",
    "net/core/default_qdisc",
)


def git_state(folder: Path) -> dict[str, Any]:
    """Commit and whether the tree differs from it; empty where there is no repository."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *args], capture_output=True, text=True, check=False, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    sha = git("rev-parse", "HEAD")
    return {} if sha is None else {"sha": sha, "dirty": bool(git("status", "--porcelain"))}


def cpu_name() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def provenance(command: str) -> dict[str, Any]:
    """Everything about the host that may matter to a measurement."""
    packages: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    sysctls: dict[str, str] = {}
    for name in _SYSCTLS:
        try:
            sysctls[name.replace("/", ".")] = Path("/proc/sys", name).read_text().strip()
        except OSError:
            sysctls[name.replace("/", ".")] = "unreadable"
    return {
        "command": command,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(Path(__file__).parent),
        "python": sys.version.split()[0],
        "packages": packages,
        "kernel": f"{platform.system()} {platform.release()}",
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "sysctls": sysctls,
    }
