"""Every test of the testbed has to leave the host as it found it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator

import pytest
from bed_tools import descendants_and_orphans


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
