"""The tables of a scenario file: their keys, ranges and defaults. `dsdlab.scenario` puts them together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dsdlab.models.emulated import check_persist
from dsdlab.models.zoo import default_precision
from dsdlab.nodes.request import MAX_RUN_AHEAD
from dsdlab.policies import RUN_AHEAD, window_policy_names
from dsdlab.protocol.frames import MAX_WINDOW
from dsdlab.sim.profile import LinkStep

UNLIMITED = "unlimited"
RUNTIMES = ("auto", "process", "netns", "docker")
LINKS = ("auto", "modelled", "netem", "netem-uml", "wan")

Mode = Literal["cloud-ar", "cloud-sd", "edge-sd", "dsd-sync", "dsd-pipelined", "dsd-stream", "dsd-adaptive"]
Runtime = Literal["auto", "process", "netns", "docker"]
LinkName = Literal["auto", "modelled", "netem", "netem-uml", "wan"]

Window = Annotated[int, Field(ge=0, le=MAX_WINDOW)]
RunAhead = Annotated[int, Field(ge=1, le=MAX_RUN_AHEAD)]
Edges = Annotated[int, Field(ge=1, le=64)]
Rtt = Annotated[float, Field(ge=0, le=10_000)]
Rate = Annotated[float, Field(ge=0.001, le=100_000)] | Literal["unlimited"]
Loss = Annotated[float, Field(ge=0, le=50)]
Burst = Annotated[float, Field(ge=1, le=1000)]
Jitter = Annotated[float, Field(ge=0, le=10_000)]
Share = Annotated[float, Field(gt=0, le=1)]
Memory = Annotated[int, Field(ge=64, le=1 << 30)]


def mbit(rate: float | str | None) -> float | None:
    """A rate as links take it: None is unlimited."""
    return None if rate is None or isinstance(rate, str) else rate


class Part(BaseModel):
    """A table: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Axes(Part):
    """A table whose lists are axes of the grid: each value once."""

    @field_validator("*")
    @classmethod
    def _no_repeats(cls, values: list[Any]) -> list[Any]:
        if len(set(values)) != len(values):
            raise ValueError("every value once")
        return values


