"""The default pair on one machine, a core a node and no network: which configuration is fastest?

Per precision a sweep of every mode that needs no luck with links (RTT 0, modelled), and between two of them
transformers: plain, and its own assisted generation with the same target and drafter on the same prompts.
Tokens a second are of whole answers, the first token's wait included: all tokens over all seconds.

    python -m bench.pair --page docs/drafter.md      rewrites the table there (some 20 minutes)
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsdlab.models.distill.student import Block, Student, load_exported
from dsdlab.models.loading import load_tokenizer
from dsdlab.models.zoo import DRAFTERS, fetch
from dsdlab.scenario_parts import Workload
from dsdlab.sweep.workload import encode_prompt, load_prompts

TARGET, DRAFTER = "smollm2-135m-instruct", "smollm2-drafter"
MARKS = ("<!-- pair -->", "<!-- /pair -->")
SCENARIO = """
name = "pair-{precision}"
[models]
target = "{target}"
drafter = "{drafter}"
precision = "{precision}"
[workload]
n_prompts = {prompts}
max_new_tokens = {tokens}
stop_at_eos = false
[grid]
mode = ["cloud-ar", "cloud-sd", "edge-sd", "dsd-sync", "dsd-pipelined", "dsd-stream", "dsd-adaptive"]
gamma = [3, 5]
free_run = [false, true]
rtt_ms = [0]
[run]
repeats = {prompts}
seed = {seed}
"""


def sweep(
    precision: str, drafter: str, prompts: int, tokens: int, seed: int, folder: Path
) -> list[dict[str, Any]]:
    """All rows of one precision's sweep."""
    file = folder / f"{precision}.toml"
    file.write_text(
        SCENARIO.format(
            precision=precision, target=TARGET, drafter=drafter, prompts=prompts, tokens=tokens, seed=seed
        )
    )
    out = folder / precision
    command = [sys.executable, "-m", "dsdlab", "sweep", str(file), "--out", str(out), "--runtime", "process"]
    done = subprocess.run([*command, "--link", "modelled"], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip() or done.stdout.strip())
    print("\n".join(x for x in done.stdout.splitlines() if x.startswith(("exact", "measuring"))), flush=True)
    rows = [json.loads(line) for path in out.rglob("rows.jsonl") for line in path.read_text().splitlines()]
    return [row for row in rows if row["status"] == "ok"]


def rate(rows: list[dict[str, Any]]) -> float:
    """Tokens a second of whole answers."""
    seconds = sum(r["ttft_ms"] + r["tpot_ms"] * (r["tokens"] - 1) for r in rows) / 1e3
    return float(sum(r["tokens"] for r in rows) / seconds)


class _KeptHead(nn.Module):
    """The drafter's output head over its kept rows, as logits over the whole vocabulary."""

    def __init__(self, student: Student, vocab: int) -> None:
        super().__init__()
        table = student.embed if student.head is None else student.head
        self.table, self.ids, self.vocab = table.detach().to(torch.bfloat16), student.head_ids.long(), vocab

    def forward(self, hidden: Tensor) -> Tensor:
        """[*, d] to [*, vocab]."""
        out = hidden.new_full((*hidden.shape[:-1], self.vocab), -1e4)
        out[..., self.ids] = F.linear(hidden, self.table)
        return out


