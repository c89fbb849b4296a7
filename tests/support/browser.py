"""Chromium without a window, driven over its DevTools protocol through pipes: no driver, no port, no further package."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
ANSWER_S = 60.0


class BrowserError(Exception):
    """The browser refused a command, or a script in a page raised."""


class Browser:
    """A browser; its pages share nothing with each other. Close it at the end.

    Args:
        folder: for its profile.
    """

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None
        read_end, self._write = os.pipe()
        self._read, write_end = os.pipe()
        # The browser reads commands from descriptor 3, and writes answers to 4; the shell moves them there.
        move = f'exec "$0" "$@" 3<&{read_end} 4>&{write_end} {read_end}<&- {write_end}>&-'
        self._process = subprocess.Popen(
            [
                "bash", "-c", move, CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                "--no-first-run", "--hide-scrollbars", "--disable-background-networking", "--disable-component-update",
                "--disable-features=Translate,OptimizationHints,MediaRouter", "--mute-audio", "--remote-debugging-pipe",
                f"--user-data-dir={folder}", "about:blank",
            ],
            pass_fds=(read_end, write_end),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read_end)
        os.close(write_end)
        self._numbers = itertools.count(1)
        self._rest = b""
        self._answers: dict[int, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        """A command's result."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        self.wait_for(lambda: number in self._answers)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']}")
        return answer["result"]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Take messages until a condition holds."""
        ends = time.monotonic() + ANSWER_S
        while not condition():
            self._take(ends)

    def _take(self, ends: float) -> None:
        ready, _, _ = select.select([self._read], [], [], max(0.0, ends - time.monotonic()))
        data = os.read(self._read, 2**20) if ready else b""
        if not data:
            raise BrowserError("the browser doesn't answer")
        *messages, self._rest = (self._rest + data).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self.events.append(message)

    @contextmanager
    def page(self, width: int = 1440, height: int = 900, *, dark: bool = False, scale: float = 1.0) -> Iterator[Page]:
        """A page of its own profile, closed at the end."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.resize(width, height, scale)
        page.call(
            "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        )
        try:
            yield page
        finally:
            self.call("Target.disposeBrowserContext", browserContextId=context)

    def close(self) -> None:
        """End the browser."""
        try:
            self.call("Browser.close")
        except (BrowserError, OSError):
            self._process.kill()
        os.close(self._write)
        self._process.wait(ANSWER_S)
        os.close(self._read)


class Page:
    """One page of a browser."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **parameters: Any) -> Any:
        """A command's result."""
        return self._browser.call(method, self._session, **parameters)

    def resize(self, width: int, height: int, scale: float = 1.0) -> None:
        """Set the window's size in CSS pixels, and how many device pixels each is."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=width < 600
        )

    def open(self, url: str) -> None:
        """Go to an address, and wait until the page is loaded."""
        before = self._loads
        self.call("Page.navigate", url=url)
        self._browser.wait_for(lambda: self._loads > before)

    @property
    def _loads(self) -> int:
        return sum(event["method"] == "Page.loadEventFired" for event in self._events)

    @property
    def _events(self) -> list[dict[str, Any]]:
        return [event for event in self._browser.events if event.get("sessionId") == self._session]

    def run(self, script: str) -> Any:
        """The value of an expression in the page; promises are awaited."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise BrowserError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def wait_for(self, condition: str) -> Any:
        """Wait until an expression is true in the page, without asking again and again; returns its value."""
        script = f"""new Promise((found) => {{
            const look = () => {{ const value = (() => {condition})(); value ? found(value) : setTimeout(look, 20); }};
            look();
        }})"""
        return self.run(script)

    def text(self, id: str) -> str:
        """An element's text."""
        return str(self.run(f"document.getElementById({json.dumps(id)}).textContent"))

    def type(self, id: str, text: str) -> None:
        """Focus an element, and type."""
        self.run(f"document.getElementById({json.dumps(id)}).focus()")
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """A key's way down and up."""
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, windowsVirtualKeyCode=_CODES[key], **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=_CODES[key])

    def shoot(self, file: Path) -> None:
        """Write a screenshot."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    @property
    def complaints(self) -> list[str]:
        """Errors of scripts, and the console's errors and warnings; refusals of a content policy among them."""
        self.run("0")  # what came before is here then
        found = []
        for event in self._events:
            parameters = event["params"]
            match event["method"]:
                case "Runtime.exceptionThrown":
                    found.append(str(parameters["exceptionDetails"]))
                case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                    found.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
                case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "warning"):
                    found.append(str(parameters["args"]))
        return found

    @property
    def requested(self) -> set[str]:
        """Addresses that the page asked."""
        self.run("0")
        return {event["params"]["request"]["url"] for event in self._events if event["method"] == "Network.requestWillBeSent"}


_CODES = {"Enter": 13, "ArrowRight": 39, "ArrowDown": 40, "ArrowLeft": 37, "ArrowUp": 38, "Home": 36, "End": 35, "Tab": 9}
