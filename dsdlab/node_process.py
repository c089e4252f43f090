"""A node as a process: engines, sockets and the control lines around the coroutines of `dsdlab.nodes`.

With control "stdio" a node reads JSON lines on standard input and answers on standard output; that is
how the testbed drives it, whatever runtime it lives in. Its log goes to standard error.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

from dsdlab.decoding import Sampling
from dsdlab.models.base import Engine, ModelError
from dsdlab.models.calibrate import measure_node
from dsdlab.models.compute import ThreadCompute
from dsdlab.models.drafters import Drafter, load_drafter
from dsdlab.models.loading import EngineOptions, load_engine, load_tokenizer
from dsdlab.models.measures import CalibrationFailed, Measures
from dsdlab.models.steps import measure_steps
from dsdlab.nodes import DrafterNode, GenerationFailed, GenerationRequest, VerifierNode
from dsdlab.policies import RUN_AHEAD
from dsdlab.probe import ProbeError, Reflector, measure
from dsdlab.protocol import (
    Channel,
    ChannelClosed,
    ConnectFailed,
    ProtocolError,
    Refused,
    WebSocketChannel,
    connect,
    serve,
)

log = logging.getLogger("dsdlab.node")

Control = Callable[[dict[str, Any]], Awaitable[dict[str, Any] | None]]


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """What both kinds of node are started with."""

    target: str
    drafter: str | None
    precision: str
    device: str
    threads: int | None  # None: as many as cores this process may use
    slots: int
    max_context: int
    token: str

    def engine_options(self) -> EngineOptions:
        return EngineOptions(
            precision=self.precision, device=self.device, slots=self.slots, max_context=self.max_context
        )


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run a node's main coroutine under uvloop where there is one."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(main)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None

    class PreciseLoop(uvloop.Loop):
        """uvloop whose clock is not rounded to the millisecond of its last iteration."""

        def time(self) -> float:
            return time.monotonic()

    return PreciseLoop


def set_threads(threads: int | None) -> None:
    """Give torch its threads: the cores that this process may run on, unless told."""
    import torch

    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))


def _load(options: NodeOptions, with_target: bool) -> tuple[Engine | None, Drafter | None]:
    names = [options.target if with_target else "", options.drafter or ""]
    if any(n and not n.startswith("emulated:") for n in names):
        set_threads(options.threads)
    target = load_engine(options.target, options.engine_options()) if with_target else None
    drafter = load_drafter(options.drafter, options.engine_options()) if options.drafter else None
    tokenizer = target.info.tokenizer if target else ""
    if drafter is not None and drafter.tokenizer and tokenizer and drafter.tokenizer != tokenizer:
        raise ModelError(
            f"drafter {drafter.name} has tokenizer {drafter.tokenizer}, target {options.target} has "
            f"{tokenizer}; a pair must share one"
        )
    return target, drafter


class Sockets:
    """The connections that a process has made, for measuring: their options and what became of them."""

    def __init__(self) -> None:
        self.nodelay = True
        self._latest: WebSocketChannel | None = None

    async def dial(self, url: str) -> Channel:
        """`connect`, with the options asked for last."""
        self._latest = await connect(url, nodelay=self.nodelay)
        return self._latest

    def accepted(self, channel: Channel) -> None:
        """Note a connection from outside."""
        if isinstance(channel, WebSocketChannel):
            self._latest = channel

    def state(self) -> dict[str, Any]:
        """TCP of the latest connection, as its kernel has it."""
        return dict(self._latest.tcp_state()) if self._latest is not None else {}


class Engines:
    """What a process computes with, for measuring: its thread, and the models it has loaded."""

    def __init__(self) -> None:
        self.compute: ThreadCompute | None = None
        self.target: Engine | None = None
        self.drafter: Drafter | None = None

    async def calibrate(self, message: dict[str, Any]) -> dict[str, Any]:
        """Measure what forwards cost; an answer line. Sessions go on meanwhile, and disturb it."""
        reply = {"id": message.get("id")}
        try:
            if self.compute is None:
                raise CalibrationFailed("this node is not ready yet")
            kinds: dict[str, type] = {"budget_s": float, "shared_caches": bool, "seed": int}
            asked: dict[str, Any] = {
                name: msgspec.convert(message[name], kinds[name]) for name in kinds if name in message
            }
            sampling = Sampling(**message.get("sampling", {}))
            found: dict[str, Measures]
            if (of := message.get("steps_of")) is not None:
                seconds = msgspec.convert(message.get("steps_s"), float)
                model = self.target if of == "target" else self.drafter
                steps = await measure_steps(model, self.compute, seconds=seconds)
                found = {} if steps is None else {of: steps}
            else:
                found = await measure_node(
                    self.compute, self.target, self.drafter, sampling=sampling, **asked
                )
        except (CalibrationFailed, ModelError, ValueError, TypeError) as e:
            return reply | {"op": "error", "code": "calibrate", "message": str(e)}
        return reply | {"op": "calibrated", "measures": msgspec.to_builtins(found)}


async def run_verifier(options: NodeOptions, host: str, port: int, control: bool) -> None:
    """Serve until told to stop. Raises ModelError or ListenFailed before anything is listening."""
    target, drafter = await asyncio.to_thread(_load, options, True)
    if target is None:
        raise ModelError("a verifier needs a target model")
    compute = ThreadCompute()
    node = VerifierNode(target, compute, drafter=drafter, token=options.token)
    sockets = Sockets()
    engines = Engines()
    engines.compute, engines.target, engines.drafter = compute, target, drafter

    async def handler(channel: Channel) -> None:
        sockets.accepted(channel)
        await node.serve(channel)

    reflector: Reflector | None = None
    try:
        async with serve(handler, host, port, nodelay=lambda: sockets.nodelay) as bound:
            try:
                reflector = Reflector(host, bound, options.token)
            except ProbeError as e:  # serving comes first
                log.warning("the link cannot be probed: %s", e)
            info = {"target": asdict(target.info), "drafter": drafter.name if drafter else None}
            log.info("listening on ws://%s:%d/ with %s", host, bound, target.info.model_id)

            async def answer(message: dict[str, Any]) -> dict[str, Any] | None:
                match message.get("op"):
                    case "socket":
                        sockets.nodelay = bool(message.get("nodelay", sockets.nodelay))
                        return {"op": "socket", "id": message.get("id"), "state": sockets.state()}
                    case "calibrate":
                        return await engines.calibrate(message)
                    case op:
                        return {"op": "error", "id": message.get("id"), "code": "op",
                                "message": f"unknown op {op!r}"}  # fmt: skip

            await _live(control, {"op": "ready", "port": bound, "info": info}, answer)
            await node.close()
    finally:
        if reflector is not None:
            reflector.close()
        compute.close()


async def run_drafter(options: NodeOptions, url: str, control: bool, edge_target: bool) -> None:
    """A drafter node under control. Raises ModelError or ConnectFailed."""
    sockets, engines = Sockets(), Engines()
    loading = drafter_node(options, url, edge_target=edge_target, sockets=sockets, engines=engines)
    async with loading as (node, drafter):
        await node.reconnect()  # with patience: the verifier may still be loading its model
        welcome = node.welcome
        info = {
            "drafter": drafter.name if drafter else None,
            "target": welcome.target if welcome else options.target,
        }

        async def answer(message: dict[str, Any]) -> dict[str, Any] | None:
            match message.get("op"):
                case "reconnect":
                    sockets.nodelay = bool(message.get("nodelay", sockets.nodelay))
                case "probe":
                    return {"id": message.get("id"), **await _probe(url, options.token, message)}
                case "calibrate":
                    return await engines.calibrate(message)
            reply = await _answer(node, message)
            return reply | {"socket": sockets.state()} if reply["op"] == "reconnected" else reply

        await _live(control, {"op": "ready", "info": info}, answer)


async def _probe(url: str, token: str, message: dict[str, Any]) -> dict[str, Any]:
    """Measure the path to the verifier; an answer line without its id."""
    names = ("n", "gap_s", "rtt_s", "train_up", "train_down", "train_s", "late_s")
    try:
        return {
            "op": "probed",
            "measure": await probe_url(url, token, {k: message[k] for k in names if k in message}),
        }
    except (ProbeError, ValueError, TypeError) as e:
        return {"op": "error", "code": "probe", "message": str(e)}


async def probe_url(url: str, token: str, plan: dict[str, Any]) -> dict[str, Any]:
    """`dsdlab.probe.measure` towards the verifier at ws://HOST:PORT/. Raises ProbeError."""
    parts = urlsplit(url)
    if not parts.hostname:
        raise ProbeError(f"{url} names no host (allowed: ws://HOST:PORT/)")
    return await asyncio.to_thread(measure, parts.hostname, parts.port or 80, token, **plan)


