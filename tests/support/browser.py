"""A headless Chromium for tests of pages; `scripts/install_browser.sh` installs what it needs."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

SIZES = {"wide": (1280, 900), "phone": (390, 844)}


class Browser:
    """One tab, which reaches no host but this one.

    Attributes:
        driver: selenium's, for all that has no method here.
        downloads: folder that files are saved to.
    """

    def __init__(self, folder: Path) -> None:
        from selenium import webdriver

        self.downloads = folder / "downloads"
        self.downloads.mkdir()
        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        flags = [
            "headless=new",
            "disable-dev-shm-usage",
            "disable-gpu",
            "disable-background-networking",
            "no-first-run",
        ]
        flags += [f"user-data-dir={folder / 'profile'}", "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        for flag in [*flags, *["no-sandbox"] * (os.geteuid() == 0)]:
            options.add_argument(f"--{flag}")
        service = webdriver.ChromeService(executable_path=str(shutil.which("chromedriver")))
        self.driver = webdriver.Chrome(options=options, service=service)
        self._devtools("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))

    def _devtools(self, command: str, **arguments: object) -> Any:
        return self.driver.execute_cdp_cmd(command, arguments)

    def open(self, page: Path | str, *, size: str = "wide", dark: bool = False) -> None:
        """Open a file or an address, and wait until it is loaded. What `console` and `requests` had is forgotten."""
        width, height = SIZES[size]
        self._devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=size == "phone",
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._devtools("Emulation.setEmulatedMedia", features=[scheme])
        self.console(), self.requests()
        self.driver.get(page.resolve().as_uri() if isinstance(page, Path) else page)

    def first_view(self) -> float:
        """Seconds from the start of the navigation to the first text that the browser drew."""
        from selenium.webdriver.support.ui import WebDriverWait

        script = "return performance.getEntriesByName('first-contentful-paint').map(e => e.startTime)"
        [entry] = WebDriverWait(self.driver, 10).until(lambda driver: driver.execute_script(script))
        return float(entry) / 1000

    def press(self, *keys: str) -> None:
        """Press keys, one after the other, wherever the focus is."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def run(self, script: str, *arguments: object) -> Any:
        """What a script in JavaScript returns; `arguments[0]` is its first argument."""
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> list[Any]:
        """The elements of a CSS selector."""
        return self.driver.find_elements("css selector", selector)

    def console(self) -> list[str]:
        """Messages of the console since the last call: errors, and what the content policy refused."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses of servers that were asked since the last call; none of files and of data in the page."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        sent += [event["params"]["url"] for event in events if event["method"] == "Network.webSocketCreated"]
        return [address for address in sent if urlsplit(address).scheme not in ("file", "data", "blob")]

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window; a page that fits has none."""
        return int(self.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth"))

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """The page as PNG: `whole`, or what the window shows."""
        shot = self._devtools("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def started(folder: Path) -> Iterator[Browser]:
    """A browser with its files in `folder`; the test is skipped where there is none."""
    pytest.importorskip("selenium", reason="selenium is not installed; scripts/install_browser.sh installs it")
    if missing := [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]:
        pytest.skip(f"no {' and no '.join(missing)} on this machine; scripts/install_browser.sh installs it")
    browser = Browser(folder)
    try:
        yield browser
    finally:
        browser.driver.quit()
