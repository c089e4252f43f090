"""What does sampling cost on the wire? `make bench-wire` writes the price list in docs/wire.md.

Real nodes with the real pair generate the same prompts and seeds over links of two rates, with every scheme
in turn: greedy, coupled by shared noise, and rejection sampling with the drafter's distribution cut to a few
ids or whole. Bytes are those of the frames that crossed. Exact is asked of each scheme in its own way: of
greedy and coupled the ids that the target alone says, of rejection sampling that a run over another link says
the same, and that what is committed is distributed as the target's own choice (`bench.wire_law`).

Prints the table, writes results/bench/wire.json and the page. Exit code 1 if a scheme is not exact.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bench import wire_law, wire_page
from dsdlab.decoding import Sampling
from dsdlab.models.alone import generate_alone
from dsdlab.models.base import Engine
from dsdlab.models.drafters import ModelDrafter, load_drafter
from dsdlab.models.loading import EngineOptions, load_engine, load_tokenizer
from dsdlab.node_process import set_threads
from dsdlab.nodes import GenerationRecord
from dsdlab.scenario import Workload
from dsdlab.sim.profile import LinkProfile
from dsdlab.sweep.bootstrap import generator, resample
from dsdlab.sweep.calibration import judge
from dsdlab.sweep.plan import sampling_json
from dsdlab.sweep.provenance import cpu_name
from dsdlab.sweep.workload import load_prompts
from testbed.controller import CpuSplit, Testbed
from testbed.host import choose

TARGET, DRAFTER = "smollm2-135m-instruct", "smollm2-drafter"
PRECISION = "bf16"
CONTEXT = 1024
RATES_MBIT = (1.0, 10.0)
HEAT = 0.8
LEVEL = 1e-3  # of a chi-square; its control must lie far below
BASE = "coupled"  # what dsdlab does unless told
PAGE = Path("docs/wire.md")


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way to sample. `top_q` concerns rejection alone; 0: all of q."""

    key: str
    label: str
    mode: str = "dsd-sync"
    temperature: float = HEAT
    acceptance: str = "coupled"
    top_q: int = 0

    @property
    def rejects(self) -> bool:
        return self.acceptance == "rejection"


SCHEMES = (
    Scheme("alone", "the target alone, streaming", "cloud-ar"),
    Scheme("greedy", "greedy, ids only", temperature=0.0),
    Scheme("coupled", "coupled by shared noise, ids only"),
    Scheme("q8", "rejection, q cut to 8 ids", acceptance="rejection", top_q=8),
    Scheme("q32", "rejection, q cut to 32 ids", acceptance="rejection", top_q=32),
    Scheme("full", "rejection, all of q", acceptance="rejection"),
)


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt and a seed, for every scheme and rate."""

    prompt: str
    ids: list[int]
    seed: int

    def sampling(self, temperature: float) -> Sampling:
        return Sampling(temperature, seed=self.seed)


@dataclass(slots=True)
class Law:
    """What the pair itself says of a rejection scheme."""

    overlap: float
    kept_ids: float
    p_value: float
    control: float


@dataclass(slots=True)
class Truth:
    """What is known before any node starts."""

    alone: dict[tuple[str, int, float], list[int]] = field(
        default_factory=dict
    )  # by prompt, seed, temperature
    laws: dict[str, Law] = field(default_factory=dict)
    drafter_ids: int = 0


def truth_of(jobs: Sequence[Job], tokens: int, draws: int) -> Truth:
    """The target alone for every job, and the laws of rejection sampling, by the verifier's arithmetic."""
    cores = os.sched_getaffinity(0)
    split = CpuSplit.default(sorted(cores))
    set_threads(len(split.verifier))
    options = EngineOptions(precision=PRECISION, slots=1, max_context=CONTEXT)
    target, drafter = load_engine(TARGET, options), load_drafter(DRAFTER, options)
    assert isinstance(drafter, ModelDrafter)
    out = Truth()
    for job in jobs:
        for temperature in (0.0, HEAT):
            sampling = job.sampling(temperature)
            ids = generate_alone(target, job.ids, sampling, tokens, target.info.eos_ids)
            out.alone[job.prompt, job.seed, temperature] = ids
    out.drafter_ids = (
        target.info.vocab_size if drafter.engine.output_ids is None else drafter.engine.output_ids.size
    )
    out.laws = laws_of(target, drafter.engine, jobs, out, draws)
    return out


