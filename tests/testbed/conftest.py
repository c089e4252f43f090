"""Every test of the testbed has to leave the host as it found it."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

T = TypeVar("T")
HERE = Path(__file__).parent


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
            if process.status() != psutil.STATUS_ZOMBIE:
                lines.append(f"{process.pid} {' '.join(process.cmdline())}")
        except psutil.Error:
            continue
    return lines


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Tag the children of a test, and fail it when one lives on."""
    tag = f"{os.getpid()}-{request.node.nodeid}"
    monkeypatch.setenv("DSDLAB_TEST", tag)
    yield tag
    end_s = time.monotonic() + 2.0
    while (left := descendants_and_orphans(tag)) and time.monotonic() < end_s:
        time.sleep(0.02)
    assert left == []


@pytest.fixture
def python() -> str:
    return sys.executable
