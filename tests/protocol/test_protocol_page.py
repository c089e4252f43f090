"""PROTOCOL.md says what the code does: examples, fields, tags, codes, limits. Public names are pinned."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import get_args

import msgspec
import pytest

import dsdlab.protocol as protocol
from dsdlab.nodes.request import MAX_RUN_AHEAD
from dsdlab.protocol import AnyFrame, decode, encode

PAGE = resources.files(protocol).joinpath("PROTOCOL.md").read_text(encoding="utf-8")
FRAMES = {c.__name__: c for c in get_args(AnyFrame)}
OWN_RANGES = {
    ("Error", "session"), ("Welcome", "vocab_size"), ("Welcome", "max_context"), ("Steer", "max_window"),
}  # fmt: skip
EXAMPLES = re.findall(r"^    ([A-Z]\w+\(.*\))\n    = ([0-9a-f ]+)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("expression", "octets"), EXAMPLES, ids=lambda v: v[:12])
def test_examples(expression: str, octets: str) -> None:
    frame = eval(expression, dict(vars(protocol)))
    assert encode(frame).hex(" ") == octets
    assert decode(bytes.fromhex(octets)) == frame


def test_every_frame_has_an_example() -> None:
    assert {expression.split("(")[0] for expression, _ in EXAMPLES} == set(FRAMES)


def test_every_frame_has_its_section() -> None:
    sections = re.findall(r"^### (\d+) (\w+) [→←↔]\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL)
    documented = {
        name: (int(tag), tuple(re.findall(r"^\| `(\w+)` \|", body, re.MULTILINE)))
        for tag, name, body in sections
    }
    actual = {name: (c.__struct_config__.tag, c.__struct_fields__) for name, c in FRAMES.items()}
    assert documented == actual


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("session", (1, 65535)),
        ("epoch", (0, 65535)),
        ("position", (0, 1048575)),
        ("window count", (0, 256)),
        ("token id", (0, 16777215)),
        ("µs", (0, 4294967295)),
        ("natural", (0, 9223372036854775807)),
    ],
)
def test_documented_ranges_are_those_checked(kind: str, wanted: tuple[int, int]) -> None:
    """For each field of that type in the tables: the schema's bounds are the page's."""
    [row] = re.findall(rf"^\| `{kind}` \| unsigned integer \| (\d+) … (\d+)", PAGE, re.MULTILINE)
    assert tuple(map(int, row)) == wanted
    checked = 0
    for tag, name, body in re.findall(r"^### (\d+) (\w+) .*?\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL):
        assert tag
        info = msgspec.inspect.type_info(FRAMES[name])
        assert isinstance(info, msgspec.inspect.StructType)
        types = {f.name: f.type for f in info.fields}
        for field in re.findall(rf"^\| `(\w+)` \| {kind} \|", body, re.MULTILINE):
            if (name, field) in OWN_RANGES:
                continue  # the page gives these their own ranges
            bounds = types[field]
            assert isinstance(bounds, msgspec.inspect.IntType)
            assert (bounds.ge, bounds.le) == wanted, (name, field)
            checked += 1
    assert checked


def test_codes() -> None:
    section = PAGE[PAGE.index("## 6. Error codes") : PAGE.index("## 7.")]
    assert dict(re.findall(r"^\| `([a-z-]+)` \| (.*) \|$", section, re.MULTILINE)) == protocol.ERROR_CODES


def test_limits() -> None:
    section = PAGE[PAGE.index("## 7. Limits") : PAGE.index("## 8.")]
    values = [int(v) for v in re.findall(r"\| (\d+) \|$", section, re.MULTILINE)]
    assert values[:3] == [protocol.MAX_FRAME_BYTES, protocol.MAX_WINDOW, protocol.MAX_POSITION + 1]
    assert values[-1] == MAX_RUN_AHEAD
    assert f"`base > n + {MAX_RUN_AHEAD}` is a `bad-frame`" in PAGE
    assert f"version {protocol.PROTOCOL_VERSION}" in PAGE.splitlines()[0]


def test_invariants_name_real_tests() -> None:
    rows = re.findall(r"^\| ([A-Z]\d+) \| .* \| `(\w+\.py)::(\w+)` \|$", PAGE, re.MULTILINE)
    names = [r[0] for r in rows]
    wire = [name for name in names if name.startswith("W")]
    assert wire == [f"W{i}" for i in range(1, len(wire) + 1)]
    assert names[len(wire) :] == ["C1", "C2", "F1", "K1", "K2", "R1", "R2"]
    for name, file, test in rows:
        folder = Path(__file__).parent if name in wire else Path(__file__).parents[1] / "nodes"
        assert f"def {test}(" in (folder / file).read_text(encoding="utf-8")


def test_public_names() -> None:
    """Names others build on; taking one away is a breaking change."""
    assert protocol.__all__ == sorted(protocol.__all__, key=lambda n: (not n.isupper(), n.lower() == n, n))
    assert all(hasattr(protocol, name) for name in protocol.__all__)
    assert set(FRAMES) <= set(protocol.__all__)
    for name in ("Channel", "ChannelClosed", "ProtocolError", "Refused", "connect", "serve", "memory_pair"):
        assert name in protocol.__all__
