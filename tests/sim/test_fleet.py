"""Fleets: workloads, routing, what a scenario makes of them, and what is said of bad ones."""

from __future__ import annotations

import gc
import io
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from dsdlab.nodes import GenerationRecord
from dsdlab.scenario import Scenario, ScenarioError, load_scenario
from dsdlab.sim.costs import ForwardCost, NodeCosts, SystemProfile, UnfitProfile
from dsdlab.sim.fleet import FleetResult, FleetSpec, run_fleet
from dsdlab.sim.fleet_grid import bound_tps, fleet_json, fleet_specs, simulate_fleet_grid
from dsdlab.sim.fleet_parts import Router, Window, quantile
from dsdlab.sim.fleet_table import FleetReport, capacity_lines, fleet_table
from dsdlab.sim.profile import LinkProfile
from dsdlab.sim.simulate import Pair, simulate_generation

SCENARIOS = Path(__file__).parents[2] / "scenarios"
EDGE = NodeCosts(drafter=ForwardCost(base_s=0.005))
CLOUD = NodeCosts(target=ForwardCost(base_s=0.05, per_token_s=0.0004), drafter=ForwardCost(base_s=0.005))


def spec(**changes: Any) -> FleetSpec:
    return FleetSpec(**({"edge": EDGE, "cloud": CLOUD, "link": LinkProfile(rtt_ms=20.0)} | changes))


def without_wall(result: FleetResult) -> FleetResult:
    return msgspec.structs.replace(result, wall_s=0.0)


def test_a_fleet_of_one_is_one_pair() -> None:
    """TTFT is half a round trip up, the prompt, half a round trip down; TPOT is the closed form's."""
    result = run_fleet(spec(mode="cloud-ar", drafters=1, max_new_tokens=11))
    ttft_ms = 20.0 + 50.0 + 0.4 * 64
    assert result.ttft_ms.p50 == pytest.approx(ttft_ms)
    assert result.tpot_ms.p50 == pytest.approx(50.4)
    assert (result.generations, result.tokens, result.sessions, result.windows) == (1, 11, 1, 11)
    assert result.virtual_s == pytest.approx(0.020 + ttft_ms / 1e3 + 10 * 0.0504)
    assert result.inexact == result.refused == 0


def test_closed_users_pause_and_ask_again() -> None:
    what = spec(drafters=4, think_s=3.0, duration_s=100.0, warmup_s=10.0, max_new_tokens=20)
    result = run_fleet(what)
    busy = run_fleet(replace(what, think_s=0.0))
    assert result.seconds == 90.0
    assert 10 < result.generations < busy.generations
    assert result.sessions > result.generations  # some in the warm-up
    assert result.utilisation[0] < busy.utilisation[0] <= 1.0
    assert result.goodput_tps == pytest.approx(20 * result.generations / 90.0, rel=0.1)


def test_open_sessions_come_at_their_rate_and_all_are_served() -> None:
    what = spec(arrival_per_s=2.0, duration_s=200.0, verifiers=3, max_new_tokens=8, generations_per_session=2)
    result = run_fleet(what)
    assert result.sessions == pytest.approx(400, rel=0.15)  # three standard deviations
    assert result.generations == pytest.approx(2 * result.sessions, abs=2)
    assert result.goodput_tps == pytest.approx(8 * result.generations / 200.0, rel=0.02)


def test_routing() -> None:
    """Chance leaves some verifiers idle while others are crowded."""
    waits = {}
    for routing in ("random", "round-robin", "jsq"):
        what = spec(arrival_per_s=6.0, duration_s=100.0, warmup_s=10.0, verifiers=4, max_new_tokens=24)
        result = run_fleet(replace(what, routing=routing))
        assert len(result.utilisation) == len(result.queue_mean) == len(result.wait_ms) == 4
        assert sum(result.utilisation) / 4 == pytest.approx(0.66, abs=0.06)
        waits[routing] = sum(result.wait_ms) / 4
    assert max(waits["jsq"], waits["round-robin"]) < 0.7 * waits["random"]


