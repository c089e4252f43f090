"""Scenarios in virtual time: the same tokens as the target alone, the time that costs and links say."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from dsdlab.decoding import Sampling
from dsdlab.nodes import GenerationRequest
from dsdlab.scenario import Scenario, load_scenario
from dsdlab.sim.costs import ForwardCost, NodeCosts, SystemProfile, UnfitProfile
from dsdlab.sim.predict import predict
from dsdlab.sim.prediction import PredictionError, encode_prediction, load_prediction
from dsdlab.sim.profile import LinkProfile, LinkStep
from dsdlab.sim.simulate import Pair, simulate_generation
from dsdlab.sweep.plan import Job, plan_jobs
from dsdlab.sweep.workload import Prompt

TARGET = "emulated:base_s=0.05,per_token_s=0.001"
DRAFTER = "emulated:base_s=0.005,alpha=0.8"
PAIR = Pair(target=TARGET, drafter=DRAFTER)
MODES = ("cloud-ar", "cloud-sd", "edge-sd", "dsd-sync")
SCENARIO = f"""
name = "small"
[models]
target = "{TARGET}"
drafter = "{DRAFTER}"
[workload]
n_prompts = 2
max_new_tokens = 24
[grid]
mode = ["cloud-ar", "cloud-sd", "dsd-sync"]
gamma = [2, 4]
rtt_ms = [1, 80]
loss_pct = [0, 3]
[run]
repeats = 2
[simulate]
draws = 3
"""
NODE = NodeCosts(target=ForwardCost(base_s=0.05), drafter=ForwardCost(base_s=0.004))
PROFILE = SystemProfile(name="made-up", origin="published", source="a test", edge=NODE, cloud=NODE)


def request(mode: str, *, n: int = 40, gamma: int = 4) -> GenerationRequest:
    return GenerationRequest([5, 3, 9], mode, gamma=gamma, sampling=Sampling(seed=7), max_new_tokens=n)


def planned(tmp_path: Path, text: str = SCENARIO) -> tuple[Scenario, list[Job]]:
    (tmp_path / "s.toml").write_text(text)
    scenario = load_scenario(tmp_path / "s.toml")[0]
    return scenario, plan_jobs(scenario, [Prompt("a", "one two"), Prompt("b", "three")], [[1, 2], [3]])


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_says_what_the_target_says_alone(mode: str) -> None:
    alone = simulate_generation(PAIR, request("cloud-ar"), LinkProfile(), seed="a").ids
    lossy = LinkProfile(rtt_ms=80, rate_up_mbit=1, rate_down_mbit=1, loss_pct=5, jitter_ms=10)
    assert len(alone) == 40
    for seed in "abc":
        assert simulate_generation(PAIR, request(mode), lossy, seed=seed).ids == alone


def test_times_are_what_costs_and_link_say() -> None:
    """One window: γ drafts, half a round trip, one forward over γ + 1 rows, half a round trip."""
    link = LinkProfile(rtt_ms=30)
    streamed = simulate_generation(PAIR, request("cloud-ar"), link, seed="a")
    assert streamed.tpot_s == pytest.approx(0.051)
    assert streamed.ttft_s == pytest.approx(0.03 + 0.05 + 3 * 0.001)
    sync = simulate_generation(PAIR, request("dsd-sync", gamma=4), link, seed="a")
    whole = [w for w in sync.windows if w[0] == 4]
    assert len(whole) > 5
    first, last = sync.commits[0][0], sync.commits[-1][0]
    # the first entry is the prompt's own forward, whose token is the first commit
    windows = sum(0.005 * drafted + 0.03 + 0.05 + 0.001 * (drafted + 1) for drafted, _ in sync.windows[1:])
    assert last - first == pytest.approx(windows, rel=1e-3)


def test_what_the_nodes_add_is_spent() -> None:
    slow = NodeCosts(target=NODE.target, drafter=NODE.drafter, hop_s=0.001, send_s=0.002, recv_s=0.003)
    pair = Pair(
        target="t",
        drafter="d",
        profile=msgspec.structs.replace(PROFILE, edge=slow, cloud=slow),
        alpha=1.0,
    )
    link = LinkProfile(rtt_ms=20)
    record = simulate_generation(pair, request("dsd-sync", gamma=4, n=41), link, seed="a")
    assert record.windows[1] == (4, 4)
    window_s = 4 * 0.004 + 0.001 + 0.005 + 0.02 + 0.05 + 0.001 + 0.005
    opening_s = 0.001  # the drafter's slot, once
    assert record.tpot_s == pytest.approx((8 * window_s + opening_s) / 40, rel=1e-6)


def test_a_seed_repeats_everything_and_another_differs() -> None:
    lossy = LinkProfile(rtt_ms=40, loss_pct=10, jitter_ms=5)
    one, two, other = (
        msgspec.json.encode(simulate_generation(PAIR, request("dsd-sync", n=120), lossy, seed=seed))
        for seed in ("1", "1", "2")
    )
    assert one == two
    assert one != other


def test_residuals_are_drawn_anew() -> None:
    noisy = msgspec.structs.replace(NODE, target=ForwardCost(base_s=0.05, residuals=(0.9, 1.0, 1.1)))
    pair = Pair(target="t", drafter="d", profile=msgspec.structs.replace(PROFILE, cloud=noisy), alpha=0.5)
    times = {simulate_generation(pair, request("cloud-ar"), LinkProfile(), seed=s).tpot_s for s in "abcdef"}
    assert len(times) == 6
    assert all(t is not None and 0.045 < t < 0.055 for t in times)


def test_synthetic_acceptance_takes_a_real_prompt() -> None:
    pair = Pair(target="smollm2-135m-instruct", drafter="d", profile=PROFILE, alpha=0.8, persist=20.0)
    ask = GenerationRequest([49_000, 3, 9], "dsd-sync", gamma=4, max_new_tokens=2000, stop_at_eos=True)
    record = simulate_generation(pair, ask, LinkProfile(rtt_ms=5), seed="a")
    assert len(record.ids) == 2000
    assert record.alpha == pytest.approx(0.8, abs=0.08)


def test_the_link_changes_on_the_way() -> None:
    step = LinkStep(at_s=0.5, for_s=5.0, changes={"partitioned": True})
    link = LinkProfile(rtt_ms=20)
    plain = simulate_generation(PAIR, request("dsd-sync"), link, seed="a")
    cut = simulate_generation(PAIR, request("dsd-sync"), link, [step], seed="a")
    assert cut.ids == plain.ids
    assert 4.0 < cut.commits[-1][0] - plain.commits[-1][0] < 12.0
    jump = LinkStep(at_s=0.0, changes={"rtt_ms": 200.0})
    assert simulate_generation(PAIR, request("dsd-sync"), link, [jump], seed="a").tpot_s == pytest.approx(
        simulate_generation(PAIR, request("dsd-sync"), LinkProfile(rtt_ms=200), seed="a").tpot_s, rel=0.05
    )


def test_a_grid_is_predicted_whole_and_the_same_on_any_number_of_processes(tmp_path: Path) -> None:
    scenario, jobs = planned(tmp_path)
    one, two = (
        predict(scenario, jobs, PAIR, draws=scenario.simulate.draws, workers=workers) for workers in (1, 2)
    )
    assert one.cells == two.cells
    assert [c.cell for c in one.cells] == list(dict.fromkeys(j.cell_id for j in jobs))
    assert len(one.cells) == 2 * 2 * 5
    for cell in one.cells:
        assert not cell.error
        assert [g.rep for g in cell.generations] == [0, 1]
        for g in cell.generations:
            assert g.exact and g.tokens == 24 and len(g.tpot_ms) == len(g.ttft_ms) == 3
            lossy = cell.axes["loss_pct"] > 0
            assert lossy or len(set(g.tpot_ms)) == 1, "nothing is random without loss, jitter and residuals"
    path = tmp_path / "p.json"
    path.write_bytes(encode_prediction(one))
    assert load_prediction(path) == one
    assert one.acceptance["kind"] == "emulated"


def test_what_one_cell_suffers_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    text = SCENARIO.replace("repeats = 2", "repeats = 1\ntimeout_s = 2").replace("[1, 80]", "[1, 2000]")
    scenario, jobs = planned(tmp_path, text)
    found = {(c.axes["mode"], c.axes["rtt_ms"], c.axes["loss_pct"]): c for c in predict(
        scenario, jobs, PAIR, draws=2, workers=1).cells if c.axes["gamma"] in (0, 4)}  # fmt: skip
    assert found["dsd-sync", 2000, 0].error == "2 of 2 draws not finished within 2 s"
    assert not found["dsd-sync", 2000, 0].generations
    assert found["dsd-sync", 1, 0].generations and not found["dsd-sync", 1, 0].error


def test_extrapolation_is_marked(tmp_path: Path) -> None:
    scenario, jobs = planned(tmp_path)
    small = ForwardCost(base_s=0.05, tokens=(1, 2), context=(0, 8))
    pair = Pair(
        target="t",
        drafter="d",
        profile=msgspec.structs.replace(PROFILE, cloud=msgspec.structs.replace(NODE, target=small)),
        alpha=0.5,
    )
    cells = predict(scenario, jobs, pair, draws=1, workers=1).cells
    gamma_4 = [c.outside for c in cells if c.axes["gamma"] == 4]
    assert set(gamma_4) == {"target on the cloud: rows 5 (calibrated to 2), context 26 (calibrated to 8)"}
    assert {c.outside for c in cells if c.axes["mode"] == "cloud-ar"} == {
        "target on the cloud: context 26 (calibrated to 8)"
    }


def test_models_without_costs_or_words_are_refused() -> None:
    with pytest.raises(UnfitProfile, match=r"model smollm says nothing by itself; needs a trace"):
        simulate_generation(
            Pair(target="smollm", drafter="d", profile=PROFILE), request("cloud-ar"), LinkProfile(), seed="a"
        )
    bare = msgspec.structs.replace(PROFILE, edge=NodeCosts())
    with pytest.raises(UnfitProfile, match="profile made-up has no costs of the drafter on the edge node"):
        simulate_generation(
            Pair(target="t", drafter="d", profile=bare, alpha=0.5),
            request("dsd-sync"),
            LinkProfile(),
            seed="a",
        )


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"{", "is no prediction"),
        (b"[]", "is no prediction"),
        (b'{"version": 9}', "is a prediction of version 9; allowed: 1"),
        (b'{"version": 1}', "is no prediction: Object missing required field"),
    ],
)
def test_broken_predictions(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(data)
    with pytest.raises(PredictionError, match=says):
        load_prediction(path)
    with pytest.raises(PredictionError, match="No such file"):
        load_prediction(tmp_path / "none.json")
