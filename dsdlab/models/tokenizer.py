"""Tokenizers by file, without importing transformers; a fingerprint that both ends compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as _Backend

from dsdlab.models.base import ModelError


class Tokenizer:
    """A fast tokenizer from `tokenizer.json`, with the chat form of its model.

    The chat form is ChatML (`<|im_start|>role … <|im_end|>`) where the vocabulary has its markers;
    otherwise the prompt's text is used as it is.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._backend = _Backend.from_file(str(path))
        except Exception as e:  # the library raises bare Exception for a missing or broken file
            raise ModelError(f"tokenizer file {path} cannot be read: {e}") from None
        state = json.loads(self._backend.to_str())
        canonical = json.dumps(
            {"model": state["model"], "added": state.get("added_tokens")}, sort_keys=True, ensure_ascii=True
        )
        self.fingerprint = hashlib.sha256(canonical.encode()).hexdigest()[:16]
        self.vocab_size = self._backend.get_vocab_size()
        self._chatml = self._backend.token_to_id("<|im_start|>") is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; markers written in the text are parsed as markers."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_chat(self, user: str, system: str | None = None) -> list[int]:
        """Token ids of one user turn, ready for the answer. Raises ValueError for an empty prompt."""
        if not user.strip():
            raise ValueError("the prompt is empty; allowed: any text with at least one visible character")
        if not self._chatml:
            return self.encode(user)
        head = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        return self.encode(f"{head}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n")

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, markers left out."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text
