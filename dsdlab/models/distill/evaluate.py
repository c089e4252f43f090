"""Acceptance of a drafter on held-out text, per task and position, and what it is worth in milliseconds.

Greedy acceptance is exact: where the accepted prefix equals the target's own greedy text, a drafter's
proposal at each position is its argmax after that text, so windows can be replayed from one bit a position.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsdlab.models.distill.store import Example
from dsdlab.models.distill.student import Block, Student, quantise
from dsdlab.models.distill.teacher import rotary, rotate
from dsdlab.models.distill.train import micro_batches
from dsdlab.models.drafters import FIRST_LONGEST, FIRST_UNSAYABLE, believed


def lookup(
    ids: Sequence[int], longest: int = FIRST_LONGEST, shortest: int = FIRST_UNSAYABLE
) -> list[tuple[int, int]]:
    """Prompt lookup: after each position, the token that followed the latest earlier match, and its length.

    The last n ids are sought, n from `longest` down to `shortest`; (-1, 0) without a match.
    """
    tables: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in range(shortest, longest + 1)}
    out = []
    for end in range(1, len(ids) + 1):
        found, matched = -1, 0
        for n in range(longest, shortest - 1, -1):
            if end >= n and found < 0:
                found = tables[n].get(tuple(ids[end - n : end]), -1)
                matched = n if found >= 0 else 0
        out.append((ids[found], matched) if matched else (-1, 0))
        for n, table in tables.items():
            if end >= n:
                table[tuple(ids[end - n : end])] = end
    return out


def windows(hits: Sequence[bool], gamma: int) -> list[tuple[int, int]]:
    """Replay windows over one text: (drafted, accepted) of each; the last may be cut short."""
    out = []
    at, total = 0, len(hits)
    while at < total:
        drafted = min(gamma, total - at)
        accepted = 0
        while accepted < drafted and hits[at + accepted]:
            accepted += 1
        out.append((drafted, accepted))
        at += accepted + 1
    return out


@dataclass
class Judged:
    """One held-out answer, teacher-forced: one entry per answer position."""

    task: str
    temperature: float
    neural: list[bool]  # drafter's argmax is the target's
    either: list[bool]  # prompt lookup first, else the drafter
    from_lookup: list[bool]
    overlap: float  # mean sum of min(p, q) at the text's temperature (0 for greedy texts)
    coupled: float  # share of positions where shared Gumbel noise picks the same token


@torch.no_grad()
def judge(
    student: Student,
    head: Tensor,
    examples: Sequence[Example],
    *,
    device: str = "cpu",
    noise_seeds: int = 0,
    temperature: float = 0.8,
    max_tokens: int = 4096,
) -> list[Judged]:
    """Compare a student with the stored states of the target. head: the target's full head [vocab, d]."""
    student.to(device).eval()
    head = head.to(device, torch.bfloat16)
    to_token = student.head_ids.long()
    sayable = frozenset(to_token.tolist())
    out = []
    for group in micro_batches(examples, max_tokens):
        longest = max(len(e.ids) for e in group)
        ids = torch.zeros(len(group), longest, dtype=torch.long)
        for r, e in enumerate(group):
            ids[r, : len(e.ids)] = e.ids.long()
        with torch.autocast(device, torch.bfloat16):
            hidden = student.body(ids.to(device))
        for r, e in enumerate(group):
            first = e.prompt_len - 1
            answer = e.ids[e.prompt_len :].tolist()
            states = e.hidden[first - e.start :].to(device)
            with torch.autocast(device, torch.bfloat16):
                rows = student.rows(hidden[r, first : len(e.ids) - 1]).float()
            full = F.linear(states, head).float()
            guess = to_token[rows.argmax(-1)].tolist()
            truth = answer if e.temperature == 0 else full.argmax(-1).tolist()
            found = lookup(e.ids.tolist())[first:-1]
            looked = [token if believed(matched, token, sayable) else -1 for token, matched in found]
            neural = [g == t for g, t in zip(guess, truth, strict=True)]
            either = [n == t if n >= 0 else hit for n, t, hit in zip(looked, truth, neural, strict=True)]
            overlap = coupled = 0.0
            if e.temperature > 0:
                p = (full / temperature).softmax(-1)
                q = torch.zeros_like(p)
                q[:, to_token] = (rows / temperature).softmax(-1)
                overlap = float(torch.minimum(p, q).sum(-1).mean())
                same = 0.0
                for seed in range(noise_seeds):
                    generator = torch.Generator(device).manual_seed(1000 + seed)
                    noise = -torch.log(torch.empty_like(p).exponential_(generator=generator))
                    same += float(
                        ((p.log() + noise).argmax(-1) == (q.log() + noise).argmax(-1)).float().mean()
                    )
                coupled = same / noise_seeds if noise_seeds else 0.0
            out.append(
                Judged(e.task, e.temperature, neural, either, [n >= 0 for n in looked], overlap, coupled)
            )
    student.train()
    return out


