"""The image that nodes run in, built on this host: `python -m testbed.image`, or `make image`.

It holds Python, dsdlab's dependencies and iproute2, which change rarely, and in its last layers dsdlab. The
docker runtime mounts the controller's own source over that copy, so the image is stale only when the
dependencies have changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from testbed.engine import connect, one_line, remove
from testbed.image_parts import LOCAL_BASE, BasePython, fetch_wheels, host_mirror, make_base, requirements
from testbed.runtimes.base import RuntimeFailed

if TYPE_CHECKING:
    from docker import DockerClient

__all__ = ["build", "dependencies_digest", "image_name", "image_problem"]

Say = Callable[[str], None]
ROOT = Path(__file__).parents[1]
DOCKERFILE = "testbed/Dockerfile"
PUBLIC_BASE = "python:3.11-slim-bookworm"
LABEL = "dsdlab.image"
DIGEST_LABEL = "dsdlab.dependencies"
SOURCES = (DOCKERFILE, "pyproject.toml", "README.md", "LICENSE", "testbed", "dsdlab")
LOOSE = {"dangling": True, "label": LABEL}  # layers that no image has
PULL_TIMEOUT_S = 20.0  # without a word from the registry
ASK_PYTHON = (
    "import platform, sys; print(*sys.version_info[:2], sep='.'); "
    "print(platform.machine()); print(platform.libc_ver()[1])"
)


def image_name() -> str:
    """The image's name: $DSDLAB_IMAGE, or the default."""
    return os.environ.get("DSDLAB_IMAGE") or "dsdlab-node:latest"


def dependencies_digest(root: Path = ROOT) -> str | None:
    """What an image must have been built from to fit this source; None where dsdlab was installed without
    its source folder."""
    try:
        words = [*requirements(root / "pyproject.toml"), (root / DOCKERFILE).read_text()]
    except FileNotFoundError:
        return None
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]


def image_problem(client: DockerClient) -> str | None:
    """One line when the image is missing or was built from other dependencies; blocking."""
    from docker.errors import APIError, ImageNotFound

    name = image_name()
    try:
        labels = client.images.get(name).labels
    except ImageNotFound:
        return f"docker: there is no image {name}: make image"
    except (APIError, OSError) as error:  # it refuses, or has gone or hangs
        return f"docker: image {name}: {one_line(error)}"
    wanted = dependencies_digest()
    if wanted is not None and labels.get(DIGEST_LABEL) != wanted:
        return f"docker: image {name} was built from other dependencies: make image"
    return None


def build(say: Say, base: str | None = None) -> None:
    """Build the image; blocking, minutes the first time and seconds after a change of code.

    say: takes progress lines. base: an image with Python, instead of the public one or one made here.
    Raises RuntimeFailed, and leaves nothing unfinished then, nor when interrupted.
    """
    digest = dependencies_digest()
    if digest is None:
        raise RuntimeFailed("docker: the image is built from dsdlab's source folder, and this is not one")
    client = connect(timeout_s=600.0)
    with (ROOT / DOCKERFILE).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one at a time: the end of one build takes away loose layers
        _build_all(client, say, base, digest)


def _build_all(client: DockerClient, say: Say, base: str | None, digest: str) -> None:
    from docker.errors import DockerException

    began_s, done = time.time(), False
    try:
        base = _find_base(client, say, base)
        wheels = fetch_wheels(requirements(ROOT / "pyproject.toml"), _base_python(client, base), say)
        with tempfile.TemporaryFile(dir="/var/tmp") as context:
            _write_context(context, wheels)
            say(f"building {image_name()} on {base}")
            _build(client, context, base, digest)
        done = True
    except (DockerException, OSError) as error:
        raise RuntimeFailed(f"docker: {one_line(error)}") from None
    finally:
        with suppress(DockerException, OSError):
            if not done:
                _remove_unfinished(client, began_s)
            client.images.prune(filters=LOOSE)  # also the layers that a new image has replaced
        client.close()


def _find_base(client: DockerClient, say: Say, base: str | None) -> str:
    """The name of a base image that is here, pulled or made."""
    from docker.errors import ImageNotFound

    mirror = host_mirror()
    local = f"{LOCAL_BASE}:{mirror.suite}" if mirror else LOCAL_BASE
    for name in [base] if base else [PUBLIC_BASE, local]:
        with suppress(ImageNotFound):
            client.images.get(name)
            return name
    wanted = base or PUBLIC_BASE
    say(f"pulling {wanted}")
    problem = _pull(wanted)
    if problem is None:
        return wanted
    if base:
        raise RuntimeFailed(f"docker: cannot pull {wanted}: {problem}")
    say(f"cannot pull it ({problem})")
    try:
        return make_base(client, say)
    except RuntimeFailed as error:
        raise RuntimeFailed(f"docker: cannot pull {wanted} ({problem}); {error}") from None


