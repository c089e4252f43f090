"""What this host can do for the testbed, found out without leaving anything behind."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from testbed.links.base import percentile
from testbed.links.uml import uml_problem

__all__ = ["Finding", "Status", "namespaces", "netem", "probe_host"]

Status = Literal["ok", "missing", "info"]
COMMAND_TIMEOUT_S = 1.0
SYSCTLS = Path("/proc/sys/net/ipv4")
TRY_NETEM = ("qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about the host. `how` says how to get it, where it is missing."""

    name: str
    status: Status
    detail: str
    how: str = ""


def _run(*command: str) -> tuple[int, str]:
    """Exit status and output of a short command; 127 when it is not there or takes too long."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return 127, ""
    return done.returncode, done.stdout.strip()


def _which(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} ({sys.executable})")


def _torch() -> Finding:
    """From the metadata: importing torch would take seconds. The processor's flags are the kernel's words."""
    version = _version("torch")
    if not version:
        return Finding("torch", "missing", "not installed", "pip install torch")
    return Finding("torch", "ok", version)


def _processor() -> Finding:
    flags: set[str] = set()
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    except OSError:
        pass
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "bf16")
    return Finding("processor", "info", f"{model}; {' '.join(f for f in wanted if f in flags) or 'no flags'}")


def _bf16() -> Finding:
    text = _processor().detail.split(";")[-1].split()
    fast = [flag for flag in text if "bf16" in flag]
    if fast:
        return Finding("fast bf16", "ok", " ".join(fast))
    return Finding(
        "fast bf16", "missing", "no avx512_bf16, amx or bf16", "use --precision fp32, or a newer processor"
    )


def _cores() -> Finding:
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    total = os.cpu_count() or 1
    detail = f"{len(usable) or total} of {total} usable" + (
        f" ({','.join(map(str, usable))})" if usable else ""
    )
    if (len(usable) or total) < 2:
        how = "give it two cores or more: both nodes share one now"
        return Finding("cores", "missing", detail, how)
    return Finding("cores", "ok", detail)


def _memory() -> Finding:
    values = {}
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            key, _, value = line.partition(":")
            values[key] = int(value.split()[0]) / 2**20
    except (OSError, ValueError, IndexError):
        return Finding("memory", "info", "unknown")
    free, total = values.get("MemAvailable", 0.0), values.get("MemTotal", 0.0)
    detail = f"{free:.1f} of {total:.1f} GiB available"
    if free < 2:
        return Finding("memory", "missing", detail, "free 2 GiB for a pair of nodes")
    return Finding("memory", "ok", detail)


def _kernel() -> Finding:
    return Finding("kernel", "info", f"{platform.system()} {platform.release()} ({platform.machine()})")


def netem() -> Finding:
    """Builtin, loaded, loadable; or, when the module tools say nothing, tried in a throw-away namespace."""
    name, how = "sch_netem", "a kernel with sch_netem, or link netem-uml: apt install user-mode-linux"
    release = platform.release()
    try:
        if any(line.startswith("sch_netem ") for line in Path("/proc/modules").read_text().splitlines()):
            return Finding(name, "ok", "loaded")
    except OSError:
        pass
    builtin = Path("/lib/modules") / release / "modules.builtin"
    try:
        if "/sch_netem.ko" in builtin.read_text():
            return Finding(name, "ok", "built into the kernel")
    except OSError:
        pass
    modprobe = _which("modprobe")
    if modprobe and _run(modprobe, "-n", "-q", "sch_netem")[0] == 0:
        return Finding(name, "ok", "module can be loaded (modprobe sch_netem)")
    # No module files may just mean a container; the kernel itself is the judge.
    tc, unshare = _which("tc"), _which("unshare")
    if tc and unshare:
        code, text = _run(unshare, *_unshare_flags(), "--", tc, *TRY_NETEM)
        if code == 0:
            return Finding(name, "ok", "works (tried in a namespace of its own)")
        return Finding(name, "missing", f"tried: {text.splitlines()[0] if text else 'refused'}", how)
    return Finding(name, "missing", "no module for this kernel (tc and unshare are needed to be sure)", how)


def _unshare_flags() -> list[str]:
    return ["-n"] if os.geteuid() == 0 else ["-r", "-n"]


def _tool(program: str, package: str, what: str) -> Callable[[], Finding]:
    def probe() -> Finding:
        path = _which(program)
        if path is None:
            return Finding(program, "missing", f"no {program} ({what})", f"apt install {package}")
        return Finding(program, "ok", path)

    return probe


def namespaces() -> Finding:
    """A child tries to enter a new network namespace, as a user in a user namespace, and ends with it."""
    name = "namespaces"
    if not hasattr(os, "fork") or platform.system() != "Linux":
        return Finding(name, "missing", "Linux only", "use runtime process, or docker")
    flags = CLONE_NEWNET if os.geteuid() == 0 else CLONE_NEWUSER | CLONE_NEWNET
    code = (
        "import ctypes,sys;l=ctypes.CDLL(None,use_errno=True);"
        f"sys.exit(ctypes.get_errno() if l.unshare({flags}) else 0)"
    )
    status, _ = _run(sys.executable, "-I", "-S", "-c", code)
    if status == 0:
        who = "as root" if os.geteuid() == 0 else "in a user namespace, without root"
        return Finding(name, "ok", f"network namespaces can be made ({who}): runtime netns")
    if status == 127:
        return Finding(name, "missing", "a trial did not end in time", "try again on a quieter host")
    how = "sysctl -w kernel.unprivileged_userns_clone=1 (or kernel.apparmor_restrict_unprivileged_userns=0)"
    return Finding(name, "missing", f"refused: {os.strerror(status)}", how)


def _docker() -> Finding:
    """Asks the engine through its socket, in a second at most."""
    from testbed.engine import START, socket_path
    from testbed.runtimes.base import RuntimeFailed

    try:
        path = str(socket_path())
    except RuntimeFailed as error:
        return Finding("docker", "missing", str(error), "unset DOCKER_HOST")
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(0.5)
            sock.connect(path)
            sock.sendall(b"GET /version HTTP/1.0\r\nHost: docker\r\n\r\n")
            answer = sock.recv(64)
        if answer.startswith(b"HTTP/"):
            return Finding("docker", "ok", f"engine answers at {path}")
        reason = "answers no HTTP"
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    how = "sudo usermod -aG docker $USER, and log in again" if reason == "permission denied" else START
    return Finding("docker", "missing", f"engine at {path}: {reason}", how)


def _image() -> Finding:
    from testbed.engine import connect
    from testbed.image import image_name, image_problem
    from testbed.runtimes.base import RuntimeFailed

    try:
        client = connect(timeout_s=COMMAND_TIMEOUT_S)
    except RuntimeFailed:
        return Finding("image", "missing", "no engine to ask", "make image")
    with contextlib.closing(client):
        problem = image_problem(client)
    if problem:
        return Finding("image", "missing", problem, "make image")
    return Finding("image", "ok", f"{image_name()} is there and up to date")


def _uml() -> Finding:
    problem = uml_problem()
    if problem:
        detail, _, how = problem.rpartition(" (")
        return Finding("user-mode-linux", "missing", f"{detail} (router for link netem-uml)", how.rstrip(")"))
    return Finding("user-mode-linux", "ok", f"{_which('linux.uml')}, with sch_netem: link netem-uml")


def _chromium() -> Finding:
    for program in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if path := _which(program):
            return Finding("chromium", "ok", path)
    return Finding("chromium", "missing", "the report's browser test is skipped", "apt install chromium")


def _congestion() -> Finding:
    try:
        available = (SYSCTLS / "tcp_available_congestion_control").read_text().split()
        current = (SYSCTLS / "tcp_congestion_control").read_text().strip()
    except OSError:
        return Finding("congestion control", "info", "unknown")
    return Finding("congestion control", "info", f"{current} (available: {', '.join(available)})")


def _timers() -> Finding:
    """How late a wait of 2 ms ends, with the kernel's usual timer slack, as most programs see it."""
    late_ms = []
    for _ in range(40):
        t0_s = time.perf_counter()
        select.select((), (), (), 0.002)
        late_ms.append((time.perf_counter() - t0_s - 0.002) * 1e3)
    p50, p99 = percentile(late_ms, 0.5), percentile(late_ms, 0.99)
    detail = f"a 2 ms wait ends {p50:.2f} ms late (median), {p99:.2f} ms (worst of 40)"
    if p50 > 0.5:
        return Finding("timers", "missing", detail, "an idle host, or a kernel with high-resolution timers")
    return Finding("timers", "ok", detail)


