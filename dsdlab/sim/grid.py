"""Many independent simulations: in this process, over its cores, or on a Ray cluster.

`run_tasks(function, payload, tasks)` calls `function(payload, task)` for every task. The payload travels
once per worker, not once per task; results come back in the order of the tasks.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

__all__ = ["ENGINES", "GridFailed", "run_tasks", "usable_cores"]

ENGINES = ("local", "ray")
R = TypeVar("R")
Work = Callable[[Any, Any], R]
OnDone = Callable[[int, int], None]
"""(tasks done, tasks in all)"""

_work: tuple[Work[Any], Any] | None = None  # of this worker process


class GridFailed(Exception):
    """The grid cannot be run: an engine is missing, a worker was killed. One line for the user."""


def usable_cores() -> int:
    """Cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def run_tasks(
    function: Work[R],
    payload: Any,
    tasks: Sequence[Any],
    *,
    engine: str = "local",
    workers: int | None = None,
    on_done: OnDone | None = None,
) -> list[R]:
    """`function(payload, task)` for each task. `function` is a module's; payload and tasks are picklable.

    workers: processes of engine "local"; 1 runs in this process; default: the usable cores.
    Raises GridFailed, and whatever `function` raises.
    """
    if engine not in ENGINES:
        raise GridFailed(f"engine is {engine!r}; allowed: {', '.join(ENGINES)}")
    on_done = on_done or _quietly
    if engine == "ray":
        return _on_ray(function, payload, tasks, on_done)
    workers = min(workers or usable_cores(), len(tasks))
    if workers <= 1:
        out = []
        for n, task in enumerate(tasks, 1):
            out.append(function(payload, task))
            on_done(n, len(tasks))
        return out
    return _on_cores(function, payload, tasks, workers, on_done)


def _quietly(done: int, of: int) -> None:
    """Nobody wants to know."""


def _begin(work: bytes) -> None:
    global _work
    _work = pickle.loads(work)


def _do(task: Any) -> Any:
    assert _work is not None
    function, payload = _work
    return function(payload, task)


def _on_cores(
    function: Work[R], payload: Any, tasks: Sequence[Any], workers: int, on_done: OnDone
) -> list[R]:
    out: dict[int, R] = {}
    # spawned, not forked: this process may have threads, of a progress display or of an engine
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(pickle.dumps((function, payload)),),
    )
    try:
        pending: dict[Future[R], int] = {pool.submit(_do, task): n for n, task in enumerate(tasks)}
        while pending:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                out[pending.pop(future)] = future.result()
                on_done(len(out), len(tasks))
    except BrokenProcessPool:
        raise GridFailed(f"a worker process died with {len(out)} of {len(tasks)} tasks done") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return [out[n] for n in range(len(tasks))]


def _on_ray(function: Work[R], payload: Any, tasks: Sequence[Any], on_done: OnDone) -> list[R]:
    """On the cluster that RAY_ADDRESS names, or on one of this machine's cores alone."""
    try:
        import ray
    except ImportError:
        raise GridFailed("engine 'ray' needs the package ray: pip install 'dsdlab[ray]'") from None
    scratch = ""
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if "RAY_ADDRESS" not in os.environ:
        scratch = tempfile.mkdtemp(prefix="dsdlab-ray-")
        options |= {"include_dashboard": False, "_temp_dir": scratch}
    try:
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError) as e:
            raise GridFailed(f"no Ray cluster: {' '.join(str(e).split())}") from None
        shared = ray.put((function, payload))
        remote: Any = ray.remote(_apart)
        pending = {remote.remote(shared, task): n for n, task in enumerate(tasks)}
        out: dict[int, R] = {}
        while pending:
            done, _ = ray.wait(list(pending))
            for ref in done:
                out[pending.pop(ref)] = ray.get(ref)
                on_done(len(out), len(tasks))
        return [out[n] for n in range(len(tasks))]
    finally:
        ray.shutdown()
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)


def _apart(shared: tuple[Work[R], Any], task: Any) -> R:
    function, payload = shared
    return function(payload, task)
