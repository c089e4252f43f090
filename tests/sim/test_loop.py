"""The virtual-time loop: asyncio's own order, jumping time, deadlocks and runaways that say who it was."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import math
import selectors
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from itertools import count
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsdlab.nodes.mailbox import Mailbox
from dsdlab.protocol.frames import Ping
from dsdlab.sim.channel import SimLink
from dsdlab.sim.compute import SimCompute
from dsdlab.sim.loop import Deadlock, Runaway, VirtualLoop, run
from dsdlab.sim.profile import LinkProfile

# the stock loop on a virtual clock, to compare with ----------------------------------------------


class _VirtualSelector(selectors.DefaultSelector):
    now_s = 0.0
    loop: Any  # whose selector this is

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("nothing is scheduled")
        if timeout > 0.0:  # to the timer exactly: now + (when - now) need not be when
            self.now_s = self.loop._scheduled[0]._when
        return super().select(0)


class _FairTimer(asyncio.TimerHandle):
    """The stock loop's timer, but those of one instant keep the order in which they were set."""

    numbers: Iterator[int] = count()

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.number = next(self.numbers)

    def __lt__(self, other: Any) -> bool:
        return (self._when, self.number) < (other._when, other.number)


class StockLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.virtual = _VirtualSelector()
        super().__init__(self.virtual)
        self.virtual.loop = self

    @property
    def _clock_resolution(self) -> float:
        """A timer is due when its time is before now + this: when it is now, or earlier."""
        return math.ulp(self.virtual.now_s)

    @_clock_resolution.setter
    def _clock_resolution(self, _: float) -> None:
        """The stock loop's is the real clock's."""

    def time(self) -> float:
        return self.virtual.now_s


def on_stock(main: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=StockLoop) as runner:
        return runner.run(main)


Action = tuple[str, int]
ACTIONS = st.one_of(
    st.tuples(st.just("sleep"), st.integers(0, 4)),
    st.tuples(st.sampled_from(["put", "get"]), st.integers(0, 1)),
    st.tuples(st.sampled_from(["lock", "set", "wait", "yield", "shield"]), st.just(0)),
    st.tuples(st.sampled_from(["timeout", "wait_for", "cancel", "later", "at", "gather"]), st.integers(0, 4)),
    st.tuples(st.sampled_from(["park", "drop in", "look in", "work"]), st.integers(0, 4)),
    st.tuples(st.sampled_from(["send", "recv"]), st.integers(0, 1)),
)


async def play(scripts: list[list[Action]], log: list[Any]) -> None:
    """Tasks that follow their scripts, with everything that asyncio has to wait for and with what parks on
    the virtual loop where others wait for a future; and a log of it all."""
    loop = asyncio.get_running_loop()
    sleep = getattr(loop, "sleep", asyncio.sleep)
    box: Mailbox[int] = Mailbox()
    compute = SimCompute(hop_s=1.0)
    ends = SimLink(LinkProfile(rtt_ms=2000.0)).pair(edge=(0.0, 1.0))
    queues: list[asyncio.Queue[int]] = [asyncio.Queue(), asyncio.Queue(1)]
    lock, event = asyncio.Lock(), asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    def note(*what: Any) -> None:
        log.append((loop.time(), *what))

    async def nap(me: int, units: int) -> None:
        await asyncio.sleep(units)
        note(me, "napped", units)

    async def act(me: int, what: str, n: int) -> None:
        match what:
            case "sleep":
                await asyncio.sleep(n)
            case "park":
                await sleep(n)
            case "drop in":
                box.put(me)
            case "look in" if box.parked is None:
                async with asyncio.timeout(n):
                    note(me, "found", await box.get())
            case "work":
                note(me, "worked", await compute.run(lambda: compute.spend(float(n))))
            case "send":
                await ends[n].send(Ping(me, loop.time()))
            case "recv" if ends[n].parked is None:
                async with asyncio.timeout(3):
                    note(me, "received", await ends[n].recv())
            case "yield":
                await asyncio.sleep(0)
            case "put":
                await asyncio.wait_for(queues[n].put(me), 3)
            case "get":
                note(me, "got", await asyncio.wait_for(queues[n].get(), 3))
            case "lock":
                async with lock:
                    await asyncio.sleep(1)
            case "set":
                event.set()
            case "wait":
                async with asyncio.timeout(2):
                    await event.wait()
            case "timeout":
                async with asyncio.timeout(n):
                    await asyncio.sleep(2)
            case "wait_for":
                await asyncio.wait_for(nap(me, 2), n)
            case "shield":
                await asyncio.shield(nap(me, 1))
            case "cancel":
                tasks[n % len(tasks)].cancel()
            case "later":
                handle = loop.call_later(n, note, me, "later")
                loop.call_later(2, handle.cancel)
            case "at":
                loop.call_at(n, note, me, "at")
            case "gather":
                await asyncio.gather(nap(me, n), nap(me, 1))

    async def follow(me: int, script: list[Action]) -> None:
        for what, n in script:
            try:
                await act(me, what, n)
                note(me, what, n)
            except TimeoutError:
                note(me, what, "timeout")

    for me, script in enumerate(scripts):
        tasks.append(asyncio.create_task(follow(me, script)))
    done = await asyncio.gather(*tasks, return_exceptions=True)
    note("done", [type(d).__name__ for d in done])
    await asyncio.sleep(10)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(ACTIONS, max_size=8), min_size=1, max_size=5))
