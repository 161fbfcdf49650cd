"""The page beside a prediction: its numbers are those of the tables, and it works in a real browser."""

from __future__ import annotations

import base64
import csv
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from imagecodecs import jpeg_decode
from PIL import Image

from browser import opened, pixels
from nuclei3d.errors import InputError
from nuclei3d.images.frames import find_frames
from nuclei3d.images.ome_zarr import create_zarr
from nuclei3d.images.tiff import write_image, write_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.report.prediction import ShownFrame, odd_numbers
from nuclei3d.segmentation.masks import NUCLEUS_COLUMNS
from nuclei3d.stages import predict_page
from nuclei3d.stages.predict_page import write_page
from nuclei3d.stages.predicted import PredictedFrame

if TYPE_CHECKING:
    from playwright.sync_api import Page

SIZE = VoxelSize(2.0, 0.5, 0.5)
SHAPE = (16, 60, 72)
CENTRES = {1: (8, 8, 8), 2: (8, 20, 22), 3: (22, 8, 26)}


def labels_of(centres: dict[int, tuple[float, float, float]]) -> np.ndarray:
    grid = np.meshgrid(*(np.arange(n) * e for n, e in zip(SHAPE, SIZE.zyx, strict=True)), indexing="ij")
    labels = np.zeros(SHAPE, np.uint16)
    for label, centre in centres.items():
        labels[sum((axis - c) ** 2 for axis, c in zip(grid, centre, strict=True)) <= 25] = label
    return labels


def predicted(root: Path, zarr: bool = False) -> list[PredictedFrame]:
    """Write three frames as predict does; the third nucleus is missing in the second."""
    done = []
    for frame in range(3):
        centres = {label: centre for label, centre in CENTRES.items() if frame != 1 or label != 3}
        labels = labels_of(centres)
        write_image(
            root / f"images/t{frame}.tif",
            np.where(labels > 0, 100 + 50 * labels, 20 + frame).astype(np.uint16),
            SIZE,
        )
        masks = root / f"out/t{frame}_masks.ome.{'zarr' if zarr else 'tif'}"
        if zarr:
            create_zarr(masks, SHAPE, np.uint32, SIZE, (8, 32, 32), labels=True)[:] = labels
        else:
            write_labels(masks, labels, SIZE)
        table = root / f"out/t{frame}_nuclei.csv"
        rows = [
            [label, *centre, 500 + label, 100 + label, "" if label == 2 else 0.9]
            for label, centre in centres.items()
        ]
        with table.open("w", newline="") as file:
            csv.writer(file).writerows([NUCLEUS_COLUMNS, *rows])
        done.append(PredictedFrame(f"t{frame}", masks, table, len(rows), 0.0, False))
    return done


# the second nucleus divides after the second frame; the third is gone there
TRACKS = """track,parent,frame,label,z_um,y_um,x_um
1,0,0,1,8.0,8,8
1,0,1,1,8.0,8,8
1,0,2,1,8.0,8,8
2,0,0,2,8.0,20,22
2,0,1,2,8.0,20,22
3,2,2,2,8.0,20,22
4,2,2,3,22.0,8,26
5,0,0,3,22.0,8,26
"""


def made(root: Path, done: list[PredictedFrame]) -> Path:
    return write_page(root / "out", find_frames(root / "images"), done, ["The <b>light</b> flickers."])


@pytest.fixture(scope="module")
def made_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    return made(root, predicted(root))


@pytest.fixture(scope="module")
def linked_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("linked")
    done = predicted(root)
    (root / "out/tracks").mkdir()
    (root / "out/tracks/tracks.csv").write_text(TRACKS)
    return made(root, done)


def frames_in(page: Path) -> list[tuple[np.ndarray, dict[str, Any]]]:
    packed = re.findall(r'<script type="text/plain" id="frame-\d+">(.*?)</script>', page.read_text())
    parts = [[base64.b64decode(part) for part in frame.split(".")] for frame in packed]
    return [(jpeg_decode(picture), json.loads(zlib.decompress(rest))) for picture, rest in parts]


