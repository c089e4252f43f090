"""What the testbed's tests share."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import psutil

T = TypeVar("T")
HERE = Path(__file__).parent
RESOURCE_TRACKER = "multiprocessing.resource_tracker"  # of an earlier test's process pool; it ends with us


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run under a fresh event loop."""
    return asyncio.run(coroutine)


def descendants_and_orphans(tag: str) -> list[str]:
    """Our child processes, and anyone's whose environment has the tag of this test."""
    found = {p.pid: p for p in psutil.Process().children(recursive=True)}
    for process in psutil.process_iter():
        try:
            if process.environ().get("DSDLAB_TEST") == tag and process.pid != os.getpid():
                found[process.pid] = process
        except psutil.Error:
            continue
    lines = []
    for process in found.values():
        try:
            command = " ".join(process.cmdline())
            if process.status() != psutil.STATUS_ZOMBIE and RESOURCE_TRACKER not in command:
                lines.append(f"{process.pid} {command}")
        except psutil.Error:
            continue
    return lines
