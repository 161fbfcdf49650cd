"""The page of a prediction: one HTML file with every frame as a picture, its nuclei, and how they change.

Frames are read, drawn and written one by one: as much memory is taken for one as for a thousand.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d import __version__
from nuclei3d.console import some_of
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.report.animation import Animation
from nuclei3d.report.charts import OUTLINES, draw_chart, draw_series, style_of
from nuclei3d.report.page import json_in_page, page_environment, page_part
from nuclei3d.report.projections import Box, PictureGrid, Polygon, coarse_labels, project_image, silhouettes
from nuclei3d.segmentation.masks import NUCLEUS_COLUMNS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

#: Of a page, at most; the pictures of very long time-lapses are the smaller for it.
_MEGABYTES = 40.0
_MOST_PIXELS = 500_000
_JPEG_QUALITIES = (82, 70, 55, 40, 25, 10)
# Of the share of a frame, for the picture before base64; the rest is for outlines and nuclei.
_PICTURE_SHARE = 0.5
_MOST_HINTS = 200
# What counts as odd: shares of the number beside a frame, and of all nuclei.
_JUMP = 0.25
_ODD_SIZES = 0.02
_FEWEST_FOR_TREND = 5

_CHARTS = {"volume_um3": "volume (µm³)", "mean_intensity": "mean intensity", "score": "score"}


@dataclass(frozen=True)
class ShownFrame:
    """A frame of a prediction, and how to read its image and labels block by block.

    The table `nuclei` has the columns `NUCLEUS_COLUMNS` and, where nuclei are linked over time, ``track``.
    Frames of one `film` follow each other in time.
    """

    name: str
    shape: tuple[int, int, int]
    voxel_size: VoxelSize
    nuclei: pd.DataFrame
    read_image: Callable[[], Iterable[tuple[Box, NDArray[Any]]]]
    read_labels: Callable[[], Iterable[tuple[Box, NDArray[np.uint32]]]]
    film: str = ""


def write_prediction_page(
    path: Path,
    frames: Sequence[ShownFrame],
    *,
    parents: Mapping[int, int] | None = None,
    made_from: str = "",
    warnings: Sequence[str] = (),
    advance: Callable[[], None] = lambda: None,
    animation: Animation | None = None,
) -> None:
    """Write the page of a prediction.

    `frames` are in the order of time; `parents` has the parent of each track (0: none) where nuclei are
    linked; `made_from` digests what the page shows, and `made_from_of` reads it; to the `warnings` is added
    what is odd in the numbers. `advance` is called after each frame, and the `animation` gets the frames too.
    """
    tracks = [] if parents is None else lay_out_lineages(frames, parents)
    tree = {
        "names": [frame.name for frame in frames],
        "fields": [*NUCLEUS_COLUMNS, "track"],
        "color": OUTLINES["pred"],
        "tracks": [asdict(track) for track in tracks] or None,
    }
    counts = [len(frame.nuclei) for frame in frames]
    page = page_environment().get_template("prediction.html")
    page.stream(
        version=__version__,
        made_from=made_from,
        warnings=[*warnings, *odd_numbers(frames)],
        tracks=tracks,
        divisions=len({track.parent for track in tracks if track.parent}),
        frames=frames,
        total=sum(counts),
        counts=counts,
        medians=[frame.nuclei[list(_CHARTS)].median() for frame in frames],
        charts=prediction_charts(frames),
        css=page_part("report.css"),
        js=page_part("prediction.js"),
        data=json_in_page(tree),
        packed=_pack_frames(frames, advance, animation),
    ).dump(str(path), encoding="utf-8")


def made_from_of(path: Path) -> str | None:
    """Read of what a page was made; None where there is none."""
    try:
        with path.open(encoding="utf-8") as file:
            head = file.read(1000)
    except (OSError, UnicodeDecodeError):
        return None
    _, found, rest = head.partition('<meta name="made-from" content="')
    return rest.partition('"')[0] if found else None


@dataclass(frozen=True)
class ShownTrack:
    """A track from its first to its last frame (from 0), and its lane in the tree; `parent` may be 0."""

    track: int
    parent: int
    first: int
    last: int
    lane: float


def lay_out_lineages(frames: Sequence[ShownFrame], parents: Mapping[int, int]) -> list[ShownTrack]:
    """Give each track a lane in the tree: one for each that has no daughters, and mothers amid theirs.

    Lineages of many nuclei come first.
    """
    spans: dict[int, list[int]] = {}
    for at, frame in enumerate(frames):
        for track in frame.nuclei["track"].dropna().astype(int):
            spans.setdefault(track, []).append(at)
    daughters: dict[int, list[int]] = {}
    for track in sorted(spans):
        parent = parents.get(track, 0)
        daughters.setdefault(parent if parent in spans else 0, []).append(track)

    def descend(track: int) -> list[int]:
        """List a track and its descendants, mothers first."""
        found, left = [], [track]
        while left:
            found.append(left.pop())
            left += reversed(daughters.get(found[-1], []))
        return found

    lineages = [descend(founder) for founder in daughters.get(0, [])]
    lineages.sort(key=lambda lineage: -sum(len(spans[track]) for track in lineage))
    lanes: dict[int, float] = {}
    leaves = itertools.count()
    for lineage in lineages:
        lanes |= {track: float(next(leaves)) for track in lineage if track not in daughters}
        for track in reversed(lineage):
            if track in daughters:
                lanes[track] = float(np.mean([lanes[daughter] for daughter in daughters[track]]))
    return [
        ShownTrack(track, parents.get(track, 0), spans[track][0], spans[track][-1], lanes[track])
        for lineage in lineages
        for track in lineage
    ]


def _pack_frames(
    frames: Sequence[ShownFrame], advance: Callable[[], None], animation: Animation | None
) -> Iterator[str]:
    most_bytes = _MEGABYTES * 1e6 / len(frames)
    for frame in frames:
        grid = PictureGrid.fitting(frame.shape, frame.voxel_size, min(_MOST_PIXELS, 3 * most_bytes))
        picture = project_image(grid, frame.read_image())
        coarse = coarse_labels(grid, frame.read_labels())
        outlines = silhouettes(grid, coarse, frame.nuclei["label"].tolist())
        if animation is not None:
            animation.add(picture, outlines, frame.nuclei.get("track", frame.nuclei["label"]).tolist())
        yield pack_frame(grid, picture, outlines, frame.nuclei, most_bytes)
        advance()


def pack_frame(
    grid: PictureGrid,
    picture: NDArray[np.uint8],
    outlines: Sequence[Sequence[Polygon]],
    nuclei: pd.DataFrame,
    most_bytes: float,
) -> str:
    """Pack a frame into about so many bytes, as the script of the page unpacks it.

    Gives two parts in base64 with a point between: the picture as JPEG, and deflated JSON with ``size`` (z,
    y, x, in pixels), ``px_um``, ``nuclei`` (rows) and, row by row, ``outlines``: x, y, x, y ... in half
    pixels of the picture for xy, yz and xz.
    """
    content = {
        "size": grid.size,
        "px_um": grid.px_um,
        "nuclei": _rows(nuclei),
        "outlines": [
            [np.round(2 * polygon).astype(int).ravel().tolist() for polygon in views] for views in outlines
        ],
    }
    deflated = zlib.compress(json.dumps(content, separators=(",", ":"), allow_nan=False).encode(), 9)
    parts = (_jpeg_of(picture, _PICTURE_SHARE * most_bytes), deflated)
    return ".".join(base64.b64encode(part).decode("ascii") for part in parts)


def _rows(nuclei: pd.DataFrame) -> list[list[float | int | None]]:
    """Give the nuclei as rows of the page's fields; None where a value is unknown."""
    table = nuclei.reindex(columns=[*NUCLEUS_COLUMNS, "track"])
    return [
        [None if math.isnan(value) else float(f"{value:.5g}") for value in row]
        for row in table.astype(float).itertuples(index=False)
    ]


