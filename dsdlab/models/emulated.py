"""The emulated engine: no weights; cost from a profile, tokens from a seeded process or a trace.

It stands in for hardware that is not here and for tests of everything around the model. Its target's
token at a position is a hash of (profile seed, sampling seed, position); its drafter says the same
token where the acceptance process says so, and a wrong one elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from dsdlab.decoding import Sampling
from dsdlab.decoding.noise import counter_bits
from dsdlab.models.base import Chunk, ContextFull, Engine, Logits, ModelError, ModelInfo, NoFreeSlot

_WRONG_STREAM = 1
_TOKEN_STREAM = 2


class EmulatedProfile(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Costs in seconds: one forward takes base_s + per_token_s · tokens + per_session_s · batch.

    alpha: probability, independent per position, that this model says the target's token (1 for a
    target). accepts: a trace instead: entry i tells whether absolute position i (the prompt's first token
    is 0) agrees; past its end it repeats. seed: of both processes. vocab_size: tokens are 1 … vocab_size - 1.
    """

    base_s: float = 0.0
    per_token_s: float = 0.0
    per_session_s: float = 0.0
    alpha: float = 1.0
    accepts: tuple[bool, ...] = ()
    seed: int = 0
    vocab_size: int = 1024

    def __post_init__(self) -> None:
        for name in ("base_s", "per_token_s", "per_session_s"):
            if not 0.0 <= getattr(self, name) <= 3600.0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 0 to 3600 seconds")
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha is {self.alpha}; allowed: 0 to 1")
        if not 3 <= self.vocab_size <= 1 << 24:
            raise ValueError(f"vocab_size is {self.vocab_size}; allowed: 3 to 16777216")

    def cost_s(self, tokens: int, batch: int) -> float:
        return self.base_s + self.per_token_s * tokens + self.per_session_s * batch


def parse_profile(spec: str) -> EmulatedProfile:
    """A profile from a JSON file's path or from `base_s=0.05,per_token_s=0.001,alpha=0.8`."""
    try:
        if spec.endswith(".json"):
            return msgspec.json.decode(Path(spec).read_bytes(), type=EmulatedProfile)
        pairs = dict(item.split("=", 1) for item in spec.split(",") if item)
        return msgspec.convert(pairs, EmulatedProfile, strict=False)
    except OSError as e:
        raise ModelError(f"emulated profile {spec}: {e.strerror}") from None
    except ValueError as e:  # msgspec's errors are ValueErrors too
        keys = ", ".join(EmulatedProfile.__struct_fields__)
        raise ModelError(
            f"emulated profile {spec!r}: {e}; allowed: a .json file or KEY=VALUE of {keys}"
        ) from None


def precise_sleep(duration_s: float) -> None:
    """Sleep to within some 50 µs: the operating system's sleep, then a short spin."""
    end = time.perf_counter() + duration_s
    if duration_s > 3e-4:
        time.sleep(duration_s - 2e-4)
    while time.perf_counter() < end:
        pass


class EmulatedEngine(Engine):
    """An engine that spends a profile's time; `wait` is how (a precise sleep, or a virtual clock)."""

    def __init__(
        self,
        profile: EmulatedProfile,
        *,
        slots: int = 8,
        max_context: int = 2048,
        wait: Callable[[float], None] = precise_sleep,
    ) -> None:
        self.profile = profile
        self.wait = wait
        self.info = ModelInfo(
            model_id="emulated",
            tokenizer=f"emulated-{profile.vocab_size}",
            vocab_size=profile.vocab_size,
            max_context=max_context,
            eos_ids=(0,),  # never produced: an emulated text ends by length
            precision="emulated",
            n_params=0,
        )
        self._slots = slots
        self._free = list(range(slots))[::-1]
        self._length: dict[int, int] = {}

    def open(self) -> int:
        if not self._free:
            raise NoFreeSlot(f"all {self._slots} session slots of the emulated model are taken")
        slot = self._free.pop()
        self._length[slot] = 0
        return slot

    def close(self, slot: int) -> None:
        if self._length.pop(slot, None) is not None:
            self._free.append(slot)

    def length(self, slot: int) -> int:
        return self._length[slot]

    def rollback(self, slot: int, length: int) -> None:
        if not 0 <= length <= self._length[slot]:
            raise ValueError(f"rollback to {length}; allowed: 0 to the session's {self._length[slot]}")
        self._length[slot] = length

    def _advance(self, chunks: Sequence[Chunk]) -> None:
        for c in chunks:
            if self._length[c.slot] + len(c.ids) > self.info.max_context:
                raise ContextFull(
                    f"{self._length[c.slot] + len(c.ids)} positions; the emulated model is set for "
                    f"{self.info.max_context}"
                )
        for c in chunks:
            self._length[c.slot] += len(c.ids)
        self.wait(self.profile.cost_s(sum(len(c.ids) for c in chunks), len(chunks)))

    def token(self, sampling_seed: int, position: int) -> int:
        """What this model says at an absolute position."""
        p = self.profile
        stream = np.array([_TOKEN_STREAM, _WRONG_STREAM], dtype=np.uint64)
        bits = counter_bits((p.seed << 32 ^ sampling_seed) & (2**64 - 1), position, stream)
        right = 1 + int(bits[0]) % (p.vocab_size - 1)
        drawn = int(bits[1]) < p.alpha * 2.0**64
        agrees = p.accepts[position % len(p.accepts)] if p.accepts else drawn
        return right if agrees else 1 + right % (p.vocab_size - 1)

    def extend(self, chunks: Sequence[Chunk]) -> list[Logits]:
        picks = self.choose(chunks, [Sampling()] * len(chunks))
        out = []
        for row_ids in picks:
            logits = np.zeros((len(row_ids), self.info.vocab_size), dtype=np.float32)
            logits[np.arange(len(row_ids)), row_ids] = 100.0
            out.append(logits)
        return out

    def choose(self, chunks: Sequence[Chunk], samplings: Sequence[Sampling]) -> list[list[int]]:
        self._advance(chunks)
        return [
            [self.token(s.seed, self._length[c.slot] - c.rows + 1 + r) for r in range(c.rows)]
            for c, s in zip(chunks, samplings, strict=True)
        ]


def load_emulated(spec: str, slots: int, max_context: int) -> EmulatedEngine:
    """An emulated engine from a profile's text or file. Raises ModelError."""
    return EmulatedEngine(parse_profile(spec), slots=slots, max_context=max_context)
