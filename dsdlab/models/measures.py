"""What a calibration measures and what comes of it: sizes asked for, single measurements found."""

from __future__ import annotations

import msgspec

__all__ = ["CalibrationFailed", "Drawn", "Measures", "Rested", "Sample", "Sizes"]


class CalibrationFailed(ValueError):
    """A model cannot be measured; one line for the user."""


DISTURBED = 0.01


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """One forward: rows of all sessions, sessions, positions that they held before in all, seconds.

    waited_s: for how long of it the thread could have run and was not let: other work had its core. 0 where
    the kernel does not tell.
    """

    tokens: int
    batch: int
    context: int
    seconds: float
    waited_s: float = 0.0

    @property
    def disturbed(self) -> bool:
        """Whether it took longer, by more than a hundredth, for what is none of the model's."""
        return self.waited_s > DISTURBED * self.seconds

    @property
    def own_s(self) -> float:
        """Seconds without those of waiting."""
        return max(self.seconds - self.waited_s, DISTURBED * self.seconds)


class Rested(msgspec.Struct, frozen=True):
    """Forwards in a row after a rest. idle_s: how long the node was idle; None: another model ran on it."""

    idle_s: float | None
    forwards: list[Sample]


class Drawn(msgspec.Struct, frozen=True, array_like=True):
    """The same forward twice, its `rows` tokens chosen greedily and drawn: seconds each, without waiting."""

    rows: int
    greedy_s: float
    drawn_s: float


class Measures(msgspec.Struct, kw_only=True):
    """All that was measured of one model on one node.

    hops_s: from asking the compute thread to the answer, beyond the compute; one for each measurement.
    """

    model: str
    forwards: list[Sample] = []
    rested: list[Rested] = []
    drawn: list[Drawn] = []
    hops_s: list[float] = []
    repeats: int = 0
    wall_s: float = 0.0

    @property
    def disturbed(self) -> float:
        """The share of forwards during which other work had the core."""
        every = [*self.forwards, *(f for rest in self.rested for f in rest.forwards)]
        return sum(f.disturbed for f in every) / len(every) if every else 0.0


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured.

    rows: of one session. contexts: least positions held before; each repeat adds something below `spread`,
    because attention's cost has steps. batches: sessions in one forward, each with `batch_rows` rows.
    prefills: rows of a prompt. idle_s: rests of the node.
    """

    rows: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17, 24)
    contexts: tuple[int, ...] = (32, 128, 384)
    spread: int = 64
    batches: tuple[int, ...] = (2, 4)
    batch_rows: tuple[int, ...] = (1, 5)
    prefills: tuple[int, ...] = (32, 48, 64, 96, 128, 192, 256, 384, 512)
    idle_s: tuple[float, ...] = (0.005, 0.02, 0.06, 0.15)

    @classmethod
    def of_drafter(cls) -> Sizes:
        """A drafter's forwards have one row, and at a window's first those that it has to catch up with."""
        return cls(
            rows=(1, 2, 3, 4, 5, 6, 7, 8),
            batches=(),
            prefills=(16, 32, 64, 128, 256, 512),
            idle_s=(0.01, 0.04, 0.15),
        )

    def within(self, max_context: int) -> Sizes:
        """Those that a model has room for. Raises CalibrationFailed where that is too little."""
        if max_context < 16:
            raise CalibrationFailed(
                f"a context of {max_context} positions is too short to calibrate; allowed: 16 or more"
            )
        spread = min(self.spread, max_context // 4)
        room = max_context - spread - max(self.rows)
        contexts = tuple(c for c in self.contexts if c < room)
        rows = self.rows
        if not contexts:
            contexts = (max_context // 4,)
            rows = tuple(n for n in rows if contexts[0] + spread + n < max_context)
        prefills = tuple(n for n in self.prefills if n < max_context)
        return msgspec.structs.replace(self, rows=rows, contexts=contexts, spread=spread, prefills=prefills)
