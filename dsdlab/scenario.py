"""What a scenario file may say, and how its grid becomes cells."""

from __future__ import annotations

import hashlib
import itertools
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from dsdlab.decoding import Sampling
from dsdlab.nodes.request import DRAFTING_MODES, MODES
from dsdlab.policies import window_policy_names
from dsdlab.protocol.frames import MAX_WINDOW

UNLIMITED = "unlimited"
RUNTIMES = ("process",)
LINKS = ("modelled",)


class ScenarioError(Exception):
    """A scenario cannot be used; one line naming file, field, value and what is allowed."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Models(_Part):
    """Which pair, and in which precision the target computes."""

    target: str = "smollm2-135m-instruct"
    drafter: str = "lookup+smollm2-drafter"
    precision: Literal["bf16", "fp32", "int8"] = "bf16"
    max_context: Annotated[int, Field(ge=16, le=1 << 20)] = 2048


class Workload(_Part):
    """Prompts and lengths. `prompts` is "builtin", or a JSONL file named relative to the scenario."""

    prompts: str = "builtin"
    n_prompts: Annotated[int, Field(ge=1, le=100_000)] = 4
    max_new_tokens: Annotated[int, Field(ge=1, le=1 << 20)] = 48
    stop_at_eos: bool = True


class SamplingPart(_Part):
    """Each temperature is an axis of the grid; 0 is greedy."""

    temperature: Annotated[list[Annotated[float, Field(ge=0, le=100)]], Field(min_length=1)] = [0.0]
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


Mode = Literal["cloud-ar", "cloud-sd", "edge-sd", "dsd-sync"]


class Grid(_Part):
    """The axes; every combination is a cell. γ does not concern `cloud-ar`."""

    mode: Annotated[list[Mode], Field(min_length=1)] = ["cloud-ar", "cloud-sd", "dsd-sync"]
    policy: Annotated[list[str], Field(min_length=1)] = ["static"]
    gamma: Annotated[list[Annotated[int, Field(ge=0, le=MAX_WINDOW)]], Field(min_length=1)] = [4]
    rtt_ms: Annotated[list[Annotated[float, Field(ge=0, le=10_000)]], Field(min_length=1)]
    rate_mbit: Annotated[
        list[Annotated[float, Field(gt=0, le=100_000)] | Literal["unlimited"]], Field(min_length=1)
    ] = ["unlimited"]
    loss_pct: Annotated[list[Annotated[float, Field(ge=0, le=50)]], Field(min_length=1)] = [0.0]

    @field_validator("*")
    @classmethod
    def _no_repeats(cls, values: list[Any]) -> list[Any]:
        if len(set(values)) != len(values):
            raise ValueError("every value once")
        return values

    @field_validator("policy")
    @classmethod
    def _installed(cls, names: list[str]) -> list[str]:
        installed = window_policy_names()
        if not set(names) <= set(installed):
            raise ValueError(f"installed window policies ({', '.join(installed)})")
        return names


class Run(_Part):
    """How often, where, and how long a generation may take."""

    repeats: Annotated[int, Field(ge=1, le=100_000)] = 3
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 1
    runtime: Literal["process"] = "process"
    link: Literal["modelled"] = "modelled"
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 120.0


class Cell(_Part):
    """One combination of the grid."""

    mode: Mode
    policy: str
    gamma: int
    rtt_ms: float
    rate_mbit: float | None  # None: unlimited
    loss_pct: float
    temperature: float


class Scenario(_Part):
    """A whole scenario file."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
    title: str = ""
    models: Models = Models()
    workload: Workload = Workload()
    sampling: SamplingPart = SamplingPart()
    grid: Grid
    run: Run = Run()
    _content: str = PrivateAttr("")

    def pinned(self, content: str) -> Scenario:
        """The same scenario with cell ids that also depend on `content`, a hash of the files it names."""
        out = self.model_copy()
        out._content = content
        return out

    def cells(self) -> list[Cell]:
        """Every cell once, in grid order."""
        g = self.grid
        out: dict[Cell, None] = {}
        axes = itertools.product(
            self.sampling.temperature, g.loss_pct, g.rate_mbit, g.rtt_ms, g.mode, g.policy, g.gamma
        )
        for temperature, loss, rate, rtt, mode, policy, gamma in axes:
            drafting = mode in DRAFTING_MODES
            cell = Cell(
                mode=mode,
                policy=policy if mode == "dsd-sync" else "static",
                gamma=gamma if drafting else 0,
                rtt_ms=rtt,
                rate_mbit=None if isinstance(rate, str) else rate,
                loss_pct=loss,
                temperature=temperature,
            )
            out[cell] = None
        return list(out)

    def cell_id(self, cell: Cell) -> str:
        """A content hash: the same work has the same id in every scenario that contains it."""
        work = {
            "cell": cell.model_dump(),
            "models": self.models.model_dump(),
            "workload": self.workload.model_dump(),
            "top_k": self.sampling.top_k,
            "top_p": self.sampling.top_p,
            "seed": self.run.seed,
            "runtime": self.run.runtime,
            "link": self.run.link,
            "content": self._content,
        }
        return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()[:12]

    def sampling_of(self, cell: Cell, rep: int) -> Sampling:
        """The sampling of a repetition: its seed is shared by all cells, so that they are paired."""
        return Sampling(
            temperature=cell.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
            seed=(self.run.seed * 1_000_003 + rep) % 2**64,
        )

    def digest(self) -> str:
        """A hash of everything that determines the results: titles and repeats do not."""
        ids = sorted(self.cell_id(c) for c in self.cells())
        return hashlib.sha256(json.dumps([self.name, ids]).encode()).hexdigest()[:8]


