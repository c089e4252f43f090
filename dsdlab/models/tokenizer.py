"""Tokenizers by file, without importing transformers; a fingerprint that both ends compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer as _Backend

from dsdlab.models.base import ModelError


class ChatForm(NamedTuple):
    """How a family of models writes a user's turn, up to where the answer begins."""

    marker: str  # a vocabulary with this token is of the family
    turn: str
    system: str  # goes before the turn; "" where the family has none, and it goes before the user's text


CHAT_FORMS = (
    ChatForm(
        "<|im_start|>",
        "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\n{text}<|im_end|>\n",
    ),
    ChatForm(  # Gemma; without <bos> it babbles
        "<start_of_turn>",
        "<bos><start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\n",
        "",
    ),
)


PROBES = (
    "The quick brown fox jumps over the lazy dog; it's 1,234.5 km away!",
    "def f(x):\n    return {k: v**2 for k, v in x.items()}\n\n\tpass  # end",
    " leading,  double   and trailing spaces  ",
    "naïve Straße façade — “quotes” … 東京 Привет مرحبا 🙂👩‍🔬",
    "<|im_start|>user\nHi<|im_end|>\n<bos><start_of_turn>user\nHi<end_of_turn>\n<s></s>",
)
"""Texts whose ids are part of a tokenizer's fingerprint."""


class Tokenizer:
    """A fast tokenizer from `tokenizer.json`, with the chat form of its model.

    The chat form is ChatML or Gemma's, where the vocabulary has its markers; otherwise the prompt's text is
    used as it is.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._backend = _Backend.from_file(str(path))
        except Exception as e:  # the library raises bare Exception for a missing or broken file
            raise ModelError(f"tokenizer file {path} cannot be read: {e}") from None
        self.fingerprint = self._fingerprint()
        self.vocab_size = self._backend.get_vocab_size()
        self._form = next((f for f in CHAT_FORMS if self._backend.token_to_id(f.marker) is not None), None)

    def _fingerprint(self) -> str:
        """Of what it does, not of how its file is written: libraries write the same tokenizer differently."""
        merges = json.loads(self._backend.to_str())["model"].get("merges", [])
        canonical = json.dumps(
            [
                sorted(self._backend.get_vocab(with_added_tokens=True).items()),
                [m if isinstance(m, str) else " ".join(m) for m in merges],
                [self.encode(text) for text in PROBES],
            ]
        )
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; markers written in the text are parsed as markers."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_chat(self, user: str, system: str | None = None) -> list[int]:
        """Token ids of one user turn, ready for the answer. Raises ValueError for an empty prompt."""
        if not user.strip():
            raise ValueError("the prompt is empty; allowed: any text with at least one visible character")
        form = self._form
        if form is None:
            return self.encode(user)
        head = form.system.replace("{text}", system) if system else ""
        if system and not form.system:
            user = f"{system}\n\n{user}"
        return self.encode(head + form.turn.replace("{text}", user))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, markers left out."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text
