"""Judge a drafter file on held-out prompts, as `dsdlab distill` does: docs/drafter.md, "What it achieves".

Give the prompt files that it was distilled with, in the same order: which prompts are held out follows from
their text, but where long ones are cut from all before. The target answers first (a few minutes on two CPU
cores), then the drafter is held against its answers. --spread gives several files' mean and 95 % interval
instead, for seeds of one recipe.

    make bench-drafter PROMPTS="gsm8k_train.jsonl humaneval_train.jsonl cnndm_train.jsonl"
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student_t

from dsdlab.models.distill import main as distillation
from dsdlab.models.distill.config import load_config
from dsdlab.models.distill.evaluate import judge, predict_tpot, summary
from dsdlab.models.distill.prompts import Template, builtin, from_files
from dsdlab.models.distill.store import load_shard
from dsdlab.models.distill.student import load_exported
from dsdlab.models.distill.tables import acceptance, positions
from dsdlab.models.distill.teacher import Teacher
from dsdlab.models.loading import eos_of, resolve_device
from dsdlab.models.tokenizer import Tokenizer
from dsdlab.models.weights_io import load_llama_dir
from dsdlab.models.zoo import DRAFTERS, fetch

CONFIG = Path(distillation.__file__).with_name("gpu-on.toml")
T_DRAFT_MS = 2.1  # of the shipped drafter on one CPU core: docs/exactness.md
T_VERIFY_MS, SLOPE = 13.8, 0.06  # of the bf16 target there: one row, and the share of it for each further one


def spread(values: list[float]) -> str:
    """Mean and 95 % interval over seeds (Student's t)."""
    half = student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


def over_seeds(found: list[dict[str, Any]]) -> str:
    """Per task and their mean: α, and acceptance by place in the window, over several files."""
    gamma = found[0]["gamma"]
    lines = ["| task | α | lookup first | " + " | ".join(str(k + 1) for k in range(gamma)) + " |"]
    lines.append("|" + "---|" * (3 + gamma))
    for task in found[0]["tasks"]:
        mine = [f["tasks"][task] for f in found]
        cells = [spread([m[key] for m in mine]) for key in ("alpha", "alpha_lookup_first")]
        cells += [spread([m["by_position"][k] for m in mine]) for k in range(gamma)]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    means = [spread([f[key] for f in found]) for key in ("alpha", "alpha_lookup_first")]
    return "\n".join([*lines, f"| mean | {means[0]} | {means[1]} |" + " |" * gamma])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("prompts", nargs="+", help="jsonl files")
    parser.add_argument("--drafter", nargs="+", default=["smollm2-drafter"], help="names or files")
    parser.add_argument("--spread", action="store_true")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--answers", type=Path, help="folder to keep the target's answers in, and find them")
    asked = parser.parse_args()
    files = [DRAFTERS.get(name, Path(name)) for name in asked.drafter]
    if missing := [str(file) for file in (*files, *map(Path, asked.prompts)) if not file.is_file()]:
        parser.error(f"no such file: {', '.join(missing)}")
    if asked.spread and len(files) < 2:
        parser.error("--spread needs several --drafter files")
    config, device = load_config(CONFIG), resolve_device("auto")
    if device == "cpu":  # batches for its memory
        smaller = config.generate.model_copy(update={"batch": 64, "cache_positions": 50_000})
        config = config.model_copy(update={"generate": smaller})
    folder = fetch(config.target)
    template = Template(Tokenizer(folder / "tokenizer.json"))
    teacher = Teacher(load_llama_dir(folder, ""), device)
    with tempfile.TemporaryDirectory() as scratch:
        data = asked.answers or Path(scratch)
        prompts = from_files(config.prompts, asked.prompts, template, config.seed) + builtin(template)
        distillation.make_held_out(
            config, teacher, prompts, data, eos_of(folder), lambda line: print(line, flush=True), asked.split
        )
        examples = [e for path in sorted(data.glob(f"{asked.split}-*.pt")) for e in load_shard(path)]
        found = []
        for name, file in zip(asked.drafter, files, strict=True):
            student, _ = load_exported(file)
            judged = judge(
                student, teacher.head, examples, device=device, noise_seeds=config.evaluate.seeds,
                temperature=config.generate.temperature,
            )  # fmt: skip
            found.append(summary(judged, config.evaluate.gamma))
            if asked.spread:
                continue
            print(f"\n{name}, {asked.split} prompts\n\n{acceptance(found[-1])}")
            print(f"\nby place in the window, the drafter alone\n\n{positions(found[-1])}")
            first = positions(found[-1], "by_position_lookup_first")
            print(f"\nby place in the window, prompt lookup first\n\n{first}\n")
            for which in ("neural", "either"):
                for rtt_ms in config.evaluate.rtts_ms:
                    ms, gamma = predict_tpot(
                        judged, T_DRAFT_MS, rtt_ms=rtt_ms, t_verify_ms=T_VERIFY_MS, slope=SLOPE,
                        which=which,
                    )  # fmt: skip
                    print(f"{which}: {ms:.1f} ms a token at RTT {rtt_ms:g} ms, γ = {gamma:g}")
        if asked.spread:
            print(over_seeds(found))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
