"""The Docker engine of this host: find it, or say in one line why it cannot be used."""

from __future__ import annotations

import errno
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.runtimes.base import RuntimeFailed

if TYPE_CHECKING:
    from docker import DockerClient

__all__ = ["NEEDS_ROOT", "START", "connect", "one_line", "socket_path"]

START = "scripts/docker.sh start"
NEEDS_ROOT = "docker: containers get their links from root (sudo dsdlab …)"
REMOVAL_S = 20.0  # the engine may be slow on a busy host


def socket_path() -> Path:
    """The engine's socket, from $DOCKER_HOST. Raises RuntimeFailed for an engine on another host: nodes mount
    this host's files and get their network from it."""
    host = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    if not host.startswith("unix://"):
        raise RuntimeFailed(f"docker: needs an engine on this host (DOCKER_HOST is {host})")
    return Path(host.removeprefix("unix://"))


def connect(timeout_s: float = 120.0) -> DockerClient:
    """A client whose engine has answered; blocking. Raises RuntimeFailed."""
    path = socket_path()
    with socket.socket(socket.AF_UNIX) as probe:  # its errors are clearer than the client's
        try:
            probe.connect(str(path))
        except OSError as error:
            raise RuntimeFailed(f"docker: {_why(path, error)}") from None

    import docker
    from docker.errors import DockerException

    try:
        client = docker.DockerClient(base_url=f"unix://{path}", version="auto", timeout=timeout_s)
    except DockerException as error:
        raise RuntimeFailed(f"docker: the engine at {path} does not answer: {one_line(error)}") from None
    return client


def _why(path: Path, error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"not allowed to use {path}: sudo usermod -aG docker $USER, then log in again"
    if error.errno == errno.ENOENT:
        return f"no engine runs (no {path}): {START}, or install docker.io"
    return f"no engine answers at {path} ({error.strerror}): {START}"


def one_line(error: BaseException) -> str:
    """What the engine said, without HTTP's words around it."""
    explanation = getattr(error, "explanation", None)
    if explanation is None and isinstance(error, OSError) and error.errno is None:
        return "the engine does not answer"  # the client library's words for it are long
    text = explanation or str(error) or type(error).__name__
    return " ".join(str(text).split()).strip('"')


def remove(client: DockerClient, ident: str) -> None:
    """Kill and remove a container and wait until it is gone; blocking. None of that name is fine. Raises
    DockerException."""
    from docker.errors import APIError, NotFound

    end_s = time.monotonic() + REMOVAL_S
    while True:
        try:
            client.api.remove_container(ident, force=True, v=True)
        except NotFound:
            return
        except APIError as error:  # 409: being removed already, because it has ended
            if error.status_code != 409 or time.monotonic() > end_s:
                raise
        time.sleep(0.02)