class Models(Part):
    """Which pair, and in which precision the target computes.

    edge_target, edge_drafter: what edge nodes load instead, where they are not as fast as the cloud's. The
    edge's target (`edge-sd`) must say what `target` says: every id is compared. precision: unless given, the
    one that the target's weights were stored for (`default_precision`).
    """

    target: str = "smollm2-135m-instruct"
    drafter: str = "lookup+smollm2-drafter"
    edge_target: str | None = None
    edge_drafter: str | None = None
    precision: Literal["bf16", "fp32", "int8", "int4", "gguf"] = "bf16"
    max_context: Annotated[int, Field(ge=16, le=1 << 20)] = 2048

    @model_validator(mode="before")
    @classmethod
    def _own_precision(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "precision" in given:
            return given
        target = given.get("target", cls.model_fields["target"].default)
        return given | {"precision": default_precision(target) if isinstance(target, str) else "bf16"}


class Workload(Part):
    """Prompts and lengths. `prompts` is "builtin", or a JSONL file named relative to the scenario."""

    prompts: str = "builtin"
    n_prompts: Annotated[int, Field(ge=1, le=100_000)] = 4
    max_new_tokens: Annotated[int, Field(ge=1, le=1 << 20)] = 48
    stop_at_eos: bool = True


class SamplingPart(Part):
    """Each temperature is an axis of the grid; 0 is greedy."""

    temperature: Annotated[list[Annotated[float, Field(ge=0, le=100)]], Field(min_length=1)] = [0.0]
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


class Grid(Axes):
    """The axes; every combination is a cell. γ does not concern `cloud-ar`, nor a burst length no loss.

    run_ahead: tokens drafted and not yet judged (`dsd-pipelined`, `dsd-stream`). free_run: whether the target
    decodes alone while no draft waits (`dsd-stream`). beside: window of a drafter at the target that fills up
    such steps (`dsd-stream` with free_run, `dsd-adaptive`); 0: none stands there. edges: so many edge nodes
    generate at once, each over a link of its own, with one verifier; a repetition for each of them.
    """

    mode: Annotated[list[Mode], Field(min_length=1)] = ["cloud-ar", "cloud-sd", "dsd-sync"]
    policy: Annotated[list[str], Field(min_length=1)] = ["static"]
    gamma: Annotated[list[Window], Field(min_length=1)] = [4]
    run_ahead: Annotated[list[Annotated[int, Field(ge=1, le=MAX_RUN_AHEAD)]], Field(min_length=1)] = [
        RUN_AHEAD
    ]
    free_run: Annotated[list[bool], Field(min_length=1)] = [False]
    beside: Annotated[list[Window], Field(min_length=1)] = [0]
    edges: Annotated[list[Edges], Field(min_length=1)] = [1]
    rtt_ms: Annotated[list[Rtt], Field(min_length=1)]
    rate_mbit: Annotated[list[Rate], Field(min_length=1)] = ["unlimited"]
    loss_pct: Annotated[list[Loss], Field(min_length=1)] = [0.0]
    loss_burst: Annotated[list[Burst], Field(min_length=1)] = [1.0]  # mean packets lost in a row
    jitter_ms: Annotated[list[Jitter], Field(min_length=1)] = [0.0]  # half-width, of the round trip

    @field_validator("policy")
    @classmethod
    def _installed(cls, names: list[str]) -> list[str]:
        installed = window_policy_names()
        if not set(names) <= set(installed):
            raise ValueError(f"installed window policies ({', '.join(installed)})")
        return names


class Step(Part):
    """A change of the link during every generation; `rate_mbit` is both directions'."""

    at_s: Annotated[float, Field(ge=0, le=86_400)]
    for_s: Annotated[float, Field(gt=0, le=86_400)] | None = None
    rtt_ms: Rtt | None = None
    rate_mbit: Rate | None = None
    rate_up_mbit: Rate | None = None
    rate_down_mbit: Rate | None = None
    loss_pct: Loss | None = None
    loss_burst: Burst | None = None
    jitter_ms: Jitter | None = None
    partition: Literal[True] | None = None

    def link_step(self) -> LinkStep:
        """The same for a link. Raises ValueError where nothing changes."""
        changes: dict[str, Any] = {}
        if self.rate_mbit is not None:
            changes |= dict.fromkeys(("rate_up_mbit", "rate_down_mbit"), mbit(self.rate_mbit))
        for name in ("rate_up_mbit", "rate_down_mbit"):
            if getattr(self, name) is not None:
                changes[name] = mbit(getattr(self, name))
        for name in ("rtt_ms", "loss_pct", "loss_burst", "jitter_ms"):
            if getattr(self, name) is not None:
                changes[name] = getattr(self, name)
        if self.partition:
            changes["partitioned"] = True
        if not changes:
            words = [name for name in type(self).model_fields if name not in ("at_s", "for_s")]
            raise ValueError(f"changes nothing; allowed: one or more of {', '.join(words)}")
        return LinkStep(at_s=self.at_s, for_s=self.for_s, changes=changes)


class LinkPart(Part):
    """What all cells' links share. A direction's rate here overrides `grid.rate_mbit`, the cell's label."""

    up_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5
    rate_up_mbit: Rate | None = None
    rate_down_mbit: Rate | None = None
    reorder_pct: Annotated[float, Field(ge=0, le=50)] = 0.0
    buffer_bytes: int | None = None
    steps: list[Step] = []


class Tcp(Axes):
    """How the nodes' TCP behaves; each key is an axis of the grid."""

    congestion: Annotated[list[Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,15}$")]], Field(min_length=1)] = [
        "auto"
    ]
    slow_start_after_idle: Annotated[list[bool], Field(min_length=1)] = [True]
    rto_min_ms: Annotated[list[Annotated[float, Field(ge=1, le=120_000)]], Field(min_length=1)] = [200.0]
    nodelay: Annotated[list[bool], Field(min_length=1)] = [True]


class Nodes(Part):
    """Limits of the nodes: a share of their cores' time, and memory in MB. Containers have them."""

    edge_cpu_quota: Share | None = None
    cloud_cpu_quota: Share | None = None
    edge_memory_mb: Memory | None = None
    cloud_memory_mb: Memory | None = None


class Simulate(Part):
    """What the simulator is fed with; nothing of it changes what a sweep measures.

    profile: a shipped profile's name, or a file that `dsdlab calibrate` wrote (relative to the scenario).
    alpha: a synthetic acceptance rate instead of a recorded trace; persist: mean length of a run of accepted
    positions (a two-state chain) instead of independent ones. draws: of losses, jitter and compute times.
    """

    profile: str | None = None
    alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    persist: Annotated[float, Field(ge=1, le=1e6)] | None = None
    draws: Annotated[int, Field(ge=1, le=10_000)] = 8


def check_acceptance(alpha: float | None, persist: float | None) -> None:
    """Whether there is such a synthetic acceptance. Raises ValueError, field first."""
    if persist is None:
        return
    if alpha is None:
        raise ValueError(f"simulate.persist is {persist:g} without simulate.alpha")
    try:
        check_persist(alpha, persist)
    except ValueError as e:
        raise ValueError(f"simulate.{e}") from None


class Run(Part):
    """How often, where, and how long a generation may take. "auto" is chosen by what the host can do.

    `verifier` is for link "wan" alone: ws://HOST:PORT/ of one that was started by hand. `token_file` is named
    relative to the scenario; without it the token is $DSDLAB_TOKEN.
    """

    repeats: Annotated[int, Field(ge=1, le=100_000)] = 3
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 1
    runtime: Runtime = "process"
    link: LinkName = "modelled"
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 120.0
    verifier: str | None = None
    token_file: str | None = None
