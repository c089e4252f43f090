"""Open a page in headless Chromium over the DevTools protocol; what it logged, asked for and shows."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest


def chromium_path() -> str:
    """The browser's path. Without one: a skip, or a failure under CI=true."""
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        found = shutil.which(name)
        if found:
            return found
    if os.environ.get("CI") == "true":
        pytest.fail("no Chromium on PATH, and CI needs one: apt-get install chromium")
    pytest.skip("no Chromium on PATH")


class Page:
    """One tab. `complaints`: console errors and exceptions; `requests`: URLs asked for."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._session = ""
        self._loaded = asyncio.Event()
        self.complaints: list[str] = []
        self.requests: list[str] = []

    async def listen(self) -> None:
        async for message in self._socket:
            data = json.loads(message.data)
            if "id" in data:
                self._answers.pop(data["id"]).set_result(data)
                continue
            method, params = data["method"], data["params"]
            if method == "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            elif method == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(params["exceptionDetails"]))
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                self.complaints.append(json.dumps(params["args"]))
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                self.complaints.append(json.dumps(params["entry"]))
            elif method == "Page.loadEventFired":
                self._loaded.set()

    async def call(self, method: str, **params: object) -> dict[str, Any]:
        number = next(self._ids)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        request: dict[str, object] = {"id": number, "method": method, "params": params}
        if self._session:
            request["sessionId"] = self._session
        await self._socket.send_json(request)
        data = await asyncio.wait_for(answer, 30)
        assert "error" not in data, f"{method}: {data.get('error')}"
        result: dict[str, Any] = data["result"]
        return result

    async def open(self, url: str) -> None:
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        await self.resize(1200, 900)
        await self.call("Page.navigate", url=url)
        await asyncio.wait_for(self._loaded.wait(), 30)

    async def resize(self, width: int, height: int) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    async def look(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def hover(self, x: float, y: float) -> None:
        await self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)


@contextlib.asynccontextmanager
async def browse(url: str) -> AsyncIterator[Page]:
    """A tab showing `url`; the browser and its profile are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="dsdlab-chromium-", ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            chromium_path(),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-port=0",
            f"--user-data-dir={profile}",
            "about:blank",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "TMPDIR": profile},  # a browser that is killed leaves folders there
        )
        try:
            assert process.stderr is not None
            address = None
            while address is None:
                line = await asyncio.wait_for(process.stderr.readline(), 60)
                assert line, "Chromium ended before it listened"
                address = re.search(rb"DevTools listening on (ws://\S+)", line)
            drain = asyncio.create_task(process.stderr.read())
            async with (
                aiohttp.ClientSession() as client,
                client.ws_connect(address[1].decode(), max_msg_size=0) as socket,
            ):
                page = Page(socket)
                listener = asyncio.create_task(page.listen())
                await page.open(url)
                yield page
                listener.cancel()
            drain.cancel()
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
