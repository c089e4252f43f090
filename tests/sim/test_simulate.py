"""Scenarios in virtual time: the same tokens as the target alone, the time that costs and links say."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dsdlab.decoding import Sampling
from dsdlab.models.drafters import PromptLookup
from dsdlab.nodes import GenerationRecord, GenerationRequest
from dsdlab.scenario import Scenario, load_scenario
from dsdlab.sim.compute import SimCompute
from dsdlab.sim.costs import Contention, ForwardCost, NodeCosts, SystemProfile, UnfitProfile
from dsdlab.sim.predict import predict
from dsdlab.sim.prediction import PredictionError, encode_prediction, load_prediction
from dsdlab.sim.profile import LinkProfile, LinkStep
from dsdlab.sim.simulate import Pair, simulate_generation
from dsdlab.sim.theory_stream import stream_tpot_s
from dsdlab.sim.trace import Trace
from dsdlab.sweep.plan import Job, plan_jobs
from dsdlab.sweep.workload import Prompt

TARGET = "emulated:base_s=0.05,per_token_s=0.001"
DRAFTER = "emulated:base_s=0.005,alpha=0.8"
PAIR = Pair(target=TARGET, drafter=DRAFTER)
WAYS: dict[str, dict[str, Any]] = {
    "cloud-ar": {},
    "cloud-sd": {},
    "edge-sd": {},
    "dsd-sync": {},
    "dsd-pipelined": {"run_ahead": 12},
    "dsd-stream": {},
    "free run": {"mode": "dsd-stream", "free_run": True},
    "free run beside": {"mode": "dsd-stream", "free_run": True, "beside": 3},
    "dsd-adaptive": {},
    "dsd-adaptive beside": {"mode": "dsd-adaptive", "beside": 3},
}
STREAMS = tuple(way for way in WAYS if way.startswith(("dsd-p", "dsd-stream", "free", "dsd-a")))
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
EMPTY: dict[str, Any] = {
    "target": "t",
    "drafter": "prompt-lookup",
    "precision": "bf16",
    "tokenizer": "",
    "vocab_size": 9,
    "eos_ids": (),
    "max_context": 64,
    "gamma": 4,
    "texts": (),
}
NODE = NodeCosts(target=ForwardCost(base_s=0.05), drafter=ForwardCost(base_s=0.004))
PROFILE = SystemProfile(name="made-up", origin="published", source="a test", edge=NODE, cloud=NODE)


def request(way: str, *, n: int = 40, gamma: int = 4) -> GenerationRequest:
    """A generation in one of `WAYS`."""
    fields = {"mode": way, "gamma": gamma, "sampling": Sampling(seed=7), "max_new_tokens": n} | WAYS[way]
    return GenerationRequest([5, 3, 9], **fields)


def planned(tmp_path: Path, text: str = SCENARIO) -> tuple[Scenario, list[Job]]:
    (tmp_path / "s.toml").write_text(text)
    scenario = load_scenario(tmp_path / "s.toml")[0]
    return scenario, plan_jobs(scenario, [Prompt("a", "one two"), Prompt("b", "three")], [[1, 2], [3]])


@pytest.mark.parametrize("way", WAYS)
def test_every_mode_says_what_the_target_says_alone(way: str) -> None:
    alone = simulate_generation(PAIR, request("cloud-ar"), LinkProfile(), seed="a").ids
    lossy = LinkProfile(rtt_ms=80, rate_up_mbit=1, rate_down_mbit=1, loss_pct=5, jitter_ms=10)
    assert len(alone) == 40
    for seed in "abc":
        record = simulate_generation(PAIR, request(way), lossy, seed=seed)
        assert record.ids == alone
        assert (record.drafted > 0) == (way in STREAMS or way in ("edge-sd", "dsd-sync"))


@pytest.mark.parametrize("way", STREAMS)
def test_a_stream_is_the_same_every_time_and_jitter_is_drawn_anew(way: str) -> None:
    link = LinkProfile(rtt_ms=60, loss_pct=3, jitter_ms=20)
    one, two, other = (
        msgspec.json.encode(simulate_generation(PAIR, request(way, n=120), link, seed=seed))
        for seed in ("1", "1", "2")
    )
    assert one == two
    assert one != other


def test_a_stream_by_hand() -> None:
    """α = 1, RTT 20 ms, t_d = 5 ms, t_v(k) = 51 + k ms. Times are since the edge has the prompt's token.

    Draft j is at the target at 10 + 5 j. So the first step has one draft and lasts from 15 to 67; then eleven
    drafts have come and two tokens are in the text: the second step has nine of them, and so on. (Over a
    longer link TCP's first window of ten segments would be in the way.)
    """
    pair = Pair(target=TARGET, drafter="emulated:base_s=0.005,alpha=1")
    record = simulate_generation(pair, request("dsd-stream", n=60), LinkProfile(rtt_ms=20), seed="a")
    text, now_ms, windows = 0, 15.0, list[tuple[int, int]]()
    while text < 59:
        k = min(int((now_ms - 10.0) / 5.0), 58) - text
        windows.append((k, k))
        text += k + 1
        now_ms += 51.0 + k
    assert record.windows[1:] == windows
    assert record.windows[1:3] == [(1, 1), (9, 9)]
    assert record.commits[-1][0] - record.commits[0][0] == pytest.approx((now_ms + 10.0) / 1e3, rel=1e-6)


@pytest.mark.parametrize("rtt_ms", [0, 20, 100])
@pytest.mark.parametrize("free", [False, True])
def test_long_streams_take_what_the_closed_form_says(free: bool, rtt_ms: float) -> None:
    """The closed form is of means; these are two texts of 1500 tokens."""
    pair = Pair(target=TARGET, drafter=DRAFTER, max_context=2048)
    times_s = []
    for seed in range(2):
        ask = request("free run" if free else "dsd-stream", n=1500)
        ask = dataclasses.replace(ask, sampling=Sampling(seed=seed), run_ahead=64)
        times_s.append(simulate_generation(pair, ask, LinkProfile(rtt_ms=rtt_ms), seed="a").tpot_s or 0.0)
    hold_s = 0.0 if free else math.inf
    expected_s = stream_tpot_s(0.8, 0.005, 0.051, 0.001, rtt_ms / 1e3, hold_s=hold_s, run_ahead=64)
    assert sum(times_s) / 2 == pytest.approx(expected_s, rel=0.03)


def test_company_slows_only_those_who_compute_at_once() -> None:
    """On one machine drafting takes the target's memory from it; who waits for the other loses nothing."""
    crowded = msgspec.structs.replace(PROFILE, contention=Contention(target=1.3, drafter=1.2))
    alone, beside = (Pair(target="t", drafter="d", profile=p, alpha=0.8) for p in (PROFILE, crowded))
    link = LinkProfile(rtt_ms=30)

    def both(way: str) -> list[GenerationRecord]:
        return [simulate_generation(pair, request(way), link, seed="a") for pair in (alone, beside)]

    for way in ("cloud-ar", "cloud-sd", "edge-sd", "dsd-sync"):
        one, other = both(way)
        assert one.windows == other.windows
        assert other.commits[-1][0] == pytest.approx(one.commits[-1][0], rel=1e-9)
    for way in STREAMS:
        one, other = both(way)
        assert one.ids == other.ids
        target = sum(other.t_verify_s) / len(other.t_verify_s) / 0.05
        drafter = sum(other.t_draft_s) / len(other.t_draft_s) / 0.004
        assert 1.02 < target <= 1.3
        assert 1.02 < drafter <= 1.2 + 1e-9
        if way == "free run":  # the target never rests
            assert drafter == pytest.approx(1.2)
        assert (other.tpot_s or 0.0) > (one.tpot_s or 0.0)


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


def test_the_longest_window_of_a_stream_is_its_run_ahead(tmp_path: Path) -> None:
    text = SCENARIO.replace('mode = ["cloud-ar", "cloud-sd", "dsd-sync"]', 'mode = ["dsd-stream"]')
    scenario, jobs = planned(tmp_path, text.replace("[grid]", "[grid]\nrun_ahead = [3, 12]"))
    few = msgspec.structs.replace(NODE, target=ForwardCost(base_s=0.05, tokens=(1, 5)))
    profile = msgspec.structs.replace(PROFILE, cloud=few)
    cells = predict(scenario, jobs, Pair(target="t", drafter="d", profile=profile, alpha=0.5), draws=1).cells
    assert {(c.axes["run_ahead"], c.outside) for c in cells} == {
        (3, ""),
        (12, "target on the cloud: rows 13 (calibrated to 5)"),
    }


def test_lookup_alone_is_not_replayed_but_run() -> None:
    pair = Pair(target="t", drafter="prompt-lookup", profile=PROFILE, trace=Trace(**EMPTY))
    drafter = pair.drafter_on("edge", SimCompute(), random.Random(1))
    assert isinstance(drafter, PromptLookup)


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
