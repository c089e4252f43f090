"""What `simulate`, `compare`, `trace` and `sweep --predict` do, from scenario to files and report."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dsdlab.scenario import Scenario, ScenarioError, load_scenario
from dsdlab.scenario_parts import check_acceptance
from dsdlab.sim.costs import SystemProfile, UnfitProfile
from dsdlab.sim.fleet_grid import simulate_fleet_grid
from dsdlab.sim.fleet_table import FleetReport
from dsdlab.sim.predict import predict
from dsdlab.sim.prediction import Prediction, PredictionError, encode_prediction, load_prediction
from dsdlab.sim.profiles import check_models, load_profile, profile_names, save_profile
from dsdlab.sim.simulate import EMULATED, Pair
from dsdlab.sim.trace import Trace, TraceError, load_trace, save_trace
from dsdlab.sweep.compare import Comparison, compare, comparison_json, prediction_rows
from dsdlab.sweep.plan import Job
from dsdlab.sweep.provenance import provenance
from dsdlab.sweep.references import ensure_references
from dsdlab.sweep.stats import Summary, summarise, summary_json
from dsdlab.sweep.store import Store, StoreError, read_json, read_rows, write_bytes
from dsdlab.sweep.tables import comparison_tables, tpot_tables
from dsdlab.sweep.traces import FILE as TRACE
from dsdlab.sweep.traces import ensure_trace
from testbed.calibrate import calibrate
from testbed.controller import CpuSplit, Testbed
from testbed.host import host_turn
from testbed.planning import plan_sweep, results_folder
from testbed.progress import bar
from testbed.reports import PREDICTION, SIMULATION, prediction_beside, write_report
from testbed.sweepbed import bed_of
from testbed.wan import external_verifier

SIMULATION_REPORT = "simulation.html"
PROFILE = "profile.json"  # what a prediction was made with
PROFILES = "profiles"


@dataclass(frozen=True, slots=True, kw_only=True)
class Feed:
    """What the simulator is fed with, where a command says other than the scenario. None: the scenario's."""

    profile: str | None = None
    trace: Path | None = None
    alpha: float | None = None
    persist: float | None = None
    draws: int | None = None
    engine: str = "local"
    workers: int | None = None


def profile_path(out: Path, scenario: Scenario) -> Path:
    """Where `dsdlab calibrate` keeps the profile of a scenario's pair on this host and runtime."""
    models = scenario.models
    words = (models.target, models.drafter, models.precision, scenario.run.runtime, scenario.run.link)
    name = "_".join(word.replace("/", "-").replace("+", "-").replace(":", "-") for word in words)
    return out / PROFILES / f"{name}.json"


def find_profile(
    scenario: Scenario, where: Path, out: Path, feed: Feed, console: Console
) -> SystemProfile | None:
    """The profile to simulate with: the one named, else the calibration of this host, else a shipped one of
    the same models; None where the models are emulated and cost what they say.

    A profile that is named must be of the scenario's models, unless these are emulated or their acceptance is
    synthetic. `where`: the scenario's file; a profile that it names is relative to it. Raises UnfitProfile.
    """
    models = scenario.models
    given = feed.profile
    asked = given or scenario.simulate.profile
    synthetic = models.target.startswith(EMULATED) or _alpha(scenario, feed) is not None
    if asked is not None:
        path = asked if given is not None or asked in profile_names() else str(where.parent / asked)
        profile = load_profile(path)
        if not synthetic:
            check_models(profile, models.target, models.drafter, models.precision)
        return profile
    if models.target.startswith(EMULATED):
        return None
    own = profile_path(out, scenario)
    if own.is_file():
        profile = load_profile(str(own))
        check_models(profile, models.target, models.drafter, models.precision)
        return profile
    for name in profile_names():
        profile = load_profile(name)
        try:
            check_models(profile, models.target, models.drafter, models.precision)
        except UnfitProfile:
            continue
        if profile.target:
            console.print(
                f"profile {name}, measured on another machine perhaps ({profile.source}); "
                "`dsdlab calibrate` measures this one",
                highlight=False,
                markup=False,
            )
            return profile
    raise UnfitProfile(
        f"no profile of {models.target} with {models.drafter} in {models.precision}; measure one with "
        f"`dsdlab calibrate {where}`, or name one: {', '.join(profile_names())}"
    )


async def find_trace(
    scenario: Scenario, jobs: Sequence[Job], folder: Path, feed: Feed, console: Console
) -> Trace | None:
    """The recorded acceptance; recorded now where it is missing. None for emulated models and synthetic
    acceptance. Raises TraceError."""
    if scenario.models.target.startswith(EMULATED) or _alpha(scenario, feed) is not None:
        return None
    if feed.trace is not None:
        trace = load_trace(feed.trace)
        trace.check(scenario, jobs)
        return trace
    with ExitStack() as stack:
        progress = stack.enter_context(bar(console))
        task = progress.add_task("the target alone", total=None)
        cpus = CpuSplit.default()
        references, _ = await ensure_references(
            scenario, jobs, folder, cpus.verifier, lambda n, of: progress.update(task, completed=n, total=of)
        )
        progress.reset(task, total=None, description="the drafter at every position")
        return await ensure_trace(
            scenario,
            jobs,
            references,
            folder,
            cpus.drafter,
            lambda n, of: progress.update(task, completed=n, total=of),
        )