def test_a_router_balances() -> None:
    import random

    router = Router("jsq", 3, random.Random(1))
    assert [router.enter() for _ in range(4)] == [0, 1, 2, 0]
    router.leave(1)
    assert router.enter() == 1
    turns = Router("round-robin", 2, random.Random(1))
    assert [turns.enter() for _ in range(3)] == [0, 1, 0]
    chance = Router("random", 4, random.Random(1))
    assert {chance.enter() for _ in range(100)} == {0, 1, 2, 3}
    assert sum(chance.sessions) == 100


def test_a_shared_link_is_shared() -> None:
    """At 0.02 Mbit/s a window's frames take 36 ms each way: eight users wait for each other."""
    link = LinkProfile(rtt_ms=20.0, rate_up_mbit=0.02, rate_down_mbit=0.02)
    alone = spec(drafters=8, verifiers=8, link=link)
    own, shared = run_fleet(alone), run_fleet(replace(alone, shared_link=True))
    assert own.tpot_ms.p50 is not None
    assert shared.tpot_ms.p50 is not None
    assert shared.tpot_ms.p50 > 1.2 * own.tpot_ms.p50


def test_who_finds_no_slot_comes_back_or_gives_up() -> None:
    patient = run_fleet(spec(drafters=6, slots=2, max_new_tokens=12))
    assert (patient.generations, patient.refused) == (6, 0)
    long = run_fleet(spec(drafters=3, slots=1, max_new_tokens=5000, mode="cloud-ar"))
    assert (long.generations, long.refused) == (1, 2)  # the others looked for a slot for a minute


def test_a_partitioned_target_serves_more_and_is_no_faster() -> None:
    whole = spec(drafters=12, duration_s=120.0, warmup_s=20.0)
    assert CLOUD.target is not None
    parts = msgspec.structs.replace(CLOUD.target, stages=4, hop_s=0.001)
    split = replace(whole, cloud=msgspec.structs.replace(CLOUD, target=parts))
    one, four = run_fleet(whole), run_fleet(split)
    assert four.goodput_tps > 2.5 * one.goodput_tps
    assert four.utilisation[0] <= 1.0
    single = [run_fleet(replace(s, drafters=1)).tpot_ms.p50 or 0.0 for s in (whole, split)]
    assert single[1] > single[0]


@pytest.mark.parametrize("mode", ["cloud-ar", "cloud-sd", "dsd-sync"])
@pytest.mark.parametrize("drafters", [1, 3, 12])
def test_no_fleet_beats_its_bound(mode: str, drafters: int) -> None:
    for stages in (1, 3):
        assert CLOUD.target is not None
        parts = msgspec.structs.replace(CLOUD.target, stages=stages, hop_s=0.001)
        cloud = msgspec.structs.replace(CLOUD, target=parts)
        what = spec(mode=mode, drafters=drafters, cloud=cloud, duration_s=200.0, warmup_s=20.0, think_s=0.1)
        result = run_fleet(what)
        assert 0.75 * bound_tps(what) < result.goodput_tps < 1.03 * bound_tps(what)


def test_memory_is_of_the_sessions_not_of_their_number_of_tokens() -> None:
    def peak(generations: int) -> int:
        gc.collect()  # when it runs next must not hang on the tests before
        tracemalloc.start()
        run_fleet(spec(drafters=50, verifiers=50, generations_per_session=generations, max_new_tokens=16))
        _, top = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return top

    peak(1)
    assert peak(12) < peak(3) + 200_000  # nine more generations of each of 50 users


STREAMS: dict[str, dict[str, Any]] = {
    "dsd-pipelined": {"run_ahead": 12},
    "dsd-stream": {},
    "free run": {"mode": "dsd-stream", "free_run": True},
    "beside": {"mode": "dsd-stream", "free_run": True, "beside": 3},
    "dsd-adaptive": {"beside": 3},
}


