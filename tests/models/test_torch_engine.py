"""The torch engine: the right logits, the same bits whatever is computed together, sessions kept apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import CONTEXT, VOCAB, engine_of, tiny_drafter, tiny_target, write_tiny_llama

from dsdlab.models.base import Chunk, ContextFull, Engine, ModelError, NoFreeSlot
from dsdlab.models.torch_engine import KV_BLOCK, PREFILL_ROWS, TorchEngine
from dsdlab.models.weights_io import load_llama_dir
from dsdlab.nodes.step import PROMPT_PIECE

KINDS = ("fp32", "bf16", "int8", "int4", "drafter")
RNG = np.random.default_rng(0)
TEXT = RNG.integers(0, VOCAB, CONTEXT).tolist()
OTHER = RNG.integers(0, VOCAB, CONTEXT).tolist()


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TorchEngine]:
    """A new engine by kind: a precision of the tiny target, or the tiny int8 drafter."""
    folder = tmp_path_factory.mktemp("tiny")

    def build(kind: str, **options: object) -> TorchEngine:
        if kind == "drafter":
            return tiny_drafter(folder / "drafter.safetensors", **options)
        return tiny_target(folder / "target", kind, **options)

    return build


Make = Callable[..., TorchEngine]


def alone(engine: Engine, ids: list[int], upto: int) -> np.ndarray:
    """Logits [upto, n_out] of every position, each computed by itself."""
    slot = engine.open()
    rows = [engine.extend([Chunk(slot, [i], 1)])[0] for i in ids[:upto]]
    engine.close(slot)
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def reference(make: Make) -> Callable[[str], np.ndarray]:
    """Logits of TEXT's first 640 positions by kind, each alone, on an engine of its own."""
    known: dict[str, np.ndarray] = {}

    def get(kind: str) -> np.ndarray:
        if kind not in known:
            known[kind] = alone(make(kind), TEXT, 640)
        return known[kind]

    return get


Reference = Callable[[str], np.ndarray]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(
        np.ascontiguousarray(a).view(np.uint32), np.ascontiguousarray(b).view(np.uint32)
    )


# agreement ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_logits_agree_with_transformers(tmp_path: Path, tied: bool) -> None:
    """An independent oracle: LlamaForCausalLM on the same files, fp32."""
    from transformers import LlamaForCausalLM

    folder = write_tiny_llama(tmp_path, seed=5, tie_word_embeddings=tied)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([TEXT[:300]])).logits[0].numpy()
    assert expected.std() > 0.5  # logits of a size at which an error would show
    engine = engine_of(load_llama_dir(folder, ""))
    slot = engine.open()
    got = np.concatenate(
        [
            engine.extend([Chunk(slot, TEXT[:270], 270)])[0],
            *(engine.extend([Chunk(slot, [i], 1)])[0] for i in TEXT[270:290]),
            engine.extend([Chunk(slot, TEXT[290:300], 10)])[0],
        ]
    )
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)
    assert (got.argmax(1) == expected.argmax(1)).all()


@pytest.mark.parametrize(("precision", "error"), [("bf16", 0.12), ("int8", 0.25), ("int4", 0.6)])
def test_lower_precisions_stay_near_fp32(make: Make, precision: str, error: float) -> None:
    exact, rough = (alone(make(p), TEXT, 60) for p in ("fp32", precision))
    assert np.sqrt(((exact - rough) ** 2).mean()) < error * exact.std()
    assert not np.array_equal(exact, rough)


def test_drafter_file_means_what_its_dequantised_weights_mean(tmp_path: Path) -> None:
    """The int8 drafter against a plain forward in float64 over the file's own tensors."""
    engine = tiny_drafter(tmp_path / "drafter.safetensors")
    assert engine.output_ids is not None
    assert len(engine.output_ids) == 96
    got = alone(engine, TEXT, 24)
    expected = plain_drafter_logits(tmp_path / "drafter.safetensors", TEXT[:24])
    assert np.sqrt(((got - expected) ** 2).mean()) < 0.05 * expected.std()