@example([[("at", 1), ("sleep", 1), ("park", 1)]])  # the time is an integer then
@example([[("cancel", 0), ("recv", 0)]])  # cancelled before it waits
def test_l1_events_come_in_the_stock_loops_order(scripts: list[list[Action]]) -> None:
    ours: list[Any] = []
    theirs: list[Any] = []
    run(play(scripts, ours))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.events, "TimerHandle", _FairTimer)
        on_stock(play(scripts, theirs))
    assert ours == theirs


def test_the_comparison_sees_a_difference() -> None:
    """The log tells orders apart: of two tasks that begin the other way round, for one."""
    logs: list[list[Any]] = [[], []]
    run(play([[("sleep", 1)], [("yield", 0), ("sleep", 1)]], logs[0]))
    run(play([[("yield", 0), ("sleep", 1)], [("sleep", 1)]], logs[1]))
    assert logs[0] != logs[1]


def test_l1_timers_of_one_instant_keep_their_order() -> None:
    order: list[int] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for n in range(100):
            loop.call_at(7.0, order.append, n)
        await asyncio.sleep(8)

    run(main())
    assert order == list(range(100))


# time --------------------------------------------------------------------------------------------


def test_l2_years_pass_at_once_and_times_are_exact() -> None:
    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        times = [loop.time()]
        for delay_s in (0.0, 1e-12, 0.1, 3600.0, 1e9, -5.0):
            await asyncio.sleep(delay_s)
            times.append(loop.time())
        return times

    begun = time.perf_counter()
    times = run(main())
    assert times == [0.0, 0.0, 1e-12, 0.1 + 1e-12, 3600.0 + (0.1 + 1e-12), times[5], times[5]]
    assert times[5] == pytest.approx(1e9 + 3600.1)
    assert time.perf_counter() - begun < 1.0


def test_l2_a_cancelled_timer_does_not_move_time() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        loop.call_later(5.0, pytest.fail).cancel()
        early = loop.call_later(1.0, pytest.fail)
        loop.call_later(0.5, early.cancel)
        await asyncio.sleep(0.5)
        return loop.time()

    assert run(main()) == 0.5


def test_one_timer_may_cancel_another_of_the_same_instant() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.call_at(1.0, lambda: second.cancel())
        second = loop.call_at(1.0, pytest.fail)
        await asyncio.sleep(2)
        assert second.cancelled()

    run(main())


def test_cancelled_timers_are_thrown_out() -> None:
    """10⁵ time-outs that never happen leave no heap behind; those that remain still fire in order."""
    fired: list[float] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        for n in range(50):
            loop.call_at(2000.0 - n, lambda: fired.append(loop.time()))
        for _ in range(100_000):
            loop.call_later(1000.0, pytest.fail).cancel()
            assert len(loop._timers) < 400
        await asyncio.sleep(3000)

    run(main())
    assert fired == [1951.0 + n for n in range(50)]


