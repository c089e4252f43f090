"""One line of rows.jsonl: everything that was measured on one generation."""

from __future__ import annotations

from typing import Literal

import msgspec

Status = Literal["ok", "failed", "timeout"]


class Row(msgspec.Struct, kw_only=True):
    """One generation of a sweep.

    Times carry their unit in the name and are taken at the edge, where the user is, except
    `t_draft_s` and `t_verify_s`, which are compute times at the node that drafts or verifies.
    A measure that does not exist is None: the TPOT of a single token, the α of `cloud-ar`,
    `exact` where there was no reference. A row that is not "ok" keeps the defaults from `tokens` on.
    """

    # what was asked
    cell: str  # content hash of the cell, hex
    rep: int
    status: Status
    error: str = ""
    mode: str
    policy: str
    gamma: int  # 0 for cloud-ar
    runtime: str
    link: str
    rtt_ms: float
    rate_mbit: float | None = None  # None: unlimited
    loss_pct: float = 0.0
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

    # wire and time
    bytes_up: dict[str, int] = msgspec.field(default_factory=dict)  # payload bytes by frame name
    bytes_down: dict[str, int] = msgspec.field(default_factory=dict)
    events: list[tuple[str, float, float]] = msgspec.field(default_factory=list)  # (kind, t0_s, t1_s)
    rtt_measured_ms: float | None = None  # median over the link, just before the cell
    reconnects: int = 0
    stale_frames: int = 0
    started_at: str = ""  # ISO 8601
    wall_s: float = 0.0
