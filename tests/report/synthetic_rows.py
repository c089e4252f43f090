"""TEST DATA: rows as a sweep would write them, played from known costs and acceptance plus noise.

Nothing here is a measurement. `TRUTH` holds the parameters the statistics should find again.
"""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsdlab.sim.prediction import PredictedCell, PredictedGeneration, Prediction
from dsdlab.sim.profile import LinkProfile
from dsdlab.sweep.calibration import DirectionMeasure, LinkMeasure, judge
from dsdlab.sweep.rows import Row


@dataclass(frozen=True)
class Truth:
    alpha: float = 0.62
    t_draft_s: float = 0.004
    t_verify1_s: float = 0.050
    t_verify_row_s: float = 0.0022  # per drafted token in the window
    edge_slowdown: float = 3.0
    prefill_s: float = 0.110
    noise: float = 0.03

    def t_verify_s(self, gamma: int) -> float:
        return self.t_verify1_s + self.t_verify_row_s * gamma


TRUTH = Truth()
VARIANTS = (("cloud-ar", 0), ("cloud-sd", 4), ("edge-sd", 4), ("dsd-sync", 4))
RECOVERY_S = 0.8  # of TCP after a partition
PROMPTS = ("gsm8k-3", "humaneval-11", "cnndm-7", "chat-2")


def measure(rtt_ms: float) -> LinkMeasure:
    """Pings of the connection itself."""
    return LinkMeasure(instrument="frames", rtt_p50_ms=rtt_ms, rtt_p99_ms=rtt_ms + 0.4, n=3)