def test_the_page_holds_the_nuclei_of_the_tables(made_page: Path) -> None:
    text, frames = made_page.read_text(), frames_in(made_page)
    assert made_page.name == "prediction.html"
    assert "<h1>8 nuclei in 3 frames</h1>" in text
    assert "The &lt;b&gt;light&lt;/b&gt; flickers." in text
    tables = [pd.read_csv(path) for path in sorted(made_page.parent.glob("*.csv"))]
    assert [len(frame["nuclei"]) for _, frame in frames] == [len(table) for table in tables] == [3, 2, 3]
    label, z, y, x, volume, intensity, score, track = frames[1][1]["nuclei"][1]
    assert (label, z, y, x, volume, intensity) == (2, *CENTRES[2], 502, 102)
    assert score is None
    assert track is None
    for name in ("nuclei", "volume", "mean intensity", "score"):
        assert f"{name} by frame" in text.replace(" (µm³)", "")


def test_the_picture_shows_each_nucleus_inside_its_outline(made_page: Path) -> None:
    for picture, frame in frames_in(made_page):
        for outlines in frame["outlines"]:
            for outline in outlines:
                left, top, right, bottom = (
                    getattr(np, which)(outline[axis::2]) // 2 for which in ("min", "max") for axis in (0, 1)
                )
                assert picture[(top + bottom) // 2, (left + right) // 2] > 150
        z, y, x = frame["size"]
        assert picture.shape == (y + 4 + z, x + 4 + z)
        assert picture[2, 2] < 30


def test_masks_of_blocks_give_the_same_page(
    made_page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_page, "_PART_VOXELS", 10_000)
    monkeypatch.setattr(predict_page, "_PART_SIDES", (8, 32, 32))
    reads: list[tuple[int, ...]] = []
    read_parts = predict_page._read_parts

    def watched(frame: Any) -> Any:
        for box, part in read_parts(frame):
            reads.append(part.shape)
            yield box, part

    monkeypatch.setattr(predict_page, "_read_parts", watched)
    page = made(tmp_path, predicted(tmp_path, zarr=True))
    for (picture, frame), (expected, told) in zip(frames_in(page), frames_in(made_page), strict=True):
        np.testing.assert_array_equal(picture, expected)
        assert frame == told
    assert max(np.prod(shape) for shape in reads) <= 10_000


def test_a_page_that_shows_just_this_is_kept(tmp_path: Path) -> None:
    done = predicted(tmp_path)
    page = made(tmp_path, done)
    before = page.stat().st_mtime_ns
    assert made(tmp_path, done).stat().st_mtime_ns == before
    done[0].table.write_text(done[0].table.read_text().replace("501", "777"))
    made(tmp_path, done)
    assert frames_in(page)[0][1]["nuclei"][0][4] == 777


def test_tracks_beside_the_masks_are_shown(linked_page: Path) -> None:
    text, frames = linked_page.read_text(), frames_in(linked_page)
    assert "<h1>8 nuclei in 3 frames, 5 tracks, 1 division</h1>" in text
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert found is not None
    tracks = json.loads(found[1])["tracks"]
    # the lineage of four nuclei first, its mother amid her daughters
    assert [tuple(track.values()) for track in tracks] == [
        (2, 0, 0, 1, 0.5),
        (3, 2, 2, 2, 0.0),
        (4, 2, 2, 2, 1.0),
        (1, 0, 0, 2, 2.0),
        (5, 0, 0, 0, 3.0),
    ]
    assert [[nucleus[-1] for nucleus in frame["nuclei"]] for _, frame in frames] == [
        [1, 2, 5],
        [1, 2],
        [1, 3, 4],
    ]


def test_tracks_come_and_go_with_their_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = predicted(tmp_path)
    table = tmp_path / "out/tracks/tracks.csv"
    table.parent.mkdir()
    assert "Lineages" not in made(tmp_path, done).read_text()
    table.write_text(TRACKS)
    assert "Lineages" in made(tmp_path, done).read_text()
    table.write_text(TRACKS.replace("4,2,2,3", "4,2,2,9"))
    assert "Lineages" not in made(tmp_path, done).read_text()
    assert "tracks.csv is not of these masks (t2)" in capsys.readouterr().err
    # as many nuclei as before, but others
    table.write_text(TRACKS.replace("2,0,1,2,8.0,20,22", "2,0,1,2,8.0,20,25"))
    assert "Lineages" not in made(tmp_path, done).read_text()
    assert "tracks.csv is not of these masks (t1)" in capsys.readouterr().err
    table.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"tracks\.csv is no table of tracks"):
        made(tmp_path, done)