def alpha(results: Sequence[Judged], which: str = "neural") -> float:
    """Share of greedy answer positions where the proposal is right."""
    hits: list[bool] = [hit for r in results if r.temperature == 0 for hit in getattr(r, which)]
    return sum(hits) / max(1, len(hits))


def tau(results: Sequence[Judged], gamma: int, which: str = "neural") -> float:
    """Mean tokens committed per window on greedy text; windows cut short by the end are left out."""
    got = [w for r in results if r.temperature == 0 for w in windows(getattr(r, which), gamma)]
    whole = [a + 1 for d, a in got if d == gamma] or [a + 1 for _, a in got]
    return sum(whole) / len(whole) if whole else 1.0


def _tallies(results: Sequence[Judged], gamma: int, which: str) -> Tensor:
    """Per greedy answer and place in the window: tested, accepted [answers, 2, gamma]."""
    greedy = [r for r in results if r.temperature == 0]
    out = torch.zeros(len(greedy), 2, gamma, dtype=torch.float64)
    for answer, r in zip(out, greedy, strict=True):
        for drafted, accepted in windows(getattr(r, which), gamma):
            answer[0, : min(drafted, accepted + 1)] += 1
            answer[1, :accepted] += 1
    return out


def by_position(results: Sequence[Judged], gamma: int, which: str = "neural") -> list[float]:
    """Acceptance at each place of the window, given that all before it were accepted."""
    tested, taken = _tallies(results, gamma, which).sum(0)
    return [float(x) for x in taken / tested.clamp_min(1)]


def by_position_95(
    results: Sequence[Judged], gamma: int, which: str = "neural", draws: int = 1000, seed: int = 1
) -> list[tuple[float, float]]:
    """Bootstrap 95 % interval of each entry of `by_position`, answers resampled whole."""
    tallies = _tallies(results, gamma, which)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(tallies), (draws, len(tallies)), generator=generator)
    sums = tallies[chosen].sum(1)  # [draws, 2, gamma]
    rates = sums[:, 1] / sums[:, 0].clamp_min(1)
    low, high = rates.quantile(0.025, dim=0), rates.quantile(0.975, dim=0)
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def tasks_of(results: Sequence[Judged]) -> list[str]:
    """Task names in a fixed order."""
    return sorted({r.task for r in results})


