"""A long prompt is read in pieces: nobody waits for all of it, and the tokens are those of one piece."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from node_harness import Raw, World, alone, check, draft_frame, emulated, emulated_drafter, open_frame
from tiny_models import VOCAB, engine_of, write_tiny_llama
from tracing_tools import generate

from dsdlab.decoding import Sampling
from dsdlab.models.drafters import PromptLookup
from dsdlab.models.emulated import EmulatedEngine, EmulatedProfile
from dsdlab.models.weights_io import load_llama_dir
from dsdlab.nodes import MODES, GenerationRequest
from dsdlab.nodes.step import PROMPT_PIECE
from dsdlab.protocol.frames import Commit, Verdict, pack_ids
from dsdlab.sim.compute import SimCompute
from dsdlab.sim.loop import run

LONG = np.random.default_rng(5).integers(3, VOCAB, 300).tolist()
TOKEN_S = 0.001


def metered() -> tuple[World, list[int]]:
    """A verifier whose target takes 1 ms a row on the virtual clock; the rows of each of its forwards."""
    compute, rows = SimCompute(), []

    def charge(tokens: int, batch: int, context: int, drawn: int) -> None:  # noqa: ARG001 - as engines call it
        rows.append(tokens)
        compute.spend(TOKEN_S * tokens)

    target = EmulatedEngine(EmulatedProfile(), slots=4, max_context=4096, charge=charge)
    return World(target, compute=compute), rows


def test_a_window_waits_for_a_piece_and_not_for_a_prompt() -> None:
    """Three thousand tokens are read while another session's windows are judged in between."""

    async def main() -> None:
        world, rows = metered()
        short, long = await Raw.dial(world, "a" * 16), await Raw.dial(world, "b" * 16)
        await short.send(open_frame(max_new_tokens=60))
        first = await short.recv()
        assert isinstance(first, Commit)
        text = [5, 3, 9, 5, 3, 9, 5]
        at = len(text) + 1
        begun_s = asyncio.get_running_loop().time()
        await long.send(open_frame(prompt=pack_ids([7] * 3000), max_new_tokens=4))
        waits_s = []
        for _ in range(12):
            await short.send(draft_frame(at, []))
            verdict = await short.recv()
            assert isinstance(verdict, Verdict)
            at = verdict.base + verdict.accepted + 1
            waits_s.append(verdict.queue_us / 1e6)
        assert max(waits_s) <= PROMPT_PIECE * TOKEN_S + 1e-6
        assert min(waits_s[1:]) > 0.5 * PROMPT_PIECE * TOKEN_S  # the prompt is under way all the while
        opened = await long.recv()
        assert isinstance(opened, Commit)
        assert opened.compute_us == pytest.approx(3000 * 1000, abs=50)  # all pieces, in one number
        assert asyncio.get_running_loop().time() - begun_s == pytest.approx(3.012, abs=0.01)
        assert max(rows) == PROMPT_PIECE
        assert rows.count(PROMPT_PIECE) == 23  # 2944 of 3000, and the rest as a window

    run(main())


@pytest.mark.parametrize("length", [1, PROMPT_PIECE, PROMPT_PIECE + 1, 2 * PROMPT_PIECE, 300])
def test_pieces_of_a_prompt(length: int) -> None:
    """No forward is larger than a piece, none is empty, and together they are the prompt."""

    async def main() -> None:
        world, rows = metered()
        request = GenerationRequest([7] * length, "cloud-ar", sampling=Sampling(), max_new_tokens=1)
        check(await world.client().generate(request), alone(world.target, request))
        assert sum(rows) == length
        assert all(0 < n <= PROMPT_PIECE for n in rows)

    run(main())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("piece", [5, 64, 1000])
def test_every_mode_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, piece: int
) -> None:
    """Against the target alone, which reads its prompt at once; sampled, so that every bit counts."""
    monkeypatch.setattr("dsdlab.nodes.step.PROMPT_PIECE", piece)
    target = engine_of(load_llama_dir(write_tiny_llama(tmp_path, num_hidden_layers=1), ""), "bf16")
    request = GenerationRequest(
        LONG, mode, gamma=3, sampling=Sampling(1.0, seed=3), max_new_tokens=16, stop_at_eos=False
    )
    check(generate(target, PromptLookup(), request), alone(target, request))


def test_a_client_that_leaves_in_the_middle_of_its_prompt() -> None:
    """The slot comes back, and the pieces that were not begun are never computed."""

    async def main() -> None:
        world, rows = metered()
        client = world.client(emulated_drafter(0.5))
        request = GenerationRequest([7] * 3000, "dsd-sync", gamma=4, sampling=Sampling(), max_new_tokens=4)
        task = asyncio.create_task(client.generate(request))
        await asyncio.sleep(0.3)
        task.cancel()
        await asyncio.wait([task])
        await world.verifier.close()
        await world.quiet()
        assert world.free_slots() == 4
        assert sum(rows) <= 5 * PROMPT_PIECE

    run(main())


def test_emulated_text_does_not_depend_on_pieces() -> None:
    async def main() -> None:
        target = emulated(max_context=4096)
        request = GenerationRequest([7] * 700, "cloud-ar", sampling=Sampling(seed=9), max_new_tokens=20)
        check(await World(target).client().generate(request), alone(target, request))

    run(main())