def _disk(folders: list[Path]) -> Finding:
    parts, least = [], float("inf")
    for folder in folders:
        here = folder.absolute()
        while not here.exists():
            here = here.parent
        free = shutil.disk_usage(here).free / 2**30
        least = min(least, free)
        parts.append(f"{free:.1f} GiB free for {folder}")
    detail = "; ".join(parts)
    if least < 2:
        return Finding("disk", "missing", detail, "free 2 GiB there")
    return Finding("disk", "ok", detail)


def _parent_death() -> Finding:
    try:
        pid = ctypes.c_int()
        works = ctypes.CDLL(None).prctl(2, ctypes.byref(pid), 0, 0, 0) == 0  # PR_GET_PDEATHSIG
    except (OSError, AttributeError):
        works = False
    if works:
        return Finding("parent-death signal", "ok", "nodes die with a killed controller")
    how = "Linux; elsewhere nodes end when their input ends"
    return Finding("parent-death signal", "missing", "no prctl", how)


def probe_host(folders: list[Path] | None = None) -> list[Finding]:
    """Everything that matters to the testbed, in a fixed order. No side effects; less than 3 s.

    folders: where free space matters (cache and results); default ~/.cache/dsdlab and ./results.
    """
    folders = folders or [Path.home() / ".cache" / "dsdlab", Path("results")]
    probes: list[Callable[[], Finding]] = [
        _python,
        _torch,
        _processor,
        _bf16,
        _cores,
        _memory,
        _kernel,
        _timers,
        _parent_death,
        _tool("ip", "iproute2", "network namespaces"),
        _tool("tc", "iproute2", "shaping with netem"),
        _tool("ethtool", "ethtool", "switching offloads off"),
        netem,
        namespaces,
        _docker,
        _image,
        _uml,
        _congestion,
        _chromium,
        lambda: _disk(folders),
    ]
    return [probe() for probe in probes]
