"""The link model: which packets get through a link, and when.

One model serves the `modelled` link of the testbed (real bytes, held in user space) and the simulator
(virtual time). A link has two directions, `up` (from the edge) and `down` (to the edge). In each a packet

1. is lost, or not (`loss_pct`, `loss_burst`; all of them while `partitioned`),
2. travels for the direction's share of the RTT, plus or minus jitter,
3. is serialised at the bottleneck's rate behind what came before it (`rate_*_mbit`, headers counted). So
   packets leave in the order in which they were sent, whatever the jitter and through every change.

That is what netem does with one qdisc per direction (net/sched/sch_netem.c, netem_enqueue; a lost packet
takes no capacity). What TCP makes of it (retransmission, acknowledgements) is in `dsdlab.sim.tcp`; nothing
here needs a clock.

`buffer_bytes` bounds what waits at the bottleneck. A sender learns the path: what does not fit waits with it
(`room_s`), and no overflow loss is charged. `reorder_pct` is refused: packets that overtake make TCP's
loss detection adapt (RFC 8985's reordering window), which is not modelled.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass

from dsdlab.sim.profile import HEADER_BYTES, MSS_BYTES, Direction, LinkProfile

__all__ = ["DirectionStats", "LinkDirection"]


@dataclass(slots=True)
class DirectionStats:
    """Counters of one direction. `n_bytes` and `segments` are payload sent for the first time; `lost` counts
    transmissions with payload that did not get through; then come the three reasons to send again, and bare
    acknowledgements."""

    n_bytes: int = 0
    segments: int = 0
    lost: int = 0
    fast_retransmits: int = 0
    probes: int = 0
    timeouts: int = 0
    acks: int = 0
    acks_lost: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


class LinkDirection:
    """One direction of a link: a bottleneck that all its connections share.

    `seed` fixes losses and jitter. Raises ValueError as `apply` does.
    """

    __slots__ = (
        "_bad",
        "_chain",
        "_rng",
        "_seed",
        "clean",
        "delay_s",
        "direction",
        "jitter_s",
        "loss",
        "out_s",
        "plain",
        "profile",
        "rtt_s",
        "s_per_byte",
        "stats",
    )

    def __init__(self, profile: LinkProfile, direction: Direction, seed: int = 0) -> None:
        if direction not in ("up", "down"):
            raise ValueError(f"direction: {direction!r} is unknown (allowed: up, down)")
        self.direction: Direction = direction
        self.stats = DirectionStats()
        self.out_s = -math.inf  # when all that was sent has come out at the far end
        self._seed = seed
        self._rng: random.Random | None = None  # made when first needed: it weighs 2.5 KB
        self._bad = False  # the state of the loss chain
        self.apply(profile)

    def apply(self, profile: LinkProfile) -> None:
        """Use `profile` for packets sent from now on; what is under way keeps its arrival, order is kept.

        Raises ValueError for what this model has no words for.
        """
        if profile.reorder_pct:
            raise ValueError("reorder_pct: the modelled link has none (allowed: a netem link)")
        self.profile = profile
        rate = profile.rate_mbit(self.direction)
        self.s_per_byte = 0.0 if rate is None else 8.0 / (rate * 1e6)
        self.delay_s = profile.delay_s(self.direction)
        self.rtt_s = profile.rtt_ms / 1e3  # of the link, without load
        self.jitter_s = profile.jitter_ms / 1e3 * profile.fraction(self.direction)
        self.loss = profile.loss_pct / 100.0
        self._chain = profile.gilbert_elliott() if profile.loss_burst > 1.0 else None
        self.clean = self.loss == 0.0 and not profile.partitioned
        """Whether every packet gets through."""
        self.plain = self.clean and self.jitter_s == 0.0
        """Whether it also makes no difference to a packet that acknowledgements are under way before it."""

    @property
    def by_segment(self) -> bool:
        """Whether segments of one write may arrive at different times."""
        return self.s_per_byte > 0.0 or not self.plain

    def loses(self) -> bool:
        """Whether the next packet is lost; moves the loss chain on."""
        if self.clean or self.profile.partitioned:
            return not self.clean
        rng = self._random()
        if self._chain is None:
            return rng.random() < self.loss
        lost = self._bad
        if rng.random() < self._chain[1 if self._bad else 0]:
            self._bad = not self._bad
        return lost

    def _random(self) -> random.Random:
        if self._rng is None:
            self._rng = random.Random(f"{self._seed}/{self.direction}")
        return self._rng

    def cross(self, now_s: float, wire_bytes: int) -> float:
        """When a packet sent now that gets through has arrived, s. `wire_bytes`: headers included."""
        delay_s = self.delay_s
        if self.jitter_s:
            delay_s += self.jitter_s * (2.0 * self._random().random() - 1.0)
        out_s = now_s + delay_s
        if out_s < self.out_s:
            out_s = self.out_s
        self.out_s = out_s = out_s + wire_bytes * self.s_per_byte
        return out_s

    def backlog_s(self, now_s: float) -> float:
        """How long the bottleneck needs for what waits at it."""
        return max(0.0, self.out_s - self.delay_s - now_s) if self.s_per_byte else 0.0

    def backlog_bytes(self, now_s: float) -> float:
        """Wire bytes waiting at the bottleneck."""
        return self.backlog_s(now_s) / self.s_per_byte if self.s_per_byte else 0.0

    def room_s(self, now_s: float) -> float:
        """Seconds until a full segment fits into the bottleneck's buffer: 0 when it fits now."""
        if self.s_per_byte == 0.0 or self.profile.buffer_bytes is None:
            return 0.0
        room = self.profile.buffer_bytes - (MSS_BYTES + HEADER_BYTES)
        return max(0.0, self.backlog_s(now_s) - room * self.s_per_byte)
