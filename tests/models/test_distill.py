"""Distillation: generation, training, export and judging against slower, plainer computations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from dsdlab.models.base import Chunk, ModelInfo
from dsdlab.models.distill import kernels
from dsdlab.models.distill.config import GenerateConfig, ShapeConfig, load_config
from dsdlab.models.distill.evaluate import Judged, by_position, by_position_95, judge, lookup, tau, windows
from dsdlab.models.distill.main import run
from dsdlab.models.distill.prompts import Prompt, read_jsonl, split_of
from dsdlab.models.distill.store import Example, generate_shards
from dsdlab.models.distill.student import Student, build, export, load_exported, map_inputs, rank_rows, trim
from dsdlab.models.distill.teacher import Teacher
from dsdlab.models.distill.train import HeadLoss, collate, pack_all
from dsdlab.models.torch_engine import TorchEngine
from dsdlab.models.weights_io import LayerWeights, LlamaShape, LlamaWeights, Matrix, load_drafter_file
from dsdlab.models.zoo import DRAFTERS

VOCAB = 320
SHAPE = LlamaShape(
    hidden_size=96,
    num_layers=3,
    num_heads=3,
    num_kv_heads=1,
    head_dim=64,
    intermediate_size=160,
    vocab_size=VOCAB,
    max_context=512,
    rope_theta=1e4,
    rms_norm_eps=1e-5,
)


def random_weights(seed: int = 0) -> LlamaWeights:
    """A small random target whose next token depends strongly on what it read."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Matrix:
        return Matrix(torch.randn(rows, columns, generator=generator) * gain * columns**-0.5)

    d, f, width = SHAPE.hidden_size, SHAPE.intermediate_size, SHAPE.head_dim
    layers = [
        LayerWeights(
            attn_norm=1 + 0.1 * torch.randn(d, generator=generator),
            qkv=matrix(5 * width, d, 1.5),
            o=matrix(d, 3 * width),
            mlp_norm=1 + 0.1 * torch.randn(d, generator=generator),
            gate_up=matrix(2 * f, d),
            down=matrix(d, f),
        )
        for _ in range(SHAPE.num_layers)
    ]
    embed = Matrix(torch.randn(VOCAB, d, generator=generator))
    norm = 1 + 0.1 * torch.randn(d, generator=generator)
    return LlamaWeights(SHAPE, embed, None, None, layers, norm, embed, None)


@pytest.fixture(scope="module")
def weights() -> LlamaWeights:
    return random_weights()


@pytest.fixture(scope="module")
def teacher(weights: LlamaWeights) -> Teacher:
    return Teacher(weights, dtype=torch.float32)


def full_hidden(teacher: Teacher, ids: list[int]) -> torch.Tensor:
    """Hidden states [n, d] of one text, forwarded at once."""
    return teacher.prefill(torch.tensor([ids]), None, torch.tensor([0]))[0]


