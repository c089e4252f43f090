"""`dsdlab distill`: from a target to a drafter file, in resumable stages."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsdlab.models.distill.config import DistillConfig, ShapeConfig, TrainConfig, load_config
from dsdlab.models.distill.evaluate import draft_ms, judge, predict_tpot, summary
from dsdlab.models.distill.prompts import (
    Prompt,
    Template,
    builtin,
    from_files,
    read_jsonl,
    self_written,
    split_of,
)
from dsdlab.models.distill.store import Example, finished, generate_shards, load_shard
from dsdlab.models.distill.student import Student, build, export, load_exported, map_inputs, rank_rows, trim
from dsdlab.models.distill.tables import report
from dsdlab.models.distill.teacher import Teacher
from dsdlab.models.distill.train import Pool, keep_memory, train
from dsdlab.models.loading import eos_of, resolve_device
from dsdlab.models.tokenizer import Tokenizer
from dsdlab.models.weights_io import load_llama_dir
from dsdlab.models.zoo import DRAFTERS, fetch

Say = Callable[[str], None]
TEXT = "text"  # what comes before the shapes
PREFIXES = ("validation", "test", "train")
SPECIAL_IDS = 3  # end of text and the turn marks are always kept
SAMPLE_TOKENS = 200  # length of the texts on which neurons are ranked


def run(
    config_path: Path,
    out_dir: Path,
    resume: bool = False,
    prompt_files: Sequence[str] = (),
    say: Say | None = None,
    only: str = "",
) -> dict[str, Any]:
    """Distil a drafter as `config_path` says; everything lands in `out_dir`.

    resume: go on where an earlier run in the same folder stopped. prompt_files: further jsonl files.
    only: "text", or afterwards the name of a shape, and nothing further is done: shapes can then train side
    by side, and are timed one after the other by the run that follows without it.
    Returns the report, which is also in out_dir/report.json and report.md; with `only` {} or what is known of
    the shape. Raises ValueError or ModelError with one line for the user.
    """
    config = load_config(config_path)
    parts = [TEXT, *(shape.name for shape in config.shapes)]
    if only and only not in parts:
        raise ValueError(f"only is {only!r}; allowed with {config_path}: {', '.join(parts)}")
    say = say or _say
    if not resume and out_dir.exists() and any(out_dir.iterdir()):
        raise ValueError(f"{out_dir} is not empty; allowed: an empty or new folder, or --resume")
    data = out_dir / "data"
    if only not in ("", TEXT) and not all(finished(data, prefix).exists() for prefix in PREFIXES):
        raise ValueError(f"{data}: its text is not finished; first: the same command with --only {TEXT}")
    out_dir.mkdir(parents=True, exist_ok=True)
    keep_memory()
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length of text
    torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    folder = fetch(config.target)
    tokenizer = Tokenizer(folder / "tokenizer.json")
    teacher = Teacher(load_llama_dir(folder, ""), device)
    say(f"target {config.target}: {len(teacher.layers)} layers, on {device}")

    if only in ("", TEXT):
        files = [*config.prompts.files, *prompt_files]
        prompts = gather_prompts(config, files, teacher, Template(tokenizer), out_dir / "prompts.json", say)
        make_data(config, teacher, prompts, data, eos_of(folder), say)
    if only == TEXT:
        return {}
    counts = token_counts(data, teacher.vocab)

    held_out = (e for path in sorted(data.glob("validation-*.pt")) for e in load_shard(path))
    validation = [e for e in held_out if e.temperature == 0]
    pool = Pool(data, "train", config.train.seed, device=device)
    bench = Bench(config, teacher, tokenizer, counts, validation, out_dir, say, pool)
    if only:
        return bench.train(next(s for s in config.shapes if s.name == only), config.train)
    candidates = [bench.distil(shape, config.train) for shape in config.shapes]
    best = min(candidates, key=cost_ms)
    say(f"best by predicted time per token: {best['shape']}")
    if config.final is not None:
        shape = next(s for s in config.shapes if s.name == best["shape"])
        longer = shape.model_copy(update={"name": f"{shape.name}-longer"})
        candidates.append(bench.distil(longer, config.final, out_dir / f"{shape.name}.checkpoint.pt"))
        best = min(candidates, key=cost_ms)
    chosen = Path(out_dir / config.output)
    chosen.write_bytes((out_dir / best["file"]).read_bytes())
    test = [e for path in sorted(data.glob("test-*.pt")) for e in load_shard(path)]
    student, _ = load_exported(chosen)
    final = summary(
        judge(student, teacher.head, test, device=device, noise_seeds=config.evaluate.seeds,
              temperature=config.generate.temperature),
        config.evaluate.gamma,
    )  # fmt: skip
    result = {"chosen": best["shape"], "file": str(chosen), "test": final, "candidates": candidates}
    (out_dir / "report.json").write_text(json.dumps(result, indent=1))
    (out_dir / "report.md").write_text(report(result))
    say(f"test: greedy acceptance {final['alpha']:.3f}, with prompt lookup {final['alpha_lookup_first']:.3f}")
    return result


def _say(line: str) -> None:
    """One progress line on standard error."""
    import sys

    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stderr.flush()


def gather_prompts(
    config: DistillConfig, files: Sequence[str], teacher: Teacher, template: Template, cache: Path, say: Say
) -> list[Prompt]:
    """All prompts of all splits; the self-written ones are kept in `cache`."""
    out = from_files(config.prompts, files, template, config.seed)
    if config.prompts.builtin:
        out += builtin(template)
    if sum(config.prompts.self_written.values()):
        if cache.exists():
            saved = json.loads(cache.read_text())
            out += [Prompt(task, split, tuple(ids), on_prompt) for task, split, ids, on_prompt in saved]
        else:
            say("prompts: the target writes user turns")
            fresh = self_written(
                teacher, template, config.prompts.self_written, openings(files, config.seed),
                seed=config.seed, batch=config.generate.batch,
            )  # fmt: skip
            part = cache.with_suffix(".part")
            part.write_text(json.dumps([[p.task, p.split, p.ids, p.on_prompt] for p in fresh]))
            part.replace(cache)
            out += fresh
    if not any(p.split == "train" for p in out):
        raise ValueError("prompts: none to train on; allowed: builtin = true, self_written counts, or files")
    say(f"prompts: {', '.join(f'{n:,} {split}' for split, n in _count(p.split for p in out).items())}")
    return out


def _count(names: Any) -> dict[str, int]:
    out: dict[str, int] = {}
    for name in names:
        out[name] = out.get(name, 0) + 1
    return out


def openings(files: Sequence[str], seed: int) -> dict[str, list[str]]:
    """First words of training prompts, from which the target writes prompts of the same kind."""
    rng = random.Random(seed)
    out: dict[str, list[str]] = {"maths": [], "article": [], "code": []}
    for name in files:
        stem = Path(name).stem
        for text in read_jsonl(Path(name)):
            if split_of(text) != "train":
                continue
            words = text.split(" ")
            if "gsm" in stem:
                out["maths"].append(" ".join(words[: rng.randint(2, 5)]))
            elif "cnn" in stem:
                out["article"].append(" ".join(words[: rng.randint(6, 14)]))
            elif "def " in text:
                out["code"].append(text[: text.index("def ") + 3])
    return out


def make_data(
    config: DistillConfig,
    teacher: Teacher,
    prompts: Sequence[Prompt],
    data: Path,
    stops: Sequence[int],
    say: Say,
) -> None:
    """Held-out answers, then training text until the budget is met."""
    for split in ("validation", "test"):
        make_held_out(config, teacher, prompts, data, stops, say, split)
    generate_shards(
        teacher,
        [p for p in prompts if p.split == "train"],
        config.generate,
        data,
        prefix="train",
        stop_ids=stops,
        seed=config.seed + 2,
        say=say,
    )


def make_held_out(
    config: DistillConfig,
    teacher: Teacher,
    prompts: Sequence[Prompt],
    data: Path,
    stops: Sequence[int],
    say: Say,
    split: str,
) -> None:
    """One greedy and one sampled answer to the first prompts of each task that are held out for `split`."""
    seen: dict[str, int] = {}
    mine = []
    for p in (p for p in prompts if p.split == split):
        seen[p.task] = seen.get(p.task, 0) + 1
        if seen[p.task] <= config.evaluate.prompts_per_task:
            mine.append(p)
    if not mine:
        raise ValueError(f"prompts: none held out for {split}; give more prompts or builtin = true")
    once = {
        "max_new_tokens": config.evaluate.max_new_tokens, "continuations": {"default": 2}, "minutes": 0.0,
    }  # fmt: skip
    held = config.generate.model_copy(update=once)
    generate_shards(teacher, mine, held, data, prefix=split, stop_ids=stops, seed=config.seed + 1, say=say)


def token_counts(data: Path, vocab: int) -> Tensor:
    """How often each id occurs in training text, every task weighing about the same: [vocab]."""
    by_task: dict[str, Tensor] = {}
    for path in sorted(data.glob("train*.pt")):
        for e in load_shard(path):
            counts = by_task.setdefault(e.task, torch.zeros(vocab))
            ones = torch.ones(len(e.ids))
            ones[: e.prompt_len] = 0.3
            counts.index_add_(0, e.ids.long(), ones)
    total = torch.zeros(vocab)
    for counts in by_task.values():
        total += counts / counts.sum() * min(1.0, float(counts.sum()) / 20_000)
    return total * 1e6


def cost_ms(candidate: dict[str, Any]) -> float:
    """Predicted time per token, mean over the RTTs asked for."""
    return float(sum(candidate["tpot_ms"].values()) / len(candidate["tpot_ms"]))


@dataclass
class Bench:
    """Where shapes are trained one after the other, on the same text and judged by the same answers."""

    config: DistillConfig
    teacher: Teacher
    tokenizer: Tokenizer
    counts: Tensor
    validation: Sequence[Example]
    out_dir: Path
    say: Say
    pool: Pool

    def distil(self, shape: ShapeConfig, training: TrainConfig, start: Path | None = None) -> dict[str, Any]:
        """Train a shape, unless that was done before, judge it and time it; see `train`."""
        result = self.train(shape, training, start)
        if "tpot_ms" not in result:
            result |= self._judge(self.out_dir / result["file"])
            (self.out_dir / f"{shape.name}.json").write_text(json.dumps(result, indent=1))
        self.say(
            f"{shape.name}: {result['bytes']:,} bytes, {result['t_draft_ms']:.2f} ms a token, "
            f"predicted ms per token {result['tpot_ms']}"
        )
        return result

    def train(self, shape: ShapeConfig, training: TrainConfig, start: Path | None = None) -> dict[str, Any]:
        """Train and export one shape; a finished one is read back from its result file.

        training: but for what the shape itself asks for. start: a checkpoint of the same shape whose weights
        to begin with.
        """
        own = {"seed": shape.seed, "overlap_weight": shape.overlap_weight}
        training = training.model_copy(update={k: v for k, v in own.items() if v is not None})
        done = self.out_dir / f"{shape.name}.json"
        if done.exists():
            result: dict[str, Any] = json.loads(done.read_text())
            self.say(f"{shape.name}: already trained")
            return result
        device = str(self.teacher.device)
        student, before = self._begin(shape, training.seed)
        if start is not None:
            student.load_state_dict(torch.load(start, weights_only=True, map_location="cpu")["student"])
        progress = train(
            student, self.teacher.head[student.head_ids.to(device).long()], self.pool, training,
            checkpoint=self.out_dir / f"{shape.name}.checkpoint.pt", resume=True, say=self.say,
            judge=self._look, device=device,
        )  # fmt: skip
        student.cpu()
        if shape.export_rows:
            student = trim(student, shape.export_rows, self.counts, self.teacher.embed)
        recipe = {
            "shape": shape.name,
            **({"after": before} if shape.file else {"init": shape.init, "target_layers": shape.layers}),
            "positions": progress.positions,
            "training_seconds": round(progress.seconds),
            "seed": training.seed,
            "on_policy_positions": self.pool.positions,
        }
        file = self.out_dir / f"{shape.name}.safetensors"
        size = export(
            student, file, vocab=self.teacher.vocab, base=self.config.base,
            tokenizer=self.tokenizer.fingerprint, recipe=recipe,
        )  # fmt: skip
        result = {
            "shape": shape.name,
            "file": file.name,
            "bytes": size,
            "parameters": sum(p.numel() for p in student.parameters()),
            "curve": progress.curve,
            "recipe": recipe,
        }
        done.write_text(json.dumps(result, indent=1))
        return result

    def _begin(self, shape: ShapeConfig, seed: int) -> tuple[Student, dict[str, Any]]:
        """The student to train, and the recipe of the file it comes from, if any; the pool starts again."""
        pool, teacher = self.pool, self.teacher
        pool.refresh()
        pool.restart(seed)
        if shape.file:
            student, made = load_exported(DRAFTERS.get(shape.file, Path(shape.file)))
            student.shape = student.shape.model_copy(update={"name": shape.name})
            return student, made.get("recipe", {})
        texts = [p.ids[:SAMPLE_TOKENS] for p in pool.packs if len(p.ids) >= SAMPLE_TOKENS][:24]
        shortest = min((len(p.ids) for p in pool.packs), default=1)
        sample = torch.stack(texts or [p.ids[:shortest] for p in pool.packs[:24]])
        head_ids = rank_rows(self.counts, shape.rows, range(SPECIAL_IDS))
        return build(shape, teacher, head_ids, map_inputs(teacher.embed, head_ids), sample, seed), {}

    def _look(self, model: Student) -> dict[str, Any]:
        """A point of the learning curve."""
        judged = judge(model, self.teacher.head, self.validation, device=str(self.teacher.device))
        found = summary(judged, self.config.evaluate.gamma)
        return {
            "alpha": round(found["alpha"], 4),
            "lookup_first": round(found["alpha_lookup_first"], 4),
            "tasks": {task: round(v["alpha"], 4) for task, v in found["tasks"].items()},
        }

    def _judge(self, file: Path) -> dict[str, Any]:
        """Judge and time what was exported."""
        cost = self.config.evaluate
        exported, _ = load_exported(file)
        judged = judge(exported, self.teacher.head, self.validation, device=str(self.teacher.device))
        t_draft_ms = draft_ms(exported.cpu())
        tpot = {
            f"{rtt_ms:g}": predict_tpot(
                judged, t_draft_ms, rtt_ms=rtt_ms, t_verify_ms=cost.t_verify_ms, slope=cost.verify_slope
            )[0]
            for rtt_ms in cost.rtts_ms
        }
        return {"t_draft_ms": t_draft_ms, "tpot_ms": tpot, "validation": summary(judged, cost.gamma)}
