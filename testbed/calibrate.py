"""Calibration of a bed as it stands: what its models, threads and frames cost, for the simulator.

Numbers flow one way: from here to a profile to the simulator. The scenario's own prompts are not used, and
its cells are not run. What is measured:

- models, each in its node's compute thread, one node after the other (`dsdlab.models.calibrate`);
- `hop_s`: the way to the compute thread and back. On the cloud it is the time between two commits of a stream
  beyond the target's own, so that what a node does between two steps of a stream (sending a commit) is in it;
- `contention`: how much slower each node's steps are while the other one computes (`testbed.contention`);
- `send_s`, `recv_s`: a frame's round trip beyond the link's own, in four equal parts, for both nodes send and
  receive one. The link's own is what its packet probe sees; where a link carries no packets, what its profile
  says: then what the box itself adds is in these parts, and rightly, for the simulated link adds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from dsdlab.models.forwards import calibration_text
from dsdlab.models.measures import Measures, Sample
from dsdlab.scenario import Scenario
from dsdlab.sim.costs import ForwardCost, NodeCosts, SystemProfile, UnfitProfile
from dsdlab.sim.fit import fit_measures
from dsdlab.sim.profile import LinkProfile
from dsdlab.sweep.provenance import provenance
from testbed.contention import measure_contention
from testbed.controller import Testbed
from testbed.progress import bar

__all__ = ["calibrate", "show_profile"]

LINK_RTT_MS = 20.0
ROUNDS, PINGS, PROBES = 3, 16, 60
PROMPT, STREAMED = 64, 48  # tokens of the stream that is timed
STREAMS = 3
BUSY = 0.1  # of the forwards were disturbed: the user should know

OnStage = Callable[[str], None]


async def calibrate(
    bed: Testbed,
    scenario: Scenario,
    console: Console | None = None,
    *,
    command: str = "dsdlab calibrate",
    budget_s: float | None = None,
    seed: int = 0,
) -> SystemProfile:
    """Measure a bed that is up and idle, and fit. About a minute for two nodes.

    console: shows progress and the result. budget_s: for the models of each node; default: the nodes' own.
    The link of the first edge is as before when this returns. Raises UnfitProfile for an external verifier,
    UnfitMeasures where times make no sense, NodeError, NodeDied, LinkError or TimeoutError.
    """
    if bed.external is not None:
        raise UnfitProfile(
            "a verifier that was started by hand cannot be calibrated from here; calibrate a bed of runtime "
            "process, netns or docker on its machine"
        )
    if console is None:
        return await _calibrate(bed, scenario, command, budget_s, seed, _quietly)
    with bar(console) as progress:
        task = progress.add_task("calibrating", total=None)
        profile = await _calibrate(
            bed, scenario, command, budget_s, seed, lambda what: progress.update(task, description=what)
        )
    show_profile(profile, console)
    return profile


def _quietly(what: str) -> None:
    """Nobody wants to know."""


async def _calibrate(
    bed: Testbed, scenario: Scenario, command: str, budget_s: float | None, seed: int, on_stage: OnStage
) -> SystemProfile:
    begun_at = datetime.now(UTC)
    sampling = _drawn(scenario)
    before = bed.profile
    quiet = LinkProfile(rtt_ms=LINK_RTT_MS)
    await bed.set_link(quiet)
    try:
        on_stage("calibrating frames")
        frame_s, pinged = await _frame_s(bed, quiet)
        streamed_s, streamed = await _stream(bed)
    finally:
        await bed.set_link(before)
    on_stage("calibrating the verifier's models")
    on_cloud = await bed.measure_models(sampling=sampling, budget_s=budget_s, seed=seed)
    on_stage("calibrating the edge's models")
    on_edge = await bed.measure_models(0, sampling=sampling, budget_s=budget_s, seed=seed)
    on_stage("calibrating what the nodes cost each other")
    contention, together = await measure_contention(bed, seed)
    cloud = _costs(on_cloud, frame_s / 4.0, hop_s=streamed_s)
    models = scenario.models
    runtime, link = scenario.run.runtime, scenario.run.link
    return SystemProfile(
        name=f"{models.target} with {models.drafter}",
        origin="measured here",
        source=f"calibrated {begun_at:%Y-%m-%d} as deployed: runtime {runtime}, link {link}",
        target=models.target,
        drafter=models.drafter,
        precision=models.precision,
        cloud=cloud,
        edge=_costs(on_edge, frame_s / 4.0),
        contention=contention,
        provenance={
            **provenance(command),
            "runtime": runtime,
            "link": link,
            "bed": await bed.facts(),
            "frames": pinged,
            "contention": together,
            "streamed_hop_s": streamed_s,
            "stream_over_fit": _against_stream(cloud.target, streamed),
            "nodes": {name: _told(found) for name, found in (("cloud", on_cloud), ("edge", on_edge))},
            "wall_s": (datetime.now(UTC) - begun_at).total_seconds(),
        },
    )


def _drawn(scenario: Scenario) -> dict[str, Any]:
    """How the scenario draws tokens, for the price of drawing one; empty where it never does."""
    sampling = scenario.sampling
    drawing = [t for t in sampling.temperature if t > 0.0]
    if not drawing:
        return {}
    return {"temperature": drawing[0], "top_k": sampling.top_k, "top_p": sampling.top_p, "seed": 1}


async def _frame_s(bed: Testbed, link: LinkProfile) -> tuple[float, dict[str, Any]]:
    """What a frame's round trip takes beyond the link's, s; and what was measured, for the record."""
    pings_ms: list[float] = []
    links_ms: list[float] = []
    instrument = "packets" if bed.packets else "profile"
    for _ in range(ROUNDS):
        pings_ms += await bed.ping(PINGS)
        if bed.packets:
            links_ms.append((await bed.calibrate(link, n=PROBES)).rtt_p50_ms)
        else:
            links_ms.append(link.rtt_ms)
    ping_ms, link_ms = median(pings_ms), median(links_ms)
    told = {"ping_p50_ms": ping_ms, "link_p50_ms": link_ms, "instrument": instrument, "pings": len(pings_ms)}
    return max(0.0, ping_ms - link_ms) / 1e3, told


async def _stream(bed: Testbed) -> tuple[float, list[Sample]]:
    """What passes between two commits of a stream beyond the target's compute, s: median over all steps; and
    what these steps computed."""
    info = bed.verifier.info["info"]["target"]
    prompt = min(PROMPT, info["max_context"] // 4)
    tokens = min(STREAMED, info["max_context"] // 2)
    extras: list[float] = []
    computed: list[Sample] = []
    for seed in range(STREAMS):
        job = {
            "prompt_ids": calibration_text(info["vocab_size"], prompt, seed),
            "mode": "cloud-ar",
            "max_new_tokens": tokens,
            "stop_at_eos": False,
        }
        record = await bed.generate(job)
        at_s = [when for when, _ in record["commits"]]
        for step, compute_s in enumerate(record["t_verify_s"][1:]):  # the first is the prompt's
            extras.append(at_s[step + 1] - at_s[step] - compute_s)
            computed.append(Sample(1, 1, prompt + step, compute_s))
    return (max(0.0, median(extras)) if extras else 0.0), computed


def _against_stream(cost: ForwardCost | None, computed: Sequence[Sample]) -> float | None:
    """The stream's steps, which the fit has not seen: median of measured/fitted."""
    if cost is None or not computed:
        return None
    return median(s.seconds / cost.cost_s(s.tokens, s.batch, s.context) for s in computed)