@contextlib.asynccontextmanager
async def drafter_node(
    options: NodeOptions,
    url: str,
    *,
    edge_target: bool = False,
    patience_s: float = 60.0,
    sockets: Sockets | None = None,
    engines: Engines | None = None,
) -> AsyncIterator[tuple[DrafterNode, Drafter | None]]:
    """A drafter node dialling `url`, with its engines loaded; closed at the end of the block.

    edge_target: also load the target here, for `edge-sd`.
    sockets, engines: where its connections, and what it computes with, are noted.
    """
    sockets, engines = sockets or Sockets(), engines or Engines()
    target, drafter = await asyncio.to_thread(_load, options, edge_target)
    tokenizer = drafter.tokenizer if drafter else ""
    if not tokenizer and (loaded := await asyncio.to_thread(load_tokenizer, options.target)):
        tokenizer = loaded.fingerprint
    compute = ThreadCompute()
    engines.compute, engines.target, engines.drafter = compute, target, drafter
    node = DrafterNode(
        lambda: sockets.dial(url),
        compute,
        drafter=drafter,
        target=target,
        target_name=options.target if not options.target.startswith("emulated:") else "",
        tokenizer=tokenizer,
        token=options.token,
        patience_s=patience_s,
    )
    try:
        yield node, drafter
    finally:
        await node.disconnect()
        compute.close()


