"""The engine in every precision beside its inexact path, transformers, llama.cpp and the memory's bandwidth.

Every round times each of them once, one after the other, at each number of threads; ratios are medians of
per-round ratios, so that a slow spell of the machine falls on all alike. Time for which the thread had no
core is not counted, and of three windows in a row the fastest is: other programs only add. Prints tables,
what they predict for the whole system, and each bar reached or missed, into results/bench/engine.json too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.engine_peers import (
    CONTEXT,
    DTYPES,
    GREEDY,
    LlamaCpp,
    Ours,
    Peer,
    Transformers,
    find_gguf,
    now_s,
    ours,
)
from dsdlab.models.alone import generate_alone
from dsdlab.models.base import Chunk
from dsdlab.models.linears import GROUP, grouped
from dsdlab.models.loading import load_tokenizer
from dsdlab.models.torch_engine import HEAD_OF, PRECISIONS
from dsdlab.models.weights_io import load_llama_dir
from dsdlab.models.zoo import default_precision, fetch
from dsdlab.sweep.provenance import cpu_name

TARGET = "smollm2-135m-instruct"
PROMPT = "Write a short story about a fox who learns to sail, then list the parts of a boat."
ROWS = (1, 4, 5, 8, 16)
PIECE = CONTEXT  # rows of a prompt, which is what is held
DRAFT_MS = 1.6  # of the shipped drafter after lookup: 2.1 ms for each of the 77 % that lookup leaves to it
TAU = {3: 2.55, 4: 2.83, 7: 3.36, 15: 3.95}  # its tokens a window by γ, docs/drafter.md's test prompts
RTTS_MS = (0, 100)
LEAST_TRANSFORMERS, LEAST_DEFAULT, MOST_OVERHEAD = 1.3, 1.8, 1.10
BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5 + 4 / 32}  # a weight's, scales included
KL_TOKENS = 160
PINNED = "GOMP_CPU_AFFINITY"  # read when torch is loaded; afterwards the main thread sees one core only

Times = dict[str, dict[str, list[float]]]
"""By peer and by what was timed ("decode", or a row count): milliseconds of each round."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One promise, and what was measured of it."""

    name: str
    value: float
    bar: float
    reached: bool


def clock_ms(work: Callable[[], Any]) -> float:
    """Milliseconds of one call."""
    begun_s = now_s()
    work()
    return 1e3 * (now_s() - begun_s)


def bandwidth_gb_s() -> float:
    """Gigabytes a second that the threads read from memory: the best of several passes over 512 MB."""
    big = torch.ones(1 << 27, dtype=torch.float32)
    passes = [clock_ms(work) for _ in range(4) for work in (big.sum, big.amax)]
    return big.numel() * 4 / min(passes) / 1e6


def bytes_per_token(precision: str) -> float:
    """Weights that decoding one token reads: all layers and the head, not the embedding's other rows."""
    weights = load_llama_dir(fetch(TARGET), "")
    layers = sum(
        m.weight.numel() for layer in weights.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)
    )
    return layers * BYTES[precision] + weights.head.weight.numel() * BYTES[HEAD_OF.get(precision, precision)]


def time_all(peers: list[Peer], prompt: list[int], rounds: int, tokens: int, budget_s: float) -> Times:
    """Milliseconds per peer: of a token decoded after the first, of a window of each row count, and of a
    prompt of PIECE rows. Two rounds at least, and no more begin when the budget is spent.
    """
    begun_s = time.perf_counter()
    text = prompt * (1 + PIECE // len(prompt))
    out: Times = {p.name: {w: [] for w in ("decode", *map(str, ROWS), str(PIECE))} for p in peers}
    for p in peers:  # the first of each is slower
        p.decode(prompt, 4)
        p.hold(text)
        p.window(text[:4])
    for number in range(rounds):
        if number >= 2 and time.perf_counter() - begun_s > budget_s:
            break
        for p in peers if number % 2 else peers[::-1]:
            times = out[p.name]
            times["decode"].append(p.decode(prompt, tokens))
            times[str(PIECE)].append(clock_ms(lambda p=p: p.hold(text)))  # type: ignore[misc]
            for rows in ROWS:
                spans = [clock_ms(lambda p=p, n=rows: p.window(text[:n])) for _ in range(3)]  # type: ignore[misc]
                times[str(rows)].append(min(spans))
    return out


def ratio(times: Times, ours: str, theirs: str, what: str) -> float:
    """How many times faster `ours` was: the median of the rounds' ratios."""
    pairs = zip(times[theirs][what], times[ours][what], strict=True)
    return statistics.median(a / b for a, b in pairs)


def middle(times: Times, name: str, what: str) -> float:
    return statistics.median(times[name][what])


def closeness(engines: dict[str, Ours], prompt: list[int]) -> dict[str, dict[str, float]]:
    """By precision: mean KL divergence to fp32 over decoded text; how often the best token is the same."""
    tokens = generate_alone(engines["int8"].engine, prompt, GREEDY, KL_TOKENS, ())
    logs: dict[str, Any] = {}
    for precision, peer in engines.items():
        slot = peer.engine.open()
        rows = peer.engine.extend([Chunk(slot, prompt + tokens, KL_TOKENS)])[0].astype(np.float64)
        peer.engine.close(slot)
        rows -= rows.max(1, keepdims=True)
        logs[precision] = rows - np.log(np.exp(rows).sum(1, keepdims=True))  # [tokens, vocab]
    exact = logs["fp32"]
    return {
        precision: {
            "kl_to_fp32": float((np.exp(exact) * (exact - log)).sum(1).mean()),
            "same_best_pct": 100.0 * float((log.argmax(1) == exact.argmax(1)).mean()),
        }
        for precision, log in logs.items()
    }


def int4_error() -> dict[str, float]:
    """How far int4 weights are from the fp32 ones at most: absolutely, in levels; and in all, in percent."""
    most = most_levels = squares = of = 0.0
    for layer in load_llama_dir(fetch(TARGET), "").layers:
        for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down):
            exact = matrix.dense(torch.float32)
            parts = grouped(exact)
            off = (parts.dense() - exact).abs()
            levels = off.view(*parts.scale.shape, GROUP).amax(-1) / parts.scale.float().clamp_min(1e-9)
            most, most_levels = max(most, off.max().item()), max(most_levels, levels.max().item())
            squares, of = squares + off.square().sum().item(), of + exact.square().sum().item()
    return {"most": most, "most_levels": most_levels, "norm_pct": 100.0 * (squares / of) ** 0.5}


