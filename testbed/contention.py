"""What two nodes on one machine cost each other: the target's steps while the edge drafts, and the reverse.

Measured by generations, as deployed: one that streams from the target alone, one whose edge drafts all the
while and whose drafts come too late to matter (the link is long, the target runs free), and one whose target
waits while the edge drafts. Steps that judged a draft are left out: they have more rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from dsdlab.models.calibrate import calibration_text
from dsdlab.sim.costs import Contention
from dsdlab.sim.profile import LinkProfile
from testbed.controller import Testbed

__all__ = ["measure_contention"]

LONG_RTT_MS = 400.0
ROUNDS = 4
PROMPT, TOKENS = 64, 48
RUN_AHEAD = 4096
NOISE = 1.01
LOOKED_UP = 0.3  # of the median: drafts that took less were looked up, not computed


async def measure_contention(bed: Testbed) -> tuple[Contention, dict[str, Any]]:
    """The factors, and what was measured. The bed's link is put back as it was. Raises what a bed raises."""
    info = bed.verifier.info["info"]["target"]
    prompt = min(PROMPT, info["max_context"] // 4)
    tokens = min(TOKENS, info["max_context"] // 2)
    alone: list[float] = []
    beside: list[float] = []
    drafting_alone: list[float] = []
    drafting_beside: list[float] = []
    before = bed.profile
    await bed.set_link(LinkProfile(rtt_ms=LONG_RTT_MS))
    try:
        for seed in range(ROUNDS):
            job = {
                "prompt_ids": calibration_text(info["vocab_size"], prompt, seed),
                "max_new_tokens": tokens,
                "stop_at_eos": False,
                "run_ahead": RUN_AHEAD,
            }
            record = await bed.generate({**job, "mode": "cloud-ar"})
            alone += _alone(record)
            record = await bed.generate({**job, "mode": "dsd-stream", "free_run": True})
            beside += _alone(record)
            drafting_beside += record["t_draft_s"][1:]  # the first reads the prompt
            record = await bed.generate({**job, "mode": "dsd-stream", "max_new_tokens": min(tokens, 8)})
            drafting_alone += record["t_draft_s"][1:]
    finally:
        await bed.set_link(before)
    target, drafter = _ratio(beside, alone), _ratio(_computed(drafting_beside), _computed(drafting_alone))
    told = {
        "target_alone_p50_s": median(alone) if alone else None,
        "target_beside_p50_s": median(beside) if beside else None,
        "drafter_alone_p50_s": median(drafting_alone) if drafting_alone else None,
        "drafter_beside_p50_s": median(drafting_beside) if drafting_beside else None,
        "steps": [len(alone), len(beside), len(drafting_alone), len(drafting_beside)],
    }
    return Contention(target=target, drafter=drafter), told


def _alone(record: dict[str, Any]) -> list[float]:
    """Seconds of the steps that judged nothing, the prompt's left out."""
    steps = zip(record["windows"][1:], record["t_verify_s"][1:], strict=True)
    return [compute_s for (drafted, _), compute_s in steps if not drafted]


def _computed(times_s: Sequence[float]) -> list[float]:
    """Those that a model took."""
    middle = median(times_s) if times_s else 0.0
    return [t for t in times_s if t > LOOKED_UP * middle]


def _ratio(beside: Sequence[float], alone: Sequence[float]) -> float:
    """Median over median; 1 where it cannot be told, or is no more than noise."""
    if not beside or not alone or median(alone) <= 0.0:
        return 1.0
    ratio = median(beside) / median(alone)
    return ratio if ratio > NOISE else 1.0
