"""What a scenario file may say, and how its grid becomes cells."""

from __future__ import annotations

import hashlib
import itertools
import json
import tomllib
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, Field, PrivateAttr, ValidationError, model_validator

from dsdlab.decoding import Sampling
from dsdlab.nodes.request import MODES
from dsdlab.policies import RUN_AHEAD
from dsdlab.scenario_edges import check_edges
from dsdlab.scenario_fleet import Fleet, check_fleet
from dsdlab.scenario_modes import check_ways, ways_of
from dsdlab.scenario_parts import (
    LINKS,
    RUNTIMES,
    UNLIMITED,
    Grid,
    LinkName,
    LinkPart,
    Mode,
    Models,
    Nodes,
    Part,
    Run,
    Runtime,
    SamplingPart,
    Simulate,
    Tcp,
    Workload,
    check_acceptance,
    mbit,
)
from dsdlab.scenario_wan import check_wan
from dsdlab.sim.profile import LinkProfile, LinkStep, TcpRegime

__all__ = ["LINKS", "RUNTIMES", "UNLIMITED", "Cell", "Scenario", "ScenarioError", "Workload", "load_scenario"]

# where a scenario says what a field of LinkProfile is
_PLACES = {
    "rtt_ms": "grid.rtt_ms",
    "jitter_ms": "grid.jitter_ms",
    "loss_pct": "grid.loss_pct",
    "loss_burst": "grid.loss_burst",
    "rto_min_ms": "tcp.rto_min_ms",
}


class ScenarioError(Exception):
    """A scenario cannot be used; one line naming file, field, value and what is allowed."""


class Cell(Part):
    """One combination of the grid. What does not concern the mode has its default, γ is 0."""

    mode: Mode
    policy: str
    gamma: int
    run_ahead: int = RUN_AHEAD
    free_run: bool = False
    beside: int = 0
    rtt_ms: float
    rate_mbit: float | None  # None: unlimited
    loss_pct: float
    temperature: float
    jitter_ms: float = 0.0
    loss_burst: float = 1.0
    congestion: str = "auto"
    slow_start_after_idle: bool = True
    rto_min_ms: float = 200.0
    nodelay: bool = True
    edges: int = 1

    @property
    def tcp(self) -> TcpRegime:
        """How both ends' TCP is to behave."""
        return TcpRegime(
            congestion=self.congestion,
            slow_start_after_idle=self.slow_start_after_idle,
            rto_min_ms=self.rto_min_ms,
            nodelay=self.nodelay,
        )