@given(st.lists(st.tuples(st.floats(0, 100), st.booleans()), max_size=600))
@settings(max_examples=50, deadline=None)
def test_of_any_timers_those_not_cancelled_fire_in_order(plan: list[tuple[float, bool]]) -> None:
    fired: list[float] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        handles = [(loop.call_at(when, fired.append, when), keep) for when, keep in plan]
        for handle, keep in handles:
            if not keep:
                handle.cancel()
                handle.cancel()  # twice is once
        await asyncio.sleep(101)

    run(main())
    assert fired == sorted(when for when, keep in plan if keep)


@example([(30 + n % 7, n % 20) for n in range(400)])  # enough to be thrown out
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 25)), max_size=500))
@settings(max_examples=50, deadline=None)
def test_cancelled_timers_are_counted(plan: list[tuple[int, int]]) -> None:
    """Those in the heap, and no others: neither fired ones nor those that were thrown out."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        handles = [(loop.call_at(when, int), cancelled_s) for when, cancelled_s in plan]
        for now_s in range(27):
            for handle, cancelled_s in handles:
                if cancelled_s == now_s:
                    handle.cancel()
                    assert loop._n_cancelled == sum(timer.cancelled() for _, _, timer in loop._timers)
            await asyncio.sleep(1)

    run(main())


def test_a_timer_for_never_and_a_timer_for_no_time() -> None:
    async def main(when: float) -> None:
        asyncio.get_running_loop().call_at(when, pytest.fail)
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Deadlock):
        run(main(float("inf")))
    with pytest.raises(ValueError, match="timer is set for nan s; allowed"):
        run(main(float("nan")))


def test_the_loops_own_sleep() -> None:
    """As asyncio's: exact, cancellable, stopped by a time-out."""
    seen: list[tuple[str, float]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)

        async def nap(name: str, delay_s: float) -> None:
            try:
                await loop.sleep(delay_s)
            except asyncio.CancelledError:
                seen.append((f"{name} cancelled", loop.time()))
                raise
            seen.append((name, loop.time()))

        tasks = [asyncio.create_task(nap(str(n), n)) for n in (3, 1, 2, 0)]
        long = asyncio.create_task(nap("long", 100))
        await asyncio.sleep(1.5)
        long.cancel()
        await asyncio.gather(*tasks)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await loop.sleep(50)
        seen.append(("end", loop.time()))
        await loop.sleep(200)  # the cancelled ones fire on nobody

    run(main())
    assert seen == [("0", 0), ("1", 1), ("long cancelled", 1.5), ("2", 2), ("3", 3), ("end", 4)]


# what asyncio offers -----------------------------------------------------------------------------


def test_names_contexts_and_results() -> None:
    var: contextvars.ContextVar[str] = contextvars.ContextVar("var", default="outside")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        context = contextvars.copy_context()
        context.run(var.set, "inside")

        async def look() -> str:
            return var.get()

        assert await loop.create_task(look(), name="looker", context=context) == "inside"
        assert loop.create_task(look(), name="looker").get_name() == "looker"
        assert await look() == "outside"
        seen: list[str] = []
        loop.call_soon(lambda: seen.append(var.get()), context=context)
        loop.call_later(1, lambda: seen.append(var.get()), context=context)
        var.set("now")
        loop.call_soon(lambda: seen.append(var.get()))
        handle = loop.call_soon(pytest.fail)
        handle.cancel()
        assert handle.cancelled()
        timer = loop.call_at(9, pytest.fail)
        assert timer.when() == 9
        timer.cancel()
        await asyncio.sleep(2)
        assert seen == ["inside", "now", "inside"]
        assert loop.is_running()
        assert not loop.is_closed()
        assert not loop.get_debug()
        assert repr(loop) == "<VirtualLoop running at 2 s>"

    run(main())


def test_runner_and_run_until_complete() -> None:
    async def main() -> float:
        await asyncio.sleep(5)
        return asyncio.get_running_loop().time()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(main()) == 5
        assert runner.run(main()) == 10
    loop = VirtualLoop()
    with pytest.raises(RuntimeError, match="stopped before"):
        loop.call_later(1, loop.stop)
        loop.run_until_complete(loop.create_task(main()))
    assert loop.run_until_complete(asyncio.sleep(9, "slept")) == "slept"
    loop.call_later(2, loop.stop)
    loop.run_forever()
    assert loop.time() == 12
    loop.close()
    assert loop.is_closed()
    with pytest.raises(RuntimeError, match="closed"):
        loop.call_soon(print)
    with pytest.raises(RuntimeError, match="closed"):
        loop.run_forever()