def test_generation_equals_forwarding_the_whole_text_again(teacher: Teacher) -> None:
    prompts = [[1, 2, 3, 4, 5], [7, 8], [1, 2, 3, 4, 5], [9] * 11, [7, 8]]  # twins, ragged lengths
    starts = [0, 1, 0, 10, 1]
    plain = teacher.generate(
        prompts, starts=starts, temperatures=[0.0] * 5, max_new=12, stop_ids=[],
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    ended = {g.ids[g.prompt_len + 3] for g in plain[:2]}  # stop ids that bite at different times
    stopped = teacher.generate(
        prompts, starts=starts, temperatures=[0.0] * 5, max_new=12, stop_ids=sorted(ended),
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    assert len({len(g.ids) for g in stopped}) > 1
    for free, cut in zip(plain, stopped, strict=True):
        text: list[int] = free.ids[: free.prompt_len]
        while len(text) < len(free.ids):
            text.append(int(teacher.logits(full_hidden(teacher, text)[-1]).argmax()))
        assert free.ids == text
        assert cut.ids == text[: len(cut.ids)]
        answer = cut.ids[cut.prompt_len :]
        assert not ended & set(answer[:-1])
        assert len(answer) == 12 or answer[-1] in ended
        want = full_hidden(teacher, cut.ids[:-1])[cut.start :]
        torch.testing.assert_close(cut.hidden, want, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(cut.lse, teacher.logits(want).logsumexp(-1), rtol=1e-3, atol=1e-3)
    assert plain[0].start == 0
    assert plain[2].start == 4  # a twin keeps no states of the prompt that it shares


def test_sampled_generation_follows_the_distribution(teacher: Teacher) -> None:
    prompt, n, temperature = [5, 6, 7], 4000, 8.0
    got = teacher.generate(
        [prompt] * n, starts=[2] * n, temperatures=[temperature] * n, max_new=1, stop_ids=[],
        generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    p = (teacher.logits(full_hidden(teacher, prompt)[-1]) / temperature).softmax(-1)
    counts = torch.bincount(torch.tensor([g.ids[-1] for g in got]), minlength=VOCAB)
    seen = p * n >= 5
    chi2 = float(((counts - p * n) ** 2 / (p * n))[seen].sum())
    freedom = int(seen.sum())
    assert freedom > 10
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.skipif(kernels._library() is None, reason="no C compiler here")
def test_compiled_kernels_agree_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    q = torch.randn(5, 6, 64)
    k, v = (torch.randn(5, 2, 40, 64).to(torch.bfloat16) for _ in range(2))
    lens = torch.tensor([1, 7, 40, 13, 2], dtype=torch.int32)
    logits = (torch.randn(6, 1000) * 3).to(torch.bfloat16)
    warm, u = torch.tensor([0.0, 0.7, 1.0, 0.0, 2.0, 0.7]), torch.tensor([0.5, 0.0, 0.3, 0.9, 0.999, 0.6])
    compiled = kernels.attend(q, k, v, lens, 40), kernels.pick(logits, warm, u)
    monkeypatch.setattr(kernels, "_library", lambda: None)
    torch.testing.assert_close(
        compiled[0], kernels.attend(q, k.float(), v.float(), lens, 40), rtol=1e-4, atol=1e-4
    )
    tokens, lse = kernels.pick(logits, warm, u)
    assert compiled[1][0].tolist() == tokens.tolist()
    torch.testing.assert_close(compiled[1][1], lse, rtol=1e-5, atol=1e-4)


def tiny_student(rows: int = 64, tied: bool = True) -> Student:
    torch.manual_seed(4)
    shape = ShapeConfig(
        init="random",
        hidden_size=96,
        intermediate_size=64,
        layers=[0, 1],
        num_heads=3,
        num_kv_heads=1,
        rows=rows,
    )
    head_ids = torch.randperm(VOCAB)[:rows].to(torch.int32)
    mapped = map_inputs(torch.randn(VOCAB, 8), head_ids)
    return Student(shape, head_ids, mapped, theta=1e4, eps=1e-5, tied=tied)


def examples(count: int = 7, d: int = 96) -> list[Example]:
    """Two prompts with several answers each; some judged from the prompt's start on."""
    generator = torch.Generator().manual_seed(5)
    out = []
    for i in range(count):
        prompt = [3, 1, 4, 1, 5] if i < 4 else [2, 7, 1]
        answer = torch.randint(0, VOCAB, (3 + i,), generator=generator).tolist()
        start = 0 if i in (0, 4) else len(prompt) - 1
        rows = len(prompt) + len(answer) - 1 - start
        ids = torch.tensor(prompt + answer, dtype=torch.int32)
        hidden = torch.randn(rows, d, generator=generator)
        out.append(Example("t", ids, len(prompt), start, 0.0, hidden, torch.zeros(rows)))
    return out


def test_packed_continuations_do_not_see_each_other() -> None:
    student, every = tiny_student(), examples()
    packs = pack_all(every, most=3, prompt_weight=0.25)
    assert [len(p.ids) for p in packs] == [5 + 2 + 3 + 4, 5 + 5, 3 + 6 + 7 + 8]
    batch = collate(packs)
    assert batch.mask is not None
    got = student.body(batch.ids, batch.positions, batch.mask.float()).flatten(0, 1)[batch.index]
    want = torch.cat([student.body(e.ids[None, :-1].long())[0, e.start :] for e in every])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(batch.hidden, torch.cat([e.hidden for e in every]))
    assert (batch.weight == 0.25).sum() == 4 + 2  # prompt positions before the last one
    alone = collate(pack_all(every, most=1, prompt_weight=0.25))
    assert alone.mask is None
    assert torch.equal(alone.weight, batch.weight)
    assert torch.equal(alone.lse, batch.lse)
    got = student.body(alone.ids).flatten(0, 1)[alone.index]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("overlap", [0.0, 0.7])
def test_head_loss_and_gradient(overlap: float) -> None:
    torch.manual_seed(6)
    hidden, table = torch.randn(50, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    states, head, weight = torch.randn(50, 24), torch.randn(40, 24) * 0.3, torch.rand(50)
    lse = torch.cat([states @ head.t(), torch.randn(50, 3)], 1).logsumexp(-1)
    loss, _ = HeadLoss.apply(hidden, table, states, head, lse, weight, overlap, 7)
    got = torch.autograd.grad(loss / 3, [hidden, table])
    log_p, log_q = states @ head.t() - lse[:, None], (hidden @ table.t()).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    shared = torch.minimum(log_p.exp(), log_q.exp()).sum(-1)
    plain = ((kl + overlap * (1 - shared)) * weight).sum()
    torch.testing.assert_close(loss, plain)
    for mine, theirs in zip(got, torch.autograd.grad(plain / 3, [hidden, table]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_all_layers_copied_is_the_target(teacher: Teacher) -> None:
    head_ids = torch.arange(VOCAB, dtype=torch.int32).flip(0)
    shape = ShapeConfig(
        hidden_size=96, intermediate_size=160, layers=[0, 1, 2], num_heads=3, num_kv_heads=1, rows=VOCAB
    )
    text = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(7))
    student = build(shape, teacher, head_ids, map_inputs(teacher.embed, head_ids), text, 1)
    got = student.rows(student.body(text))
    want = torch.stack([teacher.logits(full_hidden(teacher, row.tolist())) for row in text]).flip(-1)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    fewer = trim(student, 100, torch.arange(VOCAB).float(), teacher.embed)
    assert fewer.head_ids.tolist() == list(range(VOCAB - 1, VOCAB - 101, -1))
    assert torch.equal(fewer.embed, student.embed[:100])


def test_slicing_keeps_most_of_a_target_that_lives_in_few_directions(weights: LlamaWeights) -> None:
    """Where the residual stream spans 48 of 96 directions, a 48-wide slice computes the same logits."""
    basis = torch.linalg.qr(torch.randn(96, 48, generator=torch.Generator().manual_seed(8)))[0]
    project = basis @ basis.t()
    flat = torch.ones(96)
    layers = [
        LayerWeights(
            flat, w.qkv, Matrix(project @ w.o.weight), flat, w.gate_up, Matrix(project @ w.down.weight)
        )
        for w in weights.layers
    ]
    embed = Matrix(weights.embed.weight @ project)
    narrow = Teacher(LlamaWeights(SHAPE, embed, None, None, layers, flat, embed, None), dtype=torch.float32)
    head_ids = torch.arange(VOCAB, dtype=torch.int32)
    shape = ShapeConfig(
        init="slice",
        hidden_size=48,
        intermediate_size=160,
        layers=[0, 1, 2],
        num_heads=3,
        num_kv_heads=1,
        rows=VOCAB,
    )
    text = torch.randint(0, VOCAB, (4, 30), generator=torch.Generator().manual_seed(9))
    student = build(shape, narrow, head_ids, head_ids.clone(), text, 1)
    got = student.rows(student.body(text))
    want = torch.stack([narrow.logits(full_hidden(narrow, row.tolist())) for row in text])
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_shapes_that_cannot_start_from_the_target(teacher: Teacher) -> None:
    ids = torch.arange(64, dtype=torch.int32)
    text = torch.zeros(1, 4, dtype=torch.long)
    base = {"num_heads": 3, "num_kv_heads": 1, "rows": 64}
    for shape, message in [
        (ShapeConfig(hidden_size=64, layers=[0], **base), "needs hidden_size = 96"),
        (ShapeConfig(hidden_size=96, layers=[7], **base), "the target has 3"),
        (ShapeConfig(hidden_size=96, layers=[0], num_heads=2, num_kv_heads=1, rows=64), "attention heads"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(shape, teacher, ids, map_inputs(teacher.embed, ids), text, 1)


@pytest.mark.parametrize("tied", [True, False])
def test_export_runs_in_the_engine_as_it_was_judged(tmp_path: Path, tied: bool) -> None:
    student = tiny_student(rows=80, tied=tied)
    path = tmp_path / "d.safetensors"
    size = export(student, path, vocab=VOCAB, base="b", tokenizer="f00", recipe={"shape": "s"})
    assert size == path.stat().st_size
    back, config = load_exported(path)
    assert (config["tokenizer"], config["vocab_size"], back.tied) == ("f00", VOCAB, tied)
    worst = max(
        float((a - b).detach().abs().max())
        for a, b in zip(student.parameters(), back.parameters(), strict=True)
    )
    assert 0 < worst < 0.02  # int8 rows
    weights = load_drafter_file(path)
    info = ModelInfo("d", "f00", VOCAB, 64, (), "fp32", 1)
    engine = TorchEngine(weights, info, slots=1, device="cpu")
    ids = torch.randint(0, VOCAB, (1, 30), generator=torch.Generator().manual_seed(10))
    slot = engine.open()
    got = torch.from_numpy(engine.extend([Chunk(slot, ids[0].tolist(), 30)])[0])
    assert torch.equal(torch.from_numpy(engine.output_ids), back.head_ids.long())
    want = back.rows(back.body(ids))[0].detach()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_rows_and_their_map() -> None:
    counts = torch.tensor([0.0, 5.0, 0.0, 9.0, 0.0, 5.0])
    assert rank_rows(counts, 4, [0]).tolist() == [0, 3, 1, 5]  # ties: the lower id first
    embed = torch.tensor([[1.0, 0], [0, 1], [0.9, 0.1], [-1, 0], [0.1, 2], [-1, 0.2]])
    assert map_inputs(embed, torch.tensor([3, 0, 1])).tolist() == [1, 2, 1, 0, 2, 0]


def test_lookup_against_brute_force() -> None:
    ids = torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(11)).tolist()

    def slow(end: int) -> tuple[int, int]:
        for n in (3, 2):
            for at in range(end - 1, n - 1, -1):
                if end >= n and ids[at - n : at] == ids[end - n : end]:
                    return int(ids[at]), n
        return -1, 0

    assert lookup(ids, 3, 2) == [slow(end) for end in range(1, len(ids) + 1)]


def test_windows_replay() -> None:
    hits = [True, True, False, True, False, True, True, True, True, True]
    assert windows(hits, 3) == [(3, 2), (3, 1), (3, 3), (1, 1)]
    assert windows([], 4) == []
    one = Judged("t", 0.0, hits, hits, [False] * 10, 0.0, 0.0)
    assert tau([one], 3) == (3 + 2 + 4) / 3
    assert by_position([one], 3) == [1.0, 2 / 3, 0.5]
    assert by_position_95([one], 3) == [(x, x) for x in by_position([one], 3)]  # one answer: nothing to vary
    other = Judged("t", 0.0, [False] * 9, [False] * 9, [False] * 9, 0.0, 0.0)
    low, high = by_position_95([one, other], 3)[0]
    assert low == 0.0
    assert high == 1.0


def test_judge_of_the_target_itself_and_of_a_stranger(teacher: Teacher) -> None:
    """The target as its own drafter is always right and shares its whole distribution."""
    head_ids = torch.arange(VOCAB, dtype=torch.int32)
    shape = ShapeConfig(
        hidden_size=96, intermediate_size=160, layers=[0, 1, 2], num_heads=3, num_kv_heads=1, rows=VOCAB
    )
    text = torch.randint(0, VOCAB, (1, 20), generator=torch.Generator().manual_seed(12))
    itself = build(shape, teacher, head_ids, head_ids.clone(), text, 1)
    made = teacher.generate(
        [[1, 2, 3], [4, 5]] * 2, starts=[2, 1] * 2, temperatures=[0.0, 0.0, 0.8, 0.8], max_new=40,
        stop_ids=[], generator=torch.Generator().manual_seed(13),
    )  # fmt: skip
    held = [
        Example(
            "t", torch.tensor(g.ids, dtype=torch.int32), g.prompt_len, g.start, g.temperature, g.hidden, g.lse
        )
        for g in (made[0], made[1], *made[2:])
    ]
    held = [
        Example(e.task, e.ids, e.prompt_len, e.start, e.temperature, e.hidden.bfloat16(), e.lse) for e in held
    ]
    good = judge(itself, teacher.head, held, noise_seeds=2)
    share = [sum(r.neural) / len(r.neural) for r in good]
    assert min(share) > 0.9  # bfloat16 near-ties only
    assert all(r.overlap > 0.95 and r.coupled > 0.9 for r in good if r.temperature > 0)
    bad = judge(tiny_student(), teacher.head, held, noise_seeds=2)
    assert all(r.overlap < 0.5 and r.coupled <= r.overlap + 0.2 for r in bad if r.temperature > 0)
    assert sum(sum(r.neural) for r in bad) < 20


def write_target(folder: Path, weights: LlamaWeights) -> None:
    """The small target as a model folder, with a byte-level tokenizer."""
    s = weights.shape
    tensors = {"model.embed_tokens.weight": weights.embed.weight, "model.norm.weight": weights.norm}
    for i, w in enumerate(weights.layers):
        q, k, v = w.qkv.weight.split([s.num_heads * s.head_dim, s.head_dim, s.head_dim])
        gate, up = w.gate_up.weight.chunk(2)
        parts = {
            "input_layernorm": w.attn_norm, "post_attention_layernorm": w.mlp_norm, "self_attn.q_proj": q,
            "self_attn.k_proj": k, "self_attn.v_proj": v, "self_attn.o_proj": w.o.weight,
            "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": w.down.weight,
        }  # fmt: skip
        tensors |= {f"model.layers.{i}.{name}.weight": t.contiguous() for name, t in parts.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": s.hidden_size,
        "num_hidden_layers": s.num_layers,
        "num_attention_heads": s.num_heads,
        "num_key_value_heads": s.num_kv_heads,
        "head_dim": s.head_dim,
        "intermediate_size": s.intermediate_size,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "rope_theta": s.rope_theta,
        "rms_norm_eps": s.rms_norm_eps,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["what is the time and the place of the answer"] * 9, trainer)
    backend.save(str(folder / "tokenizer.json"))


CONFIG = """
target = "{target}"
[prompts]
self_written = {{ chat = 4 }}
[generate]
max_new_tokens = 8
batch = 16
token_budget = 400
continuations = {{ default = 2 }}
[[shapes]]
name = "whole"
hidden_size = 96
intermediate_size = 160
layers = [0, 1, 2]
num_heads = 3
num_kv_heads = 1
rows = 300
export_rows = 200
[[shapes]]
name = "small"
init = "random"
hidden_size = 32
intermediate_size = 32
layers = [0]
num_heads = 1
num_kv_heads = 1
head_dim = 32
rows = 200
[train]
positions = 300
batch_positions = 100
lr = 1e-4
[evaluate]
max_new_tokens = 16
prompts_per_task = 4
t_verify_ms = 40.0
"""


def test_distil_end_to_end_and_resume(tmp_path: Path, weights: LlamaWeights) -> None:
    write_target(tmp_path / "target", weights)
    more = tmp_path / "extra_train.jsonl"
    more.write_text("".join(json.dumps({"prompt": f"say the number {i}"}) + "\n" for i in range(30)))
    config = tmp_path / "c.toml"
    config.write_text(CONFIG.format(target=tmp_path / "target"))
    said: list[str] = []
    result = run(config, tmp_path / "out", prompt_files=[str(more)], say=said.append)
    assert {c["shape"] for c in result["candidates"]} == {"whole", "small"}
    assert result["chosen"] == "whole"  # it starts as the target itself; nothing else can be right here
    assert set(result["test"]["tasks"]) == {"chat", "extra"}
    assert result["test"]["alpha"] > 0.2
    assert load_drafter_file(Path(result["file"])).shape.num_layers == 3
    assert "| mean |" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(ValueError, match="is not empty"):
        run(config, tmp_path / "out", say=said.append)
    with pytest.raises(ValueError, match="its text is not finished; first: the same command"):
        run(config, tmp_path / "new", say=said.append, only="small")
    with pytest.raises(ValueError, match=r"only is 'tall'; allowed with .*c\.toml: text, whole, small"):
        run(config, tmp_path / "out", resume=True, say=said.append, only="tall")
    (tmp_path / "out" / "whole.json").unlink()  # as if it had been stopped before that shape's end
    said.clear()
    again = run(config, tmp_path / "out", resume=True, prompt_files=[str(more)], say=said.append)
    assert any("small: already trained" in line for line in said)
    assert any("whole: resumed at step" in line for line in said)
    assert not any(line.startswith("generate") for line in said)
    assert again["test"]["alpha"] == pytest.approx(result["test"]["alpha"])

    started, trained = config.read_text().index("[[shapes]]"), config.read_text().index("[train]")
    text = config.read_text()
    shape = f'[[shapes]]\nname = "on"\nfile = "{result["file"]}"\nseed = 5\n'
    final = "[final]\npositions = 600\nbatch_positions = 100\noverlap_weight = 1.0\noverlap_from = 0.2\n"
    config.write_text(text[:started] + shape + text[trained:] + final)
    files = [str(more)]
    assert run(config, tmp_path / "further", prompt_files=files, say=said.append, only="text") == {}
    alone = run(config, tmp_path / "further", True, files, said.append, only="on")
    said.clear()
    further = run(config, tmp_path / "further", True, files, said.append)
    assert "on: already trained" in said
    assert not any(line.startswith("generate") for line in said)
    assert alone["recipe"] == further["candidates"][0]["recipe"]
    first, longer = further["candidates"]
    assert (first["shape"], longer["shape"]) == ("on", "on-longer")
    assert first["recipe"]["after"]["shape"] == "whole"
    assert (first["recipe"]["seed"], longer["recipe"]["positions"] >= 600) == (5, True)
    assert first["validation"]["alpha"] > 0.2  # it began where the other had ended


def test_finished_text_is_not_added_to(tmp_path: Path, teacher: Teacher) -> None:
    """Not even where time was the limit; but a larger budget is kept, and other prompts are refused."""
    prompts = [Prompt("t", "train", (3, 4, 5, i), False) for i in range(6)]
    few = GenerateConfig(max_new_tokens=4, batch=2, continuations={"default": 1}, token_budget=8)

    def generate(config: GenerateConfig, prompts: list[Prompt]) -> tuple[int, int]:
        tokens = generate_shards(
            teacher, prompts, config, tmp_path, prefix="train", stop_ids=(), seed=1, say=lambda _: None
        )
        return tokens, len(list(tmp_path.glob("train-*.pt")))

    assert generate(few, prompts) == (8, 1)
    (tmp_path / "train-00000.pt").rename(tmp_path / "kept")  # what is finished is not looked for
    assert generate(few, prompts) == (8, 0)
    (tmp_path / "kept").rename(tmp_path / "train-00000.pt")
    assert generate(few.model_copy(update={"token_budget": 16}), prompts) == (16, 2)
    for config, other in ((few, prompts[1:]), (few.model_copy(update={"temperature": 0.5}), prompts)):
        with pytest.raises(ValueError, match="its train text was made from other prompts or settings"):
            generate(config, other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nlr = -1.0\n", "train.lr = -1.0: Input should be greater than 0"),
        ("[train]\nspeed = 3\n", "train.speed = 3: Extra inputs are not permitted"),
        ("shapes = []\n", "shapes"),
        ("[[shapes]]\nnum_heads = 5\nnum_kv_heads = 2\n", "must be a multiple"),
        ("= nonsense", "not a TOML file"),
    ],
)
def test_bad_config_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"c\.toml") as error:
        load_config(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_prompt_files_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "good\u2028line"}\n\n{"prompt": 3}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl:3: \"prompt\" must be"):
        read_jsonl(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_jsonl(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_jsonl(tmp_path / "missing.jsonl")


def test_held_out_share_is_a_tenth_each_and_depends_on_the_text_alone() -> None:
    splits = [split_of(f"prompt {i}") for i in range(5000)]
    for name in ("test", "validation"):
        assert 0.08 < splits.count(name) / 5000 < 0.12
    assert splits == [split_of(f"prompt {i}") for i in range(5000)]


def test_shipped_configs_are_valid() -> None:
    from dsdlab.models.distill import main

    found = sorted(Path(main.__file__).parent.glob("*.toml"))
    assert sorted(path.stem for path in found) == ["default", "gpu", "gpu-on", "gpu-seeds"]
    assert all(load_config(path).prompts.files == [] for path in found)


def test_shipped_drafters_load_and_fit() -> None:
    files = [p for p in DRAFTERS.values() if p.exists()]
    assert files
    assert sum(p.stat().st_size for p in files) <= 22_000_000
    for path in files:
        weights = load_drafter_file(path)
        assert weights.shape.vocab_size == 49152
        assert weights.head_ids is not None
        assert weights.head_ids.unique().numel() == weights.head_ids.numel() == weights.head.weight.shape[0]
        assert weights.embed_map is not None
        assert weights.embed_map.numel() == 49152
        assert int(weights.embed_map.max()) < weights.embed.weight.shape[0]
