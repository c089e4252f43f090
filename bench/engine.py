"""The engine beside transformers: same weights, dtype and threads, interleaved in one run.

Prints "NAME: R x PEER (ours …, theirs …)" lines and writes them to results/bench/engine.json. Ratios
are medians of per-round ratios, so that a slow spell of the machine falls on both sides alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsdlab.decoding import Sampling
from dsdlab.models.alone import generate_alone
from dsdlab.models.base import Chunk, Engine
from dsdlab.models.hf_engine import cache_word
from dsdlab.models.loading import EngineOptions, load_engine, load_tokenizer
from dsdlab.models.zoo import fetch
from dsdlab.sweep.provenance import cpu_name

TARGET = "smollm2-135m-instruct"
PROMPT = "Write a short story about a fox who learns to sail, then list the parts of a boat."
CONTEXT = 128
ROWS = (1, 4, 8, 16)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def clock_ms(work: Callable[[], Any]) -> float:
    """Milliseconds of one call."""
    begun = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - begun)


def forward_times(engine: Engine, ids: list[int], rounds: int) -> dict[int, float]:
    """Median ms of a forward of each row count after CONTEXT positions."""
    slot = engine.open()
    engine.extend([Chunk(slot, (ids * CONTEXT)[:CONTEXT], 1)])
    out: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for _ in range(rounds):
        for rows in ROWS:
            chunk = Chunk(slot, (ids * rows)[:rows], rows)
            out[rows].append(clock_ms(lambda c=chunk: engine.extend([c])))  # type: ignore[misc]
            engine.rollback(slot, CONTEXT)
    engine.close(slot)
    return {rows: statistics.median(times) for rows, times in out.items()}


def hf_forward_times(model: Any, ids: list[int], rounds: int) -> dict[int, float]:
    """The same through transformers with its own dynamic cache."""
    from transformers import DynamicCache

    word = cache_word(model)
    out: dict[int, list[float]] = {rows: [] for rows in ROWS}
    with torch.inference_mode():
        cache = DynamicCache()
        model(torch.tensor([(ids * CONTEXT)[:CONTEXT]]), use_cache=True, **{word: cache})
        for _ in range(rounds):
            for rows in ROWS:
                feed = torch.tensor([(ids * rows)[:rows]])
                out[rows].append(
                    clock_ms(lambda f=feed: model(f, use_cache=True, **{word: cache}))  # type: ignore[misc]
                )
                cache.crop(-rows)
    return {rows: statistics.median(times) for rows, times in out.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", nargs="+", default=["bf16"], choices=sorted(DTYPES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, len(os.sched_getaffinity(0))])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path("results/bench/engine.json"))
    args = parser.parse_args()
    folder = fetch(TARGET)
    tokenizer = load_tokenizer(TARGET)
    assert tokenizer is not None
    ids = tokenizer.encode_chat(PROMPT)
    lines: list[dict[str, Any]] = []
    for precision in args.precision:
        for threads in sorted(set(args.threads)):
            lines += compare(folder, precision, threads, ids, args.rounds, args.tokens)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"cpu": cpu_name(), "torch": torch.__version__, "tokens": args.tokens, "lines": lines}
    args.out.write_text(json.dumps(record, indent=1))
    print(f"written to {args.out}")


def compare(
    folder: Path, precision: str, threads: int, ids: list[int], rounds: int, tokens: int
) -> list[dict[str, Any]]:
    """All comparisons at one precision and thread count."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    ours = load_engine(TARGET, EngineOptions(precision=precision, slots=1, max_context=512))
    plain = load_engine(TARGET, EngineOptions(precision=precision, slots=1, max_context=512, exact=False))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[precision]).eval()
    feed = torch.tensor([ids])

    def hf() -> None:
        with torch.inference_mode():
            model.generate(
                feed,
                attention_mask=torch.ones_like(feed),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )

    def mine(engine: Engine) -> None:
        generate_alone(engine, ids, Sampling(), tokens, ())

    for warm_up in (hf, lambda: mine(ours), lambda: mine(plain)):
        warm_up()
    rates: dict[str, list[float]] = {"ours": [], "inexact": [], "theirs": []}
    for _ in range(rounds):
        rates["ours"].append(1e3 * tokens / clock_ms(lambda: mine(ours)))
        rates["theirs"].append(1e3 * tokens / clock_ms(hf))
        rates["inexact"].append(1e3 * tokens / clock_ms(lambda: mine(plain)))
    where = f"{precision}, {threads} thread{'s' if threads > 1 else ''}"
    out = [
        line(f"AR tokens/s ({where})", rates["ours"], rates["theirs"], "transformers", "tokens/s"),
        line(f"exact path ({where})", rates["ours"], rates["inexact"], "inexact path", "tokens/s"),
    ]
    exact_ms, plain_ms = forward_times(ours, ids, 3 * rounds), forward_times(plain, ids, 3 * rounds)
    hf_ms = hf_forward_times(model, ids, 3 * rounds)
    for rows in ROWS:
        name = f"forward of {rows} rows ({where})"
        # a speed-up: their time over ours
        print(
            f"{name}: {hf_ms[rows] / exact_ms[rows]:.2f} x transformers "
            f"(ours {exact_ms[rows]:.1f} ms, theirs {hf_ms[rows]:.1f} ms; inexact {plain_ms[rows]:.1f} ms)"
        )
        out.append(
            {
                "name": name,
                "ratio": hf_ms[rows] / exact_ms[rows],
                "peer": "transformers",
                "ours": exact_ms[rows],
                "theirs": hf_ms[rows],
                "inexact": plain_ms[rows],
                "unit": "ms",
            }
        )
    return out


def line(name: str, ours: list[float], theirs: list[float], peer: str, unit: str) -> dict[str, Any]:
    """Print one comparison of rates and return it."""
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    mine, other = statistics.median(ours), statistics.median(theirs)
    print(f"{name}: {ratio:.2f} x {peer} (ours {mine:.1f} {unit}, theirs {other:.1f} {unit})")
    return {"name": name, "ratio": ratio, "peer": peer, "ours": mine, "theirs": other, "unit": unit}


if __name__ == "__main__":
    main()
