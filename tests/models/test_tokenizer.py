"""The chat form of a model's family, by the markers in its vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
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