def laws_of(target: Engine, drafter: Engine, jobs: Sequence[Job], truth: Truth, draws: int) -> dict[str, Law]:
    """Of every rejection scheme; the chi-square looks at three places of the first text of each prompt."""
    places, tested = [], []
    seen: set[str] = set()
    for job in jobs:
        new = truth.alone[job.prompt, job.seed, HEAT]
        found = wire_law.places_of(target, drafter, job.ids, new, Sampling(HEAT)) if len(new) > 1 else []
        places += found
        if found and job.prompt not in seen:
            seen.add(job.prompt)
            tested += [found[at * (len(found) - 1) // 4] for at in (1, 2, 3)]
    control = wire_law.p_value(tested, 0, Sampling(HEAT), draws, lie=True)
    return {
        s.key: Law(
            wire_law.overlap(places, s.top_q),
            wire_law.kept_ids(places, s.top_q),
            wire_law.p_value(tested, s.top_q, Sampling(HEAT), draws),
            control,
        )
        for s in SCHEMES
        if s.rejects
    }


# measuring ------------------------------------------------------------------------------------------

Records = dict[tuple[str, float], list[GenerationRecord]]
"""By scheme and rate, in the order of the jobs."""


async def measure(
    jobs: Sequence[Job], rtt_ms: float, gamma: int, tokens: int, runtime: str, link: str
) -> tuple[Records, list[dict[str, Any]]]:
    """Every job with every scheme over every link, in an order of its own for each job.

    A busy moment of the machine meets all of them. Each rate has an edge node; one generates at a time.
    """
    records: Records = {(s.key, rate): [] for s in SCHEMES for rate in RATES_MBIT}
    links: list[dict[str, Any]] = []
    order = random.Random(1)
    profiles = [LinkProfile(rtt_ms=rtt_ms, rate_up_mbit=r, rate_down_mbit=r) for r in RATES_MBIT]
    ways = [(scheme, edge) for scheme in SCHEMES for edge in range(len(RATES_MBIT))]
    with tempfile.TemporaryDirectory(prefix="dsdlab-bench-") as folder:
        bed = Testbed(
            Path(folder), target=TARGET, drafter=DRAFTER, precision=PRECISION, runtime=runtime, link=link,
            profiles=profiles, node_args=("--max-context", str(CONTEXT)),
        )  # fmt: skip
        async with bed:
            for edge, (rate, profile) in enumerate(zip(RATES_MBIT, profiles, strict=True)):
                found = await bed.calibrate(profile, edge)
                problem = judge(profile, found)
                links.append({"rate_mbit": rate, "measure": msgspec.to_builtins(found), "problem": problem})
                await bed.generate(_ask(SCHEMES[1], jobs[0], gamma, 8), 300.0, edge)  # to warm up
            for job in jobs:
                for scheme, edge in order.sample(ways, len(ways)):
                    await bed.reconnect(edge)
                    record = await bed.generate(_ask(scheme, job, gamma, tokens), 300.0, edge)
                    kept = records[scheme.key, RATES_MBIT[edge]]
                    kept.append(msgspec.convert(record, GenerationRecord))
    return records, links


def _ask(scheme: Scheme, job: Job, gamma: int, tokens: int) -> dict[str, Any]:
    return {
        "mode": scheme.mode,
        "gamma": gamma if scheme.mode == "dsd-sync" else 0,
        "prompt_ids": job.ids,
        "sampling": sampling_json(job.sampling(scheme.temperature)),
        "max_new_tokens": tokens,
        "acceptance": scheme.acceptance,
        "top_q": scheme.top_q,
    }


# telling --------------------------------------------------------------------------------------------


def alpha_of(records: Sequence[GenerationRecord], jobs: Sequence[Job]) -> list[float] | None:
    """Accepted over judged drafts, with a bootstrap interval over prompts and seeds."""
    judged = np.array([sum(min(a + 1, d) for d, a in record.windows) for record in records], dtype=float)
    accepted = np.array([sum(a for _, a in record.windows) for record in records], dtype=float)
    if not judged.sum():
        return None
    drawn = resample([job.prompt for job in jobs], generator("wire"))
    used = drawn >= 0
    ratios = (accepted[drawn] * used).sum(axis=1) / (judged[drawn] * used).sum(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return [float(accepted.sum() / judged.sum()), float(low), float(high)]


def per_token(records: Sequence[GenerationRecord], way: str, names: tuple[str, ...]) -> float:
    tokens = sum(len(record.ids) for record in records)
    sizes: list[dict[str, int]] = [getattr(record, way) for record in records]
    return sum(size.get(name, 0) for size in sizes for name in names) / tokens


def _ratios(records: Records, key: str, rate: float) -> list[float]:
    """TPOT over that of the coupled scheme, generation by generation."""
    pairs = zip(records[key, rate], records[BASE, rate], strict=True)
    return [a / b for one, base in pairs if (a := one.tpot_s) is not None and (b := base.tpot_s) is not None]


def row_of(scheme: Scheme, records: Records, jobs: Sequence[Job], truth: Truth) -> dict[str, Any]:
    """One line of the table."""
    every = [records[scheme.key, rate] for rate in RATES_MBIT]
    first = every[0]  # what is said, and in what frames, does not depend on the rate
    windows = [window for record in first for window in record.windows if window[0]]
    tpot_s = {
        rate: [t for r in one if (t := r.tpot_s) is not None]
        for rate, one in zip(RATES_MBIT, every, strict=True)
    }
    draft_s = [t for one in every for r in one for t in r.t_draft_s]
    verify_s = [t for one in every for r in one for t in r.t_verify_s[1:]]  # the first is the prompt's
    beside = {rate: statistics.median(_ratios(records, scheme.key, rate)) for rate in RATES_MBIT}
    law = truth.laws.get(scheme.key)
    if law is None:
        alone = [truth.alone[job.prompt, job.seed, scheme.temperature] for job in jobs]
        pairs = [(r.ids, ids) for one in every for r, ids in zip(one, alone, strict=True)]
        same = sum(said == ids for said, ids in pairs)
        good, exact = same == len(pairs), f"same ids as the target alone, {same} of {len(pairs)}"
    else:
        same = sum(a.ids == b.ids for a, b in zip(*every, strict=True))
        good = same == len(jobs) and law.p_value > LEVEL and law.control < LEVEL**2
        exact = f"in distribution, χ² p = {law.p_value:.2f}; same ids over both links, {same} of {len(jobs)}"
    return {
        "key": scheme.key,
        "label": scheme.label,
        "temperature": scheme.temperature,
        "up": per_token(first, "bytes_up", ("Draft", "DraftQ")),
        "down": per_token(first, "bytes_down", ("Verdict", "Commit")),
        "alpha": alpha_of(first, jobs),
        "tau": (sum(a for _, a in windows) + len(windows)) / len(windows) if windows else None,
        "windows": len(windows),
        "tokens": sum(len(record.ids) for record in first),
        "tpot_ms": {f"{rate:g}": 1e3 * statistics.median(times) for rate, times in tpot_s.items()},
        "beside_coupled": {f"{rate:g}": ratio for rate, ratio in beside.items()},
        "draft_ms": 1e3 * statistics.median(draft_s) if draft_s else None,
        "verify_ms": 1e3 * statistics.median(verify_s),
        "overlap": None if law is None else law.overlap,
        "kept_ids": None if law is None else law.kept_ids,
        "law": None if law is None else asdict(law),
        "good": good,
        "exact": exact,
    }  # fmt: skip


def load_jobs(prompts: int, seeds: int) -> list[Job]:
    tokenizer = load_tokenizer(TARGET)
    assert tokenizer is not None
    found = load_prompts(Workload(n_prompts=prompts), Path())
    return [Job(p.key, tokenizer.encode_chat(p.text), seed) for p in found for seed in range(1, seeds + 1)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.wire", description=__doc__.split("\n")[0])
    parser.add_argument("--runtime", default="auto", choices=("auto", "process", "netns", "docker"))
    parser.add_argument("--link", default="auto", choices=("auto", "modelled", "netem", "netem-uml"))
    parser.add_argument("--rtt-ms", type=float, default=20.0)
    parser.add_argument("--gamma", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--draws", type=int, default=400, help="seeds of the chi-square, at each place")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    chosen, load = choose(args.runtime, args.link), os.getloadavg()[1]
    jobs = load_jobs(args.prompts, args.seeds)
    print(f"the target alone, and the laws of rejection sampling: {len(jobs)} texts", flush=True)
    truth = truth_of(jobs, args.tokens, args.draws)
    print(
        f"{chosen.runtime} runtime, {chosen.link} link: {len(jobs)} × {len(SCHEMES)} × {len(RATES_MBIT)}",
        flush=True,
    )
    records, links = asyncio.run(
        measure(jobs, args.rtt_ms, args.gamma, args.tokens, chosen.runtime, chosen.link)
    )
    rows = [row_of(scheme, records, jobs, truth) for scheme in SCHEMES]
    found = {
        "target": TARGET, "drafter": DRAFTER, "drafter_ids": truth.drafter_ids, "precision": PRECISION,
        "gamma": args.gamma, "rtt_ms": args.rtt_ms, "rates_mbit": list(RATES_MBIT), "generations": len(jobs),
        "max_new_tokens": args.tokens, "draws": args.draws, "runtime": chosen.runtime, "link": chosen.link,
        "cpu": cpu_name(), "load": load, "cores": os.cpu_count(), "links": links, "rows": rows,
    }  # fmt: skip
    path = Path("results/bench/wire.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    wire_page.write(args.page, found)
    print(wire_page.table(found))
    for one in links:
        if one["problem"]:
            print(
                f"the link of {one['rate_mbit']:g} Mbit/s was not as asked: {one['problem']}", file=sys.stderr
            )
    return 0 if all(row["good"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