def test_a_task_factory_is_used() -> None:
    made: list[str] = []

    def factory(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        made.append(coro.__name__)
        return asyncio.Task(coro, loop=loop, **options)

    async def other() -> None: ...

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(factory)
        assert asyncio.get_running_loop().get_task_factory() is factory
        await asyncio.create_task(other(), name="named")

    run(main())
    assert made[:1] == ["other"]  # then what ends the run


def test_task_groups_fail_together() -> None:
    async def main() -> float:
        async def fail() -> None:
            await asyncio.sleep(1)
            raise ZeroDivisionError

        with pytest.raises(ExceptionGroup) as e:
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.sleep(100))
                group.create_task(fail())
        assert e.group_contains(ZeroDivisionError)
        return asyncio.get_running_loop().time()

    assert run(main()) == 1


def test_async_generators_are_closed() -> None:
    closed: list[str] = []

    async def numbers(name: str) -> AsyncIterator[int]:
        try:
            for n in count():
                yield n
                await asyncio.sleep(1)
        finally:
            await asyncio.sleep(1)
            closed.append(name)

    async def main() -> AsyncIterator[int]:
        async for n in numbers("dropped"):
            if n == 3:
                break
        gc.collect()
        await asyncio.sleep(2)
        assert closed == ["dropped"]
        kept = numbers("kept")
        await anext(kept)
        return kept

    kept = run(main())
    assert closed == ["dropped", "kept"]
    del kept


def test_errors_of_callbacks_are_told_and_the_rest_runs(caplog: pytest.LogCaptureFixture) -> None:
    told: list[dict[str, Any]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: 1 // 0)
        await asyncio.sleep(1)
        loop.set_exception_handler(lambda _, context: told.append(context))
        loop.call_soon(lambda: [][1])
        await asyncio.sleep(1)
        loop.set_exception_handler(lambda *_: 1 // 0)
        loop.call_soon(lambda: {}[0])
        await asyncio.sleep(1)

    with caplog.at_level(logging.ERROR):
        run(main())
    assert [type(c["exception"]) for c in told] == [IndexError]
    assert "ZeroDivisionError" in caplog.text
    assert "Unhandled error in exception handler" in caplog.text


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_interrupts_leave_at_once(stop: type[BaseException]) -> None:
    async def other() -> None:
        await asyncio.sleep(1)
        raise stop

    async def main() -> None:
        task = asyncio.create_task(other())
        try:
            await asyncio.sleep(100)
        finally:
            assert asyncio.get_running_loop().time() == 1
            assert isinstance(task.exception(), stop)

    with pytest.raises(stop):
        run(main())


# what it refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reach"),
    [
        ("run_in_executor", lambda: asyncio.to_thread(print)),
        ("create_connection", lambda: asyncio.open_connection("localhost", 1)),
        ("create_server", lambda: asyncio.start_server(print, "localhost", 1)),
        ("subprocess_exec", lambda: asyncio.create_subprocess_exec("true")),
    ],
)
def test_the_world_outside_is_refused(name: str, reach: Callable[[], Coroutine[Any, Any, Any]]) -> None:
    with pytest.raises(NotImplementedError, match=f"has no {name}: nothing outside"):
        run(reach())


def test_every_method_of_a_loop_is_there_or_refused() -> None:
    loop = VirtualLoop()
    for name in vars(asyncio.AbstractEventLoop):
        if not name.startswith("_"):
            assert getattr(VirtualLoop, name) is not getattr(asyncio.AbstractEventLoop, name), name
    with pytest.raises(NotImplementedError, match="has no add_reader"):
        loop.add_reader(0, print)
    loop.close()


def test_other_threads_are_refused() -> None:
    errors: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon_threadsafe(errors.append, "own thread")

        def call() -> None:
            try:
                loop.call_soon_threadsafe(print)
            except RuntimeError as e:
                errors.append(str(e))

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        await asyncio.sleep(0)

    run(main())
    assert errors == ["a VirtualLoop takes no calls from other threads", "own thread"]


def test_handlers_and_factories_that_are_none() -> None:
    loop = VirtualLoop()
    with pytest.raises(TypeError, match="callable object or None is expected"):
        loop.set_exception_handler(1)
    with pytest.raises(TypeError, match="task factory must be a callable or None"):
        loop.set_task_factory(1)
    loop.close()


def test_a_running_loop_is_not_closed() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="Cannot close a running event loop"):
            asyncio.get_running_loop().close()
        await asyncio.sleep(1)

    run(main())


