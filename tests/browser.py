"""A headless Chromium for tests of pages, driven over its DevTools pipe: no driver, no port, no network.

Chromium reads commands from file descriptor 3 and writes answers and events to 4, each a JSON text that ends with a
zero byte (https://chromedevtools.github.io/devtools-protocol/). ``apt-get install chromium`` has it on Debian.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PATH = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
MISSING = "no chromium here: apt-get install chromium, or name one in $CHROMIUM"

_TIMEOUT_S = 60.0
_KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "Enter": 13, "End": 35, "Home": 36, "Escape": 27, "/": 191}


class BrowserError(Exception):
    """The browser does not answer, or a script in a page has failed."""


class Browser:
    """One browser with one page.

    Attributes:
        errors: what pages have written to the console as errors, and what was thrown and not caught.
        requests: addresses of all that was asked for, the opened files among them.
    """

    def __init__(self, width: int = 1500, height: int = 950) -> None:
        assert PATH is not None, MISSING
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._folder = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()

        flags = (
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe",
            f"--user-data-dir={self._folder.name}", f"--window-size={width},{height}", "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND", "about:blank",
        )  # fmt: skip
        connected = f'exec "$@" 3<&{to_read} 4>&{to_write}'  # as the shell does it, after the fork
        self._process = subprocess.Popen(
            ["bash", "-c", connected, "bash", PATH, *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(to_read, to_write),
        )
        os.close(to_read)
        os.close(to_write)
        self._serial, self._rest, self._session = 0, b"", ""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._call("Emulation.setDeviceMetricsOverride", **metrics)

    def open(self, page: Path, fragment: str = "") -> float:
        """Open a file and wait until its report is ready; seconds that this took."""
        address = page.resolve().as_uri() + (f"#{fragment}" if fragment else "")
        began = time.perf_counter()
        self._call("Page.navigate", url="about:blank")  # another fragment alone would not load it anew
        self._call("Page.navigate", url=address)
        while not self.evaluate("Boolean(window.__zgraph && (__zgraph.ready || __zgraph.errors.length))"):
            if time.perf_counter() - began > _TIMEOUT_S:
                raise BrowserError(f"{page} does not get ready")
            time.sleep(0.02)
        return time.perf_counter() - began

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, as JSON has it."""
        result = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise BrowserError(str(result["exceptionDetails"].get("exception", {}).get("description", result)))
        return result["result"].get("value")

    def text(self, selector: str) -> str:
        """What the first element of a selector shows."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).textContent"))

    def click(self, selector: str) -> None:
        """Click the middle of the first element of a selector."""
        where = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + Math.min(b.height / 2, 12)]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=where[0], y=where[1], button="left", clickCount=1)

    def drag(self, selector: str, by: int) -> None:
        """Press the button in the middle of an element, and let go so many pixels to the right."""
        x, y = self.evaluate(
            f"(() => {{ const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind, at in (("mousePressed", x), ("mouseMoved", x + by), ("mouseReleased", x + by)):
            held = {"button": "left", "buttons": int(kind != "mouseReleased"), "clickCount": 1}
            self._call("Input.dispatchMouseEvent", type=kind, x=at, y=y, **held)

    def move(self, x: float, y: float) -> None:
        """Move the pointer to a point of the window."""
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str) -> None:
        """Press and let go of a key, such as ``"ArrowRight"``."""
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=_KEYS[key])

    def write(self, selector: str, text: str) -> None:
        """Type into a field."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        self._call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        """Save what is seen as PNG."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """End the browser."""
        with contextlib.suppress(BrowserError, OSError):
            session, self._session = self._session, ""
            self._call("Browser.close")
            self._session = session
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)
        self._folder.cleanup()

    # -- the protocol -----------------------------------------------------------------------------------------

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._serial += 1
        message: dict[str, Any] = {"id": self._serial, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        for answer in self._messages(time.monotonic() + _TIMEOUT_S):
            if answer.get("id") == self._serial:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']['message']}")
                found: dict[str, Any] = answer["result"]
                return found
            self._note(answer)
        raise BrowserError(f"{method}: the browser has ended")

    def _messages(self, until: float) -> Iterator[dict[str, Any]]:
        while True:
            while b"\0" in self._rest:
                text, _, self._rest = self._rest.partition(b"\0")
                yield json.loads(text)
            if not select.select([self._from], [], [], max(until - time.monotonic(), 0))[0]:
                raise BrowserError(f"no answer within {_TIMEOUT_S:.0f} s")
            more = os.read(self._from, 2**20)
            if not more:
                return
            self._rest += more

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif event.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(str(params["args"]))
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(str(params["entry"]))
