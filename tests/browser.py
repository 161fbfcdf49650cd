"""A page of ours in headless Chromium, without a network; whatever it complains of fails the test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Page


@contextmanager
def opened(path: Path) -> Iterator[Page]:
    """Open a page on the screen of a laptop and wait until its viewer has drawn."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    named = os.environ.get("NUCLEI3D_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not named:
        pytest.skip("no Chromium found; install it or set NUCLEI3D_CHROMIUM to its path")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=named, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        context = browser.new_context(viewport={"width": 1366, "height": 768}, offline=True)
        page = context.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith(("file:", "data:", "blob:")) else problems.append(request.url)
            ),
        )
        page.goto(path.as_uri())
        page.wait_for_selector("#views[data-drawn]")
        yield page
        browser.close()
    assert problems == []


def pixels(page: Page, view: str, color: str) -> int:
    """Count the pixels of a view that have about a colour."""
    wanted = [int(color[k : k + 2], 16) for k in (1, 3, 5)]
    return int(
        page.evaluate(
            """([view, wanted]) => {
              const canvas = document.getElementById(view);
              const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
              let count = 0;
              for (let k = 0; k < data.length; k += 4)
                count += wanted.every((value, c) => Math.abs(data[k + c] - value) < 12);
              return count;
            }""",
            [view, wanted],
        )
    )