def test_loops_do_not_nest() -> None:
    async def main() -> None:
        other = VirtualLoop()
        try:
            with pytest.raises(RuntimeError, match="while another loop is running"):
                other.run_forever()
            with pytest.raises(RuntimeError, match="already running"):
                asyncio.get_running_loop().run_forever()
        finally:
            other.close()

    run(main())


@pytest.mark.parametrize(
    "limits", [{"max_time_s": -1.0}, {"max_time_s": float("nan")}, {"max_callbacks": 0}, {"max_still": 0}]
)
def test_bad_limits_name_themselves(limits: dict[str, Any]) -> None:
    async def main() -> None: ...

    with pytest.raises(ValueError, match=f"{next(iter(limits))} is .*; allowed: "):
        run(main(), **limits)


# deadlocks and runaways --------------------------------------------------------------------------


def test_a_deadlock_says_who_waits_for_what() -> None:
    async def reader(queue: asyncio.Queue[int]) -> None:
        await queue.get()

    async def outer(queue: asyncio.Queue[int]) -> None:
        await reader(queue)

    async def main() -> None:
        await asyncio.sleep(2)
        lock = asyncio.Lock()
        await lock.acquire()
        queue: asyncio.Queue[int] = asyncio.Queue()
        first = asyncio.create_task(outer(queue), name="first")
        asyncio.create_task(lock.acquire(), name="second")  # noqa: RUF006 - lives as long as the loop
        await first

    with pytest.raises(Deadlock) as e:
        run(main())
    text = str(e.value)
    assert text.startswith("nothing is left to run, at 2 s; waiting: Task-")
    line = main.__code__.co_firstlineno
    first = reader.__code__.co_firstlineno
    assert (
        f"(test_a_deadlock_says_who_waits_for_what.<locals>.main) awaits first at sim/test_loop.py:{line + 7}"
        in text
    )
    assert f".outer) awaits Queue.get at sim/test_loop.py:{first + 1}" in text
    assert "second (Lock.acquire)" in text
    assert "\n" not in text


def test_a_deadlock_of_many_names_ten() -> None:
    async def main() -> None:
        never = asyncio.get_running_loop().create_future()

        async def wait() -> None:
            await never

        tasks = [asyncio.create_task(wait(), name=f"waiter {n}") for n in range(30)]
        await asyncio.wait(tasks)

    with pytest.raises(Deadlock) as e:
        run(main())
    text = str(e.value)
    assert text.endswith("and 21 more")
    assert text.count("waiter ") == 9
    assert "waiter 8 " in text


def test_a_deadlock_of_no_task() -> None:
    loop = VirtualLoop()
    with pytest.raises(Deadlock, match="no task"):
        loop.run_forever()
    with pytest.raises(Deadlock, match="no task"):
        loop.run_until_complete(loop.create_future())
    loop.close()


def test_a_task_in_an_async_generator_is_placed() -> None:
    async def numbers() -> AsyncIterator[int]:
        yield 1
        await asyncio.get_running_loop().create_future()

    async def main() -> None:
        async for _ in numbers():
            pass

    with pytest.raises(Deadlock, match=rf"waits at sim/test_loop.py:{main.__code__.co_firstlineno + 1}"):
        run(main())


def spin_forever(**limits: Any) -> str:
    async def spin() -> None:
        while True:  # noqa: ASYNC110 - it waits for nothing
            await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.sleep(3)
        task = asyncio.create_task(spin(), name="spinner")
        await task

    with pytest.raises(Runaway) as e:
        run(main(), **limits)
    return str(e.value)


def test_a_runaway_says_who_runs() -> None:
    text = spin_forever(max_still=1000)
    assert text.startswith("more than 3,000 callbacks while time stood still, at 3 s; running: spinner (")
    assert "test_loop.py" in text
    assert spin_forever(max_callbacks=500).startswith("more than 500 callbacks, at 3 s; running: spinner (")


