"""The axes of the overlapping modes: what becomes a cell, what keeps its id, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsdlab.nodes import GenerationRequest
from dsdlab.nodes.request import MODES
from dsdlab.scenario import Cell, Scenario, ScenarioError, load_scenario

SCENARIOS = Path(__file__).parents[2] / "scenarios"
OLD = {"run_ahead": 32, "free_run": False, "beside": 0}
DIGESTS = {  # of before there were such axes: results of those days are found again
    "accuracy": "943f6bea",
    "agreement": "509d0ecf",
    "exactness": "f5ada77a",
    "lossy": "1efa0412",
    "quickstart": "1e68d850",
    "tcp": "e9d14b4f",
    "what-if": "620c997d",
}


def grid(**axes: Any) -> Scenario:
    return Scenario.model_validate({"name": "s", "grid": {"rtt_ms": [50], **axes}})


def ways(scenario: Scenario) -> list[tuple[Any, ...]]:
    return [(c.mode, c.policy, c.gamma, c.run_ahead, c.free_run, c.beside) for c in scenario.cells()]


def test_each_mode_has_the_axes_that_concern_it() -> None:
    scenario = grid(mode=list(MODES), gamma=[2, 4], run_ahead=[8, 32], free_run=[False, True], beside=[0, 3])
    assert ways(scenario) == [
        ("cloud-ar", "static", 0, 32, False, 0),
        ("cloud-sd", "static", 2, 32, False, 0),
        ("cloud-sd", "static", 4, 32, False, 0),
        ("edge-sd", "static", 2, 32, False, 0),
        ("edge-sd", "static", 4, 32, False, 0),
        ("dsd-sync", "static", 2, 32, False, 0),
        ("dsd-sync", "static", 4, 32, False, 0),
        ("dsd-pipelined", "static", 2, 8, False, 0),
        ("dsd-pipelined", "static", 2, 32, False, 0),
        ("dsd-pipelined", "static", 4, 8, False, 0),
        ("dsd-pipelined", "static", 4, 32, False, 0),
        ("dsd-stream", "static", 0, 8, False, 0),
        ("dsd-stream", "static", 0, 8, True, 0),
        ("dsd-stream", "static", 0, 8, True, 3),
        ("dsd-stream", "static", 0, 32, False, 0),
        ("dsd-stream", "static", 0, 32, True, 0),
        ("dsd-stream", "static", 0, 32, True, 3),
        ("dsd-adaptive", "adaptive", 0, 32, False, 0),
        ("dsd-adaptive", "adaptive", 0, 32, False, 3),
    ]


@given(
    st.lists(st.sampled_from(MODES), min_size=1, unique=True),
    st.lists(st.integers(1, 8), min_size=1, max_size=3, unique=True),
    st.lists(st.integers(8, 4096), min_size=1, max_size=3, unique=True),
    st.lists(st.booleans(), min_size=1, unique=True),
    st.lists(st.integers(0, 256), min_size=1, max_size=3, unique=True),
)
def test_every_cell_is_there_once_and_can_be_asked_for(
    modes: list[str], gammas: list[int], run_aheads: list[int], free_runs: list[bool], besides: list[int]
) -> None:
    try:
        scenario = grid(mode=modes, gamma=gammas, run_ahead=run_aheads, free_run=free_runs, beside=besides)
    except ValueError as e:  # an axis that nothing uses
        assert "grid.free_run" in str(e) or "grid.beside" in str(e)
        return
    cells = scenario.cells()
    assert len(set(ways(scenario))) == len(cells) == len({scenario.cell_id(c) for c in cells})
    for way in ways(scenario):
        mode, policy, gamma, run_ahead, free_run, beside = way
        GenerationRequest(
            prompt_ids=[1], mode=mode, policy=policy, gamma=gamma, run_ahead=run_ahead, free_run=free_run,
            beside=beside,
        )  # fmt: skip
    assert {c.mode for c in cells} == set(modes)


@pytest.mark.parametrize("name", DIGESTS)
def test_scenarios_of_before_keep_their_ids(name: str) -> None:
    scenario, _ = load_scenario(SCENARIOS / f"{name}.toml")
    assert scenario.digest() == DIGESTS[name]


def test_a_cell_of_before_is_one_without_the_axes() -> None:
    cell = grid(mode=["dsd-sync"]).cells()[0]
    assert Cell.model_validate(cell.model_dump(exclude=set(OLD))) == cell
    assert {name: getattr(cell, name) for name in OLD} == OLD


@pytest.mark.parametrize(
    "axes",
    [
        {"mode": ["dsd-stream"], "run_ahead": [8]},
        {"mode": ["dsd-stream"], "free_run": [True]},
        {"mode": ["dsd-adaptive"], "beside": [4]},
    ],
)
def test_what_changes_the_work_changes_the_id(axes: dict[str, Any]) -> None:
    plain, changed = grid(mode=axes["mode"]), grid(**axes)
    assert plain.cell_id(plain.cells()[0]) != changed.cell_id(changed.cells()[0])


def test_models_of_the_edge_alone_change_the_id_only_where_they_are_named() -> None:
    models = {"target": "emulated:base_s=0.05", "drafter": "emulated:alpha=0.8"}
    raw: dict[str, Any] = {"name": "s", "grid": {"mode": ["edge-sd"], "rtt_ms": [50]}, "models": models}
    plain = Scenario.model_validate(raw)
    slow = Scenario.model_validate(raw | {"models": {**models, "edge_target": "emulated:base_s=0.5"}})
    assert plain.cell_id(plain.cells()[0]) != slow.cell_id(slow.cells()[0])
    with pytest.raises(ValueError, match=r"models\.edge_target is 'other' with models\.target"):
        Scenario.model_validate(raw | {"models": {**models, "edge_target": "other"}})
    with pytest.raises(ValueError, match=r"models\.edge_drafter is 'emulated:' with models\.target 'smol"):
        Scenario.model_validate(raw | {"models": {"edge_drafter": "emulated:"}})


def test_edges_share_the_repetitions() -> None:
    raw: dict[str, Any] = {
        "name": "s",
        "grid": {"mode": ["cloud-ar"], "rtt_ms": [50], "edges": [1, 2, 4]},
        "run": {"repeats": 8},
    }
    scenario = Scenario.model_validate(raw)
    cells = scenario.cells()
    assert [c.edges for c in cells] == [1, 2, 4]
    assert scenario.cell_id(cells[0]) == scenario.cell_id(grid(mode=["cloud-ar"]).cells()[0])
    assert len({scenario.cell_id(c) for c in cells}) == 3
    with pytest.raises(ValueError, match=r"run\.repeats is 6 with grid\.edges 4; allowed: a multiple"):
        Scenario.model_validate(raw | {"run": {"repeats": 6}})
    with pytest.raises(ValueError, match=r"grid\.edges is \[1, 2, 4\] with \[fleet\]; allowed: \[1\]"):
        Scenario.model_validate(raw | {"fleet": {"drafters": [4], "duration_s": 5}})


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        (
            {"mode": ["dsd-pipelined"], "gamma": [2, 16], "run_ahead": [8]},
            "grid.gamma is 16 with mode 'dsd-pipelined' and run_ahead 8; allowed: 1 to run_ahead",
        ),
        (
            {"mode": ["dsd-pipelined"], "gamma": [0]},
            "grid.gamma is 0 with mode 'dsd-pipelined' and run_ahead 32; allowed: 1 to run_ahead",
        ),
        ({"mode": ["dsd-stream"], "run_ahead": [0]}, "grid.run_ahead.0 is 0; allowed: greater than or equal"),
        ({"mode": ["dsd-stream"], "run_ahead": [5000]}, "grid.run_ahead.0 is 5000; allowed: less than or"),
        ({"mode": ["dsd-sync"], "free_run": [True]}, "grid.free_run is [True] without mode 'dsd-stream'"),
        (
            {"mode": ["dsd-stream"], "beside": [4]},
            "grid.beside is [4]; needs mode 'dsd-stream' with free_run, or 'dsd-adaptive'",
        ),
        (
            {"mode": ["dsd-stream"], "beside": [300]},
            "grid.beside.0 is 300; allowed: less than or equal",
        ),
        ({"mode": ["dsd-stream"], "free_run": [True, True]}, "grid.free_run is [True, True]; allowed: every"),
        ({"mode": ["dsd-stream"], "free_run": ["sometimes"]}, "grid.free_run.0 is 'sometimes'; allowed:"),
        ({"mode": ["dsd-flow"]}, "grid.mode.0 is 'dsd-flow'; allowed: 'cloud-ar', 'cloud-sd'"),
    ],
)
def test_refused_in_one_line(tmp_path: Path, axes: dict[str, Any], says: str) -> None:
    toml = {key: str(value).lower() if key == "free_run" else value for key, value in axes.items()}
    lines = "\n".join(f"{key} = {value}" for key, value in toml.items())
    path = tmp_path / "s.toml"
    path.write_text(f"name = 's'\n[grid]\nrtt_ms = [50]\n{lines}\n")
    with pytest.raises(ScenarioError) as caught:
        load_scenario(path)
    assert str(caught.value).startswith(f"{path}: {says}")
    assert "\n" not in str(caught.value)


def test_the_controller_is_for_its_own_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["adaptive", "static", "threshold"]
    monkeypatch.setattr("dsdlab.scenario_parts.window_policy_names", lambda: names)
    both = grid(mode=["dsd-sync", "dsd-adaptive"], policy=["static", "threshold"])
    assert [(c.mode, c.policy, c.gamma) for c in both.cells()] == [
        ("dsd-sync", "static", 4),
        ("dsd-sync", "threshold", 4),
        ("dsd-adaptive", "adaptive", 0),
        ("dsd-adaptive", "threshold", 4),
    ]
    one = grid(mode=["dsd-adaptive"], policy=["static", "adaptive"])
    assert [c.policy for c in one.cells()] == ["adaptive"]
    with pytest.raises(ValueError, match=r"grid\.policy is 'adaptive' with mode 'dsd-sync'; needs"):
        grid(mode=["dsd-sync"], policy=["adaptive"])


def test_a_fleet_has_the_modes_that_it_can_simulate() -> None:
    with pytest.raises(
        ValueError, match=r"grid\.mode is 'edge-sd' with \[fleet\], and shares nothing; allowed: cloud-ar"
    ):
        Scenario.model_validate(
            {
                "name": "s",
                "grid": {"mode": ["edge-sd"], "rtt_ms": [50]},
                "fleet": {"drafters": [4], "duration_s": 5},
            }
        )
