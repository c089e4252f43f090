"""Training: KL to the target's distribution at every position of its own text."""

from __future__ import annotations

import contextlib
import ctypes
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dsdlab.models.distill.config import TrainConfig
from dsdlab.models.distill.store import Example, load_shard
from dsdlab.models.distill.student import Student, through_int8

LOSS_ROWS, LOSS_ROWS_DEVICE = 192, 8192  # judged positions whose logits exist at once, CPU and elsewhere


@dataclass
class Pack:
    """A prompt with several of its continuations, forwarded once; continuations do not see each other.

    ids, positions, segment: [n]; segment 0 is the prompt. index: [P] where the judged states lie in `ids`;
    weight, lse: [P]; hidden: [P, d]. answers: how many.
    """

    ids: Tensor
    positions: Tensor
    segment: Tensor
    index: Tensor
    weight: Tensor
    lse: Tensor
    hidden: Tensor
    answers: int


def pack(twins: Sequence[Example], prompt_weight: float) -> Pack:
    """Lay out examples that share their prompt."""
    if len(twins) == 1:
        return _alone(twins[0], prompt_weight)
    prompt = twins[0].prompt_len
    ids, positions, segment = [twins[0].ids[:prompt]], [torch.arange(prompt)], [torch.zeros(prompt)]
    index, weight = [], []
    offset = prompt
    for number, e in enumerate(twins, 1):
        answer = e.ids[prompt:-1]  # the last token is predicted, never read
        inside = torch.arange(len(answer))
        ids.append(answer)
        positions.append(inside + prompt)
        segment.append(torch.full((len(answer),), float(number)))
        index += [torch.arange(e.start, prompt), inside + offset]
        weight += [torch.full((prompt - 1 - e.start,), prompt_weight), torch.ones(len(answer) + 1)]
        offset += len(answer)
    return Pack(
        torch.cat(ids).long(), torch.cat(positions), torch.cat(segment), torch.cat(index), torch.cat(weight),
        torch.cat([e.lse for e in twins]), torch.cat([e.hidden for e in twins]), len(twins),
    )  # fmt: skip


@cache
def _ramp(weight: float, longest: int = 1 << 16) -> tuple[Tensor, Tensor, Tensor]:
    """What packs are slices of: positions, no segment, and `longest` times `weight` before as many 1."""
    ones = torch.ones(longest)
    return torch.arange(longest), torch.zeros(longest), torch.cat([weight * ones, ones])


def _alone(e: Example, prompt_weight: float) -> Pack:
    """`pack` for one example, without a copy but of its ids: there may be hundreds of thousands."""
    n = len(e.ids) - 1
    positions, segment, weight = _ramp(prompt_weight)
    switch = len(segment)  # where weight turns 1
    first = switch - (e.prompt_len - 1 - e.start)
    return Pack(
        e.ids[:n].long(), positions[:n], segment[:n], positions[e.start : n],
        weight[first : first + n - e.start], e.lse, e.hidden, 1,
    )  # fmt: skip


def pack_all(examples: Sequence[Example], most: int, prompt_weight: float) -> list[Pack]:
    """Pack neighbours with equal prompts, at most `most` continuations together."""
    out: list[Pack] = []
    twins: list[Example] = []
    for e in examples:
        same = twins and e.prompt_len == twins[0].prompt_len
        if twins and not (
            same and len(twins) < most and torch.equal(e.ids[: e.prompt_len], twins[0].ids[: e.prompt_len])
        ):
            out.append(pack(twins, prompt_weight))
            twins = []
        twins.append(e)
    if twins:
        out.append(pack(twins, prompt_weight))
    return out


