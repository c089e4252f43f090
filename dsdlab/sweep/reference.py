"""References and the exactness self-test, in a process of their own before any node starts.

Reads one JSON object from standard input, prints JSON lines: {"op":"selftest", …}, one
{"op":"reference", "key", "ids"} per job, {"op":"done", …}.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import Any

from dsdlab.decoding import Sampling
from dsdlab.models.alone import generate_alone
from dsdlab.models.base import ModelError
from dsdlab.models.loading import EngineOptions, load_engine


def main() -> int:
    """Exit code 2 and one line on standard error for a model that cannot be used."""
    ask = json.load(sys.stdin)
    os.sched_setaffinity(0, ask["cpus"])
    options = EngineOptions(precision=ask["precision"], slots=3, max_context=ask["max_context"])
    emulated = ask["target"].startswith("emulated:")
    try:
        if not emulated:
            from dsdlab.node_process import set_threads

            set_threads(None)
        engine = load_engine(ask["target"], options)
    except ModelError as e:
        sys.stderr.write(f"{e}\n")
        return 2
    if emulated:
        engine.wait = lambda _: None  # type: ignore[attr-defined] # emulated time need not be spent here
    _say({"op": "model", "info": asdict(engine.info)})
    if ask["selftest"]:
        from dsdlab.models.selftest import selftest

        _say({"op": "selftest", **asdict(selftest(engine))})
    for job in ask["jobs"]:
        eos_ids = engine.info.eos_ids if job["stop_at_eos"] else ()
        sampling = Sampling(**job["sampling"])
        try:
            ids = generate_alone(engine, job["prompt_ids"], sampling, job["max_new_tokens"], eos_ids)
        except ModelError as e:
            sys.stderr.write(f"prompt {job['key']}: {e}\n")
            return 2
        _say({"op": "reference", "key": job["key"], "ids": ids})
    return 0


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