class Report:
    """Prints as it collects."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.bars: list[Bar] = []

    def compare(self, name: str, times: Times, ours: str, theirs: str, peer: str) -> float:
        """One line about tokens a second; the ratio."""
        found = ratio(times, ours, theirs, "decode")
        mine, other = 1e3 / middle(times, ours, "decode"), 1e3 / middle(times, theirs, "decode")
        print(f"{name}: {found:.2f} x {peer} (ours {mine:.1f} tokens/s, theirs {other:.1f} tokens/s)")
        self.lines.append(
            {"name": name, "ratio": found, "peer": peer, "ours": mine, "theirs": other, "unit": "tokens/s"}
        )
        return found

    def bar(self, name: str, value: float, bar: float, *, at_least: bool) -> None:
        self.bars.append(Bar(name, value, bar, value >= bar if at_least else value <= bar))

    def table(self, times: Times, threads: int, gb_s: float) -> None:
        """Who takes how long; for this engine also how near the bandwidth lets it come."""
        print(f"\n{threads} thread{'s' * (threads > 1)}, memory read at {gb_s:.1f} GB/s")
        heads = [
            "",
            "tokens/s",
            *(f"t({n}) ms" for n in ROWS),
            f"prompt {PIECE}",
            "MB/token",
            "floor",
            "of it",
        ]
        print(" | ".join([f"{heads[0]:18}", *(f"{h:>10}" for h in heads[1:])]))
        for name in times:
            rate = 1e3 / middle(times, name, "decode")
            spans = {n: middle(times, name, str(n)) for n in (*ROWS, PIECE)}
            row: dict[str, Any] = {"name": name, "threads": threads, "tokens_per_s": rate, "t_ms": spans}
            cells = [f"{rate:.1f}", *(f"{ms:.1f}" for ms in spans.values())]
            if (precision := name.split()[0]) in PRECISIONS:
                mb = bytes_per_token(precision) / 1e6
                floor = 1e3 * gb_s / mb
                row |= {"mb_per_token": mb, "floor_tokens_per_s": floor, "share_of_floor": rate / floor}
                cells += [f"{mb:.0f}", f"{floor:.0f}", f"{100 * rate / floor:.0f} %"]
            print(" | ".join([f"{name:18}", *(f"{c:>10}" for c in cells)]))
            self.rows.append(row)

    def predicted(self, times: Times, threads: int) -> list[dict[str, Any]]:
        """What the times mean for the whole system: ms per token of speculation and of streaming."""
        where = f"{threads} thread{'s' * (threads > 1)}"
        print(f"\npredicted ms/token ({where}), at the best of γ = {', '.join(map(str, TAU))}:")
        out = []
        for precision in PRECISIONS:
            spans = {n: middle(times, f"{precision} exact", str(n)) for n in ROWS}
            best = {}
            for rtt in RTTS_MS:
                tpot, gamma = min(((g * DRAFT_MS + rtt + spans[g + 1]) / tau, g) for g, tau in TAU.items())
                best[rtt] = {"tpot_ms": tpot, "gamma": gamma}
            even = max(tau * spans[1] - g * DRAFT_MS - spans[g + 1] for g, tau in TAU.items())
            out.append(
                {"precision": precision, "threads": threads, "by_rtt_ms": best, "ar_ms": spans[1],
                 "break_even_rtt_ms": even}
            )  # fmt: skip
            said = ", ".join(
                f"{b['tpot_ms']:.1f} (γ = {b['gamma']}) at RTT {rtt} ms" for rtt, b in best.items()
            )
            print(f"  {precision}: {said}; streaming alone {spans[1]:.1f}; they meet at RTT {even:.1f} ms")
        return out


def compare(report: Report, times: Times, threads: int) -> None:
    """Lines and bars of one number of threads."""
    where = f"{threads} thread{'s' * (threads > 1)}"
    print()
    for precision in DTYPES:
        found = report.compare(
            f"AR ({precision}, {where})", times, f"{precision} exact", f"transformers {precision}",
            "transformers",
        )  # fmt: skip
        report.bar(
            f"AR {precision}, {where}: x transformers {precision}", found, LEAST_TRANSFORMERS, at_least=True
        )
    best = min(DTYPES, key=lambda p: middle(times, f"transformers {p}", "decode"))
    default = default_precision(TARGET)
    for precision in PRECISIONS:
        if precision == best:  # said above
            found = ratio(times, f"{precision} exact", f"transformers {best}", "decode")
        else:
            found = report.compare(
                f"AR ({precision} against {best}, {where})", times, f"{precision} exact",
                f"transformers {best}", "transformers",
            )  # fmt: skip
        if precision == default:
            name = f"AR {precision} (the default), {where}: x transformers' best ({best})"
            report.bar(name, found, LEAST_DEFAULT, at_least=True)
        if LlamaCpp.name in times:
            report.compare(
                f"AR ({precision}, {where})", times, f"{precision} exact", LlamaCpp.name, "llama.cpp"
            )
    for precision in PRECISIONS:
        exact, plain = f"{precision} exact", f"{precision} inexact"
        report.compare(f"exact path ({precision}, {where})", times, exact, plain, "inexact path")
        for what in ("decode", *map(str, ROWS)):
            name = "AR" if what == "decode" else f"t_v({what})"
            over = 1 / ratio(times, exact, plain, what)
            report.bar(f"exact {name} {precision}, {where}: x inexact", over, MOST_OVERHEAD, at_least=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    cores = len(os.environ[PINNED].split())
    parser.add_argument("--threads", type=int, nargs="+", default=[1, cores])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--budget-s", type=float, default=130.0, help="per number of threads")
    parser.add_argument("--out", type=Path, default=Path("results/bench/engine.json"))
    args = parser.parse_args()
    tokenizer = load_tokenizer(TARGET)
    assert tokenizer is not None
    prompt = tokenizer.encode_chat(PROMPT)
    pairs = {p: ours(TARGET, p) for p in PRECISIONS}
    int4 = str(pairs["int4"][0].engine.int4)
    error = int4_error()
    print(
        f"int4: {int4}; weights off by {error['most']:.4f} at most, {error['most_levels']:.3f} of a level; "
        f"{error['norm_pct']:.2f} % of their norm in all"
    )
    fixed: list[Peer] = []
    for precision, pair in pairs.items():  # what is compared is timed side by side
        fixed += pair
        if precision in DTYPES:
            fixed.append(Transformers(TARGET, precision))
    gguf = find_gguf(TARGET)
    if gguf is None:
        print("llama.cpp: not compared; pip install 'dsdlab[llama]' builds it")
    report = Report()
    bandwidth: dict[int, float] = {}
    predicted: list[dict[str, Any]] = []
    rounds: dict[int, int] = {}
    for threads in sorted(set(args.threads)):
        torch.set_num_threads(threads)
        bandwidth[threads] = bandwidth_gb_s()
        peers = [*fixed, LlamaCpp(gguf, threads)] if gguf is not None else fixed
        times = time_all(peers, prompt, args.rounds, args.tokens, args.budget_s)
        rounds[threads] = len(times[fixed[0].name]["decode"])
        report.table(times, threads, bandwidth[threads])
        compare(report, times, threads)
        predicted += report.predicted(times, threads)
    near = closeness({p: exact for p, (exact, _) in pairs.items()}, prompt)
    print()
    for precision, found in near.items():
        kl, same = found["kl_to_fp32"], found["same_best_pct"]
        print(f"{precision}: KL to fp32 {kl:.4f}, same best token {same:.1f} %")
    print()
    for bar in report.bars:
        print(f"{'reached' if bar.reached else 'MISSED '} {bar.name}: {bar.value:.2f} (bar {bar.bar:g})")
    print(f"bars: {sum(b.reached for b in report.bars)} of {len(report.bars)} reached")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "tokens": args.tokens,
        "rounds": rounds,
        "default": default_precision(TARGET),
        "int4": int4,
        "int4_error": error,
        "bandwidth_gb_s": bandwidth,
        "rows": report.rows,
        "lines": report.lines,
        "predicted": predicted,
        "near_fp32": near,
        "bars": [asdict(bar) for bar in report.bars],
    }
    args.out.write_text(json.dumps(record, indent=1))
    print(f"written to {args.out}")


if __name__ == "__main__":
    if PINNED not in os.environ:  # threads that wander cost milliseconds an operation
        cpus = " ".join(map(str, sorted(os.sched_getaffinity(0))))
        os.execve(
            sys.executable,
            [sys.executable, "-m", "bench.engine", *sys.argv[1:]],
            os.environ | {PINNED: cpus},
        )
    main()
