"""What the image is made of where no registry answers: a base from the host's package mirror, and wheels.

Both are fetched on the host, whose apt and pip know where to look, so the build itself needs no network.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING

from dsdlab.models.zoo import cache_dir
from testbed.runtimes.base import RuntimeFailed

if TYPE_CHECKING:
    from docker import DockerClient

__all__ = ["BasePython", "fetch_wheels", "make_base", "requirements"]

Say = Callable[[str], None]
LOCAL_BASE = "dsdlab-base"
BASE_PACKAGES = "python3,python3-venv,iproute2,ca-certificates"
NOT_IN_BASE = ("./var/cache/apt/*", "./var/lib/apt/lists/*", "./usr/share/doc/*", "./usr/share/man/*")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


# -- a base without a registry -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mirror:
    """Where debootstrap finds the host's own release."""

    suite: str
    url: str
    components: str


def _apt_sources(etc_apt: Path) -> Iterator[tuple[str, str, str]]:
    """(suite, URL, components) of each binary source, in both of apt's formats."""
    folder = etc_apt / "sources.list.d"
    for path in (etc_apt / "sources.list", *sorted(folder.glob("*.list"))):
        with suppress(OSError):
            for line in path.read_text().splitlines():
                if match := re.match(r"\s*deb\s+(?:\[[^]]*\]\s+)?(\S+)\s+(\S+)\s+([^#]+)", line):
                    yield match[2], match[1], match[3]
    for path in sorted(folder.glob("*.sources")):
        with suppress(OSError):
            for stanza in re.split(r"\n\s*\n", path.read_text()):
                lines = [line for line in stanza.splitlines() if line.strip() and not line.startswith("#")]
                joined = re.sub(r"\n[ \t]+", " ", "\n".join(lines))
                fields = {
                    key.strip().lower(): value.split()
                    for key, _, value in (line.partition(":") for line in joined.splitlines())
                }
                if "deb" in fields.get("types", []) and fields.get("enabled", ["yes"]) != ["no"]:
                    for suite in fields.get("suites", []):
                        for url in fields.get("uris", []):
                            yield suite, url, " ".join(fields.get("components", []))


def host_mirror(root: Path = Path("/")) -> Mirror | None:
    """The mirror of the host's own release, None on a system without apt."""
    release = platform.freedesktop_os_release() if root == Path("/") else _os_release(root)
    suite = release.get("VERSION_CODENAME", "")
    for name, url, components in _apt_sources(root / "etc/apt"):
        if name == suite and url.startswith(("http://", "https://", "file:")):
            return Mirror(suite, url, ",".join(components.split()) or "main")
    return None


def _os_release(root: Path) -> dict[str, str]:
    pairs = (line.partition("=") for line in (root / "etc/os-release").read_text().splitlines())
    return {key: value.strip('"') for key, _, value in pairs}


def make_base(client: DockerClient, say: Say) -> str:
    """A base image from the host's own package mirror; its name. Raises RuntimeFailed."""
    mirror = host_mirror()
    if mirror is None:
        raise RuntimeFailed("no apt mirror of this system's release to make a base image from")
    if os.geteuid() != 0:
        raise RuntimeFailed("only root can make a base image with debootstrap")
    if shutil.which("debootstrap") is None:
        say("installing debootstrap (once)")
        _run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "debootstrap"], "apt-get")
    say(f"making a base image from {mirror.url} {mirror.suite} (once, about a minute)")
    # Not under /tmp, which may be mounted nodev.
    with tempfile.TemporaryDirectory(prefix="dsdlab-base-", dir="/var/tmp") as scratch:
        folder = str(Path(scratch) / "root")
        # In a mount namespace of its own, so that an interruption leaves no /proc mounted in the scratch.
        _run(
            [
                *("unshare", "--mount", "--propagation", "private"),
                *("debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}"),
                *(f"--components={mirror.components}", mirror.suite, folder, mirror.url),
            ],
            "debootstrap",
        )
        excluded = [f"--exclude={pattern}" for pattern in NOT_IN_BASE]
        command = ["tar", "-C", folder, "--numeric-owner", *excluded, "-c", "."]
        with _group(command) as tar:
            assert tar.stdout is not None
            client.api.import_image_from_data(
                _parts(tar.stdout), repository=LOCAL_BASE, tag=mirror.suite, changes=["LABEL dsdlab.base=1"]
            )
            if tar.wait() != 0:
                client.images.remove(f"{LOCAL_BASE}:{mirror.suite}")
                raise RuntimeFailed("tar failed on the base image's files")
    return f"{LOCAL_BASE}:{mirror.suite}"


