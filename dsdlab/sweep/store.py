"""The store: append-only result lines that survive a kill at any instant.

A run is a folder: `rows.jsonl` (one generation a line, fsynced), `run.json` (provenance),
`references.json` (the target alone), node logs, `report.html`. One process may write at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from dsdlab.sweep.rows import Row


class StoreError(Exception):
    """The results folder cannot be used; one line for the user."""


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step: readers see the old or the new one. Raises StoreError."""
    write_bytes(path, json.dumps(value, indent=1, ensure_ascii=False).encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file in one step. Raises StoreError; nothing half-written stays."""
    scratch: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(scratch, 0o644)  # noqa: PTH101 - a name, not a Path
        os.replace(scratch, path)  # noqa: PTH105 - likewise
    except OSError as e:
        if scratch is not None:
            Path(scratch).unlink(missing_ok=True)
        raise StoreError(f"cannot write {path}: {e.strerror}") from None


def read_json(path: Path) -> Any:
    """A JSON file, or None where there is none (or a broken one)."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_rows(folder: Path) -> tuple[list[Row], list[str]]:
    """The readable rows of a run, and a line about each unreadable one. Raises StoreError."""
    path = folder / "rows.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], []
    except OSError as e:
        raise StoreError(f"{path}: {e.strerror}") from None
    decoder = msgspec.json.Decoder(Row)
    rows: list[Row] = []
    problems: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(decoder.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            problems.append(f"{path}:{number}: {e}")
    return rows, problems


class Store:
    """The one writer of a run's rows; a context manager that holds the folder's lock.

    Opening sets unreadable lines (a write cut off by a kill) aside in `rows.corrupt.jsonl`;
    `problems` says which.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[Row] = []
        self.problems: list[str] = []
        self._path = folder / "rows.jsonl"
        self._file: Any = None
        self._lock: Any = None

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise StoreError(f"another sweep is writing to {self.folder}; wait for it or stop it") from None
        except OSError as e:
            raise StoreError(f"cannot write to {self.folder}: {e.strerror}") from None
        try:
            self.rows, self.problems = read_rows(self.folder)
            if self.problems or self._ends_in_mid_line():
                self._set_aside()
            self._file = self._path.open("ab")
        except OSError as e:
            self._lock.close()
            raise StoreError(f"cannot write {self._path}: {e.strerror}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._lock.close()

    def _ends_in_mid_line(self) -> bool:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return False
        return bool(data) and not data.endswith(b"\n")

    def _set_aside(self) -> None:
        """Keep the good lines; move the others to the side file."""
        decoder = msgspec.json.Decoder(Row)
        good: list[bytes] = []
        bad: list[bytes] = []
        for line in self._path.read_bytes().split(b"\n"):
            if not line.strip():
                continue
            try:
                decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError):
                bad.append(line)
            else:
                good.append(line)
        if bad:
            with (self.folder / "rows.corrupt.jsonl").open("ab") as f:
                f.write(b"\n".join(bad) + b"\n")
                f.flush()
                os.fsync(f.fileno())
        write_bytes(self._path, b"".join(line + b"\n" for line in good))

    def append(self, row: Row) -> None:
        """Add a row durably. Raises StoreError (a full disk); the file is then as it was."""
        size = self._path.stat().st_size
        try:
            self._file.write(msgspec.json.encode(row) + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as e:
            self._file = _reopen_truncated(self._file, self._path, size)
            raise StoreError(f"cannot write {self._path}: {e.strerror}; everything before is kept") from None
        self.rows.append(row)


def _reopen_truncated(file: Any, path: Path, size: int) -> Any:
    """After a failed append: drop what was written of it."""
    with contextlib.suppress(OSError):  # the buffer cannot be flushed: that is the failure being handled
        file.close()
    os.truncate(path, size)
    return path.open("ab")
