"""The doctor tells the truth where the truth is easy to check, quickly, and changes nothing."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from testbed import doctor, doctor_report
from testbed.doctor import Finding, probe_host


def test_findings_are_complete_quick_and_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from testbed.doctor import probe_host; n = len(probe_host());"
        "sys.exit(1 if 'torch' in sys.modules else 100 + n)"
    )
    t0_s = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert time.monotonic() - t0_s < 3.0
    findings = probe_host([tmp_path / "not" / "there"])
    assert done.returncode == 100 + len(findings)
    assert len({f.name for f in findings}) == len(findings)
    for finding in findings:
        assert finding.status in ("ok", "missing", "info")
        assert finding.detail
        assert "\n" not in finding.detail + finding.how
        assert (finding.status == "missing") == bool(finding.how), finding
    assert not (tmp_path / "not").exists()
    found = {f.name: f for f in findings}
    assert platform.python_version() in found["python"].detail
    assert str(len(os.sched_getaffinity(0))) in found["cores"].detail
    assert "GiB free" in found["disk"].detail


def test_nothing_is_left_on_the_host() -> None:
    def host() -> list[str]:
        links = sorted(p.name for p in Path("/sys/class/net").iterdir())
        namespaces = sorted(str(p) for p in Path("/run/netns").glob("*"))
        modules = Path("/proc/modules")  # absent where the kernel has none
        loaded = (
            sorted(line.split()[0] for line in modules.read_text().splitlines()) if modules.exists() else []
        )
        ours = [str(Path(f"/proc/self/ns/{kind}").readlink()) for kind in ("net", "user")]
        return [*links, *namespaces, *loaded, *ours]

    before = host()
    probe_host()
    assert host() == before


def test_a_bare_host_misses_things(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No programs, no Docker socket, no /proc/sys: findings, not exceptions."""
    monkeypatch.setattr(doctor, "_which", lambda _: None)
    monkeypatch.setattr(doctor, "SYSCTLS", tmp_path)
    monkeypatch.setattr("testbed.links.uml.KERNEL", "no-such-kernel")
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    found: dict[str, Finding] = {f.name: f for f in probe_host([tmp_path])}
    for name in ("ip", "tc", "docker", "image", "user-mode-linux", "chromium"):
        assert found[name].status == "missing"
    assert found["tc"].how == "apt install iproute2"
    assert found["congestion control"].detail == "unknown"


def test_what_looks_like_markup_is_printed_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finding = Finding("docker", "missing", "DOCKER_HOST is tcp://[/x]", "unset [/y]")
    monkeypatch.setattr(doctor_report, "probe_host", lambda: [finding])
    assert doctor_report.show(as_json=False, selftest=False) == 0
    out = capsys.readouterr().out
    assert "tcp://[/x]" in out
    assert "unset [/y]" in out
