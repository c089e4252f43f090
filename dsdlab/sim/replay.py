"""Replay: a target and a drafter that say what a trace recorded, and charge what saying it costs.

Both behave as the models did, forward for forward: `ReplayDrafter` charges the sequence of (rows, context)
that `ModelDrafter` and `LookupFirst` would compute, from what they would hold of earlier windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, islice

from dsdlab.decoding import Sampling, verify
from dsdlab.models.base import Chunk, ContextFull, Logits, ModelError, ModelInfo, SlotEngine
from dsdlab.models.drafters import Drafter, GoesOn
from dsdlab.sim.trace import Proposal, Trace, TracedText, TraceError

__all__ = ["ReplayDrafter", "ReplayTarget", "windows_of"]

Charge = Callable[[int, int, int, int], None]
"""Called once a forward with (rows of all sessions, sessions, positions that they hold before, drawn
rows: those whose token is not chosen greedily)."""


class ReplayTarget(SlotEngine):
    """The recorded target. A session's prompt and sampling find its text, when first a token is wanted.

    What it says at a position is the text's token there, whatever was drafted: after a wrong draft nobody
    looks. Past the end of the text it says an end of sequence. Raises TraceError for an unknown prompt.
    """

    def __init__(self, trace: Trace, charge: Charge, slots: int = 8) -> None:
        self.info = ModelInfo(
            model_id=trace.target,
            tokenizer=trace.tokenizer,
            vocab_size=trace.vocab_size,
            max_context=trace.max_context,
            eos_ids=trace.eos_ids,
            precision=trace.precision,
            n_params=0,
        )
        self._trace, self._charge = trace, charge
        self._end = trace.eos_ids[0] if trace.eos_ids else 0
        self._begin_slots(slots)
        self._said: dict[int, list[int]] = {}  # prompt and text of each session that has begun
        self._read: dict[int, list[int]] = {}  # the pieces of a prompt that came so far, before that

    def close(self, slot: int) -> None:
        super().close(slot)
        self._said.pop(slot, None)
        self._read.pop(slot, None)

    def extend(self, chunks: Sequence[Chunk]) -> list[Logits]:  # noqa: ARG002 - refused whatever it is
        raise ModelError("a replayed target has no logits; allowed: choose")

    def choose(self, chunks: Sequence[Chunk], samplings: Sequence[Sampling]) -> list[list[int]]:
        lengths, texts = self._length, self._said
        tokens = context = drawn = 0
        for chunk, sampling in zip(chunks, samplings, strict=True):
            slot, n = chunk.slot, len(chunk.ids)
            held = lengths[slot]
            if held + n > self.info.max_context:
                raise ContextFull(
                    f"{held + n} positions; {self.info.model_id} is traced for {self.info.max_context}"
                )
            if slot not in texts:
                self._begin(chunk, sampling)
            tokens += n
            context += held
            if not sampling.greedy:
                drawn += chunk.rows
        out = []
        for chunk in chunks:
            slot, rows = chunk.slot, chunk.rows
            after = lengths[slot] = lengths[slot] + len(chunk.ids)
            said = texts[slot][after - rows + 1 : after + 1] if rows else []
            if len(said) < rows:
                said += [self._end] * (rows - len(said))
            out.append(said)
        self._charge(tokens, len(chunks), context, drawn)
        return out

    def _begin(self, chunk: Chunk, sampling: Sampling) -> None:
        """Take a piece of a prompt; the last one, of which tokens are wanted, finds the text."""
        read = self._read.pop(chunk.slot, [])[: self._length[chunk.slot]]
        read += chunk.ids
        if chunk.rows:
            self._said[chunk.slot] = self._trace.find(read, sampling).said
        else:
            self._read[chunk.slot] = read


class _Session:
    """What the drafter knows of a session, and what its model would hold: keys and values of so much of the
    committed text, and of the tokens `after` it."""

    __slots__ = ("after", "held", "seen", "text")

    def __init__(self) -> None:
        self.text: TracedText | None = None
        self.seen = 0  # tokens of the text known to be those that were asked about
        self.held = 0
        self.after: list[int] = []


class ReplayDrafter(Drafter):
    """The recorded drafter: a model, or lookup first. Of lookup alone windows can be replayed, but no tails.

    Behind a tail it says what the first recorded window that leads there goes on with. INVARIANT S9: while
    the tail is right, that is what the real drafter says, at the same forwards (with lookup first, as far as
    one window reaches). Behind a wrong token that no window holds it goes on as if that were the text:
    nothing there can be accepted, but it takes its time.
    Raises TraceError where the text is not the recorded one, or a longer window is wanted than was recorded.
    """

    def __init__(self, trace: Trace, charge: Charge) -> None:
        self.name = trace.drafter
        self.tokenizer = trace.tokenizer
        self._trace, self._charge = trace, charge
        self._sessions: dict[int, _Session] = {}
        self._next = 0

    def open(self) -> int:
        slot = self._next
        self._next += 1
        self._sessions[slot] = _Session()
        return slot

    def close(self, slot: int) -> None:
        self._sessions.pop(slot, None)

    def propose(
        self,
        slot: int,
        ids: Sequence[int],
        n: int,
        sampling: Sampling,
        tail: Sequence[int] = (),
        goes_on: GoesOn | None = None,
    ) -> list[int]:
        if goes_on is not None:
            raise TraceError(
                "a trace records no confidences; allowed: a window policy that does not stop by them"
            )
        session = self._sessions[slot]
        base = len(ids)
        text = session.text
        if text is None or base < session.seen or text.whole[session.seen : base] != ids[session.seen :]:
            found = self._trace.find(ids, sampling)
            if found is not text:  # a text that began, or another one
                text = session.text = found
                session.held, session.after = 0, []
        session.seen = base
        if n <= 0:
            return []
        if tail:
            out, places = self._behind(text, base, tail, n)
        else:
            window = self._window(text, base)
            if window is None:
                raise TraceError(f"the trace has no window after {base} tokens of prompt {text.prompt}")
            if n > self._trace.gamma == len(window.ids):
                raise TraceError(f"the trace has windows of {self._trace.gamma} tokens; asked for {n}")
            out, places = window.ids[:n], window.places
        self._spend(session, text, base, tail, out, places, 0 if sampling.greedy else 1)
        return out

    @staticmethod
    def _window(text: TracedText, base: int) -> Proposal | None:
        at = base - text.first_base
        return text.proposals[at] if 0 <= at < len(text.proposals) else None

    def _behind(
        self, text: TracedText, base: int, tail: Sequence[int], n: int
    ) -> tuple[list[int], tuple[int, ...]]:
        """What is said behind text and tail, and which places of it the model says."""
        chain, out, places = list(tail), list[int](), list[int]()
        while len(out) < n:
            found = self._goes_on(text, base, chain)
            if found is None:  # dead: a place costs what it would cost if the chain were right
                window = self._window(text, base + len(chain))
                found = (chain[-1:], (0,)) if window is None else (window.ids, window.places)
            more, by_model = found
            if not more:
                break
            more = more[: n - len(out)]
            places += [len(out) + place for place in by_model if place < len(more)]
            out += more
            chain += more
        return out, tuple(places)

    def _goes_on(
        self, text: TracedText, base: int, chain: list[int]
    ) -> tuple[list[int], tuple[int, ...]] | None:
        """How the first window that leads to the end of text and chain goes on from there, and which places
        of that the model says; None where no window leads there.

        The first, because lookup knows of the text what was committed, not what was drafted behind it.
        """
        gamma, k = self._trace.gamma, len(chain)
        first = max(0, k - gamma + 1)
        if chain[:first] != text.said[base : base + first]:
            return None
        for at in range(first, k + 1):
            if at > first and chain[at - 1 : at] != text.said[base + at - 1 : base + at]:
                return None
            window, known = self._window(text, base + at), k - at
            if window is not None and window.ids[:known] == chain[at:]:
                if len(window.ids) > known:
                    return window.ids[known:], tuple(p - known for p in window.places if p >= known)
                if known < gamma:  # it ends here because the drafter had no idea
                    return [], ()
        return None

    def _spend(
        self,
        session: _Session,
        text: TracedText,
        base: int,
        tail: Sequence[int],
        out: Sequence[int],
        places: tuple[int, ...],
        drawn: int,
    ) -> None:
        """Charge the model's forwards for its places among `out`, and note what it then holds.
        drawn: whether tokens are, 1 or 0."""
        if not places or places[0] >= len(out):
            return
        known = base + len(tail)
        held = session.held
        if session.after:
            now = chain(islice(text.whole, held, base), tail, out[: places[0]])
            for token, here in zip(session.after, now, strict=False):
                if token != here:
                    break
                held += 1
        held = min(
            held, known + places[0] - 1
        )  # the last token is always computed again: its logits are wanted
        for place in places:
            if place >= len(out):
                break
            end = known + place  # the text, the tail and what was said before this place
            self._charge(end - held, 1, held, drawn)
            held = end
        session.held, session.after = base, [*tail, *out[: held - known]]


def windows_of(
    trace: Trace,
    text: TracedText,
    mode: str,
    gamma: int,
    max_new_tokens: int,
    *,
    stop_at_eos: bool = True,
) -> list[tuple[int, int]]:
    """(drafted, accepted) of every step of a generation with a static window, from the trace alone.

    That is what a row's `windows` must be. Raises TraceError for a text or windows that are too short.
    """
    if not text.serves(max_new_tokens, stop_at_eos, trace.eos_ids):
        raise TraceError(
            f"the trace has {len(text.ids)} tokens of prompt {text.prompt}; {max_new_tokens} are asked for"
        )
    wanted = 0 if mode == "cloud-ar" else gamma
    if wanted > trace.gamma:
        raise TraceError(f"the trace has windows of {trace.gamma} tokens; asked for {wanted}")
    ids = text.ids[:max_new_tokens]
    if stop_at_eos:
        stops = [i for i, token in enumerate(ids) if token in trace.eos_ids]
        ids = ids[: stops[0] + 1] if stops else ids
    said_after_prompt = [*text.ids, *text.beyond, *[-1] * (gamma + 1)]
    out = [(0, 0)]  # the first token: the prompt is read and nothing drafted
    done = 1
    while done < len(ids):
        n = min(wanted, max_new_tokens - done - 1)
        draft = list(text.windows[done - 1].ids[:n]) if n > 0 else []
        foreign = [i for i, token in enumerate(draft) if token >= trace.vocab_size]
        draft = draft[: foreign[0]] if foreign else draft
        said = said_after_prompt[done : done + len(draft) + 1]
        accepted, _ = verify(draft, said)
        out.append((len(draft), accepted))
        done += accepted + 1
    return out
