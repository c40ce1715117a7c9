"""A headless Chromium, driven through chromedriver by plain HTTP (W3C WebDriver)."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMEDRIVER = shutil.which("chromedriver")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key under which WebDriver names an element."""
KEYS = {"Enter": "\ue007", "Shift": "\ue008", "Escape": "\ue00c", "Tab": "\ue004", "Space": "\ue00d"}
PATIENCE_S = 30.0


class Browser:
    """One window. Scripts are bodies of functions; their arguments are `arguments[0]` and so on."""

    def __init__(self, session: str) -> None:
        self._session = session

    def open(self, url: str) -> None:
        """Load a page and wait for its load event."""
        self._post("url", {"url": url})

    def run(self, script: str, *args: Any) -> Any:
        """The value that a script returns; a promise is waited for."""
        return self._post("execute/sync", {"script": script, "args": list(args)})

    def wait(self, condition: str, *args: Any) -> Any:
        """The first truthy value of an expression. Raises AssertionError, with what the page shows, if none comes."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            if value := self.run(f"return {condition}", *args):
                return value
            time.sleep(0.02)
        raise AssertionError(f"never true: {condition}; the page shows:\n{self.run('return document.body.innerText')}")

    def text(self, selector: str) -> str:
        """The text of the first element of a selector, as it is shown."""
        return self.run("return document.querySelector(arguments[0]).innerText", selector)

    def click(self, selector: str) -> None:
        """Click as a user does; fails where something lies over the element."""
        found = self._post("element", {"using": "css selector", "value": selector})
        self._post(f"element/{found[ELEMENT]}/click", {})

    def press(self, *keys: str, holding: str | None = None) -> None:
        """Type text, or keys named in `KEYS`, into whatever has the focus."""
        strokes = [stroke for key in keys for stroke in ([KEYS[key]] if key in KEYS else key)]
        moves = [{"type": kind, "value": stroke} for stroke in strokes for kind in ("keyDown", "keyUp")]
        if holding:
            modifier = KEYS[holding]
            moves = [{"type": "keyDown", "value": modifier}, *moves, {"type": "keyUp", "value": modifier}]
        self._post("actions", {"actions": [{"type": "key", "id": "keyboard", "actions": moves}]})

    def devtools(self, command: str, **params: Any) -> Any:
        """A command of the Chrome DevTools protocol."""
        return self._post("goog/cdp/execute", {"cmd": command, "params": params})

    def show_as(self, width: int, height: int, scheme: str) -> None:
        """The size of the page in CSS pixels, and `light` or `dark`."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path) -> None:
        """What the window shows, as PNG."""
        path.write_bytes(base64.b64decode(self._get("screenshot")))

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What was written since the last call: `browser` is the console, `performance` the events of DevTools."""
        return self._post("se/log", {"type": kind})

    def requested(self) -> list[str]:
        """The addresses that were asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]

    def _get(self, path: str) -> Any:
        return _call("GET", f"{self._session}/{path}")

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return _call("POST", f"{self._session}/{path}", body)


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a fresh profile in a directory; it ends with the block."""
    command = [str(CHROMEDRIVER), "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as driver:
        assert driver.stdout is not None
        try:
            port = next(line.split()[-1].rstrip(".") for line in driver.stdout if "successfully on port" in line)
            root = f"http://127.0.0.1:{port}"
            made = _call("POST", f"{root}/session", {"capabilities": {"alwaysMatch": _capabilities(profile)}})
            session = f"{root}/session/{made['sessionId']}"
            try:
                yield Browser(session)
            finally:
                _call("DELETE", session)
        finally:
            driver.terminate()


def _capabilities(profile: Path) -> dict[str, Any]:
    # no-sandbox: containers that run tests as root have no other way
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"]
    return {
        "goog:chromeOptions": {"binary": CHROMIUM, "args": flags},
        "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
    }


def _call(method: str, url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        with error:
            raise AssertionError(json.load(error)["value"]["message"]) from None
