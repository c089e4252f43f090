"""Become a command in the right namespaces, on the right cores, that dies with its parent.

`python -I -S launch.py [OPTION …] -- COMMAND …`. Setting these up in a program of its own, not between
fork and exec of the controller, is safe however many threads the controller has. Runs by path, without the
package and with the standard library alone, on the host and inside containers; it starts in some 20 ms.

    --parent PID      get SIGKILL when the process PID ends, which must be the direct parent
    --cpus 0,2        may run on these cores only
    --user-of PID     join the user namespace of that process …
    --net-of PID      … and its network namespace
    --new-user        a user namespace of its own, in which it is root
    --new-net         a network namespace of its own
    --new-pid         a PID namespace of its own: when the command ends, whatever it started ends with it
    --realtime        ask for real-time scheduling; goes on without where it is refused
    --wait            before becoming the command, wait for a line on standard input (it is not passed on)
"""

import argparse
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launch", add_help=False)
    for name in ("--parent", "--user-of", "--net-of"):
        parser.add_argument(name, type=int)
    parser.add_argument("--cpus", default="")
    for name in ("--new-user", "--new-net", "--new-pid", "--realtime", "--wait"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("command", nargs="+")
    return parser.parse_args(argv)


def call(libc: ctypes.CDLL, name: str, *args: int) -> None:
    """A libc call that raises OSError."""
    if getattr(libc, name)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def join(libc: ctypes.CDLL, pid: int, kind: str, flag: int) -> None:
    fd = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
    call(libc, "setns", fd, flag)
    os.close(fd)


def own_user_namespace(libc: ctypes.CDLL) -> None:
    """A user namespace in which the caller's user is root."""
    uid, gid = os.geteuid(), os.getegid()
    call(libc, "unshare", CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123 - procfs takes one write
            file.write(text)


def fork_first_process() -> None:
    """Go on as the first process of the new PID namespace; the outer one passes its exit status on."""
    pid = os.fork()
    if pid == 0:
        return
    for number in (signal.SIGTERM, signal.SIGINT):  # the first process of a namespace ignores what it can
        signal.signal(number, lambda *_: os.kill(pid, signal.SIGKILL))
    # Hold no end of the command's pipes, so that its reader sees their end.
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    os._exit(status)


def wait_for_line() -> bool:
    """Read up to the end of a line and no further; False when the input ends first."""
    while (byte := os.read(0, 1)) not in (b"\n", b""):
        pass
    return byte == b"\n"


def set_up(options: argparse.Namespace, libc: ctypes.CDLL) -> bool:
    """Everything but the exec; False when the command must not run. Raises OSError."""
    if options.user_of is not None:
        join(libc, options.user_of, "user", CLONE_NEWUSER)
    if options.net_of is not None:
        join(libc, options.net_of, "net", CLONE_NEWNET)
    if options.new_user:
        own_user_namespace(libc)
    if options.new_net:
        call(libc, "unshare", CLONE_NEWNET)
    if options.new_pid:
        call(libc, "unshare", CLONE_NEWPID)
    # After the namespaces: a change of credentials clears the signal.
    if options.parent is not None:
        call(libc, "prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != options.parent:  # it died before we asked
            return False
    if options.new_pid:
        fork_first_process()
        call(libc, "prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if options.cpus:
        os.sched_setaffinity(0, {int(cpu) for cpu in options.cpus.split(",")})
    if options.realtime:
        try:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(os.sched_get_priority_min(os.SCHED_RR)))
        except OSError as error:
            print(f"launch: no real-time scheduling: {error.strerror}", file=sys.stderr)  # noqa: T201
    return not options.wait or wait_for_line()


def main(argv: list[str]) -> int:
    options = parse(argv)
    command = options.command
    if sys.platform == "linux":
        try:
            if not set_up(options, ctypes.CDLL(None, use_errno=True)):
                return 1
        except OSError as error:
            print(f"dsdlab: error: cannot start {command[0]}: {error.strerror}", file=sys.stderr)  # noqa: T201
            return 126
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot run {command[0]}: {error.strerror}", file=sys.stderr)  # noqa: T201
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
