"""A whole bed as an ordinary user: run by a test inside a user namespace without any privilege."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from dsdlab.sim.profile import LinkProfile
from dsdlab.sweep.calibration import judge
from testbed.controller import Testbed


async def main(run_dir: Path) -> None:
    target, drafter = "emulated:base_s=0.01", "emulated:base_s=0.001,alpha=0.8"
    profile = LinkProfile(rtt_ms=20, rate_up_mbit=10)
    bed = Testbed(
        run_dir, target=target, drafter=drafter, runtime="netns", link="netem-uml", profiles=[profile]
    )
    async with bed:
        reason = judge(profile, await bed.calibrate())
    print(json.dumps({"uid": os.geteuid(), "reason": reason}))


asyncio.run(main(Path(sys.argv[1])))
