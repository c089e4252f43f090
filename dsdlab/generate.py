"""One generation, streamed to the terminal with drafted tokens shown."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import click

from dsdlab.decoding import Sampling
from dsdlab.models.base import ModelError
from dsdlab.models.loading import load_tokenizer
from dsdlab.models.tokenizer import Tokenizer
from dsdlab.node_process import NodeOptions, drafter_node
from dsdlab.nodes import DrafterNode, GenerationRecord, GenerationRequest
from dsdlab.nodes.request import POLICY_MODES, STREAMING_MODES, WINDOW_MODES
from dsdlab.policies import RUN_AHEAD, load_window_policy
from dsdlab.sweep.workload import Prompt, encode_prompt

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TerminalText:
    """Prints text as its tokens are committed: accepted drafts green, the target's own tokens plain.

    A token may end inside a character; its text then waits for the next.
    """

    def __init__(self, tokenizer: Tokenizer | None, echo: Callable[..., Any] = click.echo) -> None:
        self._tokenizer = tokenizer
        self._echo = echo
        self._ids: list[int] = []
        self._shown = ""

    def __call__(self, new: list[int], accepted: int) -> None:
        for i, token in enumerate(new):
            self._ids.append(token)
            text = self._text()
            if text.endswith(REPLACEMENT):
                continue
            piece, self._shown = text[len(self._shown) :], text
            self._echo(click.style(piece, fg="green" if i < accepted else None), nl=False)

    def _text(self) -> str:
        if self._tokenizer is None:
            return "".join(f"{token} " for token in self._ids)
        return self._tokenizer.decode(self._ids)


async def stream_to_terminal(
    options: NodeOptions, url: str, prompt: str, edge_target: bool, choice: dict[str, Any]
) -> None:
    """Dial the verifier, generate once, print text and a summary line. Raises what a node raises."""
    async with drafter_node(options, url, edge_target=edge_target, patience_s=30.0) as (node, _):
        tokenizer = await asyncio.to_thread(load_tokenizer, options.target)
        await show_generation(node, tokenizer, prompt, choice)


async def show_generation(
    node: DrafterNode, tokenizer: Tokenizer | None, prompt: str, choice: dict[str, Any]
) -> GenerationRecord:
    """Generate with `choice` (fields of GenerationRequest, and temperature and seed) and print it."""
    request = request_of(encode_prompt(Prompt("prompt", prompt), tokenizer), choice)
    await node.ping(3)
    record = await node.generate(request, TerminalText(tokenizer))
    click.echo()
    click.echo(click.style(summary(record, request), dim=True), err=True)
    return record


def request_of(prompt_ids: Sequence[int], choice: dict[str, Any]) -> GenerationRequest:
    """A request from a command's options. Raises ModelError naming the option that is out of range."""
    try:
        request = GenerationRequest(
            prompt_ids=prompt_ids,
            mode=choice["mode"],
            policy=choice.get("policy", "static"),
            gamma=choice["gamma"],
            run_ahead=choice.get("run_ahead", RUN_AHEAD),
            free_run=choice.get("free_run", False),
            beside=choice.get("beside", 0),
            sampling=Sampling(temperature=choice["temperature"], seed=choice["seed"]),
            max_new_tokens=choice["max_new_tokens"],
        )
        if request.mode in POLICY_MODES:
            load_window_policy(request.policy, request.gamma)
        return request
    except ValueError as e:
        raise ModelError(str(e)) from None


def summary(record: GenerationRecord, request: GenerationRequest) -> str:
    """One line about a finished generation."""
    parts = [f"{request.mode}", f"{len(record.ids)} tokens", f"TTFT {1e3 * record.ttft_s:.0f} ms"]
    if (tpot_s := record.tpot_s) is not None:
        parts.append(f"TPOT {1e3 * tpot_s:.1f} ms")
    if (alpha := record.alpha) is not None and (tau := record.tau) is not None:
        window = f" (γ = {request.gamma})" if request.mode in WINDOW_MODES else ""
        parts.append(f"α {alpha:.2f}, {tau:.2f} tokens a window{window}")
    if record.ids and request.mode in STREAMING_MODES:
        each_ms = 1e3 * record.target_s / len(record.ids)
        parts.append(f"{record.wasted} of {record.drafted} drafts wasted")
        parts.append(f"{each_ms:.1f} ms of the target a token")
    if record.decisions:
        parts.append(f"{len(record.decisions)} decisions, the last: {record.decisions[-1][1]}")
    up, down = sum(record.bytes_up.values()), sum(record.bytes_down.values())
    if up or down:
        parts.append(f"{up} bytes up, {down} down")
    if record.reconnects:
        parts.append(f"{record.reconnects} reconnects")
    return "; ".join(parts)
