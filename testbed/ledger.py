"""Which objects of the host belong to which run, so that a later start can take away what a crash left.

One JSON line per event in a file of the run: an object is written down when it is made and crossed out
when it is gone. A process is known by its id *and* its start time, because ids are used again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path
from typing import Any

__all__ = ["Ledger", "process_start"]


def process_start(pid: int) -> int | None:
    """Start time of a live process in clock ticks since boot; None when there is none or it is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    words = text.rpartition(")")[2].split()  # the name before it may hold anything
    return None if words[0] in "ZX" else int(words[19])


class Ledger:
    """The objects of one run, each of a kind: "process"; later "container", "netns", "tap"."""

    def __init__(self, path: Path, run_id: str) -> None:
        self.path = path
        self.run_id = run_id
        path.parent.mkdir(parents=True, exist_ok=True)

    def _append(self, event: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            owner = [os.getpid(), process_start(os.getpid())]
            file.write(json.dumps({"run": self.run_id, "owner": owner, **event}) + "\n")

    def made(self, kind: str, ident: str | int, **facts: Any) -> None:
        """Write an object down."""
        self._append({"made": kind, "ident": ident, **facts})

    def gone(self, kind: str, ident: str | int) -> None:
        """Cross it out."""
        self._append({"gone": kind, "ident": ident})

    def left(self) -> list[dict[str, Any]]:
        """Objects made and not crossed out, the newest first. A torn last line is ignored."""
        objects: dict[tuple[str, Any], dict[str, Any]] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    event = json.loads(line)
                    ident = event["ident"]
                except (ValueError, KeyError, TypeError):
                    continue
                if "made" in event:
                    objects[(event["made"], ident)] = event
                else:
                    objects.pop((event.get("gone"), ident), None)
        return list(reversed(objects.values()))

    def owner_alive(self) -> bool:
        """Whether the controller that wrote last still lives."""
        owner: tuple[int, int] | None = None
        with contextlib.suppress(FileNotFoundError):
            for line in self.path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    owner = tuple(json.loads(line)["owner"])
        return owner is not None and process_start(owner[0]) == owner[1]

    def reap_processes(self) -> list[int]:
        """Kill the processes of this ledger that still live; their ids."""
        killed = []
        for event in self.left():
            if event["made"] != "process":
                continue
            pid = int(event["ident"])
            if event.get("start") is not None and process_start(pid) == event["start"]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            self.gone("process", pid)
        return killed