async def _answer(node: DrafterNode, message: dict[str, Any]) -> dict[str, Any]:
    """One control message to its answer; what goes wrong becomes an error line, never a crash."""
    reply: dict[str, Any] = {"id": message.get("id")}
    try:
        async with asyncio.timeout(message.get("timeout_s")):
            match message.get("op"):
                case "ping":
                    rtt_s = await node.ping(int(message.get("n", 8)))
                    return reply | {"op": "pong", "rtt_ms": [1e3 * t for t in rtt_s]}
                case "reconnect":
                    await node.renew()
                    return reply | {"op": "reconnected"}
                case "generate":
                    record = await node.generate(request_from(message))
                    return reply | {"op": "result", "record": msgspec.to_builtins(record)}
                case op:
                    return reply | {"op": "error", "code": "op", "message": f"unknown op {op!r}"}
    except TimeoutError:
        await node.disconnect()
        limit = message.get("timeout_s")
        return reply | {"op": "error", "code": "timeout", "message": f"not finished within {limit} s"}
    except (GenerationFailed, Refused, ProtocolError) as e:
        return reply | {"op": "error", "code": e.code, "message": str(e)}
    except (ConnectFailed, ChannelClosed) as e:
        await node.disconnect()
        return reply | {"op": "error", "code": "connection", "message": str(e)}
    except (ModelError, ValueError, TypeError, KeyError) as e:
        return reply | {"op": "error", "code": "request", "message": f"{type(e).__name__}: {e}"}


def request_from(message: dict[str, Any]) -> GenerationRequest:
    """A generation request from its control message. Raises ValueError, TypeError or KeyError."""
    return GenerationRequest(
        prompt_ids=[int(i) for i in message["prompt_ids"]],
        mode=message["mode"],
        policy=message.get("policy", "static"),
        gamma=int(message.get("gamma", 0)),
        run_ahead=int(message.get("run_ahead", RUN_AHEAD)),
        free_run=bool(message.get("free_run", False)),
        beside=int(message.get("beside", 0)),
        acceptance=str(message.get("acceptance", "coupled")),
        top_q=int(message.get("top_q", 0)),
        sampling=Sampling(**message.get("sampling", {})),
        max_new_tokens=int(message["max_new_tokens"]),
        stop_at_eos=bool(message.get("stop_at_eos", True)),
    )


async def _live(control: bool, ready: dict[str, Any], answer: Control) -> None:
    """Announce readiness; answer control lines until stop, end of input or a signal, which end all work."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(stop.wait())]
    try:
        if control:
            _print_line(ready)
            reader = asyncio.StreamReader(limit=1 << 24)
            await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
            messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
            tasks.append(asyncio.create_task(_read_control(reader, messages)))
            tasks.append(asyncio.create_task(_answer_control(messages, answer)))
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def _read_control(reader: asyncio.StreamReader, messages: asyncio.Queue[dict[str, Any]]) -> None:
    """Queue control messages; returns at "stop" or the end of the input."""
    while line := await reader.readline():
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            _print_line({"op": "error", "code": "control", "message": "not a JSON object"})
        elif message.get("op") == "stop":
            return
        else:
            messages.put_nowait(message)


async def _answer_control(messages: asyncio.Queue[dict[str, Any]], answer: Control) -> None:
    """Answer one message after the other, for ever; probes, which the node knows nothing of, beside them."""

    async def reply(message: dict[str, Any]) -> None:
        if (line := await answer(message)) is not None:
            _print_line(line)

    async with asyncio.TaskGroup() as probes:
        while True:
            message = await messages.get()
            if message.get("op") == "probe":
                probes.create_task(reply(message))
            else:
                await reply(message)


def _print_line(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message, separators=(",", ":")) + "\n")
    sys.stdout.flush()