@pytest.mark.parametrize("way", STREAMS)
def test_a_streaming_fleet_of_one_is_one_pair(way: str) -> None:
    """The same nodes, costs and acceptance as of `simulate_generation`: the same generation."""
    few = {"mode": way, "drafters": 1, "max_new_tokens": 60, "prompt_tokens": 8, "seed": 0}
    what = spec(**(few | STREAMS[way]))
    records: list[GenerationRecord] = []
    result = run_fleet(what, on_record=records.append)
    profile = SystemProfile(name="p", origin="published", source="a test", edge=EDGE, cloud=CLOUD)
    pair = Pair(target="t", drafter="d", profile=profile, alpha=what.alpha)
    alone = simulate_generation(pair, what.request((1,) * 8, 0), what.link, seed="a")
    (record,) = records
    assert record.windows == alone.windows
    assert [n for _, n in record.commits] == [n for _, n in alone.commits]
    assert [t for t, _ in record.commits] == pytest.approx([t for t, _ in alone.commits])
    assert result.inexact == 0
    assert result.drafted == record.drafted
    assert result.wasted == record.wasted
    assert result.tpot_ms.p50 == pytest.approx(1e3 * (record.tpot_s or 0.0))


@pytest.mark.parametrize("way", STREAMS)
def test_a_loaded_streaming_fleet_says_what_the_target_says(way: str) -> None:
    """Six users of one verifier over bad links; free run gives way to those who wait."""
    link = LinkProfile(rtt_ms=60.0, loss_pct=3.0, jitter_ms=15.0)
    fields = {"mode": way, "drafters": 6, "generations_per_session": 2, "link": link} | STREAMS[way]
    result = run_fleet(spec(**fields))
    assert result.generations == 12
    assert result.tokens == 12 * 64
    assert result.inexact == result.refused == 0
    assert 0 < result.wasted < result.drafted
    assert without_wall(run_fleet(spec(**fields))) == without_wall(result)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mode": "dsd-pipelined", "gamma": 9, "run_ahead": 8}, "gamma is 9"),
        ({"mode": "dsd-stream", "beside": 2}, "beside is 2"),
        ({"mode": "dsd-stream", "run_ahead": 0}, "run_ahead is 0"),
        ({"mode": "edge-sd"}, "mode is 'edge-sd'"),
        ({"routing": "best"}, "routing is 'best'"),
        ({"drafters": None}, "drafters, arrival_per_s"),
        ({"arrival_per_s": 1.0}, "drafters, arrival_per_s"),
        ({"drafters": None, "arrival_per_s": 1.0}, "duration_s is None"),
        ({"drafters": 0}, "drafters is 0"),
        ({"verifiers": 0}, "verifiers is 0"),
        ({"duration_s": float("nan")}, "duration_s is nan"),
        ({"duration_s": 5.0, "warmup_s": 5.0}, "warmup_s is 5.0"),
        ({"think_s": -1.0}, "think_s is -1.0"),
    ],
)
def test_impossible_fleets_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        spec(**({"drafters": 1} | changes))


def test_a_missing_cost_is_named() -> None:
    with pytest.raises(UnfitProfile, match="drafter on the edge"):
        run_fleet(spec(drafters=1, edge=NodeCosts()))
    with pytest.raises(UnfitProfile, match="target on the cloud"):
        run_fleet(spec(drafters=1, cloud=NodeCosts()))
    for changes in ({"mode": "cloud-sd"}, STREAMS["beside"]):
        with pytest.raises(UnfitProfile, match="drafter on the cloud"):
            run_fleet(spec(drafters=1, cloud=NodeCosts(target=CLOUD.target), **changes))