def _costs(found: dict[str, Measures], quarter_s: float, hop_s: float | None = None) -> NodeCosts:
    """A node's costs. hop_s: where it is known better than from the compute thread alone."""
    hops_s = [h for measures in found.values() for h in measures.hops_s]
    thread_s = max(0.0, median(hops_s)) if hops_s else 0.0
    return NodeCosts(
        target=fit_measures(found["target"]) if "target" in found else None,
        drafter=fit_measures(found["drafter"]) if "drafter" in found else None,
        hop_s=thread_s if hop_s is None else max(hop_s, thread_s),
        send_s=quarter_s,
        recv_s=quarter_s,
    )


def _told(found: dict[str, Measures]) -> dict[str, Any]:
    return {
        model: {
            "model": measures.model,
            "repeats": measures.repeats,
            "wall_s": measures.wall_s,
            "disturbed": measures.disturbed,
            "thread_hop_p50_s": median(measures.hops_s) if measures.hops_s else 0.0,
        }
        for model, measures in found.items()
    }


def show_profile(profile: SystemProfile, console: Console) -> None:
    """Print a profile: every form with its coefficients, its fit and its range."""
    table = Table(title=f"{profile.name} ({profile.origin})", caption=profile.source)
    table.add_column("")
    found: list[tuple[str, ForwardCost]] = []
    for node, costs in (("cloud", profile.cloud), ("edge", profile.edge)):
        for model in ("target", "drafter"):
            cost: ForwardCost | None = getattr(costs, model)
            if cost is not None:
                found.append((f"{model} on the {node}", cost))
                table.add_column(f"{model}, {node}", justify="right")
    rows: list[tuple[str, Callable[[ForwardCost], str]]] = [
        ("1 row, ms", lambda c: _ms(c.cost_s(1, 1, 128))),
        ("5 rows, ms", lambda c: _ms(c.cost_s(5, 1, 128))),
        ("128 rows, ms", lambda c: _ms(c.cost_s(128, 1, 0))),
        ("base, ms", lambda c: _ms(c.base_s)),
        ("per row, µs", lambda c: _us(c.per_token_s)),
        ("per row², ns", lambda c: f"{1e9 * c.per_token2_s:.3g}"),
        ("per session, µs", lambda c: _us(c.per_session_s) if c.batch[1] > 1 else "–"),
        ("per position, µs", lambda c: _us(c.per_context_s)),
        ("per drawn token, µs", lambda c: _us(c.per_drawn_s)),
        ("after another model, ms", lambda c: _ms(c.first_s)),
        ("after idling, ms", lambda c: ", ".join(f"{_ms(y)} ({1e3 * x:g})" for x, y in c.after_idle) or "–"),
        ("fades to", lambda c: f"{c.fade:.2f}"),
        ("R² (line alone)", lambda c: "–" if c.fit is None else f"{c.fit.r2:.4f} ({c.fit.r2_line:.4f})"),
        ("error p50, p95", lambda c: "–" if c.fit is None else _percent(c.fit.error_p50, c.fit.error_p95)),
        ("mean residual", lambda c: f"{sum(c.residuals) / len(c.residuals):.3f}" if c.residuals else "–"),
        ("measurements", lambda c: "–" if c.fit is None else str(c.fit.n)),
        ("rows", lambda c: _range(c.tokens)),
        ("sessions", lambda c: _range(c.batch)),
        ("context", lambda c: _range(c.context)),
    ]
    for name, show in rows:
        table.add_row(name, *(show(cost) for _, cost in found))
    console.print(table)
    for node, costs in (("cloud", profile.cloud), ("edge", profile.edge)):
        console.print(
            f"{node} node: hop {_us(costs.hop_s)} µs, send {_us(costs.send_s)} µs, "
            f"receive {_us(costs.recv_s)} µs",
            highlight=False,
        )
    _show_contention(profile, console)
    if (ratio := profile.provenance.get("stream_over_fit")) is not None:
        console.print(f"a stream, which the fit has not seen: measured/fitted {ratio:.3f}", highlight=False)
    _warn(profile, console)


