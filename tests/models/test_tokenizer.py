"""The chat form of a model's family, by the markers in its vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Split

from dsdlab.models.tokenizer import Tokenizer

LETTERS = [chr(c) for c in range(32, 127)] + ["\n"]


def tokenizer(folder: Path, *markers: str) -> Tokenizer:
    """One token a character, and the markers."""
    backend = Backend(WordLevel({c: i for i, c in enumerate(LETTERS)}, unk_token="?"))
    backend.pre_tokenizer = Split("", "isolated")
    backend.add_special_tokens([AddedToken(m, special=True) for m in markers])
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder / "tokenizer.json")


def spell(ids: list[int], *markers: str) -> str:
    return "".join((LETTERS + list(markers))[i] for i in ids)


CHATML = ("<|im_start|>", "<|im_end|>")
GEMMA = ("<bos>", "<start_of_turn>", "<end_of_turn>")


@pytest.mark.parametrize(
    ("markers", "system", "says"),
    [
        ((), None, "Hi {text}"),
        (CHATML, None, "<|im_start|>user\nHi {text}<|im_end|>\n<|im_start|>assistant\n"),
        (
            CHATML, "Be brief.",
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\nHi {text}<|im_end|>\n<|im_start|>assistant\n",
        ),
        (GEMMA, None, "<bos><start_of_turn>user\nHi {text}<end_of_turn>\n<start_of_turn>model\n"),
        (
            GEMMA, "Be brief.",
            "<bos><start_of_turn>user\nBe brief.\n\nHi {text}<end_of_turn>\n<start_of_turn>model\n",
        ),
    ],
)  # fmt: skip
def test_a_turn_is_written_as_the_family_writes_it(
    tmp_path: Path, markers: tuple[str, ...], system: str | None, says: str
) -> None:
    ids = tokenizer(tmp_path, *markers).encode_chat("Hi {text}", system)
    assert spell(ids, *markers) == says
    assert sum(i >= len(LETTERS) for i in ids) == sum(says.count(m) for m in markers), "markers are one token"


def test_an_empty_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        tokenizer(tmp_path, *GEMMA).encode_chat(" \n")


def test_the_fingerprint_is_of_what_a_tokenizer_does(tmp_path: Path) -> None:
    """Not of how its file is written; other ids, merges or rules of splitting make another."""

    def fingerprint(vocab: dict[str, int], merges: list[tuple[str, str]], split: str, **written: Any) -> str:
        backend = Backend(BPE(vocab, merges, unk_token="?"))
        backend.pre_tokenizer = Split(split, "isolated")
        backend.add_special_tokens([AddedToken("<|im_start|>", special=True)])
        state = json.loads(backend.to_str())
        state["added_tokens"][0] |= written
        file = tmp_path / "tokenizer.json"
        file.write_text(json.dumps(state, indent=1))
        return Tokenizer(file).fingerprint

    letters = {c: i for i, c in enumerate(LETTERS)}
    vocab = letters | {"th": len(letters), "he": len(letters) + 1}
    merges = [("t", "h"), ("h", "e")]
    usual = fingerprint(vocab, merges, " ")
    assert fingerprint(vocab, merges, " ", normalized=True) == usual
    assert fingerprint(vocab, merges[::-1], " ") != usual
    assert fingerprint(vocab, merges, "h") != usual
    assert fingerprint(letters | {"he": len(letters), "th": len(letters) + 1}, merges, " ") != usual
