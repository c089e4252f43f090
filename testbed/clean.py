"""Take away what a controller left that was killed: containers, processes, folders.

Little can be left. Namespaces, interfaces and qdiscs end with the controller's own processes; containers end
when their input does. This is for what even so remains: when the engine was killed too, or the machine
stopped.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

from testbed.ledger import Ledger, process_start
from testbed.runtimes.base import RuntimeFailed

__all__ = ["RUN_FOLDER", "clean"]

RUN_FOLDER = "dsdlab-run-"
"""Scratch folders of single runs are this, the controller's process id, a hyphen and something random."""


def clean(results: Path) -> list[str]:
    """Remove leftovers of dead controllers, never what a living one uses; a line for each thing removed.

    results: the folder that sweeps wrote to; their rows, reports and logs stay.
    """
    return [*_containers(), *_processes(results), *_folders(results)]


def _containers() -> list[str]:
    from testbed.engine import connect
    from testbed.runtimes.docker import reap_containers

    try:
        client = connect(timeout_s=30.0)
    except RuntimeFailed:
        return []  # no engine, no containers
    with contextlib.closing(client):
        return [f"container {name}" for name in reap_containers(client)]


def _beds(results: Path) -> list[Path]:
    return sorted(path.parent for path in results.glob("*/bed/objects.jsonl"))


def _processes(results: Path) -> list[str]:
    killed: list[str] = []
    for bed in _beds(results):
        ledger = Ledger(bed / "objects.jsonl", "clean")
        if not ledger.owner_alive():
            killed += [f"process {pid}" for pid in ledger.reap_processes()]
    return killed


def _folders(results: Path) -> list[str]:
    """Nodes' folders hold the token that they shared; those of single runs are of no use to anybody."""
    doomed = [
        bed / "nodes"
        for bed in _beds(results)
        if (bed / "nodes").exists() and not Ledger(bed / "objects.jsonl", "clean").owner_alive()
    ]
    for folder in Path(tempfile.gettempdir()).glob(f"{RUN_FOLDER}*"):
        pid = folder.name.removeprefix(RUN_FOLDER).partition("-")[0]
        if pid.isdigit() and process_start(int(pid)) is None:
            doomed.append(folder)
    for folder in doomed:
        shutil.rmtree(folder, ignore_errors=True)
    return [f"folder {folder}" for folder in doomed if not folder.exists()]
