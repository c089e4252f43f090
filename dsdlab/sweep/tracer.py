"""Recording traces, in a process of its own on the drafter's cores.

Reads one JSON object from standard input, prints JSON lines: {"op":"target", "info"}, {"op":"drafter",
"digest"} once it is loaded, one {"op":"text", "key", "ids", "windows", "beyond"} for each text. Exit code 2
and one line on standard error for a model that cannot be used.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dsdlab.decoding import Sampling
from dsdlab.models.alone import generate_alone
from dsdlab.models.base import Engine, ModelError
from dsdlab.models.drafters import LOOKUP, LOOKUP_FIRST, Drafter, LookupFirst, ModelDrafter, load_drafter
from dsdlab.models.emulated import EmulatedEngine
from dsdlab.models.loading import EngineOptions, load_engine
from dsdlab.models.tracing import reach_beyond, record_beyond, record_windows
from dsdlab.sim.trace import EMULATED, TracedWindow


class _Models:
    """Target and drafter, each loaded when it is first needed."""

    def __init__(self, ask: dict[str, Any]) -> None:
        self._ask = ask
        self._options = EngineOptions(precision=ask["precision"], slots=1, max_context=ask["max_context"])
        self._target: Engine | None = None
        self._drafter: Drafter | None = None

    @property
    def target(self) -> Engine:
        if self._target is None:
            _give_threads(self._ask["target"])
            self._target = load_engine(self._ask["target"], self._options)
            _at_no_cost(self._target)
        return self._target

    @property
    def drafter(self) -> Drafter:
        if self._drafter is None:
            _give_threads(self._ask["drafter"])
            self._drafter = load_drafter(self._ask["drafter"], self._options)
            model = self._drafter.model if isinstance(self._drafter, LookupFirst) else self._drafter
            engine = model.engine if isinstance(model, ModelDrafter) else None
            _at_no_cost(engine)
            _say({"op": "drafter", "digest": engine.info.digest if engine is not None else ""})
        return self._drafter


def _give_threads(name: str) -> None:
    """A thread for each core, as the nodes have, if the model computes at all."""
    if name != LOOKUP and not name.removeprefix(LOOKUP_FIRST).startswith(EMULATED):
        from dsdlab.node_process import set_threads

        set_threads(None)


def _at_no_cost(engine: Engine | None) -> None:
    """Emulated time need not be spent here."""
    if isinstance(engine, EmulatedEngine):
        engine.wait = lambda _: None


def main() -> int:
    ask = json.load(sys.stdin)
    os.sched_setaffinity(0, ask["cpus"])
    key = ""
    try:
        models = _Models(ask)
        info = ask["info"] or asdict(models.target.info)
        _say({"op": "target", "info": info})
        for job in ask["texts"]:
            key = f"prompt {job['prompt']}: "
            _say({"op": "text", "key": job["key"], **_record(models, job, ask["gamma"], info)})
    except ModelError as e:
        sys.stderr.write(f"{key}{e}\n")
        return 2
    return 0


def _record(models: _Models, job: dict[str, Any], gamma: int, info: dict[str, Any]) -> dict[str, Any]:
    """One text: the target's ids if they are not given, the windows, what lies beyond."""
    prompt_ids: Sequence[int] = job["prompt_ids"]
    sampling, ids = Sampling(**job["sampling"]), job["ids"]
    eos_ids = info["eos_ids"] if job["stop_at_eos"] else ()
    if ids is None:
        ids = generate_alone(models.target, prompt_ids, sampling, job["max_new_tokens"], eos_ids)
    windows: tuple[TracedWindow, ...] = ()
    beyond: tuple[int, ...] = ()
    if gamma > 0:
        windows = record_windows(models.drafter, prompt_ids, ids, sampling, gamma)
        if reach := reach_beyond(windows, prompt_ids, ids, eos_ids, info["max_context"]):
            beyond = record_beyond(models.target, prompt_ids, ids, sampling, reach)
    rows = [(w.base, w.ids, w.by_model) for w in windows]
    return {"ids": ids, "windows": rows, "beyond": beyond}


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
