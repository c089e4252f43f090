"""Prompts of a workload: the project's own small set, or a user's JSONL file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from dsdlab.models.base import ModelError
from dsdlab.models.tokenizer import Tokenizer
from dsdlab.scenario import ScenarioError, Workload

BUILTIN = "builtin"


@dataclass(frozen=True, slots=True)
class Prompt:
    key: str
    text: str


def load_prompts(workload: Workload, scenario_path: Path) -> list[Prompt]:
    """The first `n_prompts` prompts. Raises ScenarioError naming file and line."""
    if workload.prompts == BUILTIN:
        data, where = files("dsdlab.sweep").joinpath("prompts/builtin.jsonl").read_bytes(), BUILTIN
    else:
        path = scenario_path.parent / workload.prompts
        where = str(path)
        try:
            data = path.read_bytes()
        except OSError as e:
            raise ScenarioError(f"{scenario_path}: workload.prompts: {path}: {e.strerror}") from None
    out: list[Prompt] = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip() or len(out) == workload.n_prompts:
            continue
        out.append(_prompt(line, number, where))
    if not out:
        raise ScenarioError(f"{where} holds no prompt; allowed: one JSON object with a 'prompt' a line")
    if workload.prompts == BUILTIN and len(out) < workload.n_prompts:
        raise ScenarioError(f"workload.n_prompts is {workload.n_prompts}; the builtin set has {len(out)}")
    return out


def _prompt(line: bytes, number: int, where: str) -> Prompt:
    try:
        item = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise ScenarioError(
            f"{where}:{number} is not UTF-8: byte {e.start} is 0x{line[e.start]:02x}"
        ) from None
    except ValueError as e:
        raise ScenarioError(f"{where}:{number} is not JSON: {e}") from None
    if not isinstance(item, dict) or not isinstance(item.get("prompt"), str):
        raise ScenarioError(f"{where}:{number} has no text 'prompt'")
    if not item["prompt"].strip():
        raise ScenarioError(f"{where}:{number}: the prompt is empty")
    return Prompt(str(item.get("key", f"line-{number}")), item["prompt"])


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer | None) -> list[int]:
    """Token ids of a prompt; for an emulated target, which has no tokenizer, one id per word.

    Raises ModelError for an empty prompt or one that is no Unicode text.
    """
    if tokenizer is None:
        return [1 + len(word) % 7 for word in prompt.text.split()]
    try:
        prompt.text.encode()  # refuses lone surrogates: from an escape in JSON, or an argument's bad bytes
        return tokenizer.encode_chat(prompt.text)
    except UnicodeEncodeError as e:
        raise ModelError(f"prompt {prompt.key} is no Unicode text: {e.reason} at {e.start}") from None
    except ValueError as e:
        raise ModelError(f"prompt {prompt.key}: {e}") from None
