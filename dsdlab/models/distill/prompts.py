"""Prompts for distillation: files, a small built-in set, and user turns the target writes itself."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dsdlab.models.distill.config import PromptConfig
from dsdlab.models.distill.teacher import Teacher
from dsdlab.models.tokenizer import Tokenizer

SPLITS = ("train", "validation", "test")
BEFORE = "<|im_start|>user\n"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SYSTEM_SHARE = 0.2  # of the training prompts carry the model family's usual system prompt


@dataclass(frozen=True)
class Prompt:
    """One user turn. `start` is the first position that is trained on (None: the answer only)."""

    task: str
    split: str
    ids: tuple[int, ...]
    on_prompt: bool = False  # the turn is the target's own text: train on its positions too


def split_of(text: str) -> str:
    """10 % test, 10 % validation, the rest train, by a hash of the text alone."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 10
    return {0: "test", 1: "validation"}.get(bucket, "train")


def task_of(stem: str) -> str:
    """`gsm8k_more` and `gsm8k_train` are one task."""
    return stem.split("_")[0]


def read_jsonl(path: Path) -> list[str]:
    """Prompts of one file. Raises ValueError naming file and line."""
    out = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f'{path}:{number}: expected a JSON object with a string "prompt"') from None
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f'{path}:{number}: "prompt" must be a non-empty string')
        out.append(text)
    return out


class Template:
    """ChatML around one user turn, as the nodes send it: no system prompt unless asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.head = tokenizer.encode(BEFORE)
        self.end_of_turn: int = tokenizer.encode("<|im_end|>")[0]

    def wrap(self, text: str, system: str = "") -> list[int]:
        """Token ids of one user turn, ready for the answer."""
        return self.tokenizer.encode_chat(text, system or None)


FRAMES = {
    "cnndm": ("{}", "{}", "Summarize the following article:\n\n{}", "{}\n\nSummarize the article above."),
    "humaneval": ("{}", "{}", "{}", "Complete this Python function:\n{}"),
    "gsm8k": ("{}", "{}", "{}", "{} Let's think step by step."),
}


def from_files(config: PromptConfig, files: Sequence[str], template: Template, seed: int) -> list[Prompt]:
    """Frame, tokenise, cut. Held-out prompts are always framed plainly and cut to a fixed length."""
    rng = random.Random(seed)
    out = []
    for name in files:
        path = Path(name)
        task = task_of(path.stem)
        for text in read_jsonl(path):
            split = split_of(text)
            frames = FRAMES.get(task, ("{}",))
            body = template.tokenizer.encode(text)
            pieces = [text]
            if len(body) > config.long_prompt_tokens:
                low, high = config.article_tokens
                if split == "train":  # two random excerpts of a long text
                    pieces = []
                    for _ in range(2):
                        size = rng.randint(low, high)
                        at = rng.choice((0, rng.randint(0, max(0, len(body) - size))))
                        pieces.append(template.tokenizer.decode(body[at : at + size]))
                else:
                    pieces = [template.tokenizer.decode(body[: rng.randint(low, high)])]
            for piece in pieces:
                frame = rng.choice(frames) if split == "train" else "{}"
                system = SYSTEM if split == "train" and rng.random() < SYSTEM_SHARE else ""
                ids = template.wrap(frame.replace("{}", piece), system)[-config.max_prompt_tokens :]
                out.append(
                    Prompt(task, split, tuple(ids), split == "train" and len(ids) > config.long_prompt_tokens)
                )
    return out


def builtin(template: Template) -> list[Prompt]:
    """The project's own chat prompts, split by hash as well, half of them held out."""
    text = Path(__file__).with_name("chat_prompts.txt").read_text(encoding="utf-8")
    out = []
    for i, line in enumerate(x for x in text.splitlines() if x.strip()):
        split = ("train", "test", "train", "validation")[i % 4]
        out.append(Prompt("chat", split, tuple(template.wrap(line))))
    return out


LEADS = {
    "chat": ("",),
    "code": (
        "\ndef",
        "from typing import List\n\n\ndef",
        "Write a Python function",
        "\n\ndef is_",
        "\ndef count_",
    ),
    "maths": ("",),
    "article": ("(CNN) --",),
}
TURN_TOKENS = {"chat": 72, "code": 150, "maths": 80, "article": 220}


def self_written(
    teacher: Teacher,
    template: Template,
    counts: dict[str, int],
    leads: dict[str, list[str]],
    *,
    seed: int,
    batch: int,
) -> list[Prompt]:
    """Let the target write user turns at temperature 0.9 from the opening of one (after Magpie, 2406.08464).

    leads: openings per kind, beside the built-in ones. Returns training prompts.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    out = []
    for kind, count in counts.items():
        openings = (
            [*leads.get(kind, []), *LEADS.get(kind, ("",))]
            if kind in ("code", "chat")
            else (leads.get(kind) or list(LEADS.get(kind, ("",))))
        )
        for at in range(0, count, batch):
            size = min(batch, count - at)
            heads = [template.tokenizer.encode(BEFORE + rng.choice(openings)) for _ in range(size)]
            done = teacher.generate(
                heads,
                starts=[len(h) - 1 for h in heads],
                temperatures=[0.9] * size,
                max_new=TURN_TOKENS.get(kind, 96),
                stop_ids=(template.end_of_turn, 0),
                generator=generator,
            )
            for item in done:
                turn = item.ids[len(template.head) :]
                closed = turn[-1] in (template.end_of_turn, 0)
                text = template.tokenizer.decode(turn[:-1] if closed else turn).rstrip()
                if not closed and kind != "code":  # cut at the last sentence
                    stop = max(text.rfind(x) for x in (". ", "? ", "! ", ".\n", "?\n"))
                    text = text[: stop + 1] if stop > 20 else text
                if len(text) < 8 or not text.strip():
                    continue
                system = SYSTEM if rng.random() < SYSTEM_SHARE else ""
                out.append(Prompt("self-" + kind, "train", tuple(template.wrap(text, system)), not system))
    rng.shuffle(out)
    return out
