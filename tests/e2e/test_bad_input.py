"""Every kind of bad input gets one clear line and exit code 2, and writes nothing."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest
from e2e_tools import DRAFTER, SCENARIO, TARGET, dsdlab

pytestmark = pytest.mark.e2e

EMULATED = ("--target", TARGET, "--drafter", DRAFTER)


def refused(cwd: Path, *args: str) -> str:
    """The one line that a refused command says; checks everything that is the same for all."""
    before = sorted(p.name for p in cwd.rglob("*"))
    done = dsdlab(*args, cwd=cwd)
    assert done.returncode == 2, (args, done.stdout, done.stderr)
    said = [line for line in done.stderr.splitlines() if line.strip()]
    assert "Traceback" not in done.stderr
    assert said[-1].startswith("dsdlab: error: ") or said[-1].startswith("Error: "), said
    assert done.stdout == ""
    assert sorted(p.name for p in cwd.rglob("*")) == before
    return said[-1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("[grid]", "[grid]\nlos_pct = [1]"), "unknown key 'grid.los_pct'"),
        (("rtt_ms = [1, 15]", "rtt_ms = [-4]"), "grid.rtt_ms.0 is -4"),
        (("gamma = [1, 4]", "gamma = [257]"), "grid.gamma.0 is 257"),
        (("max_new_tokens = 16", "max_new_tokens = 0"), "workload.max_new_tokens is 0"),
        (("repeats = 2", "repeats = 'x'"), "run.repeats is 'x'"),
        (("temperature = [0.0, 0.8]", "temperature = [nan]"), "sampling.temperature.0 is nan"),
        (('name = "small"', 'name = "Not A Name"'), "lower-case letters"),
        (("n_prompts = 2", "n_prompts = 99"), "builtin set has 16"),
        (("n_prompts = 2", 'prompts = "missing.jsonl"'), "missing.jsonl: No such file"),
        (("max_new_tokens = 16", "max_new_tokens = 5000"), "context of 2048"),
        (("alpha=0.8", "alpha=1.8"), "alpha is 1.8"),
        (('target = "emulated', 'target = "nothere'), "unknown model"),
        (('target = "emulated:', 'target = "gemma3-270m" # "'), "is not Llama-family; use hf:gemma3-270m"),
        (('"dsd-sync"', '"dsd-psychic"'), "allowed: 'cloud-ar'"),
        (("[run]", "[link]\nreorder_pct = 1\n[run]"), "needs netem or netem-uml"),
        (("[run]", "[[link.steps]]\nat_s = 1\n[run]"), "link.steps.0 changes nothing"),
        (("[run]", "[tcp]\ncongestion = ['bbr']\n[run]"), "needs runtime netns or docker"),
        (("[run]", "[nodes]\nedge_memory_mb = 512\n[run]"), "needs runtime docker"),
        (
            ("rtt_ms = [1, 15]", "rtt_ms = [1, 15]\njitter_ms = [2]"),
            "grid.jitter_ms: 2.0 is more than rtt_ms",
        ),
        (("[run]", "[run"), "is not TOML"),
    ],
)
def test_scenarios(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    assert change[0] in SCENARIO
    (tmp_path / "bad.toml").write_text(SCENARIO.replace(*change))
    out = tmp_path / "bad.toml"
    line = (
        refused(tmp_path, "sweep", "bad.toml", "--out", "results", "--dry-run") if "alpha" not in says else ""
    )
    if not line:  # a drafter is only looked at by the node that loads it
        done = dsdlab("sweep", "bad.toml", cwd=tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        line = done.stderr.splitlines()[-1]
    assert says in line
    assert out.exists()


def test_files_and_options(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"')
    assert "byte 3 is 0xe9" in refused(tmp_path, "run", "--prompt-file", "latin.txt", *EMULATED)
    assert "not UTF-8" in refused(tmp_path, "sweep", "latin.toml")
    assert "prompt is empty" in refused(tmp_path, "run", "  ", *EMULATED)
    assert "max_new_tokens is 0" in refused(tmp_path, "run", "hi", "--max-new-tokens", "0", *EMULATED)
    assert "context is 64" in refused(
        tmp_path, "run", "a b c", "--max-new-tokens", "62", "--max-context", "64", *EMULATED
    )
    assert "does not exist" in refused(tmp_path, "run", "hi", "--target", "gone.gguf")
    assert "rtt_ms: -1.0" in refused(tmp_path, "run", "hi", "--rtt-ms", "-1", *EMULATED)
    assert "holds no rows.jsonl" in refused(tmp_path, "report", ".")
    assert "No such file" in refused(tmp_path, "sweep", "gone.toml")
    assert "connection refused" in refused(
        tmp_path, "node", "drafter", "--connect", "ws://127.0.0.1:9/", "--prompt", "hi", *EMULATED
    )


def test_prompt_lines(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(SCENARIO.replace("n_prompts = 2", 'prompts = "p.jsonl"'))
    for content, says in (
        (b'{"prompt": "fine"}\n{"prompt": 3}\n', "p.jsonl:2 has no text 'prompt'"),
        (b"not json\n", "p.jsonl:1 is not JSON"),
        (b'{"prompt": " "}\n', "p.jsonl:1: the prompt is empty"),
        (b'{"prompt": "\xff"}\n', "p.jsonl:1 is not UTF-8"),
        (b"\n", "holds no prompt"),
    ):
        (tmp_path / "p.jsonl").write_bytes(content)
        assert says in refused(tmp_path, "sweep", "s.toml", "--dry-run")


def test_a_node_outlives_bad_peers(tmp_path: Path) -> None:
    """Wrong token, other version, other tokenizer, garbage, oversize: refused, and the next one is served."""
    (tmp_path / "token").write_text("sesame")
    (tmp_path / "wrong").write_text("open up")
    node = subprocess.Popen(
        [sys.executable, "-m", "dsdlab", "node", "verifier", *EMULATED, "--port", "0",
         "--token-file", "token", "--control", "stdio"],
        cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert node.stdin is not None and node.stdout is not None
    try:
        port = json.loads(node.stdout.readline())["port"]
        url = f"ws://127.0.0.1:{port}/"
        drafter = ("node", "drafter", "--connect", url, "--prompt", "a b c", "--max-new-tokens", "8")
        assert "wrong token" in refused(tmp_path, *drafter, *EMULATED, "--token-file", "wrong")
        assert "no token given" in refused(tmp_path, *drafter, *EMULATED)
        other = "emulated:vocab_size=77,alpha=0.5"
        line = refused(tmp_path, *drafter, "--target", TARGET, "--drafter", other, "--token-file", "token")
        assert "tokenizer 'emulated-77'" in line
        asyncio.run(_send_rubbish(url))
        served = dsdlab(*drafter, *EMULATED, "--token-file", "token", cwd=tmp_path)
        assert served.returncode == 0, served.stderr
        assert len(served.stdout.split()) == 8
    finally:
        node.stdin.close()
        assert node.wait(10) == 0
        node.stdout.close()


async def _send_rubbish(url: str) -> None:
    """Raw WebSocket messages that are no frames, each on a connection of its own."""
    async with aiohttp.ClientSession() as session:
        for data in (b"", b"\xc1", os.urandom(64), b"\x93\x01\x02\x03", bytes((1 << 20) + 1)):
            async with session.ws_connect(url, max_msg_size=0) as ws:
                await ws.send_bytes(data)
                async for message in ws:  # an Error frame at most, then the end
                    assert message.type in (aiohttp.WSMsgType.BINARY, aiohttp.WSMsgType.CLOSE)
                assert ws.closed