class Pool:
    """Training packs from a folder of shards that may still be filling up."""

    def __init__(
        self, folder: Path, prefix: str, seed: int, *, device: str = "cpu", prompt_weight: float = 0.3
    ) -> None:
        """device: where the target's states are kept. On a CPU a prompt's continuations share its forward."""
        self.folder, self.prefix, self.rng = folder, prefix, random.Random(seed)
        self.most, self.prompt_weight, self.device = 3 if device == "cpu" else 1, prompt_weight, device
        self.seen: set[str] = set()
        self.packs: list[Pack] = []
        self.positions = 0
        self.queue: list[int] = []

    def refresh(self) -> int:
        """Read shards not read yet and mix them into what is waiting. Returns new packs."""
        fresh: list[int] = []
        for path in sorted(self.folder.glob(f"{self.prefix}*.pt")):
            if path.name in self.seen:
                continue
            self.seen.add(path.name)
            for item in pack_all(load_shard(path, self.device), self.most, self.prompt_weight):
                fresh.append(len(self.packs))
                self.packs.append(item)
                self.positions += len(item.index)
        self.queue += fresh
        self.rng.shuffle(self.queue)
        return len(fresh)

    def restart(self, seed: int) -> None:
        """Draw from the beginning again, in another order."""
        self.rng.seed(seed)
        self.queue = []

    def take(self, positions: int) -> list[Pack]:
        """Packs with at least this many judged positions; every pack once before any comes again."""
        out: list[Pack] = []
        have = 0
        while have < positions:
            if not self.queue:
                self.queue = list(range(len(self.packs)))
                self.rng.shuffle(self.queue)
            out.append(self.packs[self.queue.pop()])
            have += len(out[-1].index)
        return out


class _Sized(Protocol):
    ids: Tensor


S = TypeVar("S", bound=_Sized)


def micro_batches(items: Sequence[S], tokens: int) -> Iterator[list[S]]:
    """Split into groups of about equal length of at most `tokens` padded tokens (at least one item)."""
    group: list[S] = []
    for item in sorted(items, key=lambda e: len(e.ids)):
        if group and (len(group) + 1) * len(item.ids) > tokens:
            yield group
            group = []
        group.append(item)
    if group:
        yield group


@dataclass
class Batch:
    """Packs side by side, padded.

    ids: [B, L]; positions [B, L] and score bias [B, 1, L, L], None where every pack is plain causal text;
    index (into B · L), weight, lse of judged states: [P]; hidden: the target's states there [P, d].
    """

    ids: Tensor
    positions: Tensor | None
    mask: Tensor | None
    index: Tensor
    weight: Tensor
    lse: Tensor
    hidden: Tensor

    def to(self, device: str) -> Batch:
        """The same on a device."""
        moved: dict[str, Any] = {n: t if t is None else t.to(device) for n, t in vars(self).items()}
        return Batch(**moved)


def collate(group: Sequence[Pack]) -> Batch:
    """Pad packs into one batch."""
    ids = pad_sequence([e.ids for e in group], batch_first=True)
    longest = ids.shape[1]
    index = torch.cat([e.index + r * longest for r, e in enumerate(group)])
    weight, lse = torch.cat([e.weight for e in group]), torch.cat([e.lse for e in group])
    hidden = torch.cat([e.hidden for e in group])
    if all(e.answers == 1 for e in group):
        return Batch(ids, None, None, index, weight, lse, hidden)
    positions = pad_sequence([e.positions for e in group], batch_first=True)
    segment = pad_sequence([e.segment for e in group], batch_first=True, padding_value=-1.0)
    own = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
    seen = own & torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = torch.where(seen, 0.0, -1e9).to(torch.bfloat16)[:, None]
    return Batch(ids, positions, mask, index, weight, lse, hidden)