def _parts(file: IO[bytes], n_bytes: int = 1 << 20) -> Iterator[bytes]:
    while part := file.read(n_bytes):
        yield part


@contextmanager
def _group(command: list[str], stderr: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with everything that it started, however the block is left; its output is read."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=environment,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _run(command: list[str], what: str) -> None:
    """Run quietly. Raises RuntimeFailed with the last line of its output."""
    with _group(command, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            last = line.decode("utf-8", "replace").strip() or last
        if process.wait() != 0:
            raise RuntimeFailed(f"{what} failed: {last or f'exit status {process.returncode}'}")


# -- wheels ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BasePython:
    """The interpreter of a base image: wheels have to fit it, not the host's."""

    version: str
    machine: str
    glibc: str

    def platforms(self) -> list[str]:
        """Platform tags of wheels that it can load, the newest first."""
        major, minor = map(int, self.glibc.split("."))
        new = [f"manylinux_{major}_{n}_{self.machine}" for n in range(minor, 4, -1)]
        old = [f"manylinux{name}_{self.machine}" for name in ("2014", "2010", "1")]
        return [*new, *old, f"linux_{self.machine}"]


def requirements(pyproject: Path) -> list[str]:
    """What dsdlab needs, and what pip needs to install it."""
    project = tomllib.loads(pyproject.read_text())
    return [*project["project"]["dependencies"], *project["build-system"]["requires"]]


def _name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", match[0]).lower() if match else ""


def pins(wanted: Iterable[str]) -> dict[str, str]:
    """The versions installed here of the requirements and all that they need: containers compute with the
    controller's versions."""
    found: dict[str, str] = {}
    todo = [_name(requirement) for requirement in wanted]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        try:
            dist = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        found[name] = dist.version.partition("+")[0]
        todo += [_name(needs) for needs in dist.requires or () if "extra ==" not in needs]
    return found


def fetch_wheels(wanted: list[str], python: BasePython, say: Say) -> Path:
    """A folder with the wheels of the requirements and all that they need, kept in the cache until others
    are wanted. Raises RuntimeFailed."""
    versions = pins(wanted)
    key = hashlib.sha256(repr((sorted(wanted), sorted(versions.items()), python)).encode()).hexdigest()[:16]
    cache = cache_dir() / "wheels"
    final = cache / key
    if final.is_dir():
        return final
    cache.mkdir(parents=True, exist_ok=True)
    say("fetching wheels (once per change of dependencies)")
    with tempfile.TemporaryDirectory(prefix=".wheels-", dir=cache) as scratch:
        folder = Path(scratch) / "wheels"
        torch = _fetch_torch(versions.pop("torch", None), folder, python)
        pinned = Path(scratch) / "constraints.txt"
        lines = [f"{name}=={version}" for name, version in sorted(versions.items())]
        pinned.write_text("\n".join([*lines, torch, ""]))
        problem = _download(folder, python, ["--constraint", str(pinned), torch, *wanted])
        if problem:
            raise RuntimeFailed(f"pip could not fetch the wheels: {problem}")
        for other in cache.glob("[0-9a-f]*"):
            shutil.rmtree(other, ignore_errors=True)
        folder.replace(final)
    return final


def _fetch_torch(version: str | None, folder: Path, python: BasePython) -> str:
    """The CPU build of torch, never the one with gigabytes of CUDA; the requirement that names it."""
    cpu = f"torch=={version}+cpu" if version else "torch"
    cpu_index = ["--index-url", TORCH_CPU_INDEX, "--retries", "0", "--timeout", "30"]
    attempts = [[cpu], [*cpu_index, cpu]] if version else [[*cpu_index, cpu]]
    if python.machine != "x86_64" and version:  # elsewhere the plain build is the CPU one
        attempts.append([f"torch=={version}"])
    problem = ""
    for attempt in attempts:
        problem = _download(folder, python, ["--no-deps", *attempt]) or ""
        for wheel in folder.glob("torch-*.whl"):
            return f"torch=={wheel.name.split('-')[1]}"
    raise RuntimeFailed(f"pip could not fetch the CPU build of torch: {problem}")


def _download(folder: Path, python: BasePython, arguments: list[str]) -> str | None:
    """pip download into a folder, for another interpreter; what went wrong."""
    platforms = [word for tag in python.platforms() for word in ("--platform", tag)]
    command = [
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"),
        *("--only-binary=:all:", "--implementation", "cp", "--python-version", python.version, *platforms),
        *("--find-links", str(folder), "--dest", str(folder), *arguments),
    ]
    folder.mkdir(exist_ok=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or [f"exit status {done.returncode}"])[-1]