def test_a_runaway_stops_by_default() -> None:
    assert spin_forever().startswith("more than 1,002,000 callbacks while time stood still, at 3 s")


def test_the_last_callback_allowed_runs() -> None:
    def loop_of(limit: int) -> VirtualLoop:
        loop = VirtualLoop(max_callbacks=limit)
        for n in range(1, 10):
            loop.call_later(n, int)
        loop.call_later(10, loop.stop)
        return loop

    enough, short = loop_of(10), loop_of(9)
    enough.run_forever()
    assert enough.callbacks == 10
    with pytest.raises(Runaway, match="more than 9 callbacks, at 10 s"):
        short.run_forever()
    enough.close()
    short.close()


def test_callbacks_alone_can_run_away() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()

        def again() -> None:
            loop.call_soon(again)

        again()
        await asyncio.sleep(1)

    with pytest.raises(Runaway, match="running: no task, only callbacks"):
        run(main(), max_still=5000)


def test_time_that_moves_is_no_runaway_until_its_limit() -> None:
    async def main() -> float:
        for _ in range(5000):
            await asyncio.sleep(1)
        return asyncio.get_running_loop().time()

    assert run(main(), max_still=100, max_time_s=5000) == 5000
    with pytest.raises(Runaway, match=r"virtual time would pass 4999.5 s, at 4999 s; waiting: Task-"):
        run(main(), max_time_s=4999.5)


def test_many_tasks_at_one_instant_are_no_runaway() -> None:
    async def main() -> None:
        async def hop() -> None:
            for _ in range(20):
                await asyncio.sleep(0)

        await asyncio.gather(*(hop() for _ in range(2000)))

    run(main(), max_still=100)


# a run and its end -------------------------------------------------------------------------------


def test_run_ends_every_task(caplog: pytest.LogCaptureFixture) -> None:
    ended: list[str] = []

    async def slow_to_end() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            asyncio.create_task(child(), name="child")  # noqa: RUF006 - the run ends it
            await asyncio.sleep(50)
            ended.append("slow")

    async def child() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append("child")

    async def breaks() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            raise ZeroDivisionError("at the end")

    async def main() -> str:
        tasks = [asyncio.create_task(slow_to_end()), asyncio.create_task(breaks(), name="breaks")]
        await asyncio.sleep(1)
        assert len(tasks) == 2
        return "result"

    with caplog.at_level(logging.ERROR):
        assert run(main(), max_time_s=2) == "result"
    assert ended == ["slow", "child"]
    assert "a task failed while it was ended" in caplog.text
    assert "at the end" in caplog.text


def test_a_task_that_does_not_end_is_named() -> None:
    async def stubborn() -> None:
        while True:
            try:
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:
                if stop:
                    raise

    stop: list[bool] = []
    kept: list[asyncio.Task[None]] = []
    loops: list[VirtualLoop] = []

    async def main() -> None:
        loops.append(virtual())
        kept.append(asyncio.create_task(stubborn(), name="stubborn"))
        await asyncio.sleep(1)

    with pytest.raises(Deadlock, match="stubborn"):
        run(main())
    assert asyncio.all_tasks(loops[0]) == set(kept)  # none of the loop's own waits on
    kept[0]._log_destroy_pending = False  # type: ignore[attr-defined]
    stop.append(True)


def test_run_raises_what_main_raises_and_still_cleans_up() -> None:
    ended: list[str] = []

    async def other() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append("other")

    async def main() -> None:
        asyncio.create_task(other())  # noqa: RUF006 - the run ends it
        await asyncio.sleep(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main())
    assert ended == ["other"]


@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_run_leaves_nothing_behind(
    error: type[BaseException] | None, caplog: pytest.LogCaptureFixture
) -> None:
    """The loop is closed, collecting and hooks are as they were; what was raised is not told twice."""
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(1)
        if error is not None:
            raise error

    gc.collect()  # what other tests left
    caplog.clear()
    often = gc.get_threshold()
    gc.set_threshold(701, 11, 12)
    before = gc.get_threshold(), sys.get_asyncgen_hooks()
    with caplog.at_level(logging.ERROR):
        if error is None:
            run(main())
        else:
            with pytest.raises(error):
                run(main())
        gc.collect()
    assert loops[0].is_closed()
    after = gc.get_threshold(), sys.get_asyncgen_hooks()
    gc.set_threshold(*often)
    assert after == before
    assert caplog.text == ""


