"""A headless Chromium driven through chromedriver (W3C WebDriver), for pages on disk."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
_ARGUMENTS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
]
# The driver is on this machine, whatever proxy the environment names.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Browser:
    """One session."""

    def __init__(self, port: int, size: tuple[int, int], dark: bool, scripts: bool) -> None:
        self._url = f"http://127.0.0.1:{port}"
        arguments = [*_ARGUMENTS, f"--window-size={size[0]},{size[1]}"]
        if dark:
            arguments.append("--blink-settings=preferredColorScheme=0")
        options = {"binary": shutil.which("chromium"), "args": arguments}
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        if not scripts:
            content = {"profile.managed_default_content_settings.javascript": 2}
            options["prefs"] = content
        made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._url += f"/session/{made['sessionId']}"

    def open(self, page: Path) -> None:
        """Load a file, scripts included."""
        self._call("POST", "/url", {"url": page.resolve().as_uri()})

    def run(self, script: str) -> Any:
        """Return value of a script that runs in the page."""
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def point_at(self, x: int, y: int) -> None:
        """Move the mouse to a place in the window, in CSS pixels."""
        move = {"type": "pointerMove", "duration": 0, "x": x, "y": y}
        mouse = {"type": "pointer", "id": "mouse", "actions": [move]}
        self._call("POST", "/actions", {"actions": [mouse]})

    def press(self, key: str) -> None:
        """Press and release a key, by its WebDriver code, on what has the focus."""
        keys = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        keyboard = {"type": "key", "id": "keyboard", "actions": keys}
        self._call("POST", "/actions", {"actions": [keyboard]})

    def width(self, pixels: int) -> None:
        """Lay the page out as a phone of that width does, narrower than any window."""
        size = {"width": pixels, "height": 900, "deviceScaleFactor": 1, "mobile": True}
        override = {"cmd": "Emulation.setDeviceMetricsOverride", "params": size}
        self._call("POST", "/goog/cdp/execute", override)

    def screenshot(self) -> bytes:
        """The window as PNG."""
        return base64.b64decode(self._call("GET", "/screenshot"))

    def console(self) -> list[str]:
        """Console messages since the last call, errors of the security policy included."""
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def requests(self) -> list[str]:
        """The addresses that were asked for since the last call, pages included."""
        entries = self._call("POST", "/se/log", {"type": "performance"})
        events = [json.loads(entry["message"])["message"] for entry in entries]
        sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]

    def quit(self) -> None:
        """End the session."""
        self._call("DELETE", "")

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, method=method)
        with _OPENER.open(request, timeout=60) as answer:
            return json.load(answer)["value"]


@contextmanager
def browsing(
    size: tuple[int, int] = (1200, 900), dark: bool = False, scripts: bool = True
) -> Iterator[Browser]:
    """A browser with a window of `size` CSS pixels, ended with the block.

    Without `scripts` it runs none of a page's own; those of `run` work all the same.
    """
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        port = next(
            m[1] for m in map(re.compile(r"successfully on port (\d+)").search, driver.stdout) if m
        )
        browser = Browser(int(port), size, dark, scripts)
        try:
            yield browser
        finally:
            browser.quit()
    finally:
        driver.terminate()
        driver.wait()