def _jpeg_of(picture: NDArray[np.uint8], most_bytes: float) -> bytes:
    from imagecodecs import jpeg_encode

    for quality in _JPEG_QUALITIES:
        packed = bytes(jpeg_encode(picture, level=quality))
        if len(packed) <= most_bytes:
            break
    return packed


def odd_numbers(frames: Sequence[ShownFrame]) -> list[str]:
    """Say what is odd in the numbers of nuclei, in their brightness, scores and sizes, a line each."""
    lines = []
    if empty := [frame.name for frame in frames if not len(frame.nuclei)]:
        lines.append(f"No nucleus in {some_of(empty, 5)}.")
    films: dict[str, list[ShownFrame]] = {}
    for frame in frames:
        films.setdefault(frame.film, []).append(frame)
    if jumps := [jump for film in films.values() for jump in _find_jumps(film)]:
        lines.append(f"The number of nuclei jumps in {some_of(jumps, 5)}: missed, split or false ones?")
    for name, film in films.items():
        lines += [f"{name}: {line}" if len(films) > 1 else line for line in _find_trends(film)]
    counts = np.array([len(frame.nuclei) for frame in frames])
    tables = [frame.nuclei for frame in frames if len(frame.nuclei)]
    ratios = np.array([])
    for table in tables:
        ratios = np.append(ratios, table["volume_um3"] / table["volume_um3"].median())
    for number, words in (
        (int((ratios > 3).sum()), "more than three times"),
        (int((ratios < 0.2).sum()), "less than a fifth of"),
    ):
        if number > _ODD_SIZES * counts.sum():
            lines.append(f"{number} of {counts.sum()} nuclei have {words} the median volume of their frame.")
    return lines