def load_scenario(path: Path, overrides: dict[str, Any] | None = None) -> tuple[Scenario, str]:
    """A scenario and its text. `overrides` replace single values by dotted name ("run.repeats").

    Raises ScenarioError with one line for an unreadable file, bad TOML, an unknown key or a bad value.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ScenarioError(f"{path} is not UTF-8: byte {e.start} is 0x{e.object[e.start]:02x}") from None
    except OSError as e:
        raise ScenarioError(f"{path}: {e.strerror}") from None
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ScenarioError(f"{path} is not TOML: {e}") from None
    for dotted, value in (overrides or {}).items():
        part, key = dotted.split(".")
        if not isinstance(raw.setdefault(part, {}), dict):
            raise ScenarioError(f"{path}: {part} is {raw[part]!r}; allowed: a table [{part}]")
        raw[part][key] = value
    try:
        return Scenario.model_validate(raw), text
    except ValidationError as e:
        raise ScenarioError(f"{path}: {_first_problem(e)}") from None


def _first_problem(error: ValidationError) -> str:
    """The first validation error as one line: field, value, what is allowed."""
    problem = error.errors()[0]
    # pydantic names union branches too; a user knows keys and list places
    places = [str(p) for p in problem["loc"] if isinstance(p, int) or p.isidentifier()]
    field = ".".join(p for p in places if p not in ("float", "int"))
    if problem["type"] == "extra_forbidden":
        return f"unknown key {field!r}; allowed there: {', '.join(_keys_beside(problem['loc']))}"
    if problem["type"] == "missing":
        return f"{field} is missing"
    if field.startswith("grid.rate_mbit"):
        return f"{field} is {problem['input']!r}; allowed: a number above 0, or {UNLIMITED!r}"
    if problem["type"] == "string_pattern_mismatch":
        return f"{field} is {problem['input']!r}; allowed: lower-case letters, digits and hyphens, at most 64"
    if problem["type"] in ("model_type", "model_attributes_type"):
        return f"{field} is {problem['input']!r}; allowed: a table [{field}]"
    message = problem["msg"].removeprefix("Value error, ")
    allowed = message[0].lower() + message[1:]
    return f"{field} is {problem['input']!r}; allowed: {allowed}".replace(
        "allowed: input should be", "allowed:"
    )


def _keys_beside(loc: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Scenario
    for part in loc[:-1]:
        annotation = model.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return list(model.model_fields)


assert set(Mode.__args__) == set(MODES)  # type: ignore[attr-defined] # one list of modes, checked at import