def test_an_animated_png_by_choice(tmp_path: Path) -> None:
    done, frames = predicted(tmp_path), find_frames(tmp_path / "images")
    write_page(tmp_path / "out", frames, done)
    assert not list(tmp_path.glob("out/*.png"))
    write_page(tmp_path / "out", frames, done, animated=True)
    with Image.open(tmp_path / "out/prediction.png") as animation:
        assert animation.n_frames == 3
        assert animation.size == (72 + 4 + 64, 60 + 4 + 64)
        y, x = (round(place / 0.5) for place in CENTRES[3][1:])
        spots = []
        for frame in range(3):
            animation.seek(frame)
            shown = np.asarray(animation.convert("RGB")).astype(int)
            spots.append(shown[y, x])
    # grey inside; the third nucleus is not there in the second frame
    assert [spot[0] > 100 for spot in spots] == [True, False, True]
    assert all(len(set(spot)) == 1 for spot in spots)


def frames_with(
    counts: list[int], volumes: Any = 500.0, intensity: Any = 100.0, score: Any = 0.9
) -> list[ShownFrame]:
    def table(at: int, count: int) -> pd.DataFrame:
        values = [each(at) if callable(each) else each for each in (volumes, intensity, score)]
        columns = dict(zip(NUCLEUS_COLUMNS[4:], values, strict=True))
        nuclei = pd.DataFrame(columns, index=range(count))
        return nuclei.assign(label=range(1, count + 1), z_um=0, y_um=0, x_um=0)

    return [
        ShownFrame(f"t{at}", SHAPE, SIZE, table(at, count), lambda: (), lambda: ())
        for at, count in enumerate(counts)
    ]


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        (frames_with([20, 20, 21, 22, 30, 30, 31]), []),
        (frames_with([3]), []),
        (frames_with([20, 0, 20]), ["No nucleus in t1."]),
        (
            frames_with([20, 20, 12, 20, 20]),
            [
                "The number of nuclei jumps in t2 (12; before 20, after 20): missed, split or false ones?"
            ],
        ),
        (
            frames_with([5] * 6, intensity=lambda at: 100 - 15 * at),
            [
                "Nuclei become dimmer: from 100 in the first frames to 25 in the last (medians); there more "
                "of the faint nuclei may be missed."
            ],
        ),
        (frames_with([5] * 6, score=np.nan), []),
        # another embryo is no jump and no trend
        (
            [
                replace(frame, film=film)
                for film, counts in (("a", [26, 33]), ("b", [15, 15]))
                for frame in frames_with(counts, intensity=100 if film == "a" else 20)
            ],
            [],
        ),
        (
            frames_with([10], volumes=[500.0] * 8 + [2000, 50]),
            [
                "1 of 10 nuclei have more than three times the median volume of their frame.",
                "1 of 10 nuclei have less than a fifth of the median volume of their frame.",
            ],
        ),
    ],
)  # fmt: skip
def test_odd_numbers_are_said(frames: list[ShownFrame], expected: list[str]) -> None:
    assert odd_numbers(frames) == expected


