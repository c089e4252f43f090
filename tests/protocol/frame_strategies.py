"""Hypothesis strategies for every frame, over the whole of its legal range."""

from __future__ import annotations

from hypothesis import strategies as st

from dsdlab.protocol import (
    MAX_POSITION,
    MAX_WINDOW,
    Close,
    Commit,
    Draft,
    DraftQ,
    Error,
    Hello,
    Open,
    Ping,
    Pong,
    Resume,
    Steer,
    Verdict,
    Welcome,
    pack_ids,
)

ids = st.integers(0, (1 << 24) - 1)
sessions = st.integers(1, 0xFFFF)
epochs = st.integers(0, 0xFFFF)
positions = st.integers(0, MAX_POSITION)
counts = st.integers(0, MAX_WINDOW)
micros = st.integers(0, 0xFFFFFFFF)
names = st.text(max_size=256)
floats = st.floats(allow_nan=False)
packed = st.lists(ids, max_size=300).map(pack_ids)
windows = st.lists(ids, max_size=MAX_WINDOW).map(pack_ids)
unsigned = st.integers(0, (1 << 63) - 1)

hellos = st.builds(Hello, unsigned, names, names, names, names, floats)
welcomes = st.builds(
    Welcome,
    unsigned,
    names,
    names,
    names,
    st.integers(1, 1 << 24),
    st.integers(1, MAX_POSITION + 1),
    st.lists(ids, max_size=64).map(tuple),
    st.lists(names, max_size=64).map(tuple),
    floats,
)
opens = st.builds(
    Open,
    sessions,
    names,
    packed,
    packed,
    counts,
    positions,
    st.booleans(),
    floats,
    unsigned,
    floats,
    st.integers(0, (1 << 64) - 1),
)
resumes = st.builds(Resume, sessions, positions, st.binary(min_size=8, max_size=8))
drafts = st.builds(Draft, sessions, epochs, positions, windows)
verdicts = st.builds(Verdict, sessions, epochs, positions, counts, ids, micros, micros)
commits = st.builds(Commit, sessions, positions, packed, counts, counts, micros, micros, micros, counts)
closes = st.builds(Close, sessions)
errors = st.builds(
    Error, st.integers(0, 0xFFFF), st.text(max_size=32), st.text(max_size=1000), st.integers(0, 1 << 40)
)
pings = st.builds(Ping, unsigned, floats)
pongs = st.builds(Pong, unsigned, floats)
steers = st.builds(Steer, sessions, unsigned, st.booleans(), micros, st.integers(1, MAX_WINDOW), counts)
draft_qs = st.builds(DraftQ, sessions, epochs, positions, windows, st.binary(max_size=600))

by_name = {
    "Hello": hellos,
    "Welcome": welcomes,
    "Open": opens,
    "Resume": resumes,
    "Draft": drafts,
    "Verdict": verdicts,
    "Commit": commits,
    "Close": closes,
    "Error": errors,
    "Ping": pings,
    "Pong": pongs,
    "Steer": steers,
    "DraftQ": draft_qs,
}
any_frame = st.one_of(*by_name.values())
