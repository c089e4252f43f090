"""Link `netem`, the host kernel's own: tried on a kernel that has it, booted for the purpose.

The same User-Mode Linux that serves as a router elsewhere is the whole host here: namespaces, bridges,
cables, netem and nodes are inside it. It is slow, so delays are generous and their bounds wide.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest
from bed_tools import HERE
from needs import need_uml

from testbed.links.uml import KERNEL, MODULES, scratch_folder

pytestmark = pytest.mark.netem

SCRATCH = scratch_folder(__file__)
SCRIPT = f"""PS1=; stty raw -echo
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs none {SCRATCH}
mkdir -p {SCRATCH}/m/lib/modules; ln -s {MODULES}/$(uname -r) {SCRATCH}/m/lib/modules/$(uname -r)
export PATH={shlex.quote(os.environ.get("PATH", ""))}:/usr/sbin:/usr/bin:/sbin:/bin
export HOME={SCRATCH} TMPDIR={SCRATCH}
export PYTHONPATH={shlex.quote(str(HERE.parents[1]))} PYTHONDONTWRITEBYTECODE=1
for m in sch_netem bridge veth; do modprobe -d {SCRATCH}/m $m; done
ip link set lo up
{shlex.quote(sys.executable)} {shlex.quote(str(HERE / "kernel_netem_check.py"))}
halt -f
"""


def test_the_kernels_own_netem() -> None:
    need_uml()
    as_user = [] if os.geteuid() == 0 else ["--map-root-user"]
    command = ["unshare", "--net", "--pid", "--fork", "--kill-child", *as_user, KERNEL, "mem=512M"]
    command += ["rootfstype=hostfs", "rootflags=/", "ro", "init=/bin/sh", "uml_dir=/nonexistent"]
    command += ["con0=fd:0,fd:1", "con=null", "quiet"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as machine:
        try:
            assert machine.stdin is not None
            machine.stdin.write(SCRIPT)
            machine.stdin.flush()
            assert machine.stdout is not None
            said = []
            for line in machine.stdout:
                said.append(line)
                if "RESULT " in line:
                    break
            else:
                pytest.fail("".join(said[-15:]))
        finally:
            machine.kill()
    found = json.loads(line.partition("RESULT ")[2])
    edge0, edge1 = found["edge0"], found["edge1"]
    assert edge0["n"] == 40
    assert 40 <= edge0["rtt_p50_ms"] < 46
    assert 30 <= edge0["up"]["delay_p50_ms"] < 34
    assert 10 <= edge0["down"]["delay_p50_ms"] < 14
    assert 100 <= edge1["rtt_p50_ms"] < 106
    lost = edge1["up"]["lost"] + edge1["down"]["lost"]
    assert 0 < lost < 30
    up = found["counters"][1]["up"]
    assert up["drops"] >= edge1["up"]["lost"]
    assert found["counters"][0]["up"]["drops"] == 0
