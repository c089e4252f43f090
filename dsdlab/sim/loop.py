"""An asyncio event loop on a virtual clock: time jumps to the next timer.

Tasks and futures are asyncio's own, so that everything that waits (sleep, Queue, Lock, Event, timeout,
gather, TaskGroup, …) works unchanged. There is nothing else: no sockets, threads or signals, which would make
a run depend on something other than the program.

INVARIANT L1: callbacks run in the order of asyncio's loop; timers of one instant in the order in which they
were set. A run is a function of the program alone.
INVARIANT L2: time moves only when nothing is ready, and then exactly to the earliest timer that was not
cancelled; no timer fires early.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import sys
import threading
import weakref
from asyncio import events
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from contextvars import Context, copy_context
from functools import partial
from heapq import heapify, heappop, heappush
from pathlib import PurePath
from typing import Any, NoReturn, TypeVar

import msgspec

from dsdlab.protocol.parking import Place

__all__ = ["Deadlock", "Handle", "Runaway", "TimerHandle", "VirtualLoop", "run"]

T = TypeVar("T")
log = logging.getLogger("dsdlab.sim.loop")

MAX_STILL = 1_000_000
"""Callbacks that may run while time stands still, beside `STILL_PER_TASK` for every task."""
STILL_PER_TASK = 1000
GARBAGE_EVERY = 100_000
"""New objects between two looks for garbage: looking through 10⁵ sessions takes half of the time else."""
MAX_LISTED = 10  # tasks named in an error
MAX_ENDINGS = 10  # times that a task is cancelled before it is said not to end
_NEVER_S, _LAST_S = math.inf, sys.float_info.max
COMPACT_FROM = 100  # cancelled timers; above it, and above half of all timers, they are thrown out


class Deadlock(RuntimeError):
    """Everybody waits and no timer is set. The message says who waits for what."""


class Runaway(RuntimeError):
    """A limit was passed: callbacks while time stood still, callbacks in all, or virtual time."""


class Handle(msgspec.Struct, eq=False):  # a Struct is made in a third of a class's time
    """A callback that is to run; `cancel` takes it back."""

    callback: Callable[..., object]
    args: tuple[Any, ...]
    context: Context

    def cancel(self) -> None:
        self.callback, self.args = _nothing, ()

    def cancelled(self) -> bool:
        return self.callback is _nothing


class TimerHandle(Handle, eq=False):
    """A callback that is to run at a time of the loop's clock."""

    when_s: float
    loop: Any  # a VirtualLoop; None once it is due

    def when(self) -> float:
        return self.when_s

    def cancel(self) -> None:
        if self.callback is not _nothing:
            self.callback, self.args = _nothing, ()
            if self.loop is not None:
                self.loop._timer_cancelled()


class ParkedStep(TimerHandle, eq=False):
    """The next step of a parked task: it goes on at `when_s`, or when it is told to (infinity)."""

    def resume(self) -> None:
        """Let the task go on, in the next round. Nothing happens to one that is going on already."""
        loop = self.loop
        if loop is None:
            return
        if self.when_s < _NEVER_S:  # the heap keeps this handle: another one does what it was to do
            loop._ready.append(Handle(self.callback, self.args, self.context))
            self.cancel()
        else:
            loop._ready.append(self)
        self.loop = None

    def resume_at(self, when_s: float) -> None:
        """Let the task go on at `when_s`. Only once, and where it waits to be told."""
        loop = self.loop
        if loop is not None:
            self.when_s = when_s
            loop._n_timers = number = loop._n_timers + 1
            heappush(loop._timers, (when_s, number, self))


def _closed(*_: object, **__: object) -> NoReturn:
    """What a closed loop does of what it was asked to."""
    raise RuntimeError("Event loop is closed")


def _nothing() -> None:
    """What a cancelled handle runs."""


_ONCE = (None,)


class _Park:
    """What a task awaits that is parked: it suspends once, for nothing. The loop keeps its next step."""

    __slots__ = ()
    __await__ = partial(iter, _ONCE)  # no Python function on the way


