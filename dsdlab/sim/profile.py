"""What a link does to bytes: the profile that netem, the modelled link and the simulator all take.

`LinkProfile` is the state of a link, `LinkStep` a change of it during a generation, `TcpRegime` how the ends
talk over it. Pure data: `testbed.links` and `dsdlab.sim.link` put it into force.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

__all__ = [
    "HEADER_BYTES",
    "MSS_BYTES",
    "Direction",
    "LinkProfile",
    "LinkStep",
    "TcpRegime",
    "segments_of",
    "wire_bytes",
]

Direction = Literal["up", "down"]

MSS_BYTES = 1448
"""Payload of a full TCP segment: MTU 1500 − 20 (IPv4) − 32 (TCP with timestamps)."""
HEADER_BYTES = 66
"""Bytes a segment adds on the wire, as netem counts: 14 (Ethernet) + 20 (IPv4) + 32 (TCP with timestamps)."""

_NUMBERS: dict[str, tuple[float, float, bool]] = {
    # field: (least, greatest, None allowed)
    "rtt_ms": (0.0, 60_000.0, False),
    "up_fraction": (0.0, 1.0, False),
    "rate_up_mbit": (0.001, 1_000_000.0, True),
    "rate_down_mbit": (0.001, 1_000_000.0, True),
    "loss_pct": (0.0, 50.0, False),
    "loss_burst": (1.0, 1000.0, False),
    "jitter_ms": (0.0, 60_000.0, False),
    "reorder_pct": (0.0, 50.0, False),
    "buffer_bytes": (2 * (MSS_BYTES + HEADER_BYTES), 2**30, True),
    "rto_min_ms": (1.0, 120_000.0, False),
}


def segments_of(n_bytes: int) -> int:
    """Segments that carry `n_bytes` of payload; a bare header (0 bytes) is one."""
    return max(1, -(-n_bytes // MSS_BYTES))


def wire_bytes(n_bytes: int) -> int:
    """Bytes on the wire for `n_bytes` of payload sent in one go: payload and one header per segment."""
    return n_bytes + HEADER_BYTES * segments_of(n_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkProfile:
    """What a link does to the bytes between an edge node and the verifier.

    rtt_ms: round-trip time without load, 0 to 60000 ms.
    up_fraction: share of the RTT (and of the jitter) that the direction from the edge takes.
    rate_up_mbit, rate_down_mbit: capacity of the bottleneck in Mbit/s on the wire; None is unlimited.
    loss_pct: probability in per cent that a segment is lost, in each direction, independently.
    loss_burst: mean number of segments lost in a row. 1: each is lost on its own. More: a Gilbert–Elliott
        chain that loses everything in its bad state and nothing in its good one (Gilbert, BSTJ 39, 1960).
    jitter_ms: half-width of the round trip's uniform jitter; at most rtt_ms. By itself it reorders nothing.
    reorder_pct: share of segments, in per cent, that overtake all that is under way; needs a delay.
    buffer_bytes: wire bytes that may wait at a rate-limited bottleneck; None is unlimited.
    rto_min_ms: floor of the retransmission timer's variance term; 200 ms is Linux's default. The ends have
        it, not the link, but the model of a link must know.
    partitioned: nothing gets through in either direction.

    Raises ValueError with one line that names the field, its value and what is allowed.
    """

    rtt_ms: float = 0.0
    up_fraction: float = 0.5
    rate_up_mbit: float | None = None
    rate_down_mbit: float | None = None
    loss_pct: float = 0.0
    loss_burst: float = 1.0
    jitter_ms: float = 0.0
    reorder_pct: float = 0.0
    buffer_bytes: int | None = None
    rto_min_ms: float = 200.0
    partitioned: bool = False

    def __post_init__(self) -> None:
        for name, (least, greatest, optional) in _NUMBERS.items():
            value = getattr(self, name)
            if value is None and optional:
                continue
            allowed = f"{least:g} to {greatest:g}" + (", or none" if optional else "")
            whole = name == "buffer_bytes"
            kind = int if whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind):
                what = "a whole number" if whole else "a number"
                raise ValueError(f"{name}: {value!r} is not {what} (allowed: {allowed})")
            if not least <= value <= greatest:  # NaN fails too
                raise ValueError(f"{name}: {value!r} is out of range (allowed: {allowed})")
        if self.jitter_ms > self.rtt_ms:
            raise ValueError(
                f"jitter_ms: {self.jitter_ms!r} is more than rtt_ms {self.rtt_ms!r} (allowed: 0 to rtt_ms)"
            )
        if self.loss_burst > 1.0 and not self.loss_pct > 0.0:
            raise ValueError(
                f"loss_burst: {self.loss_burst!r} without loss (allowed: 1, or a loss_pct above 0)"
            )
        # The chain must enter its bad state with probability pi r / (1 - pi) <= 1.
        if self.loss_burst > 1.0 and self.loss_pct / self.loss_burst > 100.0 - self.loss_pct:
            raise ValueError(f"loss_burst: {self.loss_burst!r} is too short for loss_pct {self.loss_pct!r}")
        if self.reorder_pct > 0.0 and self.rtt_ms == 0.0:
            raise ValueError(
                f"reorder_pct: {self.reorder_pct!r} without delay (allowed: 0, or an rtt_ms above 0)"
            )
        if not isinstance(self.partitioned, bool):
            raise ValueError(f"partitioned: {self.partitioned!r} is neither true nor false")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LinkProfile:
        """A profile from a mapping of field names; absent fields take their defaults. Raises ValueError."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"{name}: unknown link field (allowed: {', '.join(known)})")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON-ready values."""
        return asdict(self)

    def rate_mbit(self, direction: Direction) -> float | None:
        """Capacity of one direction in Mbit/s; None is unlimited."""
        return self.rate_up_mbit if direction == "up" else self.rate_down_mbit

    def fraction(self, direction: Direction) -> float:
        """Share of the RTT that one direction takes."""
        return self.up_fraction if direction == "up" else 1.0 - self.up_fraction

    def delay_s(self, direction: Direction) -> float:
        """Mean propagation delay of one direction in seconds."""
        return self.rtt_ms / 1e3 * self.fraction(direction)

    def transfer_s(self, direction: Direction, n_bytes: int) -> float:
        """Seconds from sending `n_bytes` into an idle, loss-free, jitter-free link to their arrival."""
        rate = self.rate_mbit(direction)
        serialise = 0.0 if rate is None else wire_bytes(n_bytes) * 8.0 / (rate * 1e6)
        return serialise + self.delay_s(direction)

    def gilbert_elliott(self) -> tuple[float, float]:
        """The loss chain's probabilities per segment: (into the bad state, out of it)."""
        leave = 1.0 / self.loss_burst
        lost = self.loss_pct / 100.0
        return lost * leave / (1.0 - lost), leave


