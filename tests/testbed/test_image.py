"""The image: what it holds, when it is stale, and where its parts come from."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from docker_tools import engine_or_skip

from testbed import image, image_parts
from testbed.image_parts import BasePython, Mirror, host_mirror
from testbed.runtimes.base import RuntimeFailed

TINY = "dsdlab-test-image:latest"


@pytest.fixture
def engine() -> Iterator[Any]:
    client = engine_or_skip(image=False)
    yield client
    client.close()


@pytest.mark.docker
def test_missing_and_stale_images_are_named_with_the_mend(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSDLAB_IMAGE", TINY)
    assert image.image_problem(engine) == f"docker: there is no image {TINY}: make image"
    empty_tar = b"\0" * 10240
    label = f"LABEL {image.DIGEST_LABEL}={image.dependencies_digest()}"
    try:
        engine.api.import_image_from_data(empty_tar, "dsdlab-test-image", "latest", changes=[label])
        assert image.image_problem(engine) is None
        monkeypatch.setattr(image, "dependencies_digest", lambda: "another")
        problem = image.image_problem(engine)
        assert problem == f"docker: image {TINY} was built from other dependencies: make image"
        monkeypatch.setattr(image, "dependencies_digest", lambda: None)  # installed without its source
        assert image.image_problem(engine) is None
    finally:
        engine.images.remove(TINY)


@pytest.mark.docker
def test_the_image_runs_by_hand() -> None:
    """The entry point, the CPU build of torch, iproute2."""
    engine = engine_or_skip(image=True)
    try:
        code = "import torch; print(torch.__version__, torch.version.cuda)"
        shell = f"dsdlab node --help && ip -V && python3 -c '{code}'"
        out = engine.containers.run(
            image.image_name(), ["sh", "-c", shell], network_mode="none", remove=True
        ).decode()
        assert "Run one node by hand" in out
        assert "iproute2" in out
        assert "+cpu None" in out
    finally:
        engine.close()


@pytest.mark.docker
def test_a_build_that_fails_is_one_line_and_leaves_nothing(
    engine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a base without python3; and with a broken Dockerfile."""
    before = len(engine.images.list(all=True))
    empty_tar = b"\0" * 10240
    try:
        engine.api.import_image_from_data(empty_tar, "dsdlab-test-image", "latest")
        with pytest.raises(RuntimeFailed, match=f"docker: {TINY} has no usable python3: "):
            image.build(print, base=TINY)
        monkeypatch.setenv("DSDLAB_IMAGE", "dsdlab-test-built:latest")
        monkeypatch.setattr(image, "_base_python", lambda *_: BasePython("3.11", "x86_64", "2.36"))
        monkeypatch.setattr(image, "fetch_wheels", lambda *_: tmp_path)
        with pytest.raises(RuntimeFailed, match="docker: the build failed: ") as caught:
            image.build(print, base=TINY)
        assert "\n" not in str(caught.value)
    finally:
        engine.images.remove(TINY)
    assert len(engine.images.list(all=True)) == before
    with pytest.raises(RuntimeFailed, match=r"cannot pull 127\.0\.0\.1:9/none"):
        image.build(print, base="127.0.0.1:9/none")


def test_no_engine_is_one_line_and_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "testbed.image"],
        env={"DOCKER_HOST": f"unix://{tmp_path}/none.sock", "PATH": "/usr/bin:/bin"},
        cwd=image.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("dsdlab: error: docker: no engine runs")
    assert done.stderr.count("\n") == 1