def generation(
    mode: str,
    gamma: int,
    rtt_ms: float,
    *,
    prompt: str = PROMPTS[0],
    rep: int = 0,
    tokens: int = 48,
    rate_mbit: float | None = None,
    loss_pct: float = 0.0,
    temperature: float = 0.0,
    cut_s: tuple[float, float] | None = None,
    truth: Truth = TRUTH,
) -> Row:
    """One generation walked through window by window. cut_s: nothing gets through from when to when."""
    key = f"{mode} {gamma} {rtt_ms} {rate_mbit} {loss_pct} {temperature}"
    noise = np.random.default_rng(zlib.crc32(f"{key} {prompt} {rep}".encode()))
    # acceptance belongs to prompt, seed and temperature: the same at every RTT, as with real ids
    luck = np.random.default_rng(zlib.crc32(f"{prompt} {temperature} {gamma}".encode()))
    alpha = float(np.clip(truth.alpha + luck.normal(0, 0.05) - 0.15 * (temperature > 0), 0.05, 0.95))
    edge = mode == "edge-sd"
    slow = truth.edge_slowdown if edge else 1.0

    def jitter(seconds: float) -> float:
        return seconds * float(np.exp(noise.normal(0, truth.noise)))

    def flight(n_bytes: int, at_s: float) -> float:
        if edge:
            return 0.0
        late = 0.2 if noise.random() < loss_pct / 100 else 0.0
        takes_s = rtt_ms / 2e3 + (n_bytes * 8 / (rate_mbit * 1e6) if rate_mbit else 0.0) + late
        if cut_s is not None and at_s < cut_s[1] and at_s + takes_s > cut_s[0]:
            return cut_s[1] + RECOVERY_S - at_s
        return takes_s

    events: list[tuple[str, float, float]] = []
    commits: list[tuple[float, int]] = []
    windows: list[tuple[int, int]] = []
    t_draft, t_verify = [], []
    up = {"Open": 320, "Draft": 0, "Close": 4}
    down = {"Verdict": 0, "Commit": 0}
    now, done = 0.0, 0
    if not edge:
        events.append(("flight_up", now, now := now + flight(320, now)))
    while done < tokens:
        first = not windows
        if mode == "cloud-ar":
            cost = jitter(truth.prefill_s if first else truth.t_verify1_s)
            events.append(("verify" if first else "decode", now, now := now + cost))
            arrival = now + flight(24, now)
            drafted, accepted = 0, 0
            down["Commit"] += 24
        else:
            drafted = min(gamma, tokens - done - 1) if tokens - done > 1 else 0
            spent = jitter(truth.t_draft_s * slow) * drafted
            t_draft.append(spent)
            events.append(("draft", now, now := now + spent))
            if mode == "dsd-sync":
                size = 16 + 3 * drafted
                up["Draft"] += size
                events.append(("flight_up", now, now := now + flight(size, now)))
            cost = jitter(truth.t_verify_s(drafted) * slow + (truth.prefill_s * slow if first else 0.0))
            events.append(("verify", now, now := now + cost))
            rejected = np.flatnonzero(luck.random(drafted) >= alpha)
            accepted = int(rejected[0]) if rejected.size else drafted
            down["Verdict" if mode == "dsd-sync" else "Commit"] += 22
            arrival = now + flight(22, now)
        arrival = max(arrival, commits[-1][0] if commits else 0.0)  # bytes stay in order
        t_verify.append(cost)
        windows.append((drafted, accepted))
        if not edge:
            events.append(("flight_down", now, arrival))
        if mode == "dsd-sync":
            now = arrival
        committed = min(accepted + 1, tokens - done)
        done += committed
        commits.append((arrival, committed))
    ttft_s, last_s = commits[0][0], commits[-1][0]
    gaps = np.diff([t for t, _ in commits])
    tested = sum(a + (a < d) for d, a in windows)
    return Row(
        cell=f"{zlib.crc32(key.encode()):08x}",
        rep=rep,
        status="ok",
        mode=mode,
        policy="static",
        gamma=gamma,
        runtime="process",
        link="modelled",
        rtt_ms=rtt_ms,
        rate_mbit=rate_mbit,
        loss_pct=loss_pct,
        temperature=temperature,
        seed=1,
        prompt=prompt,
        tokens=done,
        tpot_ms=(last_s - ttft_s) / (done - 1) * 1e3,
        ttft_ms=ttft_s * 1e3,
        itl_p95_ms=float(np.percentile(gaps, 95)) * 1e3,
        alpha=sum(a for _, a in windows) / tested if tested else None,
        tau=done / len(windows),
        exact=True,
        ids=list(range(done)),
        finish="length",
        windows=windows,
        t_draft_s=t_draft,
        t_verify_s=t_verify,
        t_queue_s=[1e-4] * len(windows),
        bytes_up={} if edge else up,
        bytes_down={} if edge else down,
        events=events,
        link_before=measure(rtt_ms + 0.3 + 0.05 * float(noise.random())),
        link_after=measure(rtt_ms + 0.3 + 0.05 * float(noise.random())),
        started_at="2025-06-01T12:00:00+00:00",
        wall_s=last_s + 0.2,
        generate_s=last_s,
        overhead_s=0.2,
    )


def grid(
    *,
    rtts_ms: tuple[float, ...] = (0, 20, 50, 100, 150, 200),
    variants: tuple[tuple[str, int], ...] = VARIANTS,
    rates_mbit: tuple[float | None, ...] = (None,),
    losses_pct: tuple[float, ...] = (0.0,),
    temperatures: tuple[float, ...] = (0.0,),
    prompts: tuple[str, ...] = PROMPTS,
    reps: int = 3,
    tokens: int = 48,
    truth: Truth = TRUTH,
) -> list[Row]:
    """Every generation of a grid."""
    return [
        generation(
            mode,
            gamma,
            rtt,
            prompt=prompt,
            rep=rep,
            tokens=tokens,
            rate_mbit=rate,
            loss_pct=loss,
            temperature=heat,
            truth=truth,
        )
        for rep, heat, loss, rate, rtt, prompt, (mode, gamma) in itertools.product(
            range(reps), temperatures, losses_pct, rates_mbit, rtts_ms, prompts, variants
        )
    ]


TCP = ("cubic", "bbr")