def test_small_tools() -> None:
    assert quantile([], 0.5) != quantile([], 0.5)
    assert [quantile([1.0, 2.0, 3.0, 4.0], q) for q in (0.0, 0.5, 0.51, 0.99, 1.0)] == [
        1.0,
        2.0,
        3.0,
        4.0,
        4.0,
    ]
    window = Window(1.0, 3.0)
    assert (window.overlap_s(0.0, 2.0), window.overlap_s(2.0, 9.0), window.overlap_s(4.0, 5.0)) == (
        1.0,
        1.0,
        0.0,
    )
    assert 1.0 in window
    assert 3.5 not in window


# scenarios -----------------------------------------------------------------------------------------


def scenario(text: str, tmp_path: Path) -> Scenario:
    file = tmp_path / "fleet.toml"
    file.write_text(text)
    return load_scenario(file)[0]


HEAD = """
name = "many"
[models]
target = "emulated:base_s=0.03,per_session_s=0.002"
drafter = "emulated:base_s=0.004,alpha=0.7"
[workload]
max_new_tokens = 12
[grid]
mode = ["cloud-ar", "dsd-sync"]
gamma = [2, 4]
rtt_ms = [10]
[fleet]
"""


def test_a_grid_of_fleets(tmp_path: Path) -> None:
    text = (
        HEAD
        + 'drafters = [1, 3]\nverifiers = [1, 2]\nrouting = ["jsq", "random"]\ngenerations_per_session = 2\n'
    )
    many = scenario(text, tmp_path)
    specs = fleet_specs(many)
    # three cells; with one verifier routing is nothing
    assert len(specs) == 3 * 2 * (1 + 2)
    assert {s.alpha for _, s in specs} == {0.7}
    assert all(s.cloud.target == ForwardCost(base_s=0.032, per_session_s=0.002) for _, s in specs)
    rows = simulate_fleet_grid(many, workers=1)
    assert [(r.mode, r.gamma, r.drafters, r.verifiers, r.routing) for r in rows[:3]] == [
        ("cloud-ar", 0, 1, 1, "jsq"),
        ("cloud-ar", 0, 1, 2, "jsq"),
        ("cloud-ar", 0, 1, 2, "random"),
    ]
    again = simulate_fleet_grid(many, workers=2)
    assert [without_wall(r.result) for r in rows] == [without_wall(r.result) for r in again]
    twin = json.loads(json.dumps(fleet_json(rows)))
    assert len(twin["cells"]) == len(rows)
    cell = twin["cells"][0]
    assert cell["tpot_ms_p50"] == pytest.approx(32.0)
    assert {"mode", "policy", "gamma", "rtt_ms", "rate_mbit", "loss_pct", "alpha", "goodput_tps"} <= set(cell)
    out = io.StringIO()
    Console(file=out, width=200).print(fleet_table(rows))
    lines = out.getvalue().splitlines()
    assert len(lines) == 1 + len(rows)
    assert lines[0].split()[:5] == ["mode", "γ", "drafters", "verifiers", "routing"]
    assert "loss" not in lines[0]  # it does not vary


def test_a_grid_of_streams(tmp_path: Path) -> None:
    text = HEAD.replace('"dsd-sync"]', '"dsd-stream"]\nfree_run = [false, true]\nbeside = [0, 2]')
    rows = simulate_fleet_grid(scenario(text + "drafters = [2]\ngenerations_per_session = 1\n", tmp_path))
    assert [(r.mode, r.free_run, r.beside, r.bound_tps is None) for r in rows] == [
        ("cloud-ar", False, 0, False),
        ("dsd-stream", False, 0, True),
        ("dsd-stream", True, 0, True),
        ("dsd-stream", True, 2, True),
    ]
    out = io.StringIO()
    Console(file=out, width=200).print(fleet_table(rows))
    head, *lines = out.getvalue().splitlines()
    assert head.split()[:6] == ["mode", "γ", "free", "run", "beside", "drafters"]
    assert [line.split()[:4] for line in lines[2:]] == [
        ["dsd-stream", "0", "yes", "0"],
        ["dsd-stream", "0", "yes", "2"],
    ]
    assert capacity_lines(rows, 1e6)[-1].startswith("dsd-stream, free run yes, beside 2: 2 drafters")