def _alpha(scenario: Scenario, feed: Feed) -> float | None:
    return feed.alpha if feed.alpha is not None else scenario.simulate.alpha


def pair_of(scenario: Scenario, profile: SystemProfile | None, trace: Trace | None, feed: Feed) -> Pair:
    """What the simulator needs to know of the models."""
    alpha = _alpha(scenario, feed)
    persist = feed.persist if feed.persist is not None else scenario.simulate.persist
    try:
        check_acceptance(alpha, persist)
    except ValueError as e:
        raise ScenarioError(str(e)) from None
    return Pair(
        target=scenario.models.target,
        drafter=scenario.models.drafter,
        profile=profile,
        trace=trace,
        alpha=alpha,
        persist=persist,
        max_context=scenario.models.max_context,
        edge_target=scenario.models.edge_target,
        edge_drafter=scenario.models.edge_drafter,
    )


def predict_grid(
    scenario: Scenario, jobs: Sequence[Job], pair: Pair, feed: Feed, command: str, console: Console
) -> Prediction:
    """Every cell, with a progress bar; what lies outside the profile is told. Raises what it raises."""
    with bar(console) as progress:
        task = progress.add_task("simulating", total=None)
        prediction = predict(
            scenario,
            jobs,
            pair,
            draws=feed.draws or scenario.simulate.draws,
            engine=feed.engine,
            workers=feed.workers,
            on_done=lambda n, of: progress.update(task, completed=n, total=of),
            provenance=provenance(command),
        )
    _tell(prediction, console)
    return prediction


def _tell(prediction: Prediction, console: Console) -> None:
    """What a reader of the numbers must know: extrapolations and failures, each kind once."""
    for field, what in (("outside", "far outside what the profile was calibrated for"), ("error", "failed")):
        found = [text for cell in prediction.cells if (text := getattr(cell, field))]
        for text in dict.fromkeys(found):
            console.print(
                f"{what} in {found.count(text)} of {len(prediction.cells)} cells: {text}",
                highlight=False,
                markup=False,
                style="yellow",
            )


@dataclass(frozen=True, slots=True)
class Simulated:
    """A grid that was only simulated, for the command to print."""

    prediction: Prediction
    summary: Summary
    folder: Path
    report: Path

    def as_json(self) -> dict[str, Any]:
        prediction = self.prediction
        return {
            **summary_json(prediction.scenario, self.summary),
            "profile": prediction.profile,
            "acceptance": prediction.acceptance,
            "draws": prediction.draws,
            "wall_s": round(prediction.wall_s, 3),
            "extrapolated": {cell.cell: cell.outside for cell in prediction.cells if cell.outside},
            "folder": str(self.folder),
            "report": str(self.report),
        }

    def tables(self) -> list[Table]:
        return tpot_tables(self.summary)

    def lines(self) -> list[str]:
        n = len(self.prediction.cells)
        return [
            self.summary.verdict,
            self.summary.exact_line,
            *self.summary.notes,
            f"simulated {n} cells × {self.prediction.draws} draws in {self.prediction.wall_s:.1f} s "
            f"with profile {self.prediction.profile['name']} ({self.prediction.profile['origin']})",
            f"report: {self.report}",
        ]


@dataclass(frozen=True, slots=True)
class ComparedSweep:
    """A sweep held against its simulation, for the command to print."""

    name: str
    comparison: Comparison
    report: Path

    def as_json(self) -> dict[str, Any]:
        return {**comparison_json(self.name, self.comparison), "report": str(self.report)}

    def tables(self) -> list[Table]:
        return comparison_tables(self.comparison)

    def lines(self) -> list[str]:
        found = self.comparison
        differing = [w.line for w in found.windows_differ]
        return [found.line, found.windows_line, *differing, f"report: {self.report}"]


def save_prediction(path: Path, prediction: Prediction) -> None:
    """Write it whole or not at all. Raises StoreError."""
    write_bytes(path, encode_prediction(prediction))


def compare_folder(folder: Path, given: Path | None) -> ComparedSweep:
    """Hold a sweep against its simulation and write its report with both.

    Raises StoreError, PredictionError or CompareError.
    """
    rows, _ = read_rows(folder)
    if not rows:
        raise StoreError(f"{folder} holds no measurements; allowed: a folder that a sweep wrote")
    prediction = load_prediction(given) if given is not None else prediction_beside(folder)
    if prediction is None:
        raise PredictionError(
            f"{folder} holds no {PREDICTION} and no {SIMULATION}; simulate the scenario first, "
            "or name another with --prediction FILE"
        )
    comparison = compare(rows, prediction)
    run = read_json(folder / "run.json") or {}
    return ComparedSweep(
        str(run.get("name", folder.name)), comparison, write_report(folder, run, rows, prediction)
    )