def _probed(luck: np.random.Generator, rtt_ms: float, loss_pct: float, burst: float) -> LinkMeasure:
    """100 probes each way through a chain of bursts, as `dsdlab.sweep.calibration` reads them."""
    ways = {}
    for way in ("up", "down"):
        bursts: list[int] = []
        lost = k = 0
        while k < 100:
            if luck.random() < loss_pct / 100 / burst / (1 - loss_pct / 100):
                length = min(int(luck.geometric(1 / burst)), 100 - k)
                bursts.append(length)
                lost, k = lost + length, k + length
            k += 1
        rate = 20 * float(luck.normal(1, 0.005))
        ways[way] = DirectionMeasure(sent=100, lost=lost, bursts=bursts, rate_mbit=rate)
    return LinkMeasure(
        instrument="packets", rtt_p50_ms=rtt_ms + float(luck.normal(0.05, 0.03)), rtt_p99_ms=rtt_ms + 0.6,
        n=180, **ways, wall_s=0.4,
    )  # fmt: skip


def _over_netem(row: Row, congestion: str, burst: float, luck: np.random.Generator) -> Row:
    """The same generation as if a netem link between namespaces had carried it."""
    row.runtime, row.link = "netns", "netem"
    row.cell = f"{zlib.crc32(f'{row.cell} {congestion} {burst} {row.link_steps}'.encode()):08x}"
    row.loss_burst = burst
    profile = LinkProfile(
        rtt_ms=row.rtt_ms, rate_up_mbit=row.rate_mbit, rate_down_mbit=row.rate_mbit, loss_pct=row.loss_pct,
        loss_burst=burst,
    )  # fmt: skip
    row.link_asked = profile.to_dict()
    rto_ms = 200 + row.rtt_ms + float(luck.random())
    end = {"congestion": congestion, "nodelay": True, "rto_ms": rto_ms}
    row.tcp = {
        "asked": {"congestion": congestion},
        "read_back": {"edge": end, "verifier": dict(end), "slow_start_after_idle": True, "offloads_on": []},
    }
    row.link_before = _probed(luck, row.rtt_ms, row.loss_pct, burst)
    row.link_after = _probed(luck, row.rtt_ms, row.loss_pct, burst)
    packets = 3 * len(row.windows)
    row.link_counters = {
        way: {
            "packets": packets,
            "bytes": 90 * packets,
            "drops": int(luck.binomial(packets, row.loss_pct / 100)),
        }
        for way in ("up", "down")
    }
    return row


def netem_sweep() -> list[Row]:
    """Loss alone and in bursts at 20 Mbit/s over netem; one cell lost too much, two links drifted."""
    luck = np.random.default_rng(5)
    rows = []
    for (loss, burst), rtt, (mode, gamma), rep in itertools.product(
        ((0.0, 1.0), (2.0, 1.0), (2.0, 4.0)), (20.0, 80.0), (("cloud-ar", 0), ("dsd-sync", 4)), range(4)
    ):
        row = generation(mode, gamma, rtt, rep=rep, rate_mbit=20.0, loss_pct=loss)
        rows.append(_over_netem(row, "cubic", burst, luck))
        if (mode, rtt, burst) == ("dsd-sync", 80.0, 4.0):  # the whole cell
            rows[-1].link_before = _probed(luck, rtt, 9.0, burst)
            rows[-1].link_after = _probed(luck, rtt, 9.0, burst)
    for row in (rows[1], rows[14]):
        assert row.link_after is not None
        row.link_after.rtt_p50_ms += 12.0
        row.excluded = judge_after(row)
    return rows


def judge_after(row: Row) -> str:
    """The reason a runner would write."""
    assert row.link_after is not None
    return f"after: {judge(row.profile, row.link_after)}"


def partition_sweep() -> list[Row]:
    """Five seconds without a network, under two congestion controls."""
    luck = np.random.default_rng(6)
    rows = []
    for congestion, (mode, gamma), rep in itertools.product(
        TCP, (("cloud-ar", 0), ("dsd-sync", 4)), range(2)
    ):
        row = generation(mode, gamma, 40.0, rep=rep, tokens=160, cut_s=(1.0, 6.0))
        row.link_steps = "partition from 1 s for 5 s"
        row.link_changes = [(1.002, "partition"), (6.003, "end of partition")]
        rows.append(_over_netem(row, congestion, 1.0, luck))
    return rows