# determinism -------------------------------------------------------------------------------------


def test_the_same_program_makes_the_same_log() -> None:
    def once() -> list[Any]:
        log: list[Any] = []

        async def main() -> None:
            queue: asyncio.Queue[int] = asyncio.Queue()

            async def worker(n: int) -> None:
                while True:
                    item = await queue.get()
                    await asyncio.sleep(0.001 * (item * 7919 % 13))
                    log.append((asyncio.get_running_loop().time(), n, item))

            workers = [asyncio.create_task(worker(n), name=f"w{n}") for n in range(7)]
            for item in range(500):
                queue.put_nowait(item)
                if item % 3 == 0:
                    await asyncio.sleep(0.002)
            await asyncio.sleep(10)
            assert len(workers) == 7

        run(main())
        return log

    first = once()
    junk = [object() for _ in range(1000)]  # other addresses
    assert once() == first
    assert len(first) == 500
    assert len(junk) == 1000


def test_the_loop_is_light() -> None:
    """Importing it brings in neither torch nor numpy."""
    import subprocess

    code = (
        "import sys, dsdlab.sim.loop, dsdlab.sim.compute;"
        "print(*(m for m in ('torch', 'numpy') if m in sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""


# parking -----------------------------------------------------------------------------------------


class Place:
    """Where one task waits."""

    parked: Any = None


def virtual() -> VirtualLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    return loop


def test_a_parked_task_is_cancelled_at_once() -> None:
    """Like one that awaits `asyncio.sleep`: by `cancel`, a timeout, a task group."""
    seen: list[tuple[str, float]] = []

    async def sleeper(name: str) -> None:
        try:
            await virtual().sleep(100.0)
        except asyncio.CancelledError:
            seen.append((name, virtual().time()))
            raise

    async def main() -> None:
        task = asyncio.create_task(sleeper("cancel"))
        await asyncio.sleep(1.0)
        assert task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2.0):
                await sleeper("timeout")
        with pytest.raises(ExceptionGroup):
            async with asyncio.TaskGroup() as group:
                group.create_task(sleeper("group"))
                await virtual().sleep(4.0)
                raise ValueError
        await virtual().sleep(200.0)  # no step is left over from the timers

    run(main())
    assert seen == [("cancel", 1.0), ("timeout", 3.0), ("group", 7.0)]


def test_a_task_parked_in_a_place_goes_on_when_told_and_only_once() -> None:
    order: list[str] = []

    async def waiter(place: Place, name: str) -> None:
        await virtual().park(place)
        order.append(name)

    async def main() -> None:
        place = Place()
        task = asyncio.create_task(waiter(place, "told"))
        await asyncio.sleep(1.0)
        place.parked.resume()
        place.parked.resume()
        await task
        task = asyncio.create_task(waiter(place, "cancelled"))
        await asyncio.sleep(1.0)
        task.cancel()
        await asyncio.wait([task])
        place.parked.resume()  # too late: nothing happens
        await asyncio.sleep(1.0)
        assert task.cancelled()

    run(main())
    assert order == ["told"]


def test_a_task_that_is_parked_for_good_is_a_deadlock_that_names_it() -> None:
    async def lost() -> None:
        await virtual().park(Place())

    async def main() -> None:
        await asyncio.create_task(lost(), name="lost one")

    with pytest.raises(Deadlock, match="lost one"):
        run(main())


def test_a_task_that_was_parked_goes_without_a_look_for_garbage() -> None:
    gone: list[weakref.ref[asyncio.Task[None]]] = []

    async def sleeper() -> None:
        await virtual().sleep(1.0)

    async def main() -> None:
        tasks = [asyncio.create_task(sleeper()) for _ in range(2)]
        gone.extend(weakref.ref(task) for task in tasks)
        await virtual().sleep(0.5)
        tasks.pop().cancel()
        tasks.clear()
        await virtual().sleep(1.0)
        assert [ref() for ref in gone] == [None, None]

    gc.disable()
    try:
        run(main())
    finally:
        gc.enable()