def test_capacity_in_words(tmp_path: Path) -> None:
    many = scenario(HEAD + "drafters = [1, 2, 6]\nduration_s = 30\n", tmp_path)
    lines = capacity_lines(simulate_fleet_grid(many, workers=1), 45.0)
    assert lines[0] == "cloud-ar, γ 0: 1 drafter within 45 ms per token (30 tokens/s)"
    assert any(line.startswith("dsd-sync, γ 4: 2 drafters") for line in lines)
    report = FleetReport(simulate_fleet_grid(many, workers=1), 1.0)
    assert report.lines()[0].endswith("kept to 1 ms per token")
    assert report.lines()[-1].endswith("0 differ from the target alone, 0 refused")
    assert len(report.tables()) == 1
    assert report.as_json() == fleet_json(report.rows)


def test_costs_come_from_a_profile(tmp_path: Path) -> None:
    text = HEAD.replace("emulated:base_s=0.03,per_session_s=0.002", "smollm2-135m-instruct")
    text = text.replace("emulated:base_s=0.004,alpha=0.7", "prompt-lookup")
    many = scenario(
        text + "arrival_per_s = [0.5]\nduration_s = 20\nstages = [2]\nstage_hop_ms = 3\n", tmp_path
    )
    profile = SystemProfile(name="here", origin="published", source="a test", edge=EDGE, cloud=CLOUD)
    with pytest.raises(UnfitProfile, match="has no costs; needs a profile"):
        fleet_specs(many)
    with pytest.raises(UnfitProfile, match=r"simulate\.alpha is missing"):
        fleet_specs(many, profile)
    specs = fleet_specs(many, profile, alpha=0.4, persist=9.0)
    assert {(s.alpha, s.persist, s.arrival_per_s, s.warmup_s) for _, s in specs} == {(0.4, 9.0, 0.5, 2.0)}
    target = specs[0][1].cloud.target
    assert target is not None
    assert (target.stages, target.hop_s, target.base_s) == (2, 0.003, 0.05)
    with pytest.raises(UnfitProfile, match="target on the cloud"):
        fleet_specs(many, msgspec.structs.replace(profile, cloud=NodeCosts()), alpha=0.4)


def test_acceptance_can_be_an_axis(tmp_path: Path) -> None:
    text = HEAD.replace("alpha=0.7", "alpha=0.7,informed=2") + "drafters = [2]\nduration_s = 5\n"
    tasks = text + "alpha = [0.6, 0.3]\n"
    assert {(s.alpha, s.informed) for _, s in fleet_specs(scenario(text, tmp_path))} == {(0.7, 2.0)}
    specs = [(c.mode, c.gamma, s.alpha, s.informed) for c, s in fleet_specs(scenario(tasks, tmp_path))]
    assert specs == [("cloud-ar", 0, 0.6, 2.0)] + [
        ("dsd-sync", g, a, 2.0) for g in (2, 4) for a in (0.6, 0.3)
    ]
    assert {s.alpha for _, s in fleet_specs(scenario(tasks, tmp_path), alpha=0.5)} == {0.5}
    out = io.StringIO()
    Console(file=out, width=200).print(fleet_table(simulate_fleet_grid(scenario(tasks, tmp_path), workers=1)))
    assert out.getvalue().splitlines()[0].split()[:4] == ["mode", "γ", "drafters", "α"]
    with pytest.raises(UnfitProfile, match=r"fleet\.alpha, simulate\.alpha are both given"):
        fleet_specs(scenario(tasks + "[simulate]\nalpha = 0.5\n", tmp_path))
    with pytest.raises(ScenarioError, match=r"fleet\.alpha\.0 is 1\.5"):
        scenario(text + "alpha = [1.5]\n", tmp_path)