def as_transformers(path: Path, vocab: int) -> Any:
    """The shipped drafter as a model of transformers, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    student, _ = load_exported(path)
    shape = student.shape
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=len(shape.layers),
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        rms_norm_eps=student.eps,
        rope_parameters={"rope_type": "default", "rope_theta": student.theta},
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model: Any = LlamaForCausalLM(config)
    state = {
        "model.embed_tokens.weight": student.embed[student.input_map.long()],
        "model.norm.weight": student.norm,
    }
    q, kv, f = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim, shape.intermediate_size
    for i, block in enumerate(student.blocks):
        assert isinstance(block, Block)
        at = f"model.layers.{i}"
        parts = zip(("q", "k", "v"), block.qkv.split([q, kv, kv]), strict=True)
        state.update({f"{at}.self_attn.{n}_proj.weight": w for n, w in parts})
        state[f"{at}.self_attn.o_proj.weight"] = block.o
        gate, up = block.gate_up.split(f)
        state[f"{at}.mlp.gate_proj.weight"], state[f"{at}.mlp.up_proj.weight"] = gate, up
        state[f"{at}.mlp.down_proj.weight"] = block.down
        state[f"{at}.input_layernorm.weight"] = block.attn_norm
        state[f"{at}.post_attention_layernorm.weight"] = block.mlp_norm
    model.load_state_dict({k: v.detach() for k, v in state.items()}, strict=False)
    model = model.to(torch.bfloat16).eval()
    model.lm_head = _KeptHead(student, vocab)
    return model


class Transformers:
    """Plain and assisted generation of the same pair."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.target: Any = AutoModelForCausalLM.from_pretrained(fetch(TARGET), dtype=torch.bfloat16).eval()
        self.drafter = as_transformers(DRAFTERS[DRAFTER], self.target.config.vocab_size)

    def rates(self, prompts: list[list[int]], tokens: int, threads: int) -> dict[str, float]:
        """Tokens a second of each way, on all prompts."""
        torch.set_num_threads(threads)
        ways: dict[str, dict[str, Any]] = {
            "plain": {},
            "assisted": {"assistant_model": self.drafter},
            "prompt lookup": {"prompt_lookup_num_tokens": 4},
        }
        seconds = dict.fromkeys(ways, 0.0)
        for number, ids in enumerate([prompts[0], *prompts]):
            feed = torch.tensor([ids])
            for name, how in ways.items():
                begun = time.perf_counter()
                with torch.inference_mode():
                    out = self.target.generate(
                        feed, attention_mask=torch.ones_like(feed), max_new_tokens=tokens,
                        min_new_tokens=tokens, do_sample=False, pad_token_id=2, **how,
                    )  # fmt: skip
                assert out.shape[1] - len(ids) == tokens
                if number:  # the first is a warm-up
                    seconds[name] += time.perf_counter() - begun
        return {name: len(prompts) * tokens / s for name, s in seconds.items()}


def label(row: dict[str, Any]) -> str:
    """Mode and its window."""
    said = [f"γ = {row['gamma']}"] if row["gamma"] else []
    said += ["free run"] if row.get("free_run") else []
    return str(row["mode"]) + (f" ({', '.join(said)})" if said else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", nargs="+", default=["bf16", "int8", "int4"])
    parser.add_argument("--drafter", default=f"lookup+{DRAFTER}")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--page", type=Path, help="rewrite the table between the marks in this file")
    parser.add_argument("--out", type=Path, default=Path("results/bench/pair.json"))
    args = parser.parse_args()
    tokenizer = load_tokenizer(TARGET)
    workload = Workload(n_prompts=args.prompts)
    prompts = [encode_prompt(p, tokenizer) for p in load_prompts(workload, Path())]
    peer = Transformers()
    ours: dict[str, dict[str, float]] = {}
    theirs: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as tmp:
        for precision in args.precision:
            rows = sweep(precision, args.drafter, args.prompts, args.tokens, args.seed, Path(tmp))
            by_label: dict[str, list[dict[str, Any]]] = {}
            for row in rows:
                by_label.setdefault(label(row), []).append(row)
            ours[precision] = {name: rate(mine) for name, mine in by_label.items()}
            for threads in (1, 2):
                for way, value in peer.rates(prompts, args.tokens, threads).items():
                    theirs.setdefault(f"{way}, {threads} thread{'s' * (threads > 1)}", []).append(value)
    table = as_table(ours, {way: statistics.median(values) for way, values in theirs.items()})
    best = max((value, precision, name) for precision, found in ours.items() for name, value in found.items())
    print(table + f"\n\nfastest: {best[2]} in {best[1]}, {best[0]:.1f} tokens/s")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"ours": ours, "transformers": theirs, "tokens": args.tokens}, indent=1))
    if args.page:
        before, _, rest = args.page.read_text().partition(MARKS[0])
        args.page.write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")


def as_table(ours: dict[str, dict[str, float]], theirs: dict[str, float]) -> str:
    """Configurations by precision, each with its ratio to `cloud-ar`; transformers below."""
    lines = ["| " + " | ".join(["", *ours]) + " |", "|---|" + "---|" * len(ours)]
    order = sorted(
        {name for found in ours.values() for name in found}, key=lambda n: -max(f[n] for f in ours.values())
    )
    for name in order:
        cells = [f"{found[name]:.1f} ({found[name] / found['cloud-ar']:.2f} ×)" for found in ours.values()]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    lines += [
        f"| transformers, bf16: {way} | {value:.1f} |" + " |" * (len(ours) - 1)
        for way, value in theirs.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