async def simulate(
    path: Path, *, overrides: dict[str, Any], out: Path, feed: Feed, command: str, console: Console
) -> Simulated | FleetReport:
    """Simulate a scenario's grid, keep it beside what a sweep of it would measure, and write a report; or,
    where it asks about a fleet, simulate that.

    Raises ScenarioError, UnfitProfile, TraceError, GridFailed or StoreError.
    """
    alone, _ = load_scenario(path, overrides)
    if alone.fleet is not None:
        return await asyncio.to_thread(_simulate_fleet, alone, path, out, feed, console)
    scenario, text, jobs = plan_sweep(path, overrides, console, what="cells are those of")
    folder = results_folder(out, scenario)
    profile = find_profile(scenario, path, out, feed, console)
    trace = await find_trace(scenario, jobs, folder, feed, console)
    pair = pair_of(scenario, profile, trace, feed)
    # in a thread: it may run event loops of its own, and one thread runs one at a time
    prediction = await asyncio.to_thread(predict_grid, scenario, jobs, pair, feed, command, console)
    save_prediction(folder / SIMULATION, prediction)
    rows = prediction_rows(prediction, scenario)
    if not any(row.status == "ok" for row in rows):
        why = next((cell.error for cell in prediction.cells if cell.error), "")
        raise PredictionError(f"nothing could be simulated: {why}")
    run = {
        "name": scenario.name,
        "title": scenario.title,
        "scenario_text": text,
        "scenario": scenario.model_dump(),
        **prediction.provenance,
        "models": {role: {"model_id": getattr(scenario.models, role)} for role in ("target", "drafter")},
    }
    report = write_report(folder, run, rows, name=SIMULATION_REPORT)
    return Simulated(prediction, summarise(rows, allow_incomplete=True), folder, report)


def _simulate_fleet(scenario: Scenario, path: Path, out: Path, feed: Feed, console: Console) -> FleetReport:
    assert scenario.fleet is not None
    profile = find_profile(scenario, path, out, feed, console)
    with bar(console) as progress:
        task = progress.add_task("simulating fleets", total=None)
        rows = simulate_fleet_grid(
            scenario,
            profile,
            alpha=feed.alpha,
            persist=feed.persist,
            engine=feed.engine,
            workers=feed.workers,
            on_done=lambda n, of: progress.update(task, completed=n, total=of),
        )
    return FleetReport(rows, scenario.fleet.max_tpot_ms)


async def predict_before(
    scenario: Scenario,
    path: Path,
    jobs: Sequence[Job],
    bed: Testbed,
    store: Store,
    feed: Feed,
    command: str,
    console: Console,
) -> None:
    """Calibrate the bed that is about to measure, simulate its whole plan, and write both down first.

    What the folder holds from an earlier, interrupted sweep is kept: a prediction is made once.
    """
    folder = store.folder
    if (folder / PREDICTION).is_file():
        console.print(f"the prediction of {folder} is kept: it was made before its measurements")
        return
    if store.rows:
        raise StoreError(
            f"{folder} holds measurements and no prediction; a prediction comes first (--fresh starts anew), "
            "or simulate afterwards with `dsdlab simulate`"
        )
    profile: SystemProfile | None = None
    if feed.profile is not None or scenario.simulate.profile is not None:
        profile = find_profile(scenario, path, folder.parent, feed, console)
    else:
        profile = await calibrate(bed, scenario, console, command=command)
        save_profile(folder / PROFILE, profile)
    trace = await find_trace(scenario, jobs, folder, feed, console)
    pair = pair_of(scenario, profile, trace, feed)
    prediction = await asyncio.to_thread(predict_grid, scenario, jobs, pair, feed, command, console)
    save_prediction(folder / PREDICTION, prediction)
    console.print(
        f"predicted {len(prediction.cells)} cells in {prediction.wall_s:.0f} s, before measuring: "
        f"{folder / PREDICTION} (SHA-256 {prediction.sha256()[:16]}…)",
        markup=False,
        highlight=False,
    )


async def calibrate_scenario(
    path: Path,
    *,
    overrides: dict[str, Any],
    out: Path,
    to: Path | None,
    command: str,
    console: Console,
) -> Path:
    """Bring up the scenario's bed, measure what its models cost there, and write the profile."""
    scenario, _, _ = plan_sweep(path, overrides, console, what="calibrating on")
    to = to or profile_path(out, scenario)
    async with (
        host_turn(lambda text: console.print(text, highlight=False)),
        bed_of(scenario, out / PROFILES / "bed", external_verifier(scenario)) as bed,
    ):
        save_profile(to, await calibrate(bed, scenario, console, command=command))
    return to


async def trace_scenario(
    path: Path, overrides: dict[str, Any], *, out: Path, to: Path | None, console: Console
) -> Path:
    """Record a scenario's texts and windows, or those that are missing."""
    scenario, _, jobs = plan_sweep(path, overrides, console, what="cells are those of")
    folder = results_folder(out, scenario)
    trace = await find_trace(scenario, jobs, folder, Feed(), console)
    if trace is None:
        raise TraceError(f"{path}: emulated models and synthetic acceptance have nothing to record")
    if to is None:
        return folder / TRACE
    save_trace(to, trace)
    return to
