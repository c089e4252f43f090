"""What one generation was: tokens, times at the edge, windows, bytes."""

from __future__ import annotations

import msgspec


class GenerationRecord(msgspec.Struct):
    """Times are seconds since the request, taken at the edge by the event loop's clock."""

    ids: list[int] = msgspec.field(default_factory=list)
    finish: str = ""  # "eos" | "length"
    ttft_s: float = 0.0
    commits: list[tuple[float, int]] = msgspec.field(default_factory=list)  # (when, tokens)
    windows: list[tuple[int, int]] = msgspec.field(default_factory=list)  # (drafted, accepted)
    t_draft_s: list[float] = msgspec.field(default_factory=list)  # per drafted window; streamed: per call
    t_verify_s: list[float] = msgspec.field(default_factory=list)  # per verification
    t_queue_s: list[float] = msgspec.field(default_factory=list)
    bytes_up: dict[str, int] = msgspec.field(default_factory=dict)
    bytes_down: dict[str, int] = msgspec.field(default_factory=dict)
    reconnects: int = 0
    stale_frames: int = 0
    events: list[tuple[str, float, float]] = msgspec.field(default_factory=list)
    drafted: int = 0  # tokens that the edge drafted, judged or not
    drafts_committed: int = 0  # of them, those that entered the text
    beside_s: float = 0.0  # compute of a drafter beside the target
    decisions: list[tuple[float, str]] = msgspec.field(default_factory=list)  # (when, what) was decided anew

    @property
    def wasted(self) -> int:
        """Tokens that the edge drafted and that never entered the text."""
        return self.drafted - self.drafts_committed

    @property
    def target_s(self) -> float:
        """Seconds of the target for this generation, the prompt's included."""
        return sum(self.t_verify_s)

    @property
    def tpot_s(self) -> float | None:
        """(last − first commit)/(tokens − 1); None for a single token or a single commit of several."""
        if len(self.ids) < 2 or len(self.commits) < 2:
            return None
        # the tokens of the first commit arrive together: they count as decided at its instant
        return (self.commits[-1][0] - self.commits[0][0]) / (len(self.ids) - 1)

    @property
    def alpha(self) -> float | None:
        """Accepted drafts over drafts that were judged: a rejection ends its window. None without any."""
        judged = sum(min(accepted + 1, drafted) for drafted, accepted in self.windows)
        return sum(accepted for _, accepted in self.windows) / judged if judged else None

    @property
    def tau(self) -> float | None:
        """Tokens committed per verification of a window, correction or bonus included."""
        drafting = [accepted for drafted, accepted in self.windows if drafted]
        return (sum(drafting) + len(drafting)) / len(drafting) if drafting else None

    def itl_s(self, quantile: float) -> float | None:
        """A quantile of the inter-token latency; tokens committed together are 0 apart."""
        gaps: list[float] = []
        before = None
        for when, n in self.commits:
            if before is not None:
                gaps.append(when - before)
                gaps += [0.0] * (n - 1)
            before = when
        if not gaps:
            return None
        gaps.sort()
        return gaps[min(len(gaps) - 1, round(quantile * (len(gaps) - 1)))]
