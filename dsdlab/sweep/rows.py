"""One line of rows.jsonl: everything that was measured on one generation."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from dsdlab.policies import RUN_AHEAD
from dsdlab.sim.profile import LinkProfile, TcpRegime
from dsdlab.sweep.calibration import LinkMeasure

Status = Literal["ok", "failed", "timeout"]


class Row(msgspec.Struct, kw_only=True):
    """One generation of a sweep.

    Times carry their unit in the name and are taken at the edge, where the user is, except
    `t_draft_s` and `t_verify_s`, which are compute times at the node that drafts or verifies.
    A measure that does not exist is None: the TPOT of a single token, the α of `cloud-ar`,
    `exact` where there was no reference. A row that is not "ok" keeps the defaults from `tokens` to
    `events`. Rows of earlier versions lack the link's measures and what is said of drafts, and keep their
    defaults.
    """

    # what was asked
    cell: str  # content hash of the cell, hex
    rep: int
    status: Status
    error: str = ""
    mode: str
    policy: str
    gamma: int  # 0 where no window is asked for
    run_ahead: int = RUN_AHEAD  # these three have their defaults where they do not concern the mode
    free_run: bool = False
    beside: int = 0
    edges: int = 1  # that generated at once
    runtime: str
    link: str
    rtt_ms: float
    rate_mbit: float | None = None  # None: unlimited
    loss_pct: float = 0.0
    loss_burst: float = 1.0  # mean packets lost in a row
    jitter_ms: float = 0.0
    link_asked: dict[str, Any] = msgspec.field(default_factory=dict)  # LinkProfile, before any step
    link_steps: str = ""  # what was to change during the generation, for people
    tcp: dict[str, Any] = msgspec.field(default_factory=dict)  # {"asked": TcpRegime, "read_back": {…}}
    temperature: float = 0.0
    seed: int = 0
    prompt: str = ""  # prompt key

    # what came of it
    tokens: int = 0
    tpot_ms: float | None = None  # (last − first commit)/(tokens − 1)
    ttft_ms: float | None = None
    itl_p95_ms: float | None = None
    alpha: float | None = None  # accepted/(drafted tokens actually tested)
    tau: float | None = None  # committed tokens per verification
    exact: bool | None = None  # same ids as the target alone
    ids: list[int] = msgspec.field(default_factory=list)
    finish: str = ""  # "eos" | "length"

    # per window
    windows: list[tuple[int, int]] = msgspec.field(default_factory=list)  # (drafted, accepted)
    t_draft_s: list[float] = msgspec.field(default_factory=list)
    t_verify_s: list[float] = msgspec.field(default_factory=list)
    t_queue_s: list[float] = msgspec.field(default_factory=list)

    # what it took
    drafted: int | None = None  # tokens that the edge drafted, judged or not
    wasted: int | None = None  # of them, those that never entered the text
    target_s: float | None = None  # the target's time, the prompt's included
    beside_s: float = 0.0  # of a drafter beside the target
    decisions: list[tuple[float, str]] = msgspec.field(default_factory=list)  # (s since request, new plan)

    # wire and time
    bytes_up: dict[str, int] = msgspec.field(default_factory=dict)  # payload bytes by frame name
    bytes_down: dict[str, int] = msgspec.field(default_factory=dict)
    events: list[tuple[str, float, float]] = msgspec.field(default_factory=list)  # (kind, t0_s, t1_s)
    reconnects: int = 0
    stale_frames: int = 0
    started_at: str = ""  # ISO 8601
    wall_s: float = 0.0
    generate_s: float = 0.0  # of it, the generation itself
    overhead_s: float = 0.0  # the rest: setting and calibrating the link

    # the link
    link_before: LinkMeasure | None = None
    link_after: LinkMeasure | None = None
    link_changes: list[tuple[float, str]] = msgspec.field(default_factory=list)  # (s since request, what)
    link_counters: dict[str, Any] = msgspec.field(default_factory=dict)  # of the qdiscs, per direction
    excluded: str = ""  # why the link was not what was asked; such a row counts for exactness only

    def __post_init__(self) -> None:
        """A line that names an impossible link or TCP is no row. Raises ValueError or TypeError."""
        if self.link_asked:
            LinkProfile.from_dict(self.link_asked)
        TcpRegime(**self.tcp.get("asked", {}))

    @property
    def usable(self) -> bool:
        """Whether its times may enter statistics."""
        return self.status == "ok" and not self.excluded

    @property
    def target_ms_per_token(self) -> float | None:
        """Target time per committed token, ms; None where nothing was committed."""
        spent_s = sum(self.t_verify_s) if self.target_s is None else self.target_s
        return 1e3 * spent_s / self.tokens if self.tokens and spent_s else None

    @property
    def wasted_per_token(self) -> float | None:
        """Drafts of the edge that were never committed, per committed token; None where unknown."""
        return self.wasted / self.tokens if self.tokens and self.wasted is not None else None

    @property
    def rtt_measured_ms(self) -> float | None:
        """Median round trip over the link just before the generation; None where none came back."""
        measure = self.link_before
        return measure.rtt_p50_ms if measure is not None and measure.n else None

    @property
    def profile(self) -> LinkProfile:
        """The link that was asked for, before any step."""
        if self.link_asked:
            return LinkProfile.from_dict(self.link_asked)
        return LinkProfile(
            rtt_ms=self.rtt_ms,
            rate_up_mbit=self.rate_mbit,
            rate_down_mbit=self.rate_mbit,
            loss_pct=self.loss_pct,
            loss_burst=self.loss_burst,
            jitter_ms=self.jitter_ms,
        )

    @property
    def tcp_asked(self) -> TcpRegime:
        """The TCP regime that was asked for; the default where none was recorded."""
        return TcpRegime(**self.tcp.get("asked", {}))
