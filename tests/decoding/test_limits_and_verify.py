"""Where a window ends: the first disagreement, the end of sequence, the length limit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsdlab.decoding import FINISH_EOS, FINISH_LENGTH, accepted_length, apply_limits, verify

IDS = st.lists(st.integers(0, 3), max_size=8)


@given(IDS, st.integers(0, 10), st.integers(0, 12), st.sets(st.integers(0, 3)))
def test_equals_one_token_at_a_time(new: list[int], n_before: int, limit: int, eos: set[int]) -> None:
    """The oracle commits one token after the other and stops where it must."""
    kept: list[int] = []
    finish = FINISH_LENGTH if n_before >= limit else None
    for token in new:
        if finish is not None:
            break
        kept.append(token)
        if token in eos:
            finish = FINISH_EOS
        elif n_before + len(kept) >= limit:
            finish = FINISH_LENGTH
    assert apply_limits(new, n_before, limit, eos) == (kept, finish)


@given(IDS, st.integers(0, 8), st.integers(1, 12), st.sets(st.integers(0, 3)))
def test_windows_do_not_matter(new: list[int], cut: int, limit: int, eos: set[int]) -> None:
    """One list in two pieces ends where the whole ends."""
    whole = apply_limits(new, 0, limit, eos)
    first, finish = apply_limits(new[:cut], 0, limit, eos)
    if finish is None:
        rest, finish = apply_limits(new[cut:], len(first), limit, eos)
        first = first + rest
    assert (first, finish) == whole


def test_inside_a_window() -> None:
    assert apply_limits([5, 2, 7, 8], 0, 10, {2}) == ([5, 2], FINISH_EOS)
    assert apply_limits([5, 6, 7, 8], 3, 5, {2}) == ([5, 6], FINISH_LENGTH)
    assert apply_limits([5, 6, 2], 0, 3, {2}) == ([5, 6, 2], FINISH_EOS)  # at the same place EOS wins
    assert apply_limits([5, 6, 2], 0, 2, {2}) == ([5, 6], FINISH_LENGTH)  # the limit comes first
    assert apply_limits([5, 6], 0, 2, ()) == ([5, 6], FINISH_LENGTH)
    assert apply_limits([], 0, 2, {2}) == ([], None)


@given(IDS, IDS)
def test_accepted_length_is_the_common_prefix(draft: list[int], target: list[int]) -> None:
    n = accepted_length(draft, target)
    assert draft[:n] == target[:n]
    assert n == min(len(draft), len(target)) or draft[n] != target[n]


@given(IDS, st.data())
def test_verify_commits_the_targets_own_tokens(draft: list[int], data: st.DataObject) -> None:
    target = data.draw(st.lists(st.integers(0, 3), min_size=len(draft) + 1, max_size=len(draft) + 1))
    accepted, next_id = verify(draft, target)
    assert [*draft[:accepted], next_id] == target[: accepted + 1]
    assert accepted == len(draft) or draft[accepted] != next_id


@pytest.mark.parametrize(("draft", "target"), [([1], [1]), ([], []), ([1, 2], [1, 2, 3, 4])])
def test_verify_wants_one_row_more_than_the_window(draft: list[int], target: list[int]) -> None:
    with pytest.raises(ValueError, match=f"a window of {len(draft)} needs {len(draft) + 1} target rows"):
        verify(draft, target)