def interval(values: Sequence[float], draws: int = 2000, seed: int = 1) -> tuple[float, float]:
    """Bootstrap 95 % interval of a mean."""
    data = torch.tensor(list(values), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = data[torch.randint(len(data), (draws, len(data)), generator=generator)].mean(1)
    return float(means.quantile(0.025)), float(means.quantile(0.975))


def summary(results: Sequence[Judged], gamma: int) -> dict[str, Any]:
    """Every acceptance number of one drafter on one set of held-out answers."""
    tasks: dict[str, Any] = {}
    for task in tasks_of(results):
        mine = [r for r in results if r.task == task]
        greedy = [r for r in mine if r.temperature == 0]
        warm = [r for r in mine if r.temperature > 0]
        tasks[task] = {
            "answers": len(greedy),
            "alpha": alpha(mine),
            "alpha_95": interval([sum(r.neural) / len(r.neural) for r in greedy]) if greedy else None,
            "alpha_lookup_first": alpha(mine, "either"),
            "tau": tau(mine, gamma),
            "tau_lookup_first": tau(mine, gamma, "either"),
            "by_position": by_position(mine, gamma),
            "by_position_95": by_position_95(mine, gamma) if greedy else None,
            "by_position_lookup_first_95": by_position_95(mine, gamma, "either") if greedy else None,
            "by_position_lookup_first": by_position(mine, gamma, "either"),
            "overlap": sum(r.overlap for r in warm) / max(1, len(warm)),
            "coupled": sum(r.coupled for r in warm) / max(1, len(warm)),
        }
    keys = ("alpha", "alpha_lookup_first", "tau", "tau_lookup_first", "overlap", "coupled")
    return {
        "tasks": tasks,
        "gamma": gamma,
        **{k: sum(t[k] for t in tasks.values()) / len(tasks) for k in keys},
    }


class Stepper:
    """The exported drafter, one token at a time on int8 rows: for timing."""

    def __init__(self, student: Student, context: int) -> None:
        self.student = student
        shape = student.shape
        self.context = context

        def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
            return quantise(weight.detach().cpu())

        self.layers = []
        for block in student.blocks:
            assert isinstance(block, Block)
            norms = [w.detach().to(torch.bfloat16) for w in (block.attn_norm, block.mlp_norm)]
            self.layers.append(([pack(w) for w in (block.qkv, block.o, block.gate_up, block.down)], norms))
        self.head = pack(student.embed if student.head is None else student.head)
        self.table = student.embed.detach().to(torch.bfloat16)
        self.norm = student.norm.detach().to(torch.bfloat16)
        cache = (len(self.layers), 2, 1, shape.num_kv_heads, context, shape.head_dim)
        self.cache = torch.randn(cache).to(torch.bfloat16)

    @torch.no_grad()
    def step(self, row: int) -> int:
        """One token at position context - 1."""
        shape, eps = self.student.shape, self.student.eps
        size = (shape.hidden_size,)
        cos, sin = rotary(
            torch.tensor([self.context - 1]), shape.head_dim, self.student.theta, torch.bfloat16
        )
        x = self.table[row][None]
        heads, kv, group = shape.num_heads, shape.num_kv_heads, shape.num_heads // shape.num_kv_heads
        mm = torch._weight_int8pack_mm
        for i, (packed, norms) in enumerate(self.layers):
            y = mm(F.rms_norm(x, size, norms[0], eps), *packed[0]).view(heads + 2 * kv, shape.head_dim)
            turned = rotate(y[: heads + kv], cos, sin)
            self.cache[i, 0, 0, :, -1] = turned[heads:]
            self.cache[i, 1, 0, :, -1] = y[heads + kv :]
            q = turned[:heads].view(1, kv, group, shape.head_dim)
            mixed = F.scaled_dot_product_attention(q, self.cache[i, 0], self.cache[i, 1])
            x = x + mm(mixed.reshape(1, -1), *packed[1])
            gate, up = mm(F.rms_norm(x, size, norms[1], eps), *packed[2]).chunk(2, -1)
            x = x + mm(F.silu(gate) * up, *packed[3])
        logits = mm(F.rms_norm(x, size, self.norm, eps), *self.head)
        return int(logits.argmax())


def draft_ms(student: Student, context: int = 256, steps: int = 60) -> float:
    """Median milliseconds per drafted token, int8 weights, one CPU thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        stepper = Stepper(student, context)
        times = []
        row = 1
        for _ in range(steps):
            t0 = time.perf_counter()
            row = stepper.step(row)
            times.append(time.perf_counter() - t0)
        return 1e3 * sorted(times)[len(times) // 2]
    finally:
        torch.set_num_threads(threads)


def predict_tpot(
    results: Sequence[Judged],
    t_draft_ms: float,
    *,
    rtt_ms: float,
    t_verify_ms: float,
    slope: float,
    which: str = "either",
    gammas: Sequence[int] = tuple(range(1, 17)),
) -> tuple[float, int]:
    """Predicted ms per token of lock-step speculation at its best window: (ms, gamma), mean over tasks.

    t_verify(k rows) = t_verify_ms (1 + slope (k - 1)). Looked-up tokens cost no drafting.
    """
    best = (math.inf, 0)
    for gamma in gammas:
        per_task = []
        for task in tasks_of(results):
            greedy = [r for r in results if r.task == task and r.temperature == 0]
            marks = [x for r in greedy for x in r.from_lookup]
            share = 1 - sum(marks) / max(1, len(marks)) if which == "either" else 1.0
            cost = gamma * t_draft_ms * share + rtt_ms + t_verify_ms * (1 + slope * gamma)
            per_task.append(cost / tau(greedy, gamma, which))
        best = min(best, (sum(per_task) / len(per_task), gamma))
    return best