@pytest.fixture
def page(made_page: Path) -> Iterator[Page]:
    with opened(made_page) as page:
        yield page


@pytest.fixture
def linked(linked_page: Path) -> Iterator[Page]:
    with opened(linked_page) as page:
        yield page


def drawn(page: Page) -> list[str]:
    """Give frame, number of nuclei and marked nucleus once all drawing is done."""
    page.wait_for_selector("#views[aria-busy=false]")
    return str(page.eval_on_selector("#views", "node => node.dataset.drawn")).split()


def test_the_slider_goes_through_time(page: Page) -> None:
    assert drawn(page) == ["t0", "3", "-"]
    page.locator("#t").fill("1")
    assert drawn(page) == ["t1", "2", "-"]
    assert page.locator("#rows tr").count() == 2
    assert "t1: 2 nuclei" in (page.text_content("#name") or "")
    page.focus("#views")
    page.keyboard.press("ArrowRight")
    assert drawn(page) == ["t2", "3", "-"]
    page.locator("button[data-frame]").first.click()
    assert drawn(page) == ["t0", "3", "-"]


def test_a_click_on_a_nucleus_marks_it_and_its_line(page: Page) -> None:
    box = page.locator("#picture").bounding_box()
    assert box is not None
    z, y, x = (n * e / 0.5 for n, e in zip(SHAPE, SIZE.zyx, strict=True))
    _, down, across = CENTRES[2]
    page.mouse.click(
        box["x"] + box["width"] * (across / 0.5) / (x + 4 + z),
        box["y"] + box["height"] * (down / 0.5) / (y + 4 + z),
    )
    assert drawn(page) == ["t0", "3", "2"]
    assert (page.locator("#rows tr.chosen").text_content() or "").startswith("2")
    assert pixels(page, "picture", "#ffffff") > 100
    page.locator("#rows tr").first.click()
    assert drawn(page) == ["t0", "3", "1"]


def test_outlines_are_coloured_and_switched_off(page: Page) -> None:
    page.select_option("#color", "one")
    drawn(page)
    yellow = "#F0E442"
    assert pixels(page, "picture", yellow) > 100
    page.uncheck("#outlines")
    drawn(page)
    assert pixels(page, "picture", yellow) == 0


def test_it_fits_on_a_laptop_screen(page: Page) -> None:
    page.eval_on_selector("#view", "node => node.scrollIntoView({behavior: 'instant'})")
    box = page.locator("#viewer").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] <= 768
    assert page.evaluate("document.documentElement.scrollWidth") <= 1366


def test_a_mark_stays_on_its_track(linked: Page) -> None:
    drawn(linked)
    linked.locator("#rows tr").nth(1).click()
    assert drawn(linked) == ["t0", "3", "2"]
    linked.locator("#t").fill("1")
    assert drawn(linked) == ["t1", "2", "2"]
    linked.locator("#t").fill("2")
    assert drawn(linked) == ["t2", "3", "-"]


def test_a_click_in_the_lineage_tree_goes_to_the_nucleus(linked: Page) -> None:
    drawn(linked)
    lines = linked.locator("#tree g")
    assert lines.count() == 5
    assert linked.text_content("#tree g:nth-of-type(3) title") == "track 4, of 2"
    box = linked.locator("#tree svg").bounding_box()
    assert box is not None
    # the second lane, at the end: the second daughter
    linked.locator("#tree svg").click(position={"x": box["width"] - 24, "y": 20})
    assert drawn(linked) == ["t2", "3", "3"]
    assert linked.get_attribute("#tree g:nth-of-type(3)", "stroke-width") == "6"
    # the lane of the nucleus that stays, in the middle
    linked.locator("#tree svg").click(position={"x": box["width"] / 2, "y": 30})
    assert drawn(linked) == ["t1", "2", "1"]
