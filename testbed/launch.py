"""Become a command that is pinned to cores and dies with its parent.

`python -I -S launch.py PARENT_PID CPUS COMMAND …`, CPUS as "0,2,3" or "-" for no pinning. Setting these up in
a program of its own, rather than between fork and exec of the controller, is safe however many threads the
controller has. Runs by path, without the package: it starts in some 20 ms.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
    parent, cpus, command = int(argv[0]), argv[1], argv[2:]
    if sys.platform == "linux":
        if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            print("launch: no parent-death signal", file=sys.stderr)  # noqa: T201
        if os.getppid() != parent:  # it died before we asked
            return 1
        if cpus != "-":
            os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot run {command[0]}: {error.strerror}", file=sys.stderr)  # noqa: T201
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
