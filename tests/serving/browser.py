"""Headless Chromium for tests of the page: the system's, or Debian's package, which root gets installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
APT = ("apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120")


def executable() -> str:
    """Where Chromium is. Skips the test where there is none, and none can be installed."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = {"capture_output": True, "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}}
        subprocess.run([*APT, "update"], **quiet)
        subprocess.run([*APT, "install", "-y", "--no-install-recommends", "chromium", "fonts-dejavu-core"], **quiet)
        found = shutil.which("chromium")
    if found is None:
        pytest.skip("there is no Chromium, and only root on Debian gets it installed here: apt-get install chromium")
    return found


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable(), args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A page of the browser, and what its console and network have seen."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.page.set_default_timeout(60_000)
        self.troubles: list[str] = []  # of the console, but for answers of the server that are errors
        self.asked: list[Any] = []
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("console", self._hear)
        self.page.on("request", lambda request: self.asked.append(request))
        self.page.goto(url)

    def _hear(self, message: Any) -> None:
        if message.type in ("error", "warning") and "Failed to load resource: the server responded" not in message.text:
            self.troubles.append(message.text)

    def close(self) -> None:
        self.page.close()
        assert self.troubles == []


def violations(page: Any) -> list[str]:
    """What axe-core finds against the accessibility of a page as it stands."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{one['id']}: {one['help']}: {[node['html'][:200] for node in one['nodes']]}" for one in found]
