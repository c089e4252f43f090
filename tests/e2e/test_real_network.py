"""The whole thing: the real pair in containers behind real netem, loss, a partition, and the target's ids."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from e2e_tools import dsdlab, rows_of
from needs import need

from testbed.host import docker_problem
from testbed.links.uml import uml_problem

SCENARIO = """
name = "real"
[workload]
n_prompts = 1
max_new_tokens = 96
stop_at_eos = false
[sampling]
temperature = [0.0, 0.8]
[grid]
mode = ["cloud-ar", "dsd-sync"]
rtt_ms = [20]
rate_mbit = [10]
loss_pct = [1]
loss_burst = [2]
[[link.steps]]
at_s = 0.3
for_s = 2.0
partition = true
[nodes]
edge_memory_mb = 3000
[run]
repeats = 1
"""


@pytest.mark.e2e
@pytest.mark.netem
@pytest.mark.docker
@pytest.mark.model
def test_real_pair_in_containers_behind_real_netem(tmp_path: Path) -> None:
    need(docker_problem() or uml_problem())
    (tmp_path / "real.toml").write_text(SCENARIO)
    command = ("sweep", "real.toml", "--runtime", "docker", "--link", "netem-uml", "--json")
    done = dsdlab(*command, cwd=tmp_path, timeout_s=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["exact"] == "exact: 4 of 4 generations"
    (folder,) = (tmp_path / "results").iterdir()
    for row in rows_of(folder):
        assert (row["runtime"], row["link"]) == ("docker", "netem-uml")
        assert row["link_before"]["instrument"] == "packets"
        assert abs(row["link_before"]["rtt_p50_ms"] - 20) < 2
        assert row["link_before"]["up"]["rate_mbit"] == pytest.approx(10, rel=0.05)
        assert row["tcp"]["read_back"]["edge"]["congestion"] in ("cubic", "reno", "bbr")
        assert row["link_changes"][0][1] == "partition"
        kinds = {kind for kind, _, _ in row["events"]}
        assert kinds  # there is a timeline to draw
        # the stall is in the timeline: nothing was committed while the link was cut
        ends = sorted(end for _, _, end in row["events"])
        assert max(later - earlier for earlier, later in pairwise(ends)) > 1.0
    html = (tmp_path / result["report"]).read_text()
    assert "partition" in html
