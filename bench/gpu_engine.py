"""The torch engine on a GPU: recorded blocks, the same calls one by one, the inexact path and transformers.

Proves on the GPU at hand that the engine is exact, then times a token, windows, eight sessions at once and a
prompt, interleaved, with random weights of the default target's shape, which time like its own.
Needs CUDA (`make bench-gpu`). Prints a table, into --out too.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsdlab.models.base import Chunk, ModelInfo
from dsdlab.models.selftest import selftest
from dsdlab.models.torch_engine import TorchEngine
from dsdlab.models.weights_io import LayerWeights, LlamaShape, LlamaWeights, Matrix

SHAPE = LlamaShape(
    hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, intermediate_size=1536,
    vocab_size=49_152, max_context=8192, rope_theta=100_000.0, rms_norm_eps=1e-5,
)  # fmt: skip
CONTEXT, SESSIONS, ROUNDS = 1024, 8, 20
ROWS = (1, 5, 8, 16)
DEPTHS = (128, 900)


def random_weights(shape: LlamaShape, seed: int = 1) -> LlamaWeights:
    """Weights of unit gain."""
    generator = torch.Generator().manual_seed(seed)
    d, f = shape.hidden_size, shape.intermediate_size
    width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim

    def matrix(rows: int, columns: int) -> Matrix:
        return Matrix(torch.randn(rows, columns, generator=generator) * columns**-0.5)

    def layer() -> LayerWeights:
        o = matrix(d, shape.num_heads * shape.head_dim)
        return LayerWeights(torch.ones(d), matrix(width, d), o, torch.ones(d), matrix(2 * f, d), matrix(d, f))

    embed = matrix(shape.vocab_size, d)
    layers = [layer() for _ in range(shape.num_layers)]
    return LlamaWeights(shape, embed, None, None, layers, torch.ones(d), embed, None)


def variants(precision: str) -> dict[str, TorchEngine]:
    """Exact as it is, exact without recording, and inexact, over the same weights."""
    weights = random_weights(SHAPE)
    info = ModelInfo("random", "", SHAPE.vocab_size, CONTEXT, (), precision, weights.n_params)
    engine = TorchEngine(weights, info, slots=SESSIONS, device="cuda")
    called = copy.copy(engine)
    called._blocks = None
    called._begin_slots(SESSIONS)
    return {"recorded": engine, "call by call": called, "inexact": engine.inexact_twin()}


def works(engine: TorchEngine, ids: list[int]) -> dict[str, Callable[[], None]]:
    """What is timed. Slot 0 is at the greater depth from its first window there on; the others stay."""
    slots = [engine.open() for _ in range(SESSIONS)]
    for slot in slots:
        engine.extend([Chunk(slot, ids[: DEPTHS[0]], 0)])

    def windows(sessions: list[int], rows: int) -> None:
        before = [engine.length(s) for s in sessions]
        engine.extend([Chunk(s, ids[:rows], rows) for s in sessions])
        for slot, length in zip(sessions, before, strict=True):
            engine.rollback(slot, length)

    def prompt() -> None:
        engine.rollback(slots[1], 0)
        engine.extend([Chunk(slots[1], ids[:512], 1)])
        engine.rollback(slots[1], DEPTHS[0])

    def deep() -> None:
        if engine.length(slots[0]) < DEPTHS[1]:
            engine.extend([Chunk(slots[0], ids[DEPTHS[0] : DEPTHS[1]], 0)])
        windows(slots[:1], 5)
        engine.rollback(slots[0], DEPTHS[1])

    out: dict[str, Callable[[], None]] = {
        f"{n} rows at {DEPTHS[0]}": lambda n=n: windows(slots[2:3], n)  # type: ignore[misc]
        for n in ROWS
    }
    out[f"5 rows at {DEPTHS[1]}"] = deep
    out[f"{SESSIONS} sessions of 5 rows, one at {DEPTHS[1]}"] = lambda: windows(slots, 5)
    out["a prompt of 512"] = prompt
    return out


def transformers_works(dtype: torch.dtype, ids: list[int]) -> dict[str, Callable[[], None]]:
    """The same windows in transformers, with its dynamic cache."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SHAPE.vocab_size, hidden_size=SHAPE.hidden_size, num_hidden_layers=SHAPE.num_layers,
        intermediate_size=SHAPE.intermediate_size, num_attention_heads=SHAPE.num_heads,
        num_key_value_heads=SHAPE.num_kv_heads, tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model = model.to("cuda", dtype).eval()
    cache = DynamicCache()
    model(torch.tensor([ids[: DEPTHS[0]]], device="cuda"), past_key_values=cache)

    def window(rows: int) -> None:
        logits = model(torch.tensor([ids[:rows]], device="cuda"), past_key_values=cache).logits
        logits[0].float().cpu()
        cache.crop(DEPTHS[0])

    def prompt() -> None:
        fresh = DynamicCache()
        inputs = torch.tensor([ids[:512]], device="cuda")
        model(inputs, past_key_values=fresh, logits_to_keep=1).logits[0].float().cpu()

    out: dict[str, Callable[[], None]] = {
        f"{n} rows at {DEPTHS[0]}": lambda n=n: window(n)  # type: ignore[misc]
        for n in ROWS
    }
    return out | {"a prompt of 512": prompt}


def timed(peers: dict[str, dict[str, Callable[[], None]]]) -> dict[str, dict[str, float]]:
    """Median milliseconds by peer and work; peers take turns."""
    found: dict[str, dict[str, list[float]]] = {}
    for turn in range(ROUNDS + 2):
        for name, mine in peers.items():
            for what, work in mine.items():
                torch.cuda.synchronize()
                begun_s = time.perf_counter()
                work()
                torch.cuda.synchronize()
                if turn > 1:
                    spent_ms = 1e3 * (time.perf_counter() - begun_s)
                    found.setdefault(name, {}).setdefault(what, []).append(spent_ms)
    return {n: {w: statistics.median(t) for w, t in mine.items()} for n, mine in found.items()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "torch sees no CUDA GPU, and this measures one\n")
    ids = torch.randint(0, SHAPE.vocab_size, (CONTEXT,), generator=torch.Generator().manual_seed(2)).tolist()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "ms": {},
        "selftest": {},
    }
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        begun_s = time.perf_counter()
        engines = variants(precision)
        print(f"{precision}: loaded and recorded in {time.perf_counter() - begun_s:.1f} s", flush=True)
        for name in ("recorded", "call by call"):
            test = selftest(engines[name])
            result["selftest"][f"{precision} {name}"] = [test.differing, test.elements]
            print(f"{precision} {name}: {test.differing:,} of {test.elements:,} logits differ", flush=True)
        rows = [e.extend([Chunk(e.open(), ids[:64], 64)])[0] for e in engines.values()]
        apart = [float(abs(r - rows[0]).max()) for r in rows]
        print(f"{precision}: largest difference from recorded {apart}, of {float(abs(rows[0]).max()):.1f}")
        for e in engines.values():
            e._begin_slots(SESSIONS)
        peers = {name: works(e, ids) for name, e in engines.items()}
        result["ms"][precision] = timed(peers | {"transformers": transformers_works(dtype, ids)})
        print(f"\n{precision}, ms:")
        for what in peers["recorded"]:
            each = {n: f"{t[what]:.2f}" for n, t in result["ms"][precision].items() if what in t}
            print(f"  {what}: {each}", flush=True)
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