def _show_contention(profile: SystemProfile, console: Console) -> None:
    """Say what the nodes cost each other, with what was measured where that is known."""
    measured = profile.provenance.get("contention")
    for model in ("target", "drafter"):
        factor = getattr(profile.contention, model)
        told = measured.get(model) if isinstance(measured, dict) else None
        if factor == 1.0 and not told:
            continue
        words = ""
        if told:
            low, high = told["interval"]
            rows = ", ".join(f"{n}: {value:.3f}" for n, value in told["by_rows"].items())
            words = f" (measured {told['factor']:.3f}, 95 % in {low:.3f} to {high:.3f}; by rows {rows})"
        console.print(
            f"{model} while the other node computes: {factor:.3f} × as long{words}", highlight=False
        )


def _warn(profile: SystemProfile, console: Console) -> None:
    """Say where the machine was not quiet."""
    nodes = profile.provenance.get("nodes")
    for node, models in nodes.items() if isinstance(nodes, dict) else ():
        for model, told in models.items():
            if told["disturbed"] > BUSY:
                console.print(
                    f"[yellow]other work had the core during {told['disturbed']:.0%} of the {model}'s "
                    f"forwards on the {node} node; calibrate again when the machine is quiet[/]",
                    highlight=False,
                )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.3g}"


def _percent(*shares: float) -> str:
    return ", ".join(f"{100 * share:.1f} %" for share in shares)


def _range(ends: Sequence[int]) -> str:
    return f"{ends[0]} to {ends[1]}"