class _Timed(Place):
    """A place where a task waits until a time at most."""

    __slots__ = ("_place", "_until_s")

    def __init__(self, place: Place, until_s: float) -> None:
        self._place, self._until_s = place, until_s

    @property
    def parked(self) -> Any:
        return self._place.parked

    @parked.setter
    def parked(self, step: ParkedStep) -> None:
        self._place.parked = step
        step.resume_at(self._until_s)


_PARK = _Park()

_Due = tuple[float, int, ParkedStep]
"""A parked step whose time has come: its task goes on in the next round, as one does whose future is done in
this one. So a parked task takes its turn where asyncio's loop would give it."""


class _Task(asyncio.Task[T]):
    """asyncio's task, which can also be parked; cancelled there, it goes on at once."""

    __slots__ = ("parked",)
    parked: ParkedStep  # its next step, where it was parked last

    def cancel(self, msg: Any = None) -> bool:
        asked = super().cancel(msg)
        step = getattr(self, "parked", None)
        if asked and step is not None:
            step.resume()
        return asked


class VirtualLoop(asyncio.AbstractEventLoop):
    """The loop. Time begins at 0.

    max_time_s: of virtual time. max_callbacks: in all. max_still: while time stands still. Past a limit
    `Runaway` is raised from whatever runs the loop; `Deadlock` where nothing is left to run.

    Raises ValueError for a limit that is none.
    """

    def __init__(
        self,
        *,
        max_time_s: float = math.inf,
        max_callbacks: int | None = None,
        max_still: int = MAX_STILL,
    ) -> None:
        if not max_time_s >= 0.0:
            raise ValueError(f"max_time_s is {max_time_s}; allowed: 0 or more")
        if max_callbacks is not None and max_callbacks < 1:
            raise ValueError(f"max_callbacks is {max_callbacks}; allowed: 1 or more")
        if max_still < 1:
            raise ValueError(f"max_still is {max_still}; allowed: 1 or more")
        self._now_s = 0.0
        self._ready: deque[Any] = deque()  # Handle, or _Due
        self._timers: list[tuple[float, int, Any]] = []  # a heap by (when, number): TimerHandle
        self._n_timers = 0  # set so far
        self._n_cancelled = 0  # of those in the heap
        self._park: float | Place | None = None  # until when, or where, the step asked for next is parked
        self._ran = 0  # callbacks so far
        self._max_time_s, self._max_still = max_time_s, max_still
        self._max_callbacks = math.inf if max_callbacks is None else max_callbacks
        self._thread: int | None = None  # that runs the loop
        self._main: asyncio.Future[Any] | None = None  # of run_until_complete
        self._stopping = self._closed = self._debug = False
        self._asyncgens: weakref.WeakSet[AsyncGenerator[Any, Any]] = weakref.WeakSet()
        self._exception_handler: Callable[..., object] | None = None
        self._task_factory: Any = None

    def __repr__(self) -> str:
        state = "closed" if self._closed else "running" if self._thread is not None else "at rest"
        return f"<VirtualLoop {state} at {self._now_s:g} s>"

    # clock and callbacks -------------------------------------------------------------------------

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now_s

    @property
    def callbacks(self) -> int:
        """How many callbacks have run so far."""
        return self._ran

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Handle:
        park = self._park
        if park is not None:  # a task that has just awaited `_PARK` asks for its next step
            self._park = None
            if type(park) is float:
                step = ParkedStep(callback, args, context, park, self)  # type: ignore[arg-type]
                self._n_timers = number = self._n_timers + 1
                heappush(self._timers, (park, number, step))
            else:
                step = park.parked = ParkedStep(callback, args, context, _NEVER_S, self)  # type: ignore
            task = callback.__self__  # type: ignore[attr-defined]
            task.parked = step
            if task._must_cancel:  # it was cancelled before it came here
                step.resume()
            return step
        handle = Handle(callback, args, context if context is not None else copy_context())
        self._ready.append(handle)
        return handle

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> TimerHandle:
        if when != when:
            raise ValueError(f"a timer is set for {when} s; allowed: a number")
        timer = TimerHandle(callback, args, context if context is not None else copy_context(), when, self)
        self._n_timers = number = self._n_timers + 1
        heappush(self._timers, (when, number, timer))
        return timer

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> TimerHandle:
        when = self._now_s + delay  # `call_at` once more: it is half of what a frame's way costs
        if when != when:
            raise ValueError(f"a timer is set for {when} s; allowed: a number")
        timer = TimerHandle(callback, args, context if context is not None else copy_context(), when, self)
        self._n_timers = number = self._n_timers + 1
        heappush(self._timers, (when, number, timer))
        return timer

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Handle:
        if self._thread is not None and self._thread != threading.get_ident():
            raise RuntimeError("a VirtualLoop takes no calls from other threads")
        return self.call_soon(callback, *args, context=context)

    def sleep(self, delay_s: float) -> _Park:
        """`await` it at once, in a task of this loop: `asyncio.sleep` without coroutine and future."""
        if delay_s > 0.0:  # else the step just comes in the next round
            self._park = self._now_s + (delay_s + 0.0)  # a float whatever those are
        return _PARK

    def sleep_until(self, when_s: float) -> _Park:
        """`sleep`, to a time of this clock."""
        self._park = when_s + 0.0
        return _PARK

    def park(self, place: Place, until_s: float = math.inf, /) -> _Park:
        """`await` it at once, in a task of this loop: until `resume` of what `place.parked` then holds, or
        until a time of this clock."""
        self._park = place if until_s == _NEVER_S else _Timed(place, until_s)
        return _PARK

    def _timer_cancelled(self) -> None:
        self._n_cancelled = n = self._n_cancelled + 1
        timers = self._timers
        if n > COMPACT_FROM and 2 * n > len(timers):
            timers[:] = [entry for entry in timers if entry[2].callback is not _nothing]
            heapify(timers)
            self._n_cancelled = 0

    # tasks and futures ---------------------------------------------------------------------------

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self,
        coro: Coroutine[Any, Any, T] | Generator[Any, None, T],
        *,
        name: object = None,
        context: Context | None = None,
    ) -> asyncio.Task[T]:
        if self._closed:
            raise RuntimeError("Event loop is closed")
        if self._task_factory is None:
            return _Task(coro, loop=self, name=None if name is None else str(name), context=context)
        task: asyncio.Task[T] = (
            self._task_factory(self, coro)
            if context is None
            else self._task_factory(self, coro, context=context)
        )
        if name is not None:
            task.set_name(str(name))
        return task

    def set_task_factory(self, factory: Any) -> None:
        """Tasks of another kind than this loop's own are not to be cancelled while they are parked."""
        if factory is not None and not callable(factory):
            raise TypeError("task factory must be a callable or None")
        self._task_factory = factory

    def get_task_factory(self) -> Any:
        return self._task_factory

    # running -------------------------------------------------------------------------------------

    def run_until_complete(self, future: Awaitable[T] | Generator[Any, None, T]) -> T:
        """Run until `future` is done; its result. Raises Deadlock, Runaway."""
        self._check_idle()
        is_new = not asyncio.isfuture(future)
        main: asyncio.Future[T] = asyncio.ensure_future(future, loop=self)  # type: ignore[arg-type]
        main.add_done_callback(self._main_done)
        outer, self._main = self._main, main
        try:
            self.run_forever()
        except BaseException:
            if is_new and main.done() and not main.cancelled():
                main.exception()  # retrieved: what is raised here says it all
            raise
        finally:
            self._main = outer
            main.remove_done_callback(self._main_done)
        if not main.done():
            raise RuntimeError("Event loop stopped before Future completed.")
        return main.result()

    def _main_done(self, future: asyncio.Future[Any]) -> None:
        if not future.cancelled() and isinstance(future.exception(), KeyboardInterrupt | SystemExit):
            return  # it has left the loop already
        self._stopping = True

    def run_forever(self) -> None:
        """Run until `stop`. Raises Deadlock, Runaway."""
        self._check_idle()
        hooks = sys.get_asyncgen_hooks()
        self._thread = threading.get_ident()
        try:
            sys.set_asyncgen_hooks(firstiter=self._asyncgens.add, finalizer=self._asyncgen_lost)
            events._set_running_loop(self)
            self._turn()
        finally:
            self._stopping = False
            self._thread = None
            events._set_running_loop(None)
            sys.set_asyncgen_hooks(*hooks)

    def _turn(self) -> None:
        """The loop itself: one round runs what was ready at its beginning."""
        ready, timers = self._ready, self._timers
        popleft, append = ready.popleft, ready.append
        for handle in [popleft() for _ in range(len(ready))]:  # what a round left that was broken off
            if type(handle) is tuple:
                handle[2].resume()
            else:
                append(handle)
        now_s, max_time_s = self._now_s, min(self._max_time_s, _LAST_S)
        max_callbacks, limit, ran = self._max_callbacks, self._max_still, self._ran
        still = 0  # callbacks since time moved
        while True:
            handle = None  # the only one of its round, as is usual
            if ready:
                if len(ready) == 1 and (not timers or timers[0][0] > now_s):
                    handle = popleft()
            elif timers:
                entry = heappop(timers)
                when_s, _, timer = entry
                if timer.callback is _nothing:
                    self._n_cancelled -= 1
                    continue
                if when_s > now_s:
                    if when_s > max_time_s:
                        heappush(timers, (when_s, 0, timer))  # it waits on, for who looks at the error
                        self._out_of_time(when_s)
                    self._now_s = now_s = when_s
                    still = 0
                if timers and timers[0][0] <= now_s:
                    if type(timer) is ParkedStep:
                        timer.when_s = _NEVER_S
                        append(entry)
                    else:
                        timer.loop = None
                        append(timer)
                else:
                    timer.loop = None
                    handle = timer  # a parked step too: nothing comes between this round and the next
            if handle is not None:
                still += 1
                self._ran = ran = ran + 1
                if still > limit or ran > max_callbacks:
                    ready.appendleft(handle)  # it waits on, for who looks at the error
                    limit = self._checked_limit(still)
                    popleft()
                args = handle.args
                try:
                    if args:
                        handle.context.run(handle.callback, *args)
                    else:  # a third of the time
                        handle.context.run(handle.callback)
                        if type(handle) is ParkedStep:  # a task and its last step would hold each other
                            handle.callback = _nothing
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as e:
                    self._failed(handle, e)
                if self._stopping:
                    return
                continue
            while timers and timers[0][0] <= now_s:
                entry = heappop(timers)
                timer = entry[2]
                if timer.callback is _nothing:
                    self._n_cancelled -= 1
                elif type(timer) is ParkedStep:
                    timer.when_s = _NEVER_S
                    append(entry)
                else:
                    timer.loop = None
                    append(timer)
            n = len(ready)
            if not n and not self._stopping:
                self._deadlock()
            still += n
            self._ran = ran = ran + n
            if still > limit or ran > max_callbacks:
                limit = self._checked_limit(still)
            for _ in range(n):
                handle = popleft()
                if type(handle) is tuple:
                    timer = handle[2]
                    if timer.loop is not None:  # its task was not cancelled meanwhile
                        timer.loop = None
                        append(timer)
                    continue
                args = handle.args
                try:
                    if args:
                        handle.context.run(handle.callback, *args)
                    else:  # a third of the time
                        handle.context.run(handle.callback)
                        if type(handle) is ParkedStep:  # a task and its last step would hold each other
                            handle.callback = _nothing
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as e:
                    self._failed(handle, e)
            if self._stopping:
                return

    def _failed(self, handle: Handle, error: BaseException) -> None:
        message = f"Exception in callback {handle.callback!r}"
        self.call_exception_handler({"message": message, "exception": error})

    def _checked_limit(self, still: int) -> int:
        """How many callbacks may run while time stands still. Raises Runaway.

        still: that have run since time moved, or will in the round that begins.
        """
        if self._ran > self._max_callbacks:
            self._runaway(f"more than {self._max_callbacks:,} callbacks")
        allowed = self._max_still + STILL_PER_TASK * len(asyncio.all_tasks(self))
        if still > allowed:
            self._runaway(f"more than {allowed:,} callbacks while time stood still")
        return allowed

    def _runaway(self, what: str) -> NoReturn:
        running = {task for handle in self._ready if (task := _task_of(handle)) is not None}
        names = _described(running, self._main) if running else "no task, only callbacks"
        raise Runaway(f"{what}, at {self._now_s:g} s; running: {names}")

    def _out_of_time(self, next_s: float) -> NoReturn:
        if next_s > _LAST_S:  # only timers that are set for never
            self._deadlock()
        waiting = _described(asyncio.all_tasks(self), self._main)
        raise Runaway(
            f"virtual time would pass {self._max_time_s:g} s, at {self._now_s:g} s; waiting: {waiting}"
        )

    def _deadlock(self) -> NoReturn:
        tasks = asyncio.all_tasks(self)
        waiting = _described(tasks, self._main) if tasks else "no task"
        raise Deadlock(f"nothing is left to run, at {self._now_s:g} s; waiting: {waiting}")

    def stop(self) -> None:
        """End the run after the present round of callbacks."""
        self._stopping = True

    def is_running(self) -> bool:
        return self._thread is not None

    def is_closed(self) -> bool:
        return self._closed

    def _check_idle(self) -> None:
        if self._closed:
            raise RuntimeError("Event loop is closed")
        if self._thread is not None:
            raise RuntimeError("This event loop is already running")
        if events._get_running_loop() is not None:
            raise RuntimeError("Cannot run the event loop while another loop is running")

    def close(self) -> None:
        if self._thread is not None:
            raise RuntimeError("Cannot close a running event loop")
        self._closed = True
        self.call_soon = self.call_at = self.call_later = _closed  # type: ignore[method-assign]  # no test in each call
        self._ready.clear()
        self._timers.clear()

    # async generators ----------------------------------------------------------------------------

    def _asyncgen_lost(self, generator: AsyncGenerator[Any, Any]) -> None:
        self._asyncgens.discard(generator)
        if not self._closed:
            self.call_soon(self.create_task, generator.aclose())

    async def shutdown_asyncgens(self) -> None:
        generators = list(self._asyncgens)
        self._asyncgens.clear()
        results = await asyncio.gather(*(g.aclose() for g in generators), return_exceptions=True)
        for generator, result in zip(generators, results, strict=True):
            if isinstance(result, Exception):
                self.call_exception_handler(
                    {
                        "message": f"an error occurred during closing of {generator!r}",
                        "exception": result,
                        "asyncgen": generator,
                    }
                )

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Nothing to do: there is none."""

    # errors and debugging ------------------------------------------------------------------------

    def get_exception_handler(self) -> Any:
        return self._exception_handler

    def set_exception_handler(self, handler: Any) -> None:
        if handler is not None and not callable(handler):
            raise TypeError(f"a callable object or None is expected, got {handler!r}")
        self._exception_handler = handler

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        """Log what went wrong where nobody listens."""
        error = context.get("exception")
        details = [
            f"{key}: {context[key]!r}" for key in sorted(context) if key not in ("message", "exception")
        ]
        log.error(
            "\n".join([context.get("message") or "Unhandled exception in event loop", *details]),
            exc_info=error if error is not None else False,
        )

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if self._exception_handler is None:
            self.default_exception_handler(context)
            return
        try:
            self._exception_handler(self, context)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as e:
            self.default_exception_handler(
                {"message": "Unhandled error in exception handler", "exception": e, "context": context}
            )

    def get_debug(self) -> bool:
        return self._debug

    def set_debug(self, enabled: bool) -> None:
        self._debug = enabled


# what a virtual clock cannot have ----------------------------------------------------------------


def _refuse(name: str) -> Callable[..., NoReturn]:
    def refused(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(
            f"a VirtualLoop has no {name}: nothing outside the program runs on a virtual clock"
        )

    refused.__name__ = name
    return refused


for _name, _member in vars(asyncio.AbstractEventLoop).items():
    if callable(_member) and not _name.startswith("_") and _name not in vars(VirtualLoop):
        setattr(VirtualLoop, _name, _refuse(_name))


# who waits for what ------------------------------------------------------------------------------


def _described(tasks: set[asyncio.Task[Any]], main: object = None) -> str:
    """Some tasks and what they wait for, the main one first."""
    order = sorted(tasks, key=lambda task: (task is not main, *_natural(task)))
    out = [_waiting(task) for task in order[:MAX_LISTED]]
    if len(order) > MAX_LISTED:
        out.append(f"and {len(order) - MAX_LISTED:,} more")
    return "; ".join(out)


def _natural(task: asyncio.Task[Any]) -> tuple[int, str]:
    """A key under which Task-9 comes before Task-10."""
    name = task.get_name()
    return len(name), name


def _waiting(task: asyncio.Task[Any]) -> str:
    """`NAME (COROUTINE) in WHAT at FILE:LINE`: the innermost await outside of asyncio itself."""
    coro: Any = task.get_coro()
    name, what, where = getattr(coro, "__qualname__", "?"), "", ""
    inner: Any = coro
    while inner is not None:
        kind = next((k for k in ("cr", "gi", "ag") if hasattr(inner, f"{k}_frame")), "")
        frame = getattr(inner, f"{kind}_frame", None)
        if not kind or frame is None:
            break
        file = PurePath(frame.f_code.co_filename)
        awaited = getattr(inner, "gi_yieldfrom" if kind == "gi" else f"{kind}_await")
        if file.parent.name != "asyncio" or not where:
            where = f"{'/'.join(file.parts[-2:])}:{frame.f_lineno}"
            what = getattr(awaited, "__qualname__", "")
        inner = awaited
    waiter = getattr(task, "_fut_waiter", None)
    if isinstance(waiter, asyncio.Task):
        what = waiter.get_name()
    return f"{task.get_name()} ({name}) {'awaits ' + what if what else 'waits'} at {where or '?'}"


def _task_of(handle: Handle | _Due) -> asyncio.Task[Any] | None:
    """The task whose step a handle is."""
    owner = getattr((handle[2] if isinstance(handle, tuple) else handle).callback, "__self__", None)
    return owner if isinstance(owner, asyncio.Task) else None


# a run -------------------------------------------------------------------------------------------


def run(
    main: Coroutine[Any, Any, T],
    *,
    max_time_s: float = math.inf,
    max_callbacks: int | None = None,
    max_still: int = MAX_STILL,
) -> T:
    """Run a coroutine on a new VirtualLoop, then end every task that is left and close the loop.

    Raises what the coroutine raises, Deadlock, Runaway. What a task raises while it is ended goes to the log.
    """
    try:
        loop = VirtualLoop(  # type: ignore[abstract]  # the rest is refused below the class
            max_time_s=max_time_s, max_callbacks=max_callbacks, max_still=max_still
        )
    except ValueError:
        main.close()
        raise
    often = gc.get_threshold()
    gc.set_threshold(max(often[0], GARBAGE_EVERY), 20, 100)
    try:
        try:
            result = loop.run_until_complete(main)
        except BaseException:
            with suppress(Deadlock, Runaway):
                _end_tasks(loop)
            raise
        _end_tasks(loop)
        return result
    finally:
        gc.set_threshold(*often)
        loop.close()


def _end_tasks(loop: VirtualLoop) -> None:
    """Cancel all tasks and close async generators, whatever time that takes. Raises Deadlock, Runaway."""
    loop._max_time_s = loop._max_callbacks = math.inf
    for attempt in range(MAX_ENDINGS):  # a task may start another while it ends, or not end at once
        tasks = sorted(asyncio.all_tasks(loop), key=_natural)
        if not tasks:
            break
        for task in tasks:
            task.cancel()
        try:
            loop.run_until_complete(_all_done(loop, tasks))
        except Deadlock:
            if attempt == MAX_ENDINGS - 1:
                raise
        for task in tasks:
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                loop.call_exception_handler(
                    {"message": "a task failed while it was ended", "exception": error, "task": task}
                )
    loop.run_until_complete(loop.shutdown_asyncgens())


def _all_done(loop: VirtualLoop, tasks: list[asyncio.Task[Any]]) -> asyncio.Future[None]:
    """Done when all tasks are. Unlike `asyncio.wait` it is no task itself, which would be left over where one
    of them does not end."""
    left, done = len(tasks), loop.create_future()

    def ended(_: object) -> None:
        nonlocal left
        left -= 1
        if not left:
            done.set_result(None)

    for task in tasks:
        task.add_done_callback(ended)
    return done
