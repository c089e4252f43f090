"""What identifies a cell of the grid: who decodes how (`Variant`), over what (`Condition`), at which RTT."""

from __future__ import annotations

from typing import NamedTuple

from dsdlab.policies import RUN_AHEAD
from dsdlab.sweep.rows import Row

SIMULATED = "simulated"
"""The runtime of rows that the simulator wrote: nothing was measured."""

MODE_ORDER = ("cloud-ar", "cloud-sd", "edge-sd", "dsd-sync", "dsd-pipelined", "dsd-stream", "dsd-adaptive")


USUAL_POLICIES = {("dsd-adaptive", "adaptive")}
"""Pairs of mode and policy that go without saying; so does the static window."""


class Variant(NamedTuple):
    """A way to decode. `gamma` is 0 where there is no window; the rest is as in a scenario's grid."""

    mode: str
    policy: str
    gamma: int
    run_ahead: int = RUN_AHEAD
    free_run: bool = False
    beside: int = 0

    @property
    def label(self) -> str:
        """For people: "dsd-sync (γ = 4)", "dsd-stream + free run"; what is usual goes without saying."""
        return self.label_with("")

    def label_with(self, remark: str) -> str:
        """The label with a remark at the end of its parentheses."""
        parts = []
        if self.policy not in ("", "static") and (self.mode, self.policy) not in USUAL_POLICIES:
            parts.append(self.policy)
        if self.gamma > 0:
            parts.append(f"γ = {self.gamma}")
        if self.run_ahead != RUN_AHEAD:
            parts.append(f"run-ahead {self.run_ahead}")
        if self.beside:
            parts.append(f"{self.beside} beside")
        if remark:
            parts.append(remark)
        name = f"{self.mode} + free run" if self.free_run else self.mode
        return f"{name} ({', '.join(parts)})" if parts else name

    @property
    def order(self) -> tuple[int, str, bool, int, int, int, str]:
        known = MODE_ORDER.index(self.mode) if self.mode in MODE_ORDER else len(MODE_ORDER)
        return known, self.mode, self.free_run, self.gamma, self.beside, self.run_ahead, self.policy


class Condition(NamedTuple):
    """Everything but the RTT that two cells must share to be compared. `rate_mbit` None: unlimited.

    `extra` says, for people, what else differs from one edge over a plain link with the hosts' usual TCP: how
    many edges, jitter, bursts, the TCP regime, changes during the generation; empty where nothing does.
    """

    runtime: str
    link: str
    rate_mbit: float | None
    loss_pct: float
    temperature: float
    extra: str = ""

    @property
    def label(self) -> str:
        """For people: "greedy, unlimited rate, 1 % loss, bursts of 4"."""
        heat = "greedy" if self.temperature == 0 else f"temperature {self.temperature:g}"
        return f"{heat}, {self.network}"

    @property
    def network(self) -> str:
        """The label without the temperature: "unlimited rate, 1 % loss, bursts of 4"; a WAN is "unshaped"."""
        if self.link == "wan":
            return "unshaped" + (f", {self.extra}" if self.extra else "")
        rate = "unlimited rate" if self.rate_mbit is None else f"{self.rate_mbit:g} Mbit/s"
        loss = "no loss" if self.loss_pct == 0 else f"{self.loss_pct:g} % loss"
        return f"{rate}, {loss}" + (f", {self.extra}" if self.extra else "")

    @property
    def order(self) -> tuple[str, str, float, float, float, int, str]:
        """The least constrained first: no loss, unlimited rate, greedy, nothing extra."""
        rate = 0.0 if self.rate_mbit is None else 1.0 / max(self.rate_mbit, 1e-12)
        return self.runtime, self.link, self.loss_pct, rate, self.temperature, len(self.extra), self.extra

    @property
    def modelled(self) -> bool:
        """Whether the link is a model in user space rather than a shaped interface of a kernel."""
        return self.link == "modelled"

    @property
    def simulated(self) -> bool:
        """Whether nothing was measured at all: the simulator's own numbers."""
        return self.runtime == SIMULATED


def variant_of(row: Row) -> Variant:
    return Variant(row.mode, row.policy, row.gamma, row.run_ahead, row.free_run, row.beside)


def condition_of(row: Row) -> Condition:
    return Condition(row.runtime, row.link, row.rate_mbit, row.loss_pct, row.temperature, extra_of(row))


def extra_of(row: Row) -> str:
    """What `Condition.extra` says of a row."""
    asked = row.link_asked
    words = [f"{row.edges} edges at once"] if row.edges != 1 else []
    words += [f"jitter {row.jitter_ms:g} ms"] if row.jitter_ms else []
    words += [f"bursts of {row.loss_burst:g}"] if row.loss_burst != 1.0 else []
    for way in ("up", "down"):  # a direction's own rate; the condition's is the grid's
        rate = asked.get(f"rate_{way}_mbit", row.rate_mbit)
        if rate != row.rate_mbit:
            words.append(f"{way} unlimited" if rate is None else f"{way} {rate:g} Mbit/s")
    share = asked.get("up_fraction", 0.5)
    words += [f"{100 * share:g} % of the RTT up"] if share != 0.5 else []
    words += [f"{asked['reorder_pct']:g} % reordered"] if asked.get("reorder_pct") else []
    words += [f"buffer {asked['buffer_bytes']:,} bytes"] if asked.get("buffer_bytes") else []
    words += [text for text in (row.tcp_asked.label, row.link_steps) if text]
    return ", ".join(words)


def pair_of(row: Row) -> tuple[str, int, int]:
    """Rows of two cells with the same (prompt, seed, rep) form a pair."""
    return row.prompt, row.seed, row.rep
