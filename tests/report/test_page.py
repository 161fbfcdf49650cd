"""The report in a real browser: it draws, moves, switches outlines and goes to a listed nucleus."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from nuclei3d.config import Params
from nuclei3d.images.tiff import write_image, write_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.stages.evaluate import evaluate

if TYPE_CHECKING:
    from playwright.sync_api import Page

SIZE = VoxelSize(2.0, 0.5, 0.5)
CENTRES = {1: (8, 8, 8), 2: (8, 20, 22), 3: (22, 8, 26)}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluate two frames: nucleus 3 is missed in the second, and one is invented there."""
    root = tmp_path_factory.mktemp("report")
    grid = np.meshgrid(np.arange(16) * 2.0, np.arange(60) * 0.5, np.arange(72) * 0.5, indexing="ij")
    rng = np.random.default_rng(0)
    for frame in range(2):
        labels = np.zeros((16, 60, 72), dtype=np.uint16)
        for label, centre in CENTRES.items():
            labels[sum((axis - c) ** 2 for axis, c in zip(grid, centre, strict=True)) <= 25] = label
        pred = labels.copy()
        if frame == 1:
            pred[pred == 3] = 0
            pred[:3, 51:, 61:] = 9
        write_image(
            root / f"images/t{frame}.tif", rng.poisson(20 + 80 * (labels > 0)).astype(np.uint16), SIZE
        )
        write_labels(root / f"truth/t{frame}.tif", labels, SIZE)
        write_labels(root / f"pred/t{frame}.tif", pred, SIZE)
    params = Params.model_validate({"evaluate": {"bootstrap": 50}})
    evaluate(params, root / "truth", root / "pred", root / "out", images=root / "images", method="<i>M</i>")
    return root / "out/report.html"


@pytest.fixture
def page(report: Path) -> Iterator[Page]:
    """Open the report in headless Chromium on the screen of a laptop, without a network."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    named = os.environ.get("NUCLEI3D_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not named:
        pytest.skip("no Chromium found; install it or set NUCLEI3D_CHROMIUM to its path")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=named, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        context = browser.new_context(viewport={"width": 1366, "height": 768}, offline=True)
        opened = context.new_page()
        problems: list[str] = []
        opened.on("pageerror", lambda error: problems.append(str(error)))
        opened.on(
            "console", lambda message: problems.append(message.text) if message.type == "error" else None
        )
        opened.on(
            "request",
            lambda request: (
                None if request.url.startswith(("file:", "data:", "blob:")) else problems.append(request.url)
            ),
        )
        opened.goto(report.as_uri())
        opened.wait_for_selector("#views[data-drawn]")
        yield opened
        browser.close()
    assert problems == []


def drawn(page: Page) -> str:
    """Give the volume and the voxel that are shown once all drawing is done."""
    page.wait_for_selector("#views[aria-busy=false]")
    return str(page.eval_on_selector("#views", "node => node.dataset.drawn"))


def resting_box(page: Page, selector: str) -> Mapping[str, float]:
    """Give the place of an element once the page has stopped scrolling to it."""
    before = None
    while True:
        box = page.locator(selector).bounding_box()
        assert box is not None
        if box == before:
            return box
        before = box
        page.wait_for_timeout(200)


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


def colors(page: Page) -> dict[str, Any]:
    return dict(page.evaluate("JSON.parse(document.getElementById('data').textContent).colors"))


def test_it_opens_at_the_missed_nucleus(page: Page) -> None:
    volume, z, y, x = drawn(page).split()
    assert volume.endswith("/t1")
    assert (int(z), int(y), int(x)) == (11, 16, 52)
    assert page.text_content("h1") == "How good is <i>M</i>?"
    assert page.locator("svg.chart").count() >= 4


def test_everything_of_the_viewer_fits_on_a_laptop_screen(page: Page) -> None:
    page.eval_on_selector("#view", "node => node.scrollIntoView({behavior: 'instant'})")
    box = page.locator("#viewer").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] <= 768
    assert page.evaluate("document.documentElement.scrollWidth") <= 1366
    for view in ("xy", "yz", "xz"):
        inner = page.locator(f"#{view}").bounding_box()
        assert inner is not None
        assert inner["y"] + inner["height"] <= box["y"] + box["height"]
        assert inner["x"] + inner["width"] <= box["x"] + box["width"]


def test_outlines_are_switched_on_and_off_one_kind_at_a_time(page: Page) -> None:
    drawn(page)
    palette = colors(page)
    assert pixels(page, "xy", palette["missed"]) > 50
    page.uncheck("#layer-missed")
    drawn(page)
    assert pixels(page, "xy", palette["missed"]) == 0
    page.check("#layer-missed")
    drawn(page)
    assert pixels(page, "xy", palette["missed"]) > 50


def test_a_click_on_a_listed_nucleus_goes_there(page: Page) -> None:
    rows = page.locator("#rows tr")
    assert rows.count() == 2
    page.locator("#rows tr", has_text="false").click()
    volume, z, y, x = drawn(page).split()
    assert volume.endswith("/t1")
    assert (int(z), int(y), int(x)) == (1, 55, 66)
    assert pixels(page, "xy", colors(page)["false"]) > 20
    page.check("#list-found")
    assert rows.count() == 2 + 5


def test_sliders_keys_and_clicks_move_the_planes(page: Page) -> None:
    page.locator("#z").fill("4")
    page.locator("#t").fill("0")
    volume, z, *_ = drawn(page).split()
    assert volume.endswith("/t0")
    assert z == "4"
    assert pixels(page, "xy", colors(page)["missed"]) == 0
    assert pixels(page, "xy", colors(page)["true"]) > 50
    page.focus("#views")
    page.keyboard.press("PageDown")
    assert drawn(page).split()[1] == "5"
    box = resting_box(page, "#xy")
    page.mouse.click(box["x"] + box["width"] * 8.25 / 36, box["y"] + box["height"] * 20.25 / 30)
    assert drawn(page).split()[2:] == ["40", "16"]
    page.mouse.wheel(0, 100)
    # the browser hands on a turn of the wheel when it likes
    for _ in range(100):
        if drawn(page).split()[1] == "6":
            break
        page.wait_for_timeout(50)
    assert drawn(page).split()[1] == "6"


def test_a_double_click_enlarges_a_view_and_gives_it_back(page: Page) -> None:
    before = page.locator("#xz").bounding_box()
    page.locator("#xz").dblclick()
    drawn(page)
    alone = page.locator("#xz").bounding_box()
    assert before is not None
    assert alone is not None
    assert alone["width"] > 1.3 * before["width"]
    assert not page.locator("#xy").is_visible()
    page.locator("#xz").dblclick()
    drawn(page)
    assert page.locator("#xy").is_visible()


def test_a_volume_of_the_table_opens_in_the_viewer(page: Page) -> None:
    page.locator("button[data-volume]").first.click()
    assert drawn(page).split()[0].endswith("/t0")
