"""Profiles as files: what is shipped, what is refused, and the arithmetic behind published ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dsdlab.sim.costs import ForwardCost, NodeCosts, SystemProfile, UnfitProfile
from dsdlab.sim.profiles import check_models, load_profile, profile_names, save_profile

MEASURED = SystemProfile(
    name="a pair",
    origin="measured here",
    source="a test",
    target="big",
    drafter="lookup+small",
    precision="bf16",
    cloud=NodeCosts(
        target=ForwardCost(base_s=0.02, by_rows=((1, 1e-4),), after_idle=((0.1, 1e-3),), residuals=(0.9, 1.1))
    ),
    edge=NodeCosts(drafter=ForwardCost(base_s=0.002), hop_s=1e-4),
    provenance={"cpu": "one"},
)


def raw() -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(MEASURED)
    return json.loads(json.dumps(found))


def test_saved_is_what_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "there" / "profile.json"
    save_profile(path, MEASURED)
    assert load_profile(str(path)) == MEASURED


def test_nothing_impossible_is_saved(tmp_path: Path) -> None:
    bad = msgspec.structs.replace(MEASURED, edge=NodeCosts(hop_s=float("nan")))
    with pytest.raises(UnfitProfile, match=r"edge\.hop_s is nan"):
        save_profile(tmp_path / "p.json", bad)
    assert list(tmp_path.iterdir()) == []


def _without(name: str) -> dict[str, Any]:
    out = raw()
    del out[name]
    return out


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (raw() | {"version": 99}, r"is of version 99; allowed: 1 \(calibrate again\)"),
        (_without("version"), "is none: it has no version"),
        ([1], "is none"),
        (raw() | {"colour": "red"}, "unknown field `colour`"),
        (
            raw() | {"origin": "a dream"},
            "origin is 'a dream'; allowed: 'measured here', 'measured', 'published'",
        ),
        (_without("edge"), "missing required field `edge`"),
        (raw() | {"edge": {"hop_s": -0.1}}, r"edge\.hop_s is -0.1; allowed: 0 to 3600 seconds"),
        (raw() | {"edge": {"drafter": {"base_s": None}}}, r"`\$\.edge\.drafter\.base_s`"),
        (raw() | {"edge": {"drafter": {"base_s": -1}}}, r"edge\.drafter\.base_s is -1"),
        (raw() | {"edge": {"drafter": {"base_s": 1, "by_rows": [[1, -2]]}}}, r"by_rows has -2.0 s at 1 rows"),
    ],
)
def test_what_is_no_profile_is_refused(tmp_path: Path, content: Any, word: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UnfitProfile, match=f"{re.escape(str(path))}.*{word}") as caught:
        load_profile(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b'{"version": 1, "name"', b"\xff\xfe", b"", b'{"version": NaN}'])
def test_broken_json_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(content)
    with pytest.raises(UnfitProfile, match="is no JSON"):
        load_profile(str(path))


def test_missing_file_names_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UnfitProfile, match=r"No such file.* one of .*70b-h100-phone"):
        load_profile(str(tmp_path / "none.json"))
    with pytest.raises(UnfitProfile, match="Is a directory"):
        load_profile(str(tmp_path))


def test_models_are_checked() -> None:
    check_models(MEASURED, "big", "lookup+small", "bf16")
    check_models(MEASURED, "big", "small", "bf16")  # the same model costs the same
    check_models(MEASURED, "big", "prompt-lookup", "bf16")  # and lookup nothing
    check_models(load_profile(profile_names()[0]), "any", "thing", "int8")
    with pytest.raises(
        UnfitProfile, match="profile a pair is of target big, not huge; of precision bf16, not fp32"
    ):
        check_models(MEASURED, "huge", "small", "fp32")
    with pytest.raises(UnfitProfile, match=r"of drafter lookup\+small, not tiny; calibrate these"):
        check_models(MEASURED, "big", "tiny", "bf16")


def test_shipped_profiles_say_where_they_come_from() -> None:
    names = profile_names()
    assert len(names) >= 5
    for name in names:
        profile = load_profile(name)
        assert profile.name == name or profile.origin == "measured here"
        assert profile.source
        assert profile.cloud.target is not None
        assert profile.edge.drafter is not None
        if profile.origin == "published":
            for node in ("cloud", "edge"):
                for model in ("target", "drafter"):
                    if getattr(getattr(profile, node), model) is not None:
                        assert re.search("https://|roofline", str(profile.provenance[f"{node}.{model}"]))


def _passes(cost: ForwardCost | None, points: list[tuple[int, int, float]]) -> None:
    """(rows, context, seconds as published)"""
    assert cost is not None
    for rows, context, seconds in points:
        assert cost.cost_s(rows, 1, context) == pytest.approx(seconds, rel=1e-4)


@pytest.mark.parametrize("name", ["70b-h100-phone", "70b-h100-laptop", "70b-h100-laptop-8b"])
def test_70b_on_two_h100(name: str) -> None:
    """NVIDIA NIM 1.8.0, FP8: inter-token latency, and time to first token of 500 and 5,000 tokens."""
    _passes(load_profile(name).cloud.target, [(1, 0, 0.01891), (500, 0, 0.04777), (5000, 0, 0.40677)])


@pytest.mark.parametrize("name", ["8b-rtx4090-phone", "8b-rtx4090-laptop"])
def test_8b_on_an_rtx4090(name: str) -> None:
    """llama.cpp F16: tokens/s generating 512 and 8192 from nothing, reading 512."""
    _passes(
        load_profile(name).cloud.target,
        [(1, 256, 1 / 54.84), (1, 4096, 1 / 50.88), (512, 0, 512 / 9382.00), (4096, 0, 4096 / 6531.36)],
    )


def test_drafters_as_published() -> None:
    phone = [(1, 0, 1 / 50.2), (64, 0, 64 / 260.5)]  # ExecuTorch: decode and prefill of Llama 3.2 1B
    _passes(load_profile("70b-h100-phone").edge.drafter, phone)
    _passes(load_profile("8b-rtx4090-phone").edge.drafter, phone)
    m5 = [(1, 0, 1 / 149.69), (512, 0, 512 / 3959.13)]  # llama.cpp: tg 128 and pp 512 of TinyLlama 1.1B
    _passes(load_profile("70b-h100-laptop").edge.drafter, m5)
    _passes(load_profile("8b-rtx4090-laptop").edge.drafter, m5)
    m3_max = [(1, 256, 1 / 48.97), (1, 4096, 1 / 36.12), (512, 0, 512 / 693.32), (4096, 0, 4096 / 573.09)]
    _passes(load_profile("70b-h100-laptop-8b").edge.drafter, m3_max)


def test_rooflines() -> None:
    """2 bytes and 2 operations per parameter of Llama 3.2 1B, over what the data sheets say."""
    _passes(load_profile("70b-h100-phone").cloud.drafter, [(1, 0, 2 * 1.23e9 * (1 / 3.35e12 + 1 / 989e12))])
    _passes(
        load_profile("8b-rtx4090-phone").cloud.drafter, [(1, 0, 2 * 1.23e9 * (1 / 1.008e12 + 1 / 165.2e12))]
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [("8b-h200", "llama-3.1-8b"), ("8b-h200-small-drafter", "llama-3.1-8b"), ("32b-h200", "qwen2.5-32b")],
)
def test_measured_gpu_profiles_are_what_was_measured(name: str, shape: str) -> None:
    """Windows of one session to 5 %; the straight line leaves more where attention counts."""
    raw_file = Path(__file__).parents[2] / "results" / "reference" / "gpu-shapes-h200.json"
    models = {m["shape"]["name"]: m["points"] for m in json.loads(raw_file.read_text())["models"]}
    cost = load_profile(name).cloud.target
    assert cost is not None
    alone = [point for point in models[shape] if point[1] == 1 and point[0] <= 17 and point[2] <= 1024]
    assert len(alone) > 15
    for rows, batch, context, seconds in alone:
        assert cost.cost_s(rows, batch, context) == pytest.approx(seconds, rel=0.05)
