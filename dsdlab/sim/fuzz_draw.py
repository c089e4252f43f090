"""What a fuzzed run is: everything about it, drawn from one number."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from dsdlab.decoding import Sampling
from dsdlab.nodes.request import MODES, POLICY_MODES, GenerationRequest
from dsdlab.policies import PolicyError, load_window_policy, window_policy_names
from dsdlab.policies.registry import offer
from dsdlab.sim.fuzz_faults import Roughness
from dsdlab.sim.fuzz_policy import RESTLESS, Restless
from dsdlab.sim.profile import LinkProfile, LinkStep

__all__ = ["ClientPlan", "DrafterPlan", "Situation", "described_situation", "draw", "policy_names"]

T = TypeVar("T")
MAX_CONTEXT = 512
SOME_GAMMA = 4
PATIENCE_S = 60.0
SHORT_PATIENCE_S = 14.0
FOREVER_S = 3600.0  # of a partition: longer than anybody's patience
MODE_WEIGHTS = {"edge-sd": 0.2, "cloud-ar": 0.6, "cloud-sd": 0.6}  # others: 1


class DrafterPlan(msgspec.Struct, frozen=True):
    """kind: model, synthetic (emulated models alone), lookup or lookup first. token_s: of a forward. The rest
    as `Whims` has it."""

    kind: str
    alpha: float
    token_s: float
    silent: float = 0.0
    short: float = 0.0
    wrong: float = 0.0
    alien: float = 0.0


class ClientPlan(msgspec.Struct, frozen=True):
    """A drafter node. It begins at `begins_s`, asks for one generation after the other, and may go away in
    the middle of the last (`leaves_s` after it began). links: a connection takes the next of them, the last
    one for ever; steps change whichever is in use. drops_s: when its connection breaks."""

    requests: list[GenerationRequest]
    drafter: DrafterPlan
    links: list[LinkProfile]
    steps: tuple[LinkStep, ...]
    up: Roughness
    down: Roughness
    begins_s: float
    leaves_s: float | None
    drops_s: list[float]
    patience_s: float

    @property
    def may_give_up(self) -> bool:
        """Whether nobody may answer for longer than the node's patience."""
        longest_s = max(
            (s.for_s or FOREVER_S for s in self.steps if s.changes.get("partitioned")), default=0.0
        )
        return longest_s > self.patience_s - 13.0  # a handshake takes 10 s to fail


class Situation(msgspec.Struct, frozen=True):
    """One run. restarts: (when in s, how long nobody answers) of a verifier that loses all sessions."""

    seed: int
    kind: str  # of models: hash or emulated
    vocab_size: int
    eos_ids: tuple[int, ...]
    base_s: float
    row_s: float
    slots: int
    beside: DrafterPlan
    beside_slots: int
    clients: list[ClientPlan]
    restarts: list[tuple[float, float]]
    linger_s: float

    @property
    def reorders(self) -> bool:
        return any(c.up.reorders or c.down.reorders for c in self.clients)


def policy_names() -> list[str]:
    """Every policy that may be drawn."""
    return [*window_policy_names(), RESTLESS]


def draw(seed: int, modes: Sequence[str] = (), policies: Sequence[str] = ()) -> Situation:
    """The situation of a seed. modes, policies: only these; none: all there are.

    A policy is drawn with windows that it takes. Raises PolicyError for one that is unknown.
    """
    rng = random.Random(f"dsdlab fuzz {seed}")
    for name in policies:
        if name not in policy_names():
            load_window_policy(name, SOME_GAMMA)
    offer(RESTLESS, lambda gamma: Restless(gamma, random.Random(f"{seed}/restless")))
    if len(modes) != 1 and not policies:
        weights = {m: MODE_WEIGHTS.get(m, 1.0) for m in modes or MODES}
    else:
        weights = dict.fromkeys(modes or (POLICY_MODES if policies else MODES), 1.0)
    names = list(policies) or policy_names()
    hashed = rng.random() < 0.7
    vocab_size = rng.choice([4, 8, 8, 16, 16, 30] if hashed else [4, 13, 40, 1000])
    base_s = rng.choice([0.0, 0.001, 0.02, 0.05, 0.05, 0.2])
    count = rng.choice([1, 1, 1, 2, 2, 3, 4])
    clients = [_client(rng, weights, names, hashed, vocab_size, base_s, i) for i in range(count)]
    length_s = max(c.begins_s for c in clients) + 2.0 * sum(map(_expected_s, clients))
    restarts = []
    if rng.random() < 0.3:
        restarts = sorted(
            (length_s * rng.random() ** 2, rng.choice([0.0, 0.0, 0.3, 5.0])) for _ in range(_few(rng))
        )
    return Situation(
        seed=seed,
        kind="hash" if hashed else "emulated",
        vocab_size=vocab_size,
        eos_ids=() if rng.random() < 0.4 else tuple(
            sorted(rng.sample(range(1, vocab_size), 1 if vocab_size < 8 else rng.choice([1, 1, 2])))
        ),
        base_s=base_s,
        row_s=rng.choice([0.0, 0.0, 0.001, 0.01]) if base_s else 0.0,
        slots=count if rng.random() < 0.8 else rng.randint(1, count),
        beside=_drafter(rng, hashed, edge=False),
        beside_slots=count if rng.random() < 0.8 else 1,
        clients=clients,
        restarts=restarts,
        linger_s=rng.choice([0.02, 2.0, 60.0, 60.0]),
    )  # fmt: skip


