"""Run commands inside the namespace that this process lives in, as told by JSON lines on standard input.

    {"op":"run","id":1,"commands":[["ip","link","add",…],…],"input":"…"}

runs them in order, each with `input` on its standard input, and answers {"op":"ok","id":1,"outputs":[…]}; the
first one that fails ends the batch with {"op":"error","id":1,"code":"command","message":…}. The end of the
input ends the agent. Runs by path, with the standard library alone.
"""

import json
import os
import subprocess
import sys

MEND = "apt install iproute2 ethtool util-linux"
PATH = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"


def run(commands: list[list[str]], text: str) -> dict[str, object]:
    """All of a batch; the answer without its id."""
    outputs = []
    for command in commands:
        try:
            done = subprocess.run(
                command,
                input=text,
                capture_output=True,
                text=True,
                timeout=20,
                env={**os.environ, "PATH": PATH},
            )
        except FileNotFoundError:
            return {"op": "error", "code": "missing", "message": f"no {command[0]} on this host ({MEND})"}
        except (OSError, subprocess.TimeoutExpired) as error:
            return {"op": "error", "code": "command", "message": f"{' '.join(command)}: {error}"}
        if done.returncode != 0:
            said = " ".join((done.stderr or done.stdout).split())
            return {"op": "error", "code": "command", "message": f"{' '.join(command)}: {said}"}
        outputs.append(done.stdout)
    return {"op": "ok", "outputs": outputs}


def emit(message: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> None:
    emit({"op": "ready"})
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "stop":
            return
        emit({**run(request["commands"], request.get("input", "")), "id": request["id"]})


if __name__ == "__main__":
    main()