AXES = (
    "mode", "policy", "gamma", "run_ahead", "free_run", "beside", "rtt_ms", "rate_mbit", "loss_pct",
    "temperature", "jitter_ms", "loss_burst",
)  # fmt: skip


def prediction(rows: list[Row], *, draws: int = 5, off: float = 0.03, spread: float = 0.02) -> Prediction:
    """What a simulator might have said of these rows: each cell off by its own `off` or so, draws spread.

    Written an hour before; replays all windows; the highest RTT lies outside the profile.
    """
    cells: dict[str, PredictedCell] = {}
    highest = max(row.rtt_ms for row in rows)
    for row in rows:
        if row.cell not in cells:
            far = "target on the cloud: context 1900 (calibrated to 1024)" if row.rtt_ms == highest else ""
            axes = {name: getattr(row, name) for name in AXES}
            cells[row.cell] = PredictedCell(cell=row.cell, axes=axes, outside=far, generations=[])
        own = np.random.default_rng(zlib.crc32(f"off {row.cell}".encode())).normal(0.2 * off, off, 2)
        luck = np.random.default_rng(zlib.crc32(f"draws {row.cell}".encode()))  # a draw is of all prompts
        factors = np.exp(luck.normal(0, spread * (4 if row.loss_pct else 1), draws))
        cells[row.cell].generations.append(
            PredictedGeneration(
                rep=row.rep,
                prompt=row.prompt,
                seed=row.seed,
                windows=row.windows,
                tokens=row.tokens,
                finish=row.finish,
                exact=True,
                tpot_ms=[] if row.tpot_ms is None else [row.tpot_ms * (1 + own[0]) * f for f in factors],
                ttft_ms=[] if row.ttft_ms is None else [row.ttft_ms * (1 + own[1]) * f for f in factors],
                alpha=row.alpha,
                tau=row.tau,
                bytes_up=row.bytes_up,
                bytes_down=row.bytes_down,
            )
        )
    return Prediction(
        scenario="quickstart",
        digest="feedbeef",
        created_at="2025-06-01T11:00:00+00:00",
        draws=draws,
        seed=1,
        profile={
            "name": "imaginary-cpu",
            "origin": "measured here",
            "source": "dsdlab calibrate on test data, 120 forwards",
            "sha256": "ef" * 32,
        },
        acceptance={"kind": "trace", "sha256": "09" * 32},
        wall_s=1.5,
        cells=list(cells.values()),
    )


def run_record(name: str = "quickstart") -> dict[str, Any]:
    """A run.json as a sweep writes it, with values that are clearly made up."""
    info = {
        "tokenizer": "0f1e2d3c4b5a6978",
        "vocab_size": 49152,
        "max_context": 2048,
        "eos_ids": [2],
        "precision": "bf16",
    }
    return {
        "name": name,
        "scenario_text": f'# test data\nname = "{name}"\nmodes = ["cloud-ar", "dsd-sync"]\n',
        "scenario": {"name": name},
        "command": f"dsdlab sweep scenarios/{name}.toml",
        "started_at": "2025-06-01T12:00:00+00:00",
        "git": {"sha": "0123456789abcdef0123456789abcdef01234567", "dirty": True},
        "packages": {"torch": "0.0", "transformers": "0.0", "numpy": "0.0"},
        "kernel": "Linux 0.0 (test data)",
        "cpu": "Imaginary CPU",
        "cores": 2,
        "sysctls": {"net.ipv4.tcp_congestion_control": "cubic", "net.ipv4.tcp_slow_start_after_idle": "0"},
        "models": {
            "target": {"model_id": "test-target", "n_params": 134_515_008, "digest": "ab" * 32, **info},
            "drafter": {"model_id": "test-drafter", "n_params": 9_000_000, "digest": "cd" * 32, **info},
        },
        "runtime": "process",
        "link": "modelled",
        "selftest": {"exact": True, "positions": 512},
        "cells": [],
    }