def _find_jumps(film: Sequence[ShownFrame]) -> list[str]:
    counts = np.array([len(frame.nuclei) for frame in film])
    jumps = []
    for at in range(1, len(film) - 1):
        beside = np.median(counts[max(at - 2, 0) : at]), np.median(counts[at + 1 : at + 3])
        least = max(3, _JUMP * np.mean(beside))
        if counts[at] and not min(beside) - least <= counts[at] <= max(beside) + least:
            jumps.append(f"{film[at].name} ({counts[at]}; before {beside[0]:g}, after {beside[1]:g})")
    return jumps


def _find_trends(film: Sequence[ShownFrame]) -> list[str]:
    lines = []
    for name, words, most in (("mean_intensity", "Nuclei become dimmer", 0.6), ("score", "Scores fall", 0.8)):
        medians = [median for frame in film if not math.isnan(median := frame.nuclei[name].median())]
        if len(medians) >= _FEWEST_FOR_TREND:
            part = len(medians) // _FEWEST_FOR_TREND
            early, late = np.median(medians[:part]), np.median(medians[-part:])
            if late < most * early:
                lines.append(
                    f"{words}: from {early:.3g} in the first frames to {late:.3g} in the last (medians); "
                    "there more of the faint nuclei may be missed."
                )
    return lines


def prediction_charts(frames: Sequence[ShownFrame]) -> list[tuple[str, str]]:
    """Draw numbers, volumes, intensities and scores over time, of a single frame as histograms.

    Gives (caption, SVG) of each; what is unknown of every nucleus is left out.
    """
    charts = []
    if len(frames) > 1:
        counts = [len(frame.nuclei) for frame in frames]
        draw = partial(_draw_over_time, frames=frames, values=counts, label="nuclei")
        charts.append(("Number of nuclei", draw_chart(draw)))
    for name, label in _CHARTS.items():
        if all(frame.nuclei[name].isna().all() for frame in frames):
            continue
        caption = label.partition(" (")[0].capitalize()
        if len(frames) > 1:
            draw = partial(_draw_spread, frames=frames, name=name, label=label)
            charts.append(
                (f"{caption} (line: median; bands: half and nine tenths of the nuclei)", draw_chart(draw))
            )
        else:
            draw = partial(_draw_histogram, values=frames[0].nuclei[name].dropna().to_numpy(), label=label)
            charts.append((caption, draw_chart(draw)))
    return charts


def _draw_over_time(
    axes: Axes, frames: Sequence[ShownFrame], values: Sequence[float | None], label: str
) -> None:
    known = zip(frames, values, strict=True)
    hints = [f"{frame.name}: " + ("unknown" if value is None else f"{value:.4g}") for frame, value in known]
    if len(frames) > _MOST_HINTS:
        hints = []
    style = style_of(0) | ({"marker": ""} if len(frames) >= 60 else {})
    draw_series(axes, label, range(1, len(frames) + 1), values, hints, **style)
    axes.set(xlabel="frame", ylabel=label, ylim=(0, max(axes.get_ylim()[1], 1e-9)))
    axes.locator_params("x", integer=True)


def _draw_spread(axes: Axes, frames: Sequence[ShownFrame], name: str, label: str) -> None:
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    spread = np.array([frame.nuclei[name].quantile(shares) for frame in frames], float)
    at = range(1, len(frames) + 1)
    for low, high, alpha in ((0, 4, 0.12), (1, 3, 0.22)):
        axes.fill_between(
            at, spread[:, low], spread[:, high], color=style_of(0)["color"], alpha=alpha, linewidth=0
        )
    _draw_over_time(axes, frames, [None if np.isnan(value) else value for value in spread[:, 2]], label)


def _draw_histogram(axes: Axes, values: NDArray[np.float64], label: str) -> None:
    axes.hist(values, bins=min(30, max(5, len(values) // 4)), color=style_of(0)["color"])
    axes.set(xlabel=label, ylabel="nuclei")
    axes.locator_params("y", integer=True)