def test_digest_changes_with_dependencies_and_dockerfile_only(tmp_path: Path) -> None:
    def digest(dependency: str, other: str, dockerfile: str) -> str | None:
        (tmp_path / "testbed").mkdir(exist_ok=True)
        (tmp_path / "testbed/Dockerfile").write_text(dockerfile)
        (tmp_path / "pyproject.toml").write_text(
            '[build-system]\nrequires = ["setuptools"]\n'
            f'[project]\ndependencies = ["{dependency}"]\n{other}\n'
        )
        return image.dependencies_digest(tmp_path)

    first = digest("torch", "", "FROM x")
    assert first == digest("torch", "[tool.ruff]\nline-length = 110", "FROM x")
    assert len({first, digest("torch>2", "", "FROM x"), digest("torch", "", "FROM y")}) == 3
    (tmp_path / "pyproject.toml").unlink()
    assert image.dependencies_digest(tmp_path) is None


DEB822 = """\
# the usual ones
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm
 bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/k.gpg

Types: deb
URIs: http://mirror.example/security
Suites: bookworm-security
Components: main
"""
ONE_LINE = """\
# deb http://mirror.example/no bookworm main
deb-src http://mirror.example/no bookworm main
deb [arch=amd64 signed-by=/k.gpg] https://mirror.example/debian/ bookworm main universe # comment
"""


@pytest.mark.parametrize(
    ("file", "text", "mirror"),
    [
        ("debian.sources", DEB822, Mirror("bookworm", "http://mirror.example/debian", "main,contrib")),
        ("debian.sources", "Enabled: no\n" + DEB822.partition("\n")[2].partition("\n\n")[0], None),
        ("x.list", ONE_LINE, Mirror("bookworm", "https://mirror.example/debian/", "main,universe")),
        ("x.list", "deb http://mirror.example/debian trixie main\n", None),
    ],
)
def test_the_hosts_own_mirror(tmp_path: Path, file: str, text: str, mirror: Mirror | None) -> None:
    folder = tmp_path / "etc/apt/sources.list.d"
    folder.mkdir(parents=True)
    (folder / file).write_text(text)
    (tmp_path / "etc/os-release").write_text('ID=debian\nVERSION_CODENAME="bookworm"\n')
    assert host_mirror(tmp_path) == mirror


def test_wheels_fit_the_base_and_the_controller() -> None:
    tags = BasePython("3.11", "x86_64", "2.36").platforms()
    assert tags[0] == "manylinux_2_36_x86_64"
    assert {"manylinux_2_17_x86_64", "manylinux2014_x86_64", "linux_x86_64"} < set(tags)
    pins = image_parts.pins(["torch>=2.13", "no-such-package-at-all>1", "aiohttp"])
    assert {"torch", "aiohttp", "sympy", "yarl"} < set(pins)  # with what they need
    assert "+" not in pins["torch"]
    assert not {"no-such-package-at-all", "pytest", "dsdlab"} & set(pins)


def test_wheels_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time from the cache; a failure leaves nothing there; CPU torch is asked for by name."""
    monkeypatch.setenv("DSDLAB_CACHE", str(tmp_path))
    asked: list[list[str]] = []
    problem: str | None = None

    def download(folder: Path, python: BasePython, arguments: list[str]) -> str | None:  # noqa: ARG001
        asked.append(arguments)
        folder.mkdir(exist_ok=True)
        if "--no-deps" in arguments:
            (folder / "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl").touch()
            return None
        return problem

    monkeypatch.setattr(image_parts, "_download", download)
    base = BasePython("3.11", "x86_64", "2.36")
    problem = "No matching distribution found for x"
    with pytest.raises(RuntimeFailed, match="pip could not fetch the wheels: No matching distribution"):
        image_parts.fetch_wheels(["torch", "x"], base, print)
    assert list((tmp_path / "wheels").iterdir()) == []
    problem = None
    folder = image_parts.fetch_wheels(["torch", "x"], base, print)
    assert asked[0][-1].endswith("+cpu")
    assert asked[-1][-3:] == ["torch==2.13.0+cpu", "torch", "x"]
    n_asked = len(asked)
    assert image_parts.fetch_wheels(["x", "torch"], base, print) == folder
    assert len(asked) == n_asked
    other = image_parts.fetch_wheels(["torch"], base, print)
    assert list((tmp_path / "wheels").iterdir()) == [other]  # only what is in use is kept