class Scenario(Part):
    """A whole scenario file."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")
    title: str = ""
    models: Models = Models()
    workload: Workload = Workload()
    sampling: SamplingPart = SamplingPart()
    grid: Grid
    link: LinkPart = LinkPart()
    tcp: Tcp = Tcp()
    nodes: Nodes = Nodes()
    run: Run = Run()
    simulate: Simulate = Simulate()
    fleet: Fleet | None = None
    _content: str = PrivateAttr("")
    _where: str = PrivateAttr("")

    @model_validator(mode="after")
    def _possible(self) -> Scenario:
        """Refuse here what would fail only once the testbed stands. Raises ValueError, field first."""
        self._check_run()
        check_edges(self.grid, self.run, self.models)
        check_ways(self.grid)
        check_fleet(self.fleet, self.grid, self.link, self.run)
        check_acceptance(self.simulate.alpha, self.simulate.persist)
        for index, step in enumerate(self.link.steps):
            try:
                step.link_step()
            except ValueError as e:
                raise ValueError(f"link.steps.{index} {e}") from None
        steps = self.steps
        links = {(c.rtt_ms, c.rate_mbit, c.loss_pct, c.loss_burst, c.jitter_ms): c for c in self.cells()}
        for cell in links.values():
            try:
                profile = self.profile_of(cell)
            except ValueError as e:
                field, colon, rest = str(e).partition(":")
                raise ValueError(f"{_PLACES.get(field, f'link.{field}')}{colon}{rest}") from None
            for n in range(1, len(steps) + 1):  # one more each time, to name the one that cannot be
                try:
                    LinkStep.timeline(profile, steps[:n])
                except ValueError as e:
                    raise ValueError(f"link.steps.{n - 1}: {e} (from rtt_ms {cell.rtt_ms:g})") from None
        return self

    def _check_run(self) -> None:
        """What the named runtime and link cannot do; "auto" is checked once it is resolved."""
        check_wan(self.run, self.grid, self.link, self.tcp)
        if self.run.link == "modelled" and self.link.reorder_pct:
            raise ValueError(
                f"link.reorder_pct is {self.link.reorder_pct:g} with run.link 'modelled'; "
                "needs netem or netem-uml"
            )
        if self.run.runtime == "process":  # its nodes share the host's TCP
            if self.tcp.congestion != ["auto"]:
                raise ValueError(
                    f"tcp.congestion is {self.tcp.congestion} with run.runtime 'process'; "
                    "needs runtime netns or docker"
                )
            if self.tcp.slow_start_after_idle != [True]:
                raise ValueError(
                    f"tcp.slow_start_after_idle is {self.tcp.slow_start_after_idle} with run.runtime "
                    "'process'; needs runtime netns or docker"
                )
        if self.run.runtime not in ("docker", "auto"):
            for field, value in self.nodes:
                if value is not None:
                    raise ValueError(
                        f"nodes.{field} is {value:g} with run.runtime {self.run.runtime!r}; "
                        "needs runtime docker"
                    )

    def pinned(self, content: str) -> Scenario:
        """The same scenario with cell ids that also depend on `content`, a hash of the files it names."""
        out = self.model_copy()
        out._content = content
        return out

    def resolved(self, runtime: str, link: str) -> Scenario:
        """The same scenario with the runtime and link that "auto" stands for on this host.

        Raises ScenarioError where the chosen ones cannot do what the scenario asks.
        """
        raw = self.model_dump()
        raw["run"] |= {"runtime": runtime, "link": link}
        try:
            out = Scenario.model_validate(raw)
        except ValidationError as e:
            where = f"{self._where}: " if self._where else ""
            raise ScenarioError(f"{where}{_first_problem(e)}") from None
        out._content, out._where = self._content, self._where
        return out

    def read_token(self, default: str) -> str:
        """The token of `run.token_file`, which is named relative to the scenario; `default` without one.

        Raises ScenarioError.
        """
        if self.run.token_file is None:
            return default
        path = Path(self._where).parent / self.run.token_file
        try:
            token = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as e:
            why = e.strerror if isinstance(e, OSError) else "not UTF-8"
            raise ScenarioError(f"run.token_file: {path}: {why}") from None
        if not token:
            raise ScenarioError(f"run.token_file: {path} is empty")
        return token

    @property
    def steps(self) -> tuple[LinkStep, ...]:
        """How the link changes during every generation, in the file's order."""
        return tuple(step.link_step() for step in self.link.steps)

    def profile_of(self, cell: Cell) -> LinkProfile:
        """The link that a cell asks for, before any step. Raises ValueError where there can be none."""
        up, down = self.link.rate_up_mbit, self.link.rate_down_mbit
        return LinkProfile(
            rtt_ms=cell.rtt_ms,
            up_fraction=self.link.up_fraction,
            rate_up_mbit=cell.rate_mbit if up is None else mbit(up),
            rate_down_mbit=cell.rate_mbit if down is None else mbit(down),
            loss_pct=cell.loss_pct,
            loss_burst=cell.loss_burst,
            jitter_ms=cell.jitter_ms,
            reorder_pct=self.link.reorder_pct,
            buffer_bytes=self.link.buffer_bytes,
            rto_min_ms=cell.rto_min_ms,
        )

    def cells(self) -> list[Cell]:
        """Every cell once, in grid order."""
        g, t = self.grid, self.tcp
        ways = ways_of(g)
        out: dict[Cell, None] = {}
        links = itertools.product(
            self.sampling.temperature, t.congestion, t.slow_start_after_idle, t.rto_min_ms, t.nodelay,
            g.loss_pct, g.loss_burst, g.rate_mbit, g.jitter_ms, g.rtt_ms,
        )  # fmt: skip
        for edges, link in itertools.product(g.edges, links):
            heat, congestion, slow_start, rto_min_ms, nodelay, loss, burst, rate, jitter, rtt = link
            for way in ways:
                cell = Cell(
                    **way._asdict(),
                    rtt_ms=rtt,
                    rate_mbit=mbit(rate),
                    loss_pct=loss,
                    temperature=heat,
                    jitter_ms=jitter,
                    loss_burst=burst if loss else 1.0,
                    congestion=congestion,
                    slow_start_after_idle=slow_start,
                    rto_min_ms=rto_min_ms,
                    nodelay=nodelay,
                    edges=edges,
                )
                out[cell] = None
        return list(out)

    def cell_id(self, cell: Cell) -> str:
        """A content hash: the same work has the same id in every scenario that contains it."""
        late = {"run_ahead", "free_run", "beside", "edges"}  # an id must not change where they are not used
        work = {
            "cell": {k: v for k, v in cell if k not in late or v != Cell.model_fields[k].default},
            "models": self.models.model_dump(exclude_none=True),
            "workload": self.workload.model_dump(),
            "top_k": self.sampling.top_k,
            "top_p": self.sampling.top_p,
            "seed": self.run.seed,
            "runtime": self.run.runtime,
            "link": self.run.link,
            "shared": self.link.model_dump(),
            "nodes": self.nodes.model_dump(),
            "content": self._content,
        }
        if self.run.verifier is not None:  # another one is another machine
            work["verifier"] = self.run.verifier
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
        scenario = Scenario.model_validate(raw)
    except ValidationError as e:
        raise ScenarioError(f"{path}: {_first_problem(e)}") from None
    scenario._where = str(path)
    return scenario, text


def _first_problem(error: ValidationError) -> str:
    """The first validation error as one line: field, value, what is allowed."""
    problem = error.errors()[0]
    # pydantic names union branches too; a user knows keys and list places
    places = [str(p) for p in problem["loc"] if isinstance(p, int) or p.isidentifier()]
    field = ".".join(p for p in places if p not in ("float", "int"))
    if not places:  # found between tables: it names its field itself
        return problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"unknown key {field!r}; allowed there: {', '.join(_keys_beside(problem['loc']))}"
    if problem["type"] == "missing":
        return f"{field} is missing"
    if "rate_" in field:
        return f"{field} is {problem['input']!r}; allowed: a number from 0.001 to 100000, or {UNLIMITED!r}"
    if field.startswith("tcp.congestion") and problem["type"] == "string_pattern_mismatch":
        return f"{field} is {problem['input']!r}; allowed: the kernel's name of an algorithm, or 'auto'"
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
        if isinstance(part, int):
            continue
        annotation: Any = model.model_fields[part].annotation
        inner = next(iter(get_args(annotation)), annotation)  # of a list of tables, the table
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        model = inner
    return list(model.model_fields)


assert set(get_args(Mode)) == set(MODES)  # one list of each kind of word, checked at import
assert get_args(Runtime) == RUNTIMES
assert get_args(LinkName) == LINKS