def _pull(name: str) -> str | None:
    """Pull an image; what went wrong."""
    import requests
    from docker.errors import DockerException

    client = connect(timeout_s=PULL_TIMEOUT_S)  # no long waits for a registry that is out of reach
    problem = None
    try:
        repository, _, tag = name.partition(":")
        for event in client.api.pull(repository, tag=tag or "latest", stream=True, decode=True):
            if "error" in event and problem is None:
                problem = " ".join(str(event["error"]).split())
    except (requests.Timeout, requests.ConnectionError):
        return f"no word from the registry in {PULL_TIMEOUT_S:g} s"
    except DockerException as error:
        return one_line(error)
    finally:
        client.close()
    return problem


def _base_python(client: DockerClient, base: str) -> BasePython:
    """Ask the base image's interpreter what it is."""
    from docker.errors import APIError, ContainerError

    options: dict[str, Any] = {"network_mode": "none", "remove": True, "labels": {LABEL: "build"}}
    try:
        out = client.containers.run(base, ["python3", "-I", "-S", "-c", ASK_PYTHON], **options)
        return BasePython(*out.decode().split())
    except (APIError, ContainerError, TypeError) as error:
        raise RuntimeFailed(f"docker: {base} has no usable python3: {one_line(error)}") from None


def _write_context(file: IO[bytes], wheels: Path) -> None:
    """What the Dockerfile copies, as a tar archive with nothing in it that changes by itself."""

    def clean(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if Path(info.name).name == "__pycache__":
            return None
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ""
        info.mode = 0o755 if info.isdir() or info.mode & 0o100 else 0o644
        return info

    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in SOURCES:
            tar.add(ROOT / name, name, filter=clean)
        tar.add(wheels, "wheels", filter=clean)
    file.seek(0)


def _build(client: DockerClient, context: IO[bytes], base: str, digest: str) -> None:
    events = client.api.build(
        fileobj=context,
        custom_context=True,
        dockerfile=DOCKERFILE,
        tag=image_name(),
        buildargs={"BASE": base},
        labels={LABEL: "1", DIGEST_LABEL: digest},
        network_mode="host",  # only a base without iproute2 makes use of it
        rm=True,
        forcerm=True,
    )
    said = error = ""
    for part in events:  # to the end also after an error, or the connection would stay open
        for line in part.splitlines():
            event = json.loads(line)
            error = error or " ".join(str(event.get("error", "")).split())
            said = said if error else " ".join(str(event.get("stream", "")).split()) or said
    if error:
        raise RuntimeFailed(f"docker: the build failed: {error}" + (f" ({said})" if said else ""))


def _remove_unfinished(client: DockerClient, began_s: float, patience_s: float = 20.0) -> None:
    """Take away what a failed or interrupted build left; the engine notices an interruption a little later
    than we do. Raises DockerException or OSError."""
    end_s = time.monotonic() + patience_s
    while time.monotonic() < end_s:
        left = [
            container
            for container in client.api.containers(all=True, filters={"label": LABEL})
            if _is_builds(container, began_s)
        ]
        for container in left:
            if container["State"] != "running":
                remove(client, container["Id"])
        client.images.prune(filters=LOOSE)
        if not left and not client.images.list(filters=LOOSE):
            return
        time.sleep(0.2)


def _is_builds(container: dict[str, Any], began_s: float) -> bool:
    """Whether it is a step of the build, which runs in an image without a name, or our look at the base.
    Containers that others made of our image carry its label as well."""
    labels, image = container["Labels"], container["Image"]
    step = image.startswith("sha256:") and "dsdlab.owner" not in labels
    return container["Created"] >= int(began_s) and (step or labels[LABEL] == "build")


@click.command(help="Build the image that nodes of the docker runtime run in.")
@click.option("--base", help="An image with Python and the host's architecture, instead of the usual one.")
def main(base: str | None) -> None:
    """The command line."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    t0_s = time.monotonic()
    try:
        build(click.echo, base)
    except RuntimeFailed as error:
        click.echo(f"dsdlab: error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    client = connect()
    size_mb = client.images.get(image_name()).attrs["Size"] / 1e6
    click.echo(f"{image_name()}: {size_mb:.0f} MB, {time.monotonic() - t0_s:.0f} s")


if __name__ == "__main__":
    main()
