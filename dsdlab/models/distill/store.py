"""Shards of generated sequences with the target's final hidden states."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsdlab.models.distill.config import GenerateConfig
from dsdlab.models.distill.prompts import Prompt
from dsdlab.models.distill.teacher import Teacher


@dataclass
class Example:
    """One sequence: ids [n] int32; hidden [n - 1 - start, d] bfloat16 and lse of positions start … n - 2."""

    task: str
    ids: Tensor
    prompt_len: int
    start: int
    temperature: float
    hidden: Tensor
    lse: Tensor


def save_shard(path: Path, examples: Sequence[Example]) -> None:
    """Write atomically."""
    part = path.with_suffix(".part")
    torch.save(
        {
            "task": [e.task for e in examples],
            "prompt_len": [e.prompt_len for e in examples],
            "start": [e.start for e in examples],
            "temperature": [e.temperature for e in examples],
            "lens": [len(e.ids) for e in examples],
            "ids": torch.cat([e.ids for e in examples]),
            "hidden": torch.cat([e.hidden for e in examples]),
            "lse": torch.cat([e.lse for e in examples]),
        },
        part,
    )
    part.replace(path)


def load_shard(path: Path, device: str = "cpu") -> list[Example]:
    """Read one shard, hidden states onto `device`; on a CPU they stay in the file until they are used."""
    data: dict[str, Any] = torch.load(path, weights_only=True, mmap=True)
    states: Tensor = data["hidden"].to(device)
    out = []
    at = row = 0
    for i, length in enumerate(data["lens"]):
        rows = length - 1 - data["start"][i]
        out.append(
            Example(
                data["task"][i], data["ids"][at : at + length], data["prompt_len"][i], data["start"][i],
                data["temperature"][i], states[row : row + rows], data["lse"][row : row + rows],
            )
        )  # fmt: skip
        at += length
        row += rows
    return out


def plan(prompts: Sequence[Prompt], config: GenerateConfig, seed: int) -> list[list[tuple[Prompt, int]]]:
    """Batches of (prompt, continuations): shuffled over tasks, about equal lengths inside a batch.

    Deterministic, so that an interrupted run goes on at the first missing shard.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = [prompts[i] for i in torch.randperm(len(prompts), generator=generator).tolist()]
    batches: list[list[tuple[Prompt, int]]] = []
    window = 6 * config.batch
    for at in range(0, len(shuffled), window):
        chunk = sorted(shuffled[at : at + window], key=lambda p: len(p.ids))
        mine: list[list[tuple[Prompt, int]]] = []
        current: list[tuple[Prompt, int]] = []
        rows = 0
        for prompt in chunk:
            wanted = config.continuations
            copies = min(wanted.get(prompt.task, wanted.get("default", 1)), config.batch)
            capacity = len(prompt.ids) + config.max_new_tokens
            if current and (
                rows + copies > config.batch or (rows + copies) * capacity > config.cache_positions
            ):
                mine.append(current)
                current, rows = [], 0
            current.append((prompt, copies))
            rows += copies
        if current:
            mine.append(current)
        batches += [mine[i] for i in torch.randperm(len(mine), generator=generator).tolist()]
    return batches


def generate_shards(
    teacher: Teacher,
    prompts: Sequence[Prompt],
    config: GenerateConfig,
    folder: Path,
    *,
    prefix: str,
    stop_ids: Sequence[int],
    seed: int,
    say: Callable[[str], None],
) -> int:
    """Generate shard after shard until the budget or the time is used up. Returns generated tokens.

    A note in the folder says so then, and finished text is not added to by going on with a run, but for a
    larger budget or more time. Raises ValueError where it was made from other prompts or settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note = finished(folder, prefix)
    limits = {"token_budget": config.token_budget, "minutes": config.minutes}
    asked = config.model_dump(mode="json", exclude=set(limits)) | {"seed": seed, "prompts": _digest(prompts)}
    if note.exists():
        made = json.loads(note.read_text())
        if made["asked"] != asked:
            raise ValueError(
                f"{folder}: its {prefix} text was made from other prompts or settings; allowed: the same, or "
                "another folder"
            )
        if made["limits"] == limits:
            return int(made["tokens"])
    began = time.monotonic()
    total = 0
    batches = plan(prompts, config, seed)
    saver = ThreadPoolExecutor(1)  # writes one shard while the next is generated
    saving: Future[None] | None = None
    for number, batch in enumerate(batches):
        path = folder / f"{prefix}-{number:05d}.pt"
        if path.exists():
            total += sum(len(e.ids) - e.prompt_len for e in load_shard(path))
            continue
        if total >= config.token_budget or (
            config.minutes and time.monotonic() - began > 60 * config.minutes
        ):
            break
        flat: list[Prompt] = []
        warm: list[float] = []
        for prompt, copies in batch:
            flat += [prompt] * copies
            warm += [0.0] + [config.temperature] * (copies - 1)
        t0 = time.monotonic()
        done = teacher.generate(
            [p.ids for p in flat],
            starts=[_start(p) for p in flat],
            temperatures=warm,
            max_new=config.max_new_tokens,
            stop_ids=stop_ids,
            generator=torch.Generator().manual_seed(seed * 1_000_003 + number),
        )
        examples = [
            Example(p.task, torch.tensor(g.ids, dtype=torch.int32), g.prompt_len, g.start,
                    g.temperature, g.hidden, g.lse)
            for p, g in zip(flat, done, strict=True)
        ]  # fmt: skip
        if saving is not None:
            saving.result()
        saving = saver.submit(save_shard, path, examples)
        fresh = sum(len(g.ids) - g.prompt_len for g in done)
        total += fresh
        rate = fresh / (time.monotonic() - t0)
        say(f"generate {prefix}: shard {number + 1}/{len(batches)}, {total:,} tokens, {rate:.0f} tokens/s")
    if saving is not None:
        saving.result()
    saver.shutdown()
    part = note.with_suffix(".part")
    part.write_text(json.dumps({"asked": asked, "limits": limits, "tokens": total}))
    part.replace(note)
    return total


def finished(folder: Path, prefix: str) -> Path:
    """The note that is there once all shards of a prefix are."""
    return folder / f"{prefix}.done.json"


def _digest(prompts: Sequence[Prompt]) -> str:
    return hashlib.sha256(json.dumps([p.ids for p in prompts]).encode()).hexdigest()


def _start(prompt: Prompt) -> int:
    """First position whose hidden state is kept."""
    return 0 if prompt.on_prompt else len(prompt.ids) - 1
