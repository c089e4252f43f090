"""Where a generation stops; both ends of the wire apply the same rule."""

from __future__ import annotations

from collections.abc import Collection, Sequence

FINISH_EOS = "eos"
FINISH_LENGTH = "length"


def apply_limits(
    new: Sequence[int], n_before: int, max_new_tokens: int, eos_ids: Collection[int]
) -> tuple[list[int], str | None]:
    """Cut newly decided tokens at the end of sequence or the length limit.

    new: ids decided now; n_before: tokens committed earlier. Returns (ids that count, why it
    finished or None). An end-of-sequence id counts as a token; at the same place it wins over length.
    """
    room = max_new_tokens - n_before
    for i, token in enumerate(new[: max(room, 0)]):
        if token in eos_ids:
            return list(new[: i + 1]), FINISH_EOS
    if len(new) >= room:
        return list(new[: max(room, 0)]), FINISH_LENGTH
    return list(new), None
