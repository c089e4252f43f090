"""What tests of the docker runtime and of its image share."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from testbed.engine import connect
from testbed.image import image_problem
from testbed.runtimes.base import RuntimeFailed
from testbed.runtimes.docker import RUN_LABEL, DockerRuntime


def engine_or_skip(*, image: bool) -> Any:
    """A client. Skips the test where there is no engine or image, but on CI fails it."""
    problem: str | None
    try:
        client = connect()
        problem = image_problem(client) if image else None
        if problem is None:
            return client
        client.close()
    except RuntimeFailed as error:
        problem = str(error)
    if os.environ.get("CI") == "true":
        pytest.fail(problem)
    pytest.skip(problem)


def containers(client: Any, run_id: str) -> list[str]:
    """Names of a run's containers, in whatever state."""
    found = client.api.containers(all=True, filters={"label": f"{RUN_LABEL}={run_id}"})
    return [container["Names"][0].lstrip("/") for container in found]


class NoWiring:
    """Nodes on their own loopback."""

    def address(self, node: str) -> str:  # noqa: ARG002
        return "127.0.0.1"

    async def attach(self, node: str, pid: int) -> None:
        pass


@asynccontextmanager
async def runtime_in(run_dir: Path, run_id: str, wiring: Any = None) -> AsyncIterator[DockerRuntime]:
    runtime = DockerRuntime(wiring or NoWiring(), run_id=run_id)
    try:
        await runtime.start(run_dir)
        yield runtime
    finally:
        await runtime.stop()


def unique_run_id() -> Iterator[str]:
    """Names of runs that no other test uses."""
    n = 0
    while True:
        n += 1
        yield f"test-{os.getpid()}-{n}"