_STEP_FIELDS = ("rtt_ms", "rate_up_mbit", "rate_down_mbit", "loss_pct", "loss_burst", "jitter_ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkStep:
    """A change of the link during a generation.

    at_s: when, in seconds since the request of the generation.
    for_s: how long it lasts; None is until the end, or until a later step changes the same field.
    changes: fields of LinkProfile that take a new value (rtt_ms, rates, loss_pct, loss_burst, jitter_ms,
        partitioned); rate None is unlimited.

    Raises ValueError with one line.
    """

    at_s: float
    for_s: float | None = None
    changes: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not 0.0 <= self.at_s <= 86_400.0:
            raise ValueError(f"at_s: {self.at_s!r} is out of range (allowed: 0 to 86400)")
        if self.for_s is not None and not 0.0 < self.for_s <= 86_400.0:
            raise ValueError(f"for_s: {self.for_s!r} is out of range (allowed: above 0 to 86400)")
        allowed = (*_STEP_FIELDS, "partitioned")
        if not self.changes or not set(self.changes) <= set(allowed):
            raise ValueError(
                f"a step changes {', '.join(self.changes) or 'nothing'} (allowed: {', '.join(allowed)})"
            )

    @property
    def label(self) -> str:
        """For people: "RTT 150 ms, rate 5 Mbit/s", "partition"."""
        words = []
        if self.changes.get("partitioned"):
            words.append("partition")
        for name, text in (
            ("rtt_ms", "RTT {:g} ms"),
            ("loss_pct", "loss {:g} %"),
            ("jitter_ms", "jitter {:g} ms"),
            ("loss_burst", "bursts of {:g}"),
        ):
            if name in self.changes:
                words.append(text.format(self.changes[name]))
        rates = {self.changes[n] for n in ("rate_up_mbit", "rate_down_mbit") if n in self.changes}
        words += [
            "unlimited rate" if rate is None else f"rate {rate:g} Mbit/s" for rate in sorted(rates, key=str)
        ]
        return ", ".join(words)

    @staticmethod
    def timeline(profile: LinkProfile, steps: tuple[LinkStep, ...]) -> list[tuple[float, LinkProfile, str]]:
        """(when in s, the whole profile from then on, what for people) of every change, in order.

        At each instant the profile is the base with the changes of all steps then in force, later-starting
        steps over earlier ones. Raises ValueError where a step makes a profile that cannot be.
        """
        instants = {s.at_s for s in steps} | {s.at_s + s.for_s for s in steps if s.for_s is not None}
        out: list[tuple[float, LinkProfile, str]] = []
        for t_s in sorted(instants):
            active = [s for s in steps if s.at_s <= t_s and (s.for_s is None or t_s < s.at_s + s.for_s)]
            changes: dict[str, Any] = {}
            for step in sorted(active, key=lambda s: s.at_s):
                changes |= step.changes
            now = replace(profile, **changes)
            begins = [s.label for s in steps if s.at_s == t_s]
            ends = [f"end of {s.label}" for s in steps if s.for_s is not None and s.at_s + s.for_s == t_s]
            out.append((t_s, now, "; ".join(begins + ends)))
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpRegime:
    """How the two ends' TCP behaves. Set before the connection exists, read back after.

    congestion: algorithm by its kernel name; "auto" is cubic where there is one, else the host's default.
    slow_start_after_idle: whether an idle connection starts slowly again (Linux: yes).
    rto_min_ms: floor of the retransmission timeout; 200 ms is Linux's default.
    nodelay: small frames leave at once (TCP_NODELAY) instead of waiting for an acknowledgement.
    """

    congestion: str = "auto"
    slow_start_after_idle: bool = True
    rto_min_ms: float = 200.0
    nodelay: bool = True

    @property
    def label(self) -> str:
        """What differs from the default, for people; empty where nothing does."""
        words = [] if self.congestion == "auto" else [self.congestion]
        words += [] if self.slow_start_after_idle else ["no slow start after idle"]
        words += [] if self.rto_min_ms == 200.0 else [f"RTO floor {self.rto_min_ms:g} ms"]
        words += [] if self.nodelay else ["Nagle"]
        return ", ".join(words)
