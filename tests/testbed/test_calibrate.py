"""Calibration of a real bed: processes, sockets, a link; models whose cost is known."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import msgspec
import pytest
from bed_tools import run
from rich.console import Console

from dsdlab.scenario import Scenario
from dsdlab.sim.costs import SystemProfile, UnfitProfile
from dsdlab.sim.profile import LinkProfile
from dsdlab.sim.profiles import check_models, load_profile, save_profile
from testbed.calibrate import calibrate
from testbed.controller import Testbed
from testbed.runtimes.base import NodeError

TARGET = "emulated:base_s=0.012,per_token_s=0.0004,per_session_s=0.001"
DRAFTER = "emulated:base_s=0.003,per_token_s=0.0002,alpha=0.8"


def scenario() -> Scenario:
    return Scenario.model_validate(
        {
            "name": "calibrated",
            "models": {"target": TARGET, "drafter": DRAFTER, "max_context": 256},
            "sampling": {"temperature": [0.0, 0.8]},
            "grid": {"mode": ["cloud-ar"], "rtt_ms": [1]},
            "run": {"runtime": "process", "link": "modelled"},
        }
    )


def bed(run_dir: Path) -> Testbed:
    return Testbed(
        run_dir,
        target=TARGET,
        drafter=DRAFTER,
        profiles=[LinkProfile(rtt_ms=3.0)],
        node_args=("--max-context", "256"),
    )


@pytest.mark.e2e
def test_emulated_costs_come_back(tmp_path: Path) -> None:
    text = StringIO()

    async def body() -> SystemProfile:
        async with bed(tmp_path / "bed") as testbed:
            console = Console(file=text, width=140)
            profile = await calibrate(testbed, scenario(), console, command="a test", budget_s=4.0)
            assert testbed.profile == LinkProfile(rtt_ms=3.0)  # as it was
            record = await testbed.generate(
                {"prompt_ids": [1, 2], "mode": "dsd-sync", "gamma": 3, "max_new_tokens": 8}
            )
            assert len(record["ids"]) == 8  # the nodes go on
            return profile

    profile = run(body())
    target, drafter = profile.cloud.target, profile.edge.drafter
    assert target is not None
    assert drafter is not None
    assert profile.edge.target is None
    for rows, batch, seconds in [(1, 1, 0.0134), (5, 1, 0.015), (128, 1, 0.0642), (20, 4, 0.024)]:
        assert target.cost_s(rows, batch, 64 * batch) == pytest.approx(seconds, rel=0.06)
    for cost in (drafter, profile.cloud.drafter):
        assert cost is not None
        for rows, seconds in [(1, 0.0032), (4, 0.0038), (64, 0.0158)]:
            assert cost.cost_s(rows, 1, 64) == pytest.approx(seconds, rel=0.08)
    for node in (profile.cloud, profile.edge):
        assert 0.0 < node.hop_s < 0.004
        assert 0.0 <= node.send_s < 0.002
    told = profile.provenance["contention"]
    assert told.keys() == {"target", "drafter"}
    for model, by_rows in (("target", {"1", "4", "8"}), ("drafter", {"1"})):
        low, high = told[model]["interval"]
        assert low <= told[model]["factor"] <= high
        assert told[model]["by_rows"].keys() == by_rows
        # who sleeps in place of computing takes nothing from anybody
        assert told[model]["factor"] == pytest.approx(1.0, abs=0.1)
        assert 1.0 <= getattr(profile.contention, model) <= 1.1
        assert f"{model} while the other node computes" in text.getvalue()
    assert told["target"]["alone_p50_s"]["4"] == pytest.approx(0.0146, rel=0.1)
    assert profile.origin == "measured here"
    assert profile.provenance["stream_over_fit"] == pytest.approx(1.0, abs=0.1)
    assert profile.provenance["runtime"] == "process"
    assert profile.provenance["command"] == "a test"
    assert "cpu" in profile.provenance
    said = text.getvalue()
    assert "target, cloud" in said
    assert "R²" in said
    assert "measured here" in said

    path = tmp_path / "profile.json"
    save_profile(path, profile)
    loaded = load_profile(str(path))
    assert msgspec.to_builtins(loaded.cloud) == msgspec.to_builtins(profile.cloud)
    assert json.loads(path.read_text())["version"] == 1
    check_models(loaded, TARGET, DRAFTER, "bf16")
    with pytest.raises(UnfitProfile, match="not emulated:base_s=1"):
        check_models(loaded, "emulated:base_s=1", DRAFTER, "bf16")


@pytest.mark.e2e
def test_bad_requests_are_answered(tmp_path: Path) -> None:
    async def body() -> None:
        async with bed(tmp_path) as testbed:
            for edge in (None, 0):
                with pytest.raises(NodeError, match="temperature") as caught:
                    await testbed.measure_models(edge, sampling={"temperature": -1.0})
                assert caught.value.code == "calibrate"
            with pytest.raises(NodeError, match="Expected `float`, got `str`"):
                await testbed.verifier.request({"op": "calibrate", "budget_s": "long"}, 30.0)
            steps = {"op": "calibrate", "steps_of": "target"}
            for asked, says in (({}, "Expected `float`, got `null`"), ({"steps_s": 99}, "steps_s is 99;")):
                with pytest.raises(NodeError, match=says):
                    await testbed.verifier.request(steps | asked, 30.0)
            assert len(await testbed.ping(1)) == 1

    run(body())
