"""Real nodes under faults: SIGKILL of the verifier, reset connections. The text never changes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from e2e_tools import DRAFTER, TARGET, alone

from dsdlab.sim.profile import LinkProfile
from testbed.controller import Testbed

pytestmark = pytest.mark.e2e

PROMPT = [3, 1, 4, 1, 5]
N = 120


def job(mode: str, seed: int = 7, **more: Any) -> dict[str, Any]:
    return {
        "mode": mode,
        "policy": "static",
        "gamma": 4,
        "prompt_ids": PROMPT,
        "sampling": {"temperature": 0.0, "seed": seed},
        "max_new_tokens": N,
        **more,
    }


@pytest.mark.parametrize("mode", ["cloud-ar", "cloud-sd", "dsd-sync"])
def test_kill_verifier_and_cut_connections(tmp_path: Path, mode: str) -> None:
    async def main() -> None:
        bed = Testbed(tmp_path, target=TARGET, drafter=DRAFTER, profiles=[LinkProfile(rtt_ms=4)])
        async with bed:
            task = asyncio.create_task(bed.generate(job(mode), 60))
            await asyncio.sleep(0.25)
            await bed.kill_verifier()
            await asyncio.sleep(0.2)
            await bed.restart_verifier()
            record = await task
            assert record["ids"] == alone(PROMPT, 7, N)
            assert record["reconnects"] >= 1
            assert sum(n for _, n in record["commits"]) == N

            task = asyncio.create_task(bed.generate(job(mode, seed=8), 60))
            for _ in range(3):
                await asyncio.sleep(0.1)
                await bed.drop_connections()
            record = await task
            assert record["ids"] == alone(PROMPT, 8, N)
            assert record["reconnects"] >= 1
            assert sum(n for _, n in record["commits"]) == N

    asyncio.run(main())


LONG = 400  # tokens


@pytest.mark.model
def test_real_pair_survives_kill(tmp_path: Path) -> None:
    """Every mode and some windows have the target's ids, and so has a session whose verifier was killed."""
    from dsdlab.decoding import Sampling
    from dsdlab.models.alone import generate_alone
    from dsdlab.models.loading import EngineOptions, load_engine, load_tokenizer
    from dsdlab.models.zoo import default_precision

    target = "smollm2-135m-instruct"
    tokenizer = load_tokenizer(target)
    assert tokenizer is not None
    prompt = tokenizer.encode_chat("List four birds and say one thing about each.")
    options = EngineOptions(precision=default_precision(target), slots=1, max_context=512)
    engine = load_engine(target, options)
    greedy = generate_alone(engine, prompt, Sampling(), 24, ())
    warm = generate_alone(engine, prompt, Sampling(temperature=0.8, seed=5), LONG, ())
    del engine

    def ask(mode: str, gamma: int, temperature: float, tokens: int = 24) -> dict[str, Any]:
        return job(
            mode, gamma=gamma, prompt_ids=prompt, sampling={"temperature": temperature, "seed": 5},
            max_new_tokens=tokens, stop_at_eos=False,
        )  # fmt: skip

    async def main() -> None:
        bed = Testbed(
            tmp_path, target=target, drafter="lookup+smollm2-drafter", edge_target=True,
            node_args=("--max-context", "512"),
        )  # fmt: skip
        async with bed:
            for mode, gamma in (
                ("cloud-ar", 0),
                ("cloud-sd", 3),
                ("edge-sd", 5),
                ("dsd-sync", 1),
                ("dsd-sync", 16),
            ):
                assert (await bed.generate(ask(mode, gamma, 0.0)))["ids"] == greedy
                assert (await bed.generate(ask(mode, gamma, 0.8)))["ids"] == warm[:24]
            task = asyncio.create_task(bed.generate(ask("dsd-sync", 4, 0.8, LONG), 120))
            await asyncio.sleep(0.5)  # of some three seconds
            await bed.kill_verifier()
            await bed.restart_verifier()
            record = await task
            assert record["ids"] == warm and record["reconnects"] >= 1

    asyncio.run(main())
