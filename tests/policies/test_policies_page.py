"""The page about window policies: its example works, and it names what is shipped and asked."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from window_sessions import Costs, Session

from dsdlab.nodes.request import POLICY_MODES
from dsdlab.policies import PolicyError, WindowPolicy, load_window_policy, registry

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert len(found) == 1
    return str(found[0])


def example() -> type[WindowPolicy]:
    names: dict[str, Any] = {"__name__": "my_package.policies"}
    exec(compile(block("python"), "policies.md", "exec"), names)
    (entry,) = tomllib.loads(block("toml"))["project"]["entry-points"][registry.GROUP].values()
    found: type[WindowPolicy] = names[entry.split(":")[1]]
    return found


def test_the_example_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_offered", {"halve": example()})
    policy = load_window_policy("halve", 4)
    session = Session(policy, Costs())
    assert [gamma for gamma, _ in session.go(1.0, 14)] == [*range(4, 17), 16]
    assert [gamma for gamma, _ in session.go(0.0, 6)] == [16, 8, 4, 2, 1, 1]
    with pytest.raises(PolicyError, match="gamma is -1"):
        load_window_policy("halve", -1)


def test_the_page_names_what_there_is() -> None:
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    names = shipped["project"]["entry-points"][registry.GROUP]
    assert set(re.findall(r"^\| `([a-z-]+)` \|", PAGE, re.MULTILINE)) == set(names)
    first = PAGE.split("Add your own")[0]
    assert set(re.findall(r"`(dsd-[a-z]+)`", first)) == {*POLICY_MODES, "dsd-stream"}
    for name in vars(WindowPolicy):
        if not name.startswith("_"):
            assert re.search(rf"\b{name}\b", PAGE), name