def _few(rng: random.Random) -> int:
    return rng.choice([1, 1, 2, 3])


def _chance(rng: random.Random, share: float, values: Sequence[float]) -> float:
    """0 but in `share` of all draws."""
    return rng.choice(values) if rng.random() < share else 0.0


def _drafter(rng: random.Random, hashed: bool, *, edge: bool) -> DrafterPlan:
    kinds = (
        ["model", "model", "model", "lookup", "lookup first"] if hashed else ["synthetic", "model", "lookup"]
    )
    whims = [0.0] * 4
    if rng.random() < 0.3:
        whims = [rng.choice([0.0, 0.1, 0.3]) for _ in whims]
    elif rng.random() < 0.05:
        whims[0] = 1.0  # it never has an idea
    return DrafterPlan(
        rng.choice(kinds),
        rng.choice([0.0, 0.3, 0.6, 0.8, 0.8, 0.95, 1.0]),
        rng.choice([0.0, 0.0005, 0.005, 0.005, 0.02, 0.3] if edge else [0.0, 0.002, 0.01, 0.1]),
        *whims[:2],
        *(w / 2 for w in whims[2:]),
    )


def _request(
    rng: random.Random, weights: dict[str, float], names: Sequence[str], vocab_size: int
) -> GenerationRequest:
    mode = rng.choices(list(weights), list(weights.values()))[0]
    policy = names[int(rng.random() * len(names))]
    gamma = rng.choice([1, 1, 2, 3, 4, 4, 6, 8, 16, 256])
    if rng.random() < 0.1 and mode != "dsd-pipelined":
        gamma = 0
    run_ahead = rng.choice([1, 2, 4, 8, 8, 32, 32, 300])
    if mode == "dsd-pipelined":
        gamma = min(gamma, run_ahead)
    free_run = rng.random() < 0.5
    beside = rng.choice([0, 0, 1, 4, 8])
    temperature = rng.choice([0.0, 0.0, 0.3, 1.0, 1.0, 3.0])
    return GenerationRequest(
        prompt_ids=[rng.randrange(vocab_size) for _ in range(rng.randint(1, 12))],
        mode=mode,
        policy=_accepting(policy, gamma) if mode in POLICY_MODES else "static",
        gamma=gamma,
        sampling=Sampling(
            temperature,
            rng.choice([0, 0, 1, 3, 5]) if temperature else 0,
            rng.choice([1.0, 1.0, 0.9, 0.3]) if temperature else 1.0,
            rng.getrandbits(64 if rng.random() < 0.5 else 8),
        ),
        max_new_tokens=rng.choice([1, 2, 3, 5, 8, 12, 20, 20, 30, 45, 70, rng.randint(1, 200)]),
        stop_at_eos=rng.random() < 0.8,
        run_ahead=run_ahead,
        free_run=free_run,
        beside=beside if mode == "dsd-adaptive" or (mode == "dsd-stream" and free_run) else 0,
    )


def _accepting(policy: str, gamma: int) -> str:
    """The policy, or `static` where it does not take this gamma."""
    try:
        load_window_policy(policy, gamma)
    except PolicyError:
        return "static"
    return policy


def _link(rng: random.Random, rtt_ms: float, lossy: bool) -> LinkProfile:
    rate_mbit = rng.choice([0.1, 1.0, 10.0]) if rng.random() < 0.2 else None
    return LinkProfile(
        rtt_ms=rtt_ms,
        up_fraction=rng.choice([0.5, 0.5, 0.5, 0.1, 0.9]),
        rate_up_mbit=rate_mbit,
        rate_down_mbit=None if rate_mbit is None else 2 * rate_mbit,
        loss_pct=rng.choice([0.5, 2.0, 10.0]) if lossy and rng.random() < 0.7 else 0.0,
        jitter_ms=rng.choice([0.1, 0.5]) * rtt_ms if lossy else 0.0,
    )


def _rough(rng: random.Random, rough: bool) -> Roughness:
    late_s = rng.choice([0.005, 0.05, 0.05, 0.5])
    slow, slow_s = _chance(rng, 0.2, [0.05, 0.3]), rng.choice([0.001, 0.02, 0.1])
    if not rough:
        return Roughness(slow=slow, slow_s=slow_s)
    return Roughness(
        duplicate=_chance(rng, 0.6, [0.05, 0.3, 1.0]),
        hold=_chance(rng, 0.4, [0.02, 0.1]),
        swap=_chance(rng, 0.4, [0.02, 0.1, 0.3]),
        late_s=late_s,
        lose_pong=_chance(rng, 0.5, [0.3, 1.0]),
        slow=slow,
        slow_s=slow_s,
    )