def divergence(
    rows: Tensor, target: Tensor, lse: Tensor, weight: Tensor, overlap: Tensor, with_overlap: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a student's logits from a target's, both [P, rows]; lse, weight [P]; overlap a scalar.

    Returns the weighted loss; sums over answer positions (weight 1) of KL, equal argmax and positions [3];
    and the weighted loss's gradient by the student's logits [P, rows].
    """
    rows, target = rows.float(), target.float()
    answer = (weight == 1).float()
    same = (rows.argmax(-1) == target.argmax(-1)).float()
    log_q = rows.log_softmax(-1)
    log_p = target - lse[:, None]
    p, q = log_p.exp(), log_q.exp()
    kl = (p * (log_p - log_q)).sum(-1)
    grad = q * p.sum(-1, keepdim=True) - p
    here = kl
    if with_overlap:
        under = (q < p).to(q.dtype)  # d sum min(p, q) / d q
        here = kl + overlap * (1 - torch.minimum(p, q).sum(-1))
        grad = grad - overlap * q * (under - (under * q).sum(-1, keepdim=True))
    sums = torch.stack([(kl * answer).sum(), (same * answer).sum(), answer.sum()])
    return (here * weight).sum(), sums, grad * weight[:, None]


@cache
def _divergence(device_type: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Fused where there is a compiler for the device: it reads the logits a few times, not thirty."""
    if device_type != "cuda":
        return divergence
    torch._dynamo.config.suppress_errors = True  # without a compiler: as it stands
    return cast(Callable[..., tuple[Tensor, Tensor, Tensor]], torch.compile(divergence, dynamic=True))


class HeadLoss(torch.autograd.Function):
    """Output head, KL(p || q) and its gradient in one pass over chunks: no [P, rows] tensor ever exists.

    q is the student over the kept rows; p keeps its true mass there (the rest is out of the drafter's reach).
    With `overlap` > 0 the loss adds overlap * (1 - sum min(p, q)).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        table: Tensor,
        states: Tensor,
        head: Tensor,
        lse: Tensor,
        weight: Tensor,
        overlap: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        """hidden [P, d], table [rows, d], states [P, D], head [rows, D], lse and weight [P].

        Returns the weighted loss and sums over answer positions (weight 1): KL, equal argmax, positions.
        """
        g_hidden = torch.empty_like(hidden)
        g_table = torch.zeros_like(table, dtype=torch.float32)
        low = table.to(hidden.dtype)
        loss = hidden.new_zeros((), dtype=torch.float32)
        sums = torch.zeros(3, device=hidden.device)
        share = torch.tensor(overlap, device=hidden.device)
        judge = _divergence(hidden.device.type)
        for at in range(0, len(hidden), chunk):
            part = slice(at, at + chunk)
            rows, target = F.linear(hidden[part], low), F.linear(states[part], head)
            more, seen, grad = judge(rows, target, lse[part], weight[part], share, overlap > 0)
            loss, sums = loss + more, sums + seen
            step = grad.to(hidden.dtype)
            g_hidden[part] = step @ low
            g_table += (step.t() @ hidden[part]).float()
        ctx.save_for_backward(g_hidden, g_table)
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what forward computed."""
        g_hidden, g_table = ctx.saved_tensors
        return g_hidden * grads[0].to(g_hidden.dtype), g_table * grads[0], None, None, None, None, None, None


head_loss: Callable[..., tuple[Tensor, Tensor]] = HeadLoss.apply


def keep_memory() -> None:
    """Ask glibc to keep freed memory: fresh pages cost more than the arithmetic on them."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never give back


@dataclass
class Progress:
    """Where a run stands; goes into its checkpoint."""

    step: int = 0
    positions: int = 0
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)


def train(
    student: Student,
    head_rows: Tensor,
    pool: Pool,
    config: TrainConfig,
    *,
    checkpoint: Path,
    resume: bool,
    say: Callable[[str], None],
    judge: Callable[[Student], dict[str, Any]] | None = None,
    device: str = "cpu",
) -> Progress:
    """Train to the end of the schedule. head_rows: the target's head for the kept rows [rows, d_target].

    `judge` is called now and then and at the end; what it returns joins the learning curve.
    """
    student.to(device)
    head = head_rows.to(device, torch.bfloat16)
    decay = [p for n, p in student.named_parameters() if p.dim() == 2 and n not in ("embed", "head")]
    rest = [p for n, p in student.named_parameters() if not (p.dim() == 2 and n not in ("embed", "head"))]
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=config.lr, betas=(0.9, 0.98), eps=1e-8, fused=True,
    )  # fmt: skip
    now = Progress()
    if resume and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location=device)
        student.load_state_dict(saved["student"])
        optimiser.load_state_dict(saved["optimiser"])
        now = Progress(**saved["progress"])
        pool.rng.seed(config.seed + now.step)
        say(f"train {student.shape.name}: resumed at step {now.step}")

    def save() -> None:
        part = checkpoint.with_suffix(".part")
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {"student": student.state_dict(), "optimiser": optimiser.state_dict(), "progress": vars(now)}
        torch.save(state, part)
        part.replace(checkpoint)

    def fraction() -> float:
        by_time = now.seconds / (60 * config.minutes) if config.minutes else 0.0
        return max(now.positions / config.positions, by_time)

    chunk = LOSS_ROWS if device == "cpu" else LOSS_ROWS_DEVICE
    began = time.monotonic() - now.seconds
    spoke = saved_at = looked_at = judged_at = time.monotonic()
    shown = torch.zeros(3, device=device)
    while (at := fraction()) < 1:
        if time.monotonic() - looked_at > 30 or not pool.packs:
            pool.refresh()
            looked_at = time.monotonic()
            if not pool.packs:
                raise ValueError(f"{pool.folder}: no training shards")
        rate = config.lr * (at / config.warmup if at < config.warmup else 0.5 * (1 + math.cos(math.pi * at)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        fake = at >= config.quantised_from
        overlap = config.overlap_weight * max(0.0, (at - config.overlap_from) / (1 - config.overlap_from))
        examples = pool.take(config.batch_positions)
        judged = sum(len(e.index) for e in examples)
        total = torch.zeros(3, device=device)
        for micro in micro_batches(examples, config.micro_tokens):
            batch = collate(micro).to(device)
            with torch.autocast(device, torch.bfloat16):
                hidden = student.body(batch.ids, batch.positions, batch.mask, fake)
            hidden = hidden.flatten(0, 1).index_select(0, batch.index)
            kept = student.embed if student.head is None else student.head
            table = through_int8(kept) if fake else kept
            loss, sums = head_loss(hidden, table, batch.hidden, head, batch.lse, batch.weight, overlap, chunk)
            total += sums
            loss = loss / judged
            if config.hidden_weight and at < 0.5 and hidden.shape[-1] == batch.hidden.shape[-1]:
                matched = 1 - torch.cosine_similarity(hidden.float(), batch.hidden.float(), dim=-1)
                loss = loss + config.hidden_weight * (1 - 2 * at) * (matched * batch.weight).sum() / judged
            loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        now.step += 1
        now.positions += judged
        now.seconds = time.monotonic() - began
        shown = total if now.step == 1 else 0.95 * shown + 0.05 * total
        clock = time.monotonic()
        if clock - spoke > config.report_minutes * 60 or now.step == 1:
            spoke = clock
            say(
                f"train {student.shape.name}: {100 * fraction():.1f} %, step {now.step}, "
                f"{now.positions:,} positions, KL {shown[0] / shown[2]:.3f}, "
                f"argmax {shown[1] / shown[2]:.3f}, lr {rate:.2e}, "
                f"{now.positions / now.seconds:.0f} positions/s, "
                f"{pool.positions:,} positions at hand"
            )
        if clock - saved_at > 60 * config.checkpoint_minutes:
            save()
            saved_at = time.monotonic()
        if judge is not None and clock - judged_at > 60 * config.judge_minutes:
            note(now, judge(student), say)
            judged_at = time.monotonic()
    if judge is not None:
        note(now, judge(student), say)
    save()
    return now


def note(now: Progress, result: dict[str, Any], say: Callable[[str], None]) -> None:
    """Add a point to the learning curve."""
    now.curve.append({"positions": now.positions, "seconds": round(now.seconds), **result})
    say(f"validation at {now.positions:,} positions: {result}")
