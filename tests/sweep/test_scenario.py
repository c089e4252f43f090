"""Links, TCP and limits in a scenario: what becomes a cell, what a profile, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsdlab.scenario import Scenario, ScenarioError, load_scenario
from dsdlab.sim.profile import LinkProfile, LinkStep, TcpRegime

HEAD = 'name = "s"\n'
GRID = "[grid]\nmode = ['cloud-ar']\nrtt_ms = [50]\n"
NETEM = "[run]\nruntime = 'netns'\nlink = 'netem'\n"


def read(tmp_path: Path, *parts: str) -> Scenario:
    path = tmp_path / "s.toml"
    path.write_text(HEAD + "".join(parts))
    return load_scenario(path)[0]


def grid(**axes: Any) -> Scenario:
    return Scenario.model_validate({"name": "s", "grid": {"mode": ["cloud-ar"], "rtt_ms": [50], **axes}})


def test_without_loss_there_is_one_burst_length() -> None:
    cells = grid(loss_pct=[0, 1, 2], loss_burst=[1, 4, 8]).cells()
    assert [(c.loss_pct, c.loss_burst) for c in cells] == [
        (0, 1), (1, 1), (1, 4), (1, 8), (2, 1), (2, 4), (2, 8)
    ]  # fmt: skip


@given(
    st.lists(st.floats(0, 40), min_size=1, max_size=3, unique=True),
    st.lists(st.sampled_from([0.0, 0.5, 5.0]), min_size=1, max_size=3, unique=True),
    st.lists(st.sampled_from([1.0, 2.0, 16.0]), min_size=1, max_size=3, unique=True),
)
def test_every_cell_has_a_profile_and_an_id_of_its_own(
    jitters: list[float], losses: list[float], bursts: list[float]
) -> None:
    scenario = grid(jitter_ms=jitters, loss_pct=losses, loss_burst=bursts)
    cells = scenario.cells()
    combinations = {(j, p, b if p else 1.0) for j in jitters for p in losses for b in bursts}
    assert {(c.jitter_ms, c.loss_pct, c.loss_burst) for c in cells} == combinations
    assert len(cells) == len(combinations) == len({scenario.cell_id(c) for c in cells})
    for cell in cells:
        profile = scenario.profile_of(cell)
        assert (profile.jitter_ms, profile.loss_burst) == (cell.jitter_ms, cell.loss_burst)


def test_the_link_table_overrides_the_label_of_the_grid(tmp_path: Path) -> None:
    scenario = read(
        tmp_path,
        GRID,
        "rate_mbit = [10]\n[tcp]\nrto_min_ms = [40]\n"
        "[link]\nup_fraction = 0.7\nrate_up_mbit = 2\nrate_down_mbit = 'unlimited'\nbuffer_bytes = 30000\n"
        "reorder_pct = 1\n",
        NETEM,
    )
    (cell,) = scenario.cells()
    assert cell.rate_mbit == 10
    assert scenario.profile_of(cell) == LinkProfile(
        rtt_ms=50, up_fraction=0.7, rate_up_mbit=2, rate_down_mbit=None, buffer_bytes=30_000,
        reorder_pct=1, rto_min_ms=40,
    )  # fmt: skip
    plain = read(tmp_path, GRID, "rate_mbit = [10]\n")
    assert plain.profile_of(plain.cells()[0]) == LinkProfile(rtt_ms=50, rate_up_mbit=10, rate_down_mbit=10)


def test_steps(tmp_path: Path) -> None:
    scenario = read(
        tmp_path,
        GRID,
        "[[link.steps]]\nat_s = 2\nrate_mbit = 5\nrate_up_mbit = 'unlimited'\nrtt_ms = 150\n"
        "[[link.steps]]\nat_s = 1\nfor_s = 5\npartition = true\n",
        NETEM,
    )
    assert scenario.steps == (
        LinkStep(at_s=2, changes={"rate_up_mbit": None, "rate_down_mbit": 5.0, "rtt_ms": 150.0}),
        LinkStep(at_s=1, for_s=5, changes={"partitioned": True}),
    )
    assert scenario.resolved("netns", "modelled").steps == scenario.steps  # the model can do them too


def test_tcp_is_an_axis_and_part_of_the_cell(tmp_path: Path) -> None:
    text = "[tcp]\ncongestion = ['cubic', 'reno']\nslow_start_after_idle = [true, false]\nnodelay = [false]\n"
    scenario = read(tmp_path, GRID, text, NETEM)
    assert {c.tcp for c in scenario.cells()} == {
        TcpRegime(congestion=name, slow_start_after_idle=slow, nodelay=False)
        for name in ("cubic", "reno")
        for slow in (True, False)
    }
    assert len({scenario.cell_id(c) for c in scenario.cells()}) == 4


@pytest.mark.parametrize(
    "more",
    [
        "jitter_ms = [3]\n",
        "loss_pct = [1]\nloss_burst = [4]\n",
        "[tcp]\nnodelay = [false]\n",
        "[tcp]\nrto_min_ms = [40]\n",
        "[link]\nup_fraction = 0.6\n",
        "[link]\nrate_up_mbit = 5\n",
        "[link]\nbuffer_bytes = 50000\n",
        "[[link.steps]]\nat_s = 1\nrtt_ms = 70\n",
        "[nodes]\nedge_cpu_quota = 0.5\n[run]\nruntime = 'docker'\n",
        "[run]\nlink = 'netem'\n",
    ],
)
def test_whatever_changes_the_work_changes_the_id(tmp_path: Path, more: str) -> None:
    plain, changed = read(tmp_path, GRID), read(tmp_path, GRID, more)
    assert plain.cell_id(plain.cells()[0]) != changed.cell_id(changed.cells()[0])


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (("jitter_ms = [60]\n",), "grid.jitter_ms: 60.0 is more than rtt_ms 50.0 (allowed: 0 to rtt_ms)"),
        (("loss_pct = [50]\nloss_burst = [0.5]\n",), "grid.loss_burst.0 is 0.5; allowed: greater than or"),
        (("jitter_ms = [1, 1]\n",), "grid.jitter_ms is [1, 1]; allowed: every value once"),
        (("[link]\nreorder_pct = 2\n",), "link.reorder_pct is 2 with run.link 'modelled'; needs netem or"),
        (("[link]\nbuffer_bytes = 100\n",), "link.buffer_bytes: 100 is out of range (allowed: 3028 to"),
        (("[link]\nup_fraction = 1.5\n",), "link.up_fraction is 1.5; allowed: less than or equal to 1"),
        (("[link]\nrate_up_mbit = 'fast'\n",), "link.rate_up_mbit is 'fast'; allowed: a number"),
        (("[link]\nspeed = 1\n",), "unknown key 'link.speed'; allowed there: up_fraction, rate_up_mbit"),
        (("[[link.steps]]\nat_s = 1\n",), "link.steps.0 changes nothing; allowed: one or more of rtt_ms"),
        (("[[link.steps]]\nrtt_ms = 1\n",), "link.steps.0.at_s is missing"),
        (("[[link.steps]]\nat_s = 1\nfor_s = 0\nrtt_ms = 1\n",), "link.steps.0.for_s is 0; allowed:"),
        (("[[link.steps]]\nat_s = 1\nrate_mbit = 0\n",), "link.steps.0.rate_mbit is 0; allowed: a number"),
        (("[[link.steps]]\nat_s = 1\nrtt = 9\n",), "unknown key 'link.steps.0.rtt'; allowed there: at_s"),
        (
            ("[[link.steps]]\nat_s = 1\nrtt_ms = 9\n[[link.steps]]\nat_s = 2\njitter_ms = 20\n",),
            "link.steps.1: jitter_ms: 20.0 is more than rtt_ms 9.0",
        ),
        (("[[link.steps]]\nat_s = 1\nloss_burst = 4\n",), "link.steps.0: loss_burst: 4.0 without loss"),
        (
            ("[tcp]\ncongestion = ['bbr']\n",),
            "tcp.congestion is ['bbr'] with run.runtime 'process'; needs runtime netns or docker",
        ),
        (("[tcp]\nslow_start_after_idle = [true, false]\n",), "needs runtime netns or docker"),
        (("[tcp]\ncongestion = ['a b']\n", NETEM), "tcp.congestion.0 is 'a b'; allowed: the kernel's name"),
        (("[tcp]\nrto_min_ms = [0]\n",), "tcp.rto_min_ms.0 is 0; allowed: greater than or equal to 1"),
        (("[tcp]\nnodelay = []\n",), "tcp.nodelay is []; allowed:"),
        (("[nodes]\nedge_cpu_quota = 0.5\n",), "edge_cpu_quota is 0.5 with run.runtime 'process'; needs"),
        (("[nodes]\ncloud_memory_mb = 900\n", NETEM), "with run.runtime 'netns'; needs runtime docker"),
        (("[nodes]\nedge_cpu_quota = 0\n[run]\nruntime = 'docker'\n",), "nodes.edge_cpu_quota is 0; allowed"),
        (("[run]\nruntime = 'moon'\n",), "run.runtime is 'moon'; allowed: 'auto', 'process', 'netns' or"),
    ],
)  # fmt: skip
def test_refused_in_one_line_that_names_the_field(tmp_path: Path, parts: tuple[str, ...], says: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        read(tmp_path, GRID, *parts)
    assert str(caught.value).startswith(f"{tmp_path / 's.toml'}: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


FAR = "[run]\nlink = 'wan'\nverifier = 'ws://far.example:8765/'\n"


def test_a_wan_scenario(tmp_path: Path) -> None:
    scenario = read(tmp_path, GRID, FAR, "runtime = 'auto'\ntoken_file = 'secret'\n")
    assert scenario.resolved("process", "wan").run.verifier == "ws://far.example:8765/"
    with pytest.raises(ScenarioError, match=r"run\.token_file: .*secret: No such file"):
        scenario.read_token("")
    (tmp_path / "secret").write_text("\n")
    with pytest.raises(ScenarioError, match=r"run\.token_file: .*secret is empty"):
        scenario.read_token("")
    (tmp_path / "secret").write_bytes(b"\xff")
    with pytest.raises(ScenarioError, match=r"run\.token_file: .*secret: not UTF-8"):
        scenario.read_token("")
    (tmp_path / "secret").write_text("sesame\n")
    assert scenario.read_token("environment") == "sesame"
    plain = read(tmp_path, GRID, FAR)
    assert plain.read_token("environment") == "environment"
    other = read(tmp_path, GRID, FAR.replace("far", "near"))
    assert plain.cell_id(plain.cells()[0]) != other.cell_id(other.cells()[0]), "two machines are two cells"


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (
            (GRID, "[run]\nlink = 'wan'\n"),
            "run.verifier is missing; run.link 'wan' needs it: ws://HOST:PORT/",
        ),
        ((GRID, "[run]\nverifier = 'ws://h:1/'\n"), "with run.link 'modelled'; needs run.link 'wan'"),
        ((GRID, "[run]\ntoken_file = 'secret'\n"), "run.token_file is 'secret' with run.link 'modelled'"),
        (
            (GRID, FAR.replace("ws://", "http://")),
            "run.verifier is 'http://far.example:8765/'; allowed: ws://",
        ),
        ((GRID, FAR.replace(":8765", "")), "run.verifier is 'ws://far.example/'; allowed: ws://HOST:PORT/"),
        ((GRID, FAR.replace("8765", "99999")), "allowed: ws://HOST:PORT/"),
        ((GRID, FAR, "runtime = 'netns'\n"), "run.runtime is 'netns' with run.link 'wan'; allowed: process"),
        (
            (GRID.replace("[50]", "[50, 90]"), FAR),
            "grid.rtt_ms is [50.0, 90.0] with run.link 'wan'; allowed: one",
        ),
        ((GRID, "rate_mbit = [10]\n", FAR), "grid.rate_mbit is [10.0] with run.link 'wan'; allowed: nothing"),
        (
            (GRID, "loss_pct = [1]\n", FAR),
            "grid.loss_pct is [1.0] with run.link 'wan'; allowed: nothing, the",
        ),
        ((GRID, "loss_burst = [2]\n", FAR), "grid.loss_burst is [2.0] with run.link 'wan'"),
        ((GRID, "jitter_ms = [2]\n", FAR), "grid.jitter_ms is [2.0] with run.link 'wan'"),
        ((GRID, "[link]\nup_fraction = 0.6\n", FAR), "link.up_fraction is 0.6 with run.link 'wan'"),
        ((GRID, "[link]\nbuffer_bytes = 50000\n", FAR), "link.buffer_bytes is 50000 with run.link 'wan'"),
        (
            (GRID, "[[link.steps]]\nat_s = 1\nrtt_ms = 9\n", FAR),
            "link.steps is not empty with run.link 'wan'; allowed: nothing, the link is what it is",
        ),
        ((GRID, "[tcp]\nnodelay = [false]\n", FAR), "tcp.nodelay is [False] with run.link 'wan'"),
        ((GRID, "[nodes]\nedge_cpu_quota = 0.5\n", FAR), "needs runtime docker"),
    ],
)
def test_a_wan_is_what_it_is(tmp_path: Path, parts: tuple[str, ...], says: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        read(tmp_path, *parts)
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 's.toml'}: ")
    assert "\n" not in str(caught.value)


def test_auto_is_judged_once_it_is_resolved(tmp_path: Path) -> None:
    auto = "[run]\nruntime = 'auto'\nlink = 'auto'\n"
    more = "[[link.steps]]\nat_s = 1\npartition = true\n[tcp]\ncongestion = ['reno']\n"
    scenario = read(tmp_path, GRID, "[link]\nreorder_pct = 2\n", more, auto).pinned("content")
    real = scenario.resolved("netns", "netem-uml")
    assert (real.run.runtime, real.run.link, real.steps) == ("netns", "netem-uml", scenario.steps)
    assert real.cell_id(real.cells()[0]) != scenario.cell_id(scenario.cells()[0])
    assert real.cell_id(real.cells()[0]) == scenario.resolved("netns", "netem-uml").cell_id(real.cells()[0])
    assert real.pinned("").cell_id(real.cells()[0]) != real.cell_id(real.cells()[0]), "the pin was lost"
    for runtime, link, says in (
        ("netns", "modelled", r"s\.toml: link\.reorder_pct .* needs netem or netem-uml"),
        ("process", "netem", r"s\.toml: tcp\.congestion .* needs runtime netns or docker"),
        ("process", "string", r"run\.link is 'string'"),
    ):
        with pytest.raises(ScenarioError, match=says):
            scenario.resolved(runtime, link)
    limits = read(tmp_path, GRID, "[nodes]\nedge_memory_mb = 512\n", auto)
    assert limits.resolved("docker", "netem").nodes.edge_memory_mb == 512
    with pytest.raises(ScenarioError, match=r"nodes\.edge_memory_mb is 512 .* needs runtime docker"):
        limits.resolved("netns", "netem")


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("persist = 3", "simulate.persist is 3 without simulate.alpha"),
        ("alpha = 0.8\npersist = 2", "simulate.persist is 2; allowed with alpha 0.8: 5"),
        ("alpha = 1.5", "simulate.alpha is 1.5"),
        ("draws = 0", "simulate.draws is 0"),
        ("speed = 2", "unknown key 'simulate.speed'"),
    ],
)
def test_impossible_simulations(tmp_path: Path, table: str, says: str) -> None:
    with pytest.raises(ScenarioError, match=says):
        read(tmp_path, GRID, f"[simulate]\n{table}\n")


def test_what_feeds_the_simulator_changes_no_cell(tmp_path: Path) -> None:
    plain, fed = read(tmp_path, GRID), read(tmp_path, GRID, "[simulate]\nalpha = 0.8\ndraws = 3\n")
    assert [plain.cell_id(c) for c in plain.cells()] == [fed.cell_id(c) for c in fed.cells()]
    assert plain.digest() == fed.digest()