def _client(
    rng: random.Random,
    weights: dict[str, float],
    names: Sequence[str],
    hashed: bool,
    vocab_size: int,
    base_s: float,
    number: int,
) -> ClientPlan:
    requests = [_request(rng, weights, names, vocab_size) for _ in range(rng.choice([1, 1, 1, 2]))]
    drafter = _drafter(rng, hashed, edge=True)
    rtt_ms = rng.choice([0.0, 0.0, 1.0, 10.0, 30.0, 100.0, 100.0, 300.0, 500.0])
    lossy = rng.random() < 0.15
    links = [_link(rng, rtt_ms, lossy)]
    if rng.random() < 0.15:  # another way at each connection, as when a phone changes networks
        links += [_link(rng, rng.choice([0.0, 5.0, 50.0, 400.0]), lossy) for _ in range(2)]
    rough = rng.random() < 0.35
    up, down = _rough(rng, rough), _rough(rng, rough)
    plan = ClientPlan(
        requests, drafter, links, (), up, down,
        begins_s=0.0 if number == 0 else rng.choice([0.0, 0.01, 0.3, 2.0]),
        leaves_s=None, drops_s=[], patience_s=PATIENCE_S,
    )  # fmt: skip
    length_s = _expected_s(plan) * (1.0 + base_s)
    return msgspec.structs.replace(
        plan,
        steps=_steps(rng, length_s),
        leaves_s=length_s * rng.random() if rng.random() < 0.08 else None,
        drops_s=sorted(length_s * rng.random() for _ in range(_few(rng))) if rng.random() < 0.25 else [],
        patience_s=PATIENCE_S if rng.random() < 0.9 else SHORT_PATIENCE_S,
    )


def _expected_s(client: ClientPlan) -> float:
    """Roughly how long a client is at it."""
    rtt_s = client.links[0].rtt_ms / 1e3
    tokens = sum(r.max_new_tokens for r in client.requests)
    return 2.0 * rtt_s + tokens * max(rtt_s / 4, 0.01)


def _steps(rng: random.Random, length_s: float) -> tuple[LinkStep, ...]:
    """Changes of the link on the way: mostly none."""
    if rng.random() >= 0.2:
        return ()
    steps = []
    for _ in range(_few(rng)):
        at_s = length_s * rng.random()
        for_s = rng.choice([0.02, 0.3, 3.0])
        changes: dict[str, Any] = {"rtt_ms": rng.choice([0.0, 20.0, 150.0, 500.0]), "jitter_ms": 0.0}
        match rng.choice(["rtt", "rtt", "rate", "partition", "partition"]):
            case "rate":
                changes = {"rate_up_mbit": 0.05, "rate_down_mbit": 0.2}
            case "partition":
                changes = {"partitioned": True}
                if rng.random() < 0.15:
                    for_s = rng.choice([20.0, FOREVER_S])
        steps.append(LinkStep(at_s=at_s, for_s=for_s, changes=changes))
    return tuple(steps)


def described_situation(s: Situation) -> str:
    """A situation for people, a few lines."""
    eos = f"ends at {' or '.join(map(str, s.eos_ids))}" if s.eos_ids else "no end-of-sequence id"
    out = [
        f"seed {s.seed}: {s.kind} models, vocabulary of {s.vocab_size}, {eos}; "
        f"a step takes {1e3 * s.base_s:g} ms + {1e3 * s.row_s:g} ms a row; {s.slots} slots, "
        f"sessions linger {s.linger_s:g} s; beside the target, {s.beside_slots} slots: {_plain(s.beside)}"
    ]
    out += [f"  verifier restarts at {at:g} s, away for {away:g} s" for at, away in s.restarts]
    for number, client in enumerate(s.clients):
        out.append(
            f"  client {number} begins at {client.begins_s:g} s, patience {client.patience_s:g} s; "
            f"drafter: {_plain(client.drafter)}"
        )
        out += [f"    asks: {request}" for request in client.requests]
        out += [f"    link: {_plain(link, LinkProfile())}" for link in client.links]
        out += [f"    at {step.at_s:g} s for {step.for_s} s: {step.label}" for step in client.steps]
        out += [
            f"    {name}: {_plain(rough, Roughness())}"
            for name, rough in (("up", client.up), ("down", client.down))
        ]
        if client.drops_s:
            out.append(f"    its connection breaks at {', '.join(f'{t:g}' for t in client.drops_s)} s")
        if client.leaves_s is not None:
            out.append(f"    goes away {client.leaves_s:g} s after its last request")
    return "\n".join(out)


def _plain(value: Any, usual: Any = None) -> str:
    """Fields that are not as usual."""
    names = getattr(value, "__struct_fields__", None) or list(value.__dataclass_fields__)
    words = [
        f"{name} {getattr(value, name)}"
        for name in names
        if getattr(value, name) != (getattr(usual, name) if usual is not None else 0.0)
    ]
    return ", ".join(words) or "as usual"