def plain_drafter_logits(path: Path, ids: list[int]) -> np.ndarray:
    """A textbook Llama forward, no cache, written against the drafter/1 format."""
    from safetensors.torch import load_file

    t = load_file(path)

    def matrix(name: str) -> torch.Tensor:
        return t[f"{name}.weight"].double() * t[f"{name}.scale"].double()[:, None]

    def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * w.double()

    heads, kv_heads, hd = 3, 1, 16
    n = len(ids)
    x = matrix("embed")[t["embed.map"].long()[torch.tensor(ids)]] @ matrix("embed.proj").T
    angle = torch.arange(n, dtype=torch.float64)[:, None] / 10000.0 ** (
        torch.arange(hd // 2, dtype=torch.float64) * 2 / hd
    )
    cos, sin = torch.cat([angle.cos()] * 2, 1), torch.cat([angle.sin()] * 2, 1)

    def rotate(v: torch.Tensor) -> torch.Tensor:
        a, b = v.chunk(2, -1)
        return v * cos + torch.cat([-b, a], -1) * sin

    mask = torch.full((n, n), float("-inf"), dtype=torch.float64).triu(1)
    for i in range(2):
        h = norm(x, t[f"layers.{i}.attn_norm.weight"])
        qkv = (h @ matrix(f"layers.{i}.attn.qkv").T).view(n, heads + 2 * kv_heads, hd).transpose(0, 1)
        q, k, v = qkv[:heads], qkv[heads : heads + kv_heads], qkv[heads + kv_heads :]
        q, k = rotate(q), rotate(k).repeat_interleave(heads // kv_heads, 0)
        v = v.repeat_interleave(heads // kv_heads, 0)
        o = torch.softmax(q @ k.transpose(1, 2) / hd**0.5 + mask, -1) @ v
        x = x + o.transpose(0, 1).reshape(n, heads * hd) @ matrix(f"layers.{i}.attn.o").T
        gate, up = (norm(x, t[f"layers.{i}.mlp_norm.weight"]) @ matrix(f"layers.{i}.mlp.gate_up").T).chunk(
            2, -1
        )
        x = x + (torch.nn.functional.silu(gate) * up) @ matrix(f"layers.{i}.mlp.down").T
    return (norm(x, t["norm.weight"]) @ matrix("head").T).numpy()


# the same bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_window_at_every_offset(make: Make, reference: Reference, kind: str) -> None:
    """Sizes 1 … 17 at every offset around the padded cache's first boundary, after rollback each time."""
    engine = make(kind)
    end = KV_BLOCK + 24
    expected = reference(kind)
    slot = engine.open()
    engine.extend([Chunk(slot, TEXT[: KV_BLOCK - 20], 0)])
    for start in range(KV_BLOCK - 20, end - 1):
        for size in range(1, min(17, end - start) + 1):
            got = engine.extend([Chunk(slot, TEXT[start : start + size], size)])[0]
            assert same_bits(got, expected[start : start + size]), (start, size)
            engine.rollback(slot, start)
        engine.extend([Chunk(slot, [TEXT[start]], 0)])


@pytest.mark.parametrize("kind", KINDS)
def test_every_thread_count(make: Make, kind: str, threads: int) -> None:
    """Windows of every size with one and two threads (a product split over threads may round otherwise)."""
    engine = make(kind)
    expected = alone(engine, TEXT, 34)
    slot = engine.open()
    for size in range(1, 18):
        engine.rollback(slot, 0)
        for start in (0, size):
            got = engine.extend([Chunk(slot, TEXT[start : start + size], size)])[0]
            assert same_bits(got, expected[start : start + size]), (threads, start, size)


@pytest.mark.parametrize("kind", KINDS)
def test_long_prefill_and_long_context(make: Make, reference: Reference, kind: str) -> None:
    """A prefill that passes PREFILL_ROWS, random pieces, and one token at a time, beyond 512 positions."""
    engine = make(kind)
    n = 640
    assert n > 2 * PREFILL_ROWS
    expected = reference(kind)
    slot = engine.open()
    assert same_bits(engine.extend([Chunk(slot, TEXT[:n], n)])[0], expected)
    for seed in range(2):
        rng = np.random.default_rng(seed)
        engine.rollback(slot, 0)
        start = 0
        while start < n:
            end = min(n, start + int(rng.integers(1, rng.choice([4, 18, 300]))))
            rows = int(rng.integers(0, end - start + 1))
            got = engine.extend([Chunk(slot, TEXT[start:end], rows)])[0]
            assert same_bits(got, expected[end - rows : end]), (seed, start, end)
            start = end


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_in_pieces(make: Make, reference: Reference, kind: str) -> None:
    """Pieces of any size, another session's windows between them, and then windows of every size behind."""
    engine = make(kind)
    expected = reference(kind)
    n = 300
    for piece in (7, 64, PROMPT_PIECE, n):
        slot, other = engine.open(), engine.open()
        at = 0
        for start in range(0, n, piece):
            engine.extend([Chunk(slot, TEXT[start : min(start + piece, n)], 0)])
            got = engine.extend([Chunk(other, TEXT[at : at + 5], 5)])[0]
            assert same_bits(got, expected[at : at + 5]), (piece, at)
            at += 5
        for size in range(1, 18):
            got = engine.extend([Chunk(slot, TEXT[n : n + size], size)])[0]
            assert same_bits(got, expected[n : n + size]), (piece, size)
            engine.rollback(slot, n)
        engine.close(slot)
        engine.close(other)


@pytest.mark.parametrize("kind", KINDS)
def test_windows_across_every_step_of_the_cache(make: Make, reference: Reference, kind: str) -> None:
    """A kernel sums a longer cache in other steps: a window must not lend its length to its first rows."""
    engine = make(kind)
    expected = reference(kind)
    slot = engine.open()
    for boundary in range(KV_BLOCK, len(expected), KV_BLOCK):
        start, end = boundary - 3, boundary + 9
        engine.extend([Chunk(slot, TEXT[engine.length(slot) : start], 0)])
        got = engine.extend([Chunk(slot, TEXT[start:end], end - start)])[0]
        assert same_bits(got, expected[start:end]), boundary
        engine.rollback(slot, start)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_in_any_order(make: Make, reference: Reference, kind: str) -> None:
    """Up to eight sessions of two texts in one ragged forward, of unequal lengths, in any order."""
    engine = make(kind, slots=8)
    n = 110
    texts = [TEXT, OTHER] * 4
    expected = [reference(kind), alone(engine, OTHER, n)] * 4
    slots = [engine.open() for _ in texts]
    at = [0] * 8
    rng = np.random.default_rng(3)
    while min(at) < n:
        turn = [i for i in rng.permutation(8) if at[i] < n and rng.random() < 0.7]
        sizes = {i: min(n - at[i], int(rng.integers(0, rng.choice([3, 18, 60])))) for i in turn}
        chunks = [Chunk(slots[i], texts[i][at[i] : at[i] + sizes[i]], sizes[i]) for i in turn]
        for i, got in zip(turn, engine.extend(chunks), strict=True):
            assert same_bits(got, expected[i][at[i] : at[i] + sizes[i]]), (i, at[i], sizes)
            at[i] += sizes[i]
            if rng.random() < 0.3:
                at[i] = int(rng.integers(0, at[i] + 1))
                engine.rollback(slots[i], at[i])


@pytest.mark.parametrize("kind", KINDS)
def test_rollback_forgets_a_wrong_continuation(make: Make, reference: Reference, kind: str) -> None:
    engine = make(kind)
    expected = reference(kind)
    slot = engine.open()
    start = 0
    while start < 90:
        draft = [*TEXT[start : start + 3], *OTHER[start : start + 9]]  # three right, nine wrong
        got = engine.extend([Chunk(slot, draft, len(draft))])[0]
        assert same_bits(got[:3], expected[start : start + 3])
        start += 3
        engine.rollback(slot, start)
        assert engine.length(slot) == start


@pytest.mark.parametrize("kind", KINDS)
def test_a_reused_slot_remembers_nothing(make: Make, kind: str) -> None:
    engine = make(kind, slots=1)
    expected = alone(engine, TEXT, 40)
    slot = engine.open()
    engine.extend([Chunk(slot, OTHER[:600], 1)])
    engine.close(slot)
    slot = engine.open()
    assert engine.length(slot) == 0
    assert same_bits(engine.extend([Chunk(slot, TEXT[:40], 40)])[0], expected)


def test_rows_are_the_last_ones(make: Make) -> None:
    engine = make("fp32")
    slot = engine.open()
    full = engine.extend([Chunk(slot, TEXT[:30], 30)])[0]
    for rows in (0, 1, 7, 29):
        engine.rollback(slot, 0)
        got = engine.extend([Chunk(slot, TEXT[:30], rows)])[0]
        assert got.shape == (rows, VOCAB)
        assert got.dtype == np.float32
        assert same_bits(got, full[30 - rows :])


# sessions ----------------------------------------------------------------------------------------


def test_context_full_leaves_every_session_as_it_was(make: Make) -> None:
    engine = make("bf16", max_context=64)
    a, b = engine.open(), engine.open()
    engine.extend([Chunk(a, TEXT[:60], 0), Chunk(b, TEXT[:10], 0)])
    with pytest.raises(ContextFull, match=r"65 positions; tiny is loaded for 64"):
        engine.extend([Chunk(b, TEXT[10:20], 1), Chunk(a, TEXT[60:65], 1)])
    assert (engine.length(a), engine.length(b)) == (60, 10)
    got = engine.extend([Chunk(a, TEXT[60:64], 4)])[0]  # exactly full is fine
    assert same_bits(got, alone(engine, TEXT, 64)[60:])
    assert same_bits(engine.extend([Chunk(b, TEXT[10:12], 2)])[0], alone(engine, TEXT, 12)[10:])


def test_no_free_slot_and_close_twice(make: Make) -> None:
    engine = make("bf16", slots=2)
    a, b = engine.open(), engine.open()
    assert a != b
    with pytest.raises(NoFreeSlot, match="all 2 session slots of tiny are taken"):
        engine.open()
    engine.close(a)
    engine.close(a)
    assert engine.open() == a
    with pytest.raises(NoFreeSlot):
        engine.open()


@pytest.mark.parametrize("length", [-1, 6])
def test_rollback_out_of_range(make: Make, length: int) -> None:
    engine = make("bf16")
    slot = engine.open()
    engine.extend([Chunk(slot, TEXT[:5], 0)])
    with pytest.raises(ValueError, match=f"rollback to {length}; allowed: 0 to the session's 5"):
        engine.rollback(slot, length)
    assert engine.length(slot) == 5


def test_no_chunks_and_empty_chunks(make: Make) -> None:
    engine = make("bf16")
    slot = engine.open()
    assert engine.extend([]) == []
    assert engine.extend([Chunk(slot, [], 0)])[0].shape == (0, VOCAB)
    assert engine.length(slot) == 0


def test_unknown_precision(tmp_path: Path) -> None:
    weights = load_llama_dir(write_tiny_llama(tmp_path), "")
    with pytest.raises(ModelError, match="precision is 'fp8'; allowed: bf16, fp32, int4, int8"):
        engine_of(weights, "fp8")


def test_int8_weights_may_lie_anywhere() -> None:
    """The int8 kernel crashes on weights off a 16-byte boundary, where a file's tensors may well lie."""
    from dsdlab.models.linears import linear
    from dsdlab.models.weights_io import Matrix

    for offset in (1, 2, 8):
        raw = torch.zeros(80 * 48 + 128, dtype=torch.int8)
        start = -raw.data_ptr() % 64 + offset
        weight = raw[start : start + 80 * 48].view(80, 48)
        weight.copy_(torch.randint(-127, 127, (80, 48)))
        product = linear(Matrix(weight, torch.ones(80, dtype=torch.bfloat16)), "int8", torch.device("cpu"))
        x = torch.randint(-3, 3, (9, 48)).to(torch.bfloat16)
        expected = (x.float() @ weight.float().T).to(torch.bfloat16)
        assert torch.equal(product(x), expected)
