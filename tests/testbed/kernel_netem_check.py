"""The kernel's own netem, measured: run by a test on a kernel that has it (inside User-Mode Linux)."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path

from dsdlab.sim.profile import LinkProfile
from testbed.fabric import VERIFIER, Fabric
from testbed.links.netem import KernelBoxes, NetemLink
from testbed.runtimes.base import NodeSpec
from testbed.runtimes.netns import NetnsRuntime

READY = 'print(\'{"op":"ready"}\', flush=True); sys.stdin.read()'
REFLECT = f"import sys; from dsdlab.probe import Reflector; r = Reflector('{{host}}', 8765); {READY}"
MEASURE = """
import json, sys
from dsdlab.probe import measure
print(json.dumps(measure(sys.argv[1], 8765, n=40, gap_s=0.01, rtt_s=0.1)))
"""


async def main(run_dir: Path) -> None:
    fabric = Fabric(2)
    boxes, runtime = KernelBoxes(fabric), NetnsRuntime(fabric)
    try:
        await runtime.start(run_dir)
        await fabric.start(run_dir)
        await boxes.start(run_dir)
        await runtime.start_node(NodeSpec(name=VERIFIER, args=("-c", REFLECT)), 60)
        for name in ("edge0", "edge1"):
            await runtime.start_node(NodeSpec(name=name, args=("-c", f"import sys; {READY}")), 60)
        await NetemLink(boxes, 0).apply(LinkProfile(rtt_ms=40, up_fraction=0.75))
        await NetemLink(boxes, 1).apply(LinkProfile(rtt_ms=100, partitioned=False, loss_pct=10))
        found = {}
        for name in ("edge0", "edge1"):
            command = [sys.executable, "-c", MEASURE, fabric.address(VERIFIER)]
            found[name] = json.loads((await fabric.run(command, node=name))[0])
        found["counters"] = [await boxes.counters(edge) for edge in range(2)]
        print("RESULT " + json.dumps(found), flush=True)
    finally:
        await runtime.stop()
        await boxes.stop()
        await fabric.stop()


with tempfile.TemporaryDirectory() as folder:
    asyncio.run(main(Path(folder)))
