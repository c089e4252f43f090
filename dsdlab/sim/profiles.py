"""System profiles as files: shipped ones by name, others by path.

The shipped "published" profiles are for what-if questions. Each says whose figures it holds and how they
became coefficients; tests/sim/test_profiles.py repeats that arithmetic.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from dsdlab.models.drafters import LOOKUP, LOOKUP_FIRST
from dsdlab.sim.costs import PROFILE_VERSION, SystemProfile, UnfitProfile
from dsdlab.sweep.store import write_json

__all__ = ["ORIGINS", "check_models", "load_profile", "profile_names", "save_profile"]

ORIGINS = ("measured here", "measured", "published")
_SHIPPED = files("dsdlab.sim").joinpath("profiles")


def profile_names() -> list[str]:
    """The shipped profiles."""
    return sorted(
        entry.name.removesuffix(".json") for entry in _SHIPPED.iterdir() if entry.name.endswith(".json")
    )


def load_profile(name_or_path: str) -> SystemProfile:
    """A shipped profile by name, or a file that `dsdlab calibrate` wrote. Raises UnfitProfile, one line."""
    names = profile_names()
    if name_or_path in names:
        data = _SHIPPED.joinpath(f"{name_or_path}.json").read_bytes()
    else:
        try:
            data = Path(name_or_path).read_bytes()
        except OSError as e:
            raise UnfitProfile(
                f"profile {name_or_path}: {e.strerror}; allowed: a file that `dsdlab calibrate` wrote, "
                f"or one of {', '.join(names)}"
            ) from None
    return decode_profile(data, name_or_path)


def decode_profile(data: bytes, where: str) -> SystemProfile:
    """A profile from the bytes of its file. Raises UnfitProfile, naming `where`."""
    try:
        raw: Any = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise UnfitProfile(f"profile {where} is no JSON: {e}") from None
    if not isinstance(raw, dict) or "version" not in raw:
        raise UnfitProfile(f"profile {where} is none: it has no version")
    if raw["version"] != PROFILE_VERSION:
        raise UnfitProfile(
            f"profile {where} is of version {raw['version']!r}; allowed: {PROFILE_VERSION} (calibrate again)"
        )
    try:
        profile = msgspec.json.decode(data, type=SystemProfile)
    except msgspec.ValidationError as e:
        raise UnfitProfile(f"profile {where}: {e}") from None
    _check(profile, where)
    return profile


def _check(profile: SystemProfile, where: str) -> None:
    if profile.origin not in ORIGINS:
        raise UnfitProfile(
            f"profile {where}: origin is {profile.origin!r}; allowed: {', '.join(map(repr, ORIGINS))}"
        )
    profile.edge.check(f"profile {where}: edge")
    profile.cloud.check(f"profile {where}: cloud")


def save_profile(path: Path, profile: SystemProfile) -> None:
    """Write a profile in one step. Raises StoreError, or UnfitProfile for numbers that no machine has."""
    _check(profile, profile.name)
    write_json(path, msgspec.to_builtins(profile))


def check_models(profile: SystemProfile, target: str, drafter: str, precision: str) -> None:
    """Raises UnfitProfile unless a profile is of these models; one that names none fits any.

    A drafter costs what its model costs, with or without prompt lookup before it; lookup alone costs nothing.
    """
    asked = (("target", profile.target, target), ("precision", profile.precision, precision))
    wrong = [f"{what} {has}, not {wants}" for what, has, wants in asked if has and has != wants]
    if profile.drafter and drafter != LOOKUP and _model(profile.drafter) != _model(drafter):
        wrong.append(f"drafter {profile.drafter}, not {drafter}")
    if wrong:
        raise UnfitProfile(
            f"profile {profile.name} is of {'; of '.join(wrong)}; calibrate these models, "
            "or name another profile"
        )


def _model(drafter: str) -> str:
    return drafter.removeprefix(LOOKUP_FIRST)
