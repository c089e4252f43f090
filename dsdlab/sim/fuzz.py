"""Many fuzzed runs: each a function of one number, each held to the promise that the tokens are the target's.

A run draws nodes, modes, policies, sampling, costs, links and everything that may go wrong on the way
(`fuzz_draw`), plays it in virtual time and checks what came of it (`fuzz_play`). The same seed with the same
modes and policies to draw from is the same run, anywhere.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from dsdlab.sim.fuzz_draw import described_situation, draw
from dsdlab.sim.fuzz_play import play
from dsdlab.sim.grid import OnDone, run_tasks

__all__ = ["Failure", "FuzzReport", "fuzz", "repeat_command", "show"]

BLOCK = 25  # runs that a worker does at a time
LONGEST_S = 60.0  # of processor time for a run that takes 10 ms: something goes round in circles


class Failure(msgspec.Struct, frozen=True):
    """A seed and what was wrong in its run, a line each."""

    seed: int
    wrong: list[str]


class FuzzReport(msgspec.Struct):
    """What came of runs. unfinished: generations that were given up or had to end in an error: nobody could
    be reached, or the target had no room; what was seen of them was right all the same."""

    runs: int = 0
    generations: int = 0
    unfinished: int = 0
    tokens: int = 0
    failures: list[Failure] = msgspec.field(default_factory=list)

    @property
    def exact_line(self) -> str:
        return f"exact: {self.runs - len(self.failures)} of {self.runs} runs"

    def add(self, other: FuzzReport) -> None:
        self.runs += other.runs
        self.generations += other.generations
        self.unfinished += other.unfinished
        self.tokens += other.tokens
        self.failures += other.failures


def fuzz(
    first: int,
    runs: int,
    *,
    modes: Sequence[str] = (),
    policies: Sequence[str] = (),
    workers: int | None = None,
    on_done: OnDone | None = None,
) -> FuzzReport:
    """Play the runs of the seeds first … first + runs - 1.

    modes, policies: draw from these alone; none: from all. workers: processes; default: the usable cores.
    on_done: called with (runs done, runs in all). Raises PolicyError for an unknown policy, GridFailed.
    """
    blocks = [(at, min(BLOCK, first + runs - at)) for at in range(first, first + runs, BLOCK)]
    report = FuzzReport()
    parts = run_tasks(
        _block,
        (list(modes), list(policies)),
        blocks,
        workers=workers,
        on_done=None if on_done is None else lambda done, _: on_done(min(done * BLOCK, runs), runs),
    )
    for part in parts:
        report.add(part)
    return report


def _block(drawn_from: tuple[list[str], list[str]], block: tuple[int, int]) -> FuzzReport:
    """One worker's runs, without what the nodes log meanwhile."""
    modes, policies = drawn_from
    report = FuzzReport()
    first, runs = block
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        for seed in range(first, first + runs):
            with _bounded(LONGEST_S):
                played = play(draw(seed, modes, policies))
            report.runs += 1
            report.generations += played.generations
            report.unfinished += played.unfinished
            report.tokens += played.tokens
            if played.wrong:
                report.failures.append(Failure(seed, played.wrong))
    finally:
        logging.disable(level)
    return report


@contextmanager
def _bounded(longest_s: float) -> Iterator[None]:
    """Raises TimeoutError from whatever runs for longer, so much processor time; in the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: object) -> None:
        raise TimeoutError(f"busy for {longest_s:g} s of processor time")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, longest_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


def show(seed: int, modes: Sequence[str] = (), policies: Sequence[str] = ()) -> tuple[list[str], FuzzReport]:
    """One run in full: its situation and its frames, line by line; and what came of it."""
    situation = draw(seed, modes, policies)
    with _bounded(LONGEST_S):
        played = play(situation, keep_log=True)
    failures = [Failure(seed, played.wrong)] if played.wrong else []
    report = FuzzReport(1, played.generations, played.unfinished, played.tokens, failures)
    return [described_situation(situation), *played.log], report


def repeat_command(seed: int, modes: Sequence[str] = (), policies: Sequence[str] = ()) -> str:
    """What to type to see a run again."""
    options = [f"--mode {mode}" for mode in modes] + [f"--policy {policy}" for policy in policies]
    return " ".join(["dsdlab fuzz", f"--seed {seed}", "--runs 1", *options, "-v"])
