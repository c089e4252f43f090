"""Many simulations at once: same results, in order, wherever they ran."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from dsdlab.sim.grid import GridFailed, run_tasks


def power(payload: int, task: int) -> int:
    return int(task**payload)


def where(payload: None, task: int) -> int:  # noqa: ARG001 - the interface
    return os.getpid()


def fail(payload: None, task: int) -> int:  # noqa: ARG001 - the interface
    if task == 3:
        raise ValueError("three is out of range (allowed: others)")
    return task


def die(payload: None, task: int) -> int:  # noqa: ARG001 - the interface
    os._exit(1)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_tasks(workers: int) -> None:
    seen: list[tuple[int, int]] = []
    out = run_tasks(power, 3, range(7), workers=workers, on_done=lambda n, of: seen.append((n, of)))
    assert out == [n**3 for n in range(7)]
    assert seen == [(n, 7) for n in range(1, 8)]


def test_one_worker_is_this_process_and_two_are_others() -> None:
    assert set(run_tasks(where, None, range(3), workers=1)) == {os.getpid()}
    assert os.getpid() not in run_tasks(where, None, range(3), workers=2)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_task_that_fails_says_why(workers: int) -> None:
    with pytest.raises(ValueError, match="three is out of range"):
        run_tasks(fail, None, range(5), workers=workers)


def test_a_worker_that_dies_is_told() -> None:
    with pytest.raises(GridFailed, match="a worker process died"):
        run_tasks(die, None, range(2), workers=2)


def test_no_tasks_and_unknown_engines() -> None:
    assert run_tasks(power, 2, []) == []
    with pytest.raises(GridFailed, match="engine is 'slurm'; allowed: local, ray"):
        run_tasks(power, 2, [1], engine="slurm")


def test_ray_runs_the_same_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cluster of this machine; where Ray is not installed, one line says how to get it."""
    try:
        import ray  # noqa: F401 - is it there?
    except ImportError:
        with pytest.raises(GridFailed, match=r"pip install 'dsdlab\[ray\]'"):
            run_tasks(power, 2, [1], engine="ray")
        return
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    before = set(Path(tempfile.gettempdir()).glob("*ray*"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # a worker unpickles by name
    assert run_tasks(power, 3, range(5), engine="ray") == [n**3 for n in range(5)]
    assert set(Path(tempfile.gettempdir()).glob("*ray*")) == before