def test_a_scenario_without_a_fleet_has_none(tmp_path: Path) -> None:
    with pytest.raises(UnfitProfile, match=r"has no table \[fleet\]"):
        fleet_specs(scenario('name = "x"\n[grid]\nrtt_ms = [1]\n', tmp_path))


@pytest.mark.parametrize(
    ("fleet", "said"),
    [
        ("", "fleet.drafters, fleet.arrival_per_s are missing; allowed: one of the two"),
        ("drafters = [1]\narrival_per_s = [1]", "are both given"),
        ("drafters = [1]", "fleet.duration_s is missing; allowed: how long the fleet runs, or"),
        ("arrival_per_s = [1]\ngenerations_per_session = 2", "fleet.duration_s is missing"),
        ("drafters = [2, 2]\nduration_s = 9", r"fleet.drafters is \[2, 2\]; allowed: every value once"),
        ("drafters = [0]\nduration_s = 9", "fleet.drafters.0 is 0"),
        ("drafters = [1]\nduration_s = 9\nwarmup_s = 9", "fleet.warmup_s is 9; allowed: less than"),
        (
            "drafters = [1]\ngenerations_per_session = 9\nwarmup_s = 9",
            "fleet.warmup_s is 9; allowed: less than",
        ),
        (
            'drafters = [1]\nduration_s = 9\nrouting = ["best"]',
            "fleet.routing.0 is 'best'; allowed: 'random'",
        ),
        ("drafters = [1]\nduration_s = 9\nthink_s = -1", "fleet.think_s is -1"),
        ("drafters = [1]\nduration_s = 9\npause_s = 1", "unknown key 'fleet.pause_s'"),
    ],
)
def test_bad_fleets_get_one_line(fleet: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=said) as raised:
        scenario(HEAD + fleet, tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"dsd-sync"]', '"edge-sd"]', "grid.mode is 'edge-sd'"),
        ("[fleet]", "[link]\nreorder_pct = 1\n[fleet]", "link.reorder_pct is 1"),
        ("[fleet]", "[[link.steps]]\nat_s = 1\nrtt_ms = 5\n[fleet]", "link.steps is not empty"),
        ("[fleet]", '[run]\nlink = "wan"\nverifier = "ws://h:1/"\n[fleet]', "run.link is 'wan'"),
    ],
)
def test_what_no_fleet_can_have(old: str, new: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=said):
        scenario(HEAD.replace(old, new) + "drafters = [1]\nduration_s = 9\n", tmp_path)


def test_a_fleet_changes_no_cell(tmp_path: Path) -> None:
    few = scenario(HEAD + "drafters = [1]\nduration_s = 9\n", tmp_path)
    many = scenario(HEAD + "drafters = [1000]\nduration_s = 9\n", tmp_path)
    assert few.digest() == many.digest()


def test_the_capacity_scenario_answers_its_questions() -> None:
    """In short: edge drafters serve more readers than fused ones at the same pace, and so do four devices."""
    capacity, _ = load_scenario(SCENARIOS / "capacity.toml")
    fleet = capacity.fleet
    assert fleet is not None
    assert fleet.max_tpot_ms is not None
    short = capacity.model_copy(update={"fleet": fleet.model_copy(update={"duration_s": 40.0})})
    rows = simulate_fleet_grid(short, workers=1)
    most = {
        (mode, stages): max(r.result.goodput_tps for r in rows if (r.mode, r.stages) == (mode, stages))
        for mode in ("cloud-sd", "dsd-sync")
        for stages in (1, 4)
    }
    assert most["dsd-sync", 1] == pytest.approx(2.0 * most["cloud-sd", 1], rel=0.06)
    assert most["dsd-sync", 4] > 3 * most["dsd-sync", 1]
    assert len(capacity_lines(rows, fleet.max_tpot_ms)) == 6
