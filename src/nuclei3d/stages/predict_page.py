"""The page beside a prediction: its frames read again, a part at a time, and put into one HTML file."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d import __version__
from nuclei3d.console import progress_bar, warn
from nuclei3d.errors import InputError
from nuclei3d.images.frames import Frame, frame_stem, natural_key, single_label_frame, to_labels
from nuclei3d.images.names import split_names
from nuclei3d.images.ome_zarr import is_zarr
from nuclei3d.outputs import whole_file
from nuclei3d.report.animation import Animation
from nuclei3d.report.prediction import (
    ShownFrame,
    made_from_of,
    odd_numbers,
    write_prediction_page,
)
from nuclei3d.report.projections import Box
from nuclei3d.segmentation.masks import NUCLEUS_COLUMNS
from nuclei3d.stages.predicted import TRACKS_FILE, PredictedFrame

PAGE_FILE = "prediction.html"
ANIMATION_FILE = "prediction.png"
_PLACE = ["z_um", "y_um", "x_um"]
# Voxels that are read at a time, and the sides of such a part where the file is cut into chunks.
_PART_VOXELS = 32_000_000
_PART_SIDES = (64, 512, 1024)


def write_page(
    out: Path,
    frames: Sequence[Frame],
    predicted: Sequence[PredictedFrame],
    warnings: Sequence[str] = (),
    *,
    animated: bool = False,
) -> Path:
    """Write `PAGE_FILE` of predicted frames into `out`, or leave the one there that shows just these.

    `frames` and `predicted` are in the order of time; the page says the `warnings`. Beside it is the table of
    tracks (`TRACKS_FILE`), if nuclei are to be shown by track. If `animated`, `ANIMATION_FILE` is written
    too.
    """
    page = out / PAGE_FILE
    tracks = out / TRACKS_FILE
    made_from = _digest(predicted, tracks, [*warnings, f"animated: {animated}"])
    if made_from_of(page) == made_from:
        return page
    films = name_films(frames)
    shown = [_show(*each) for each in zip(frames, predicted, films, strict=True)]
    parents = None
    if tracks.is_file():
        shown, parents = _add_tracks(shown, predicted, tracks)
    for line in odd_numbers(shown):
        warn(line)
    animation = Animation() if animated else None
    with whole_file(page) as partial_page, progress_bar("page", total=len(shown)) as bar:
        write_prediction_page(
            partial_page,
            shown,
            parents=parents,
            made_from=made_from,
            warnings=warnings,
            advance=bar.advance,
            animation=animation,
        )
        if animation is not None:
            with whole_file(out / ANIMATION_FILE) as partial_png:
                animation.save(partial_png)
    return page


def _digest(predicted: Sequence[PredictedFrame], tracks: Path, more: Sequence[str]) -> str:
    """Digest of what a page shows; files are told apart by size and time of change."""
    content = [__version__, *more, *(frame.name for frame in predicted)]
    for path in (tracks, *(path for frame in predicted for path in (frame.masks, frame.table))):
        if path.exists():
            state = path.stat()
            content.append(f"{path.name} {state.st_size} {state.st_mtime_ns}")
    return hashlib.sha256("\n".join(content).encode()).hexdigest()


def name_films(frames: Sequence[Frame]) -> list[str]:
    """Name the film that each frame is of: its file, or what files of a folder have in common."""
    stems: defaultdict[Path, list[str]] = defaultdict(list)
    for frame in frames:
        stems[frame.path.parent].append(frame_stem(frame.path))
    embryo_of = {
        (folder, stem): embryo
        for folder, names in stems.items()
        for stem, (embryo, _) in zip(names, split_names(names), strict=True)
    }
    return [
        frame.path.name
        if frame.time is not None
        else str(Path(frame.path.parent.name, embryo_of[frame.path.parent, frame_stem(frame.path)]))
        for frame in frames
    ]


def _show(frame: Frame, predicted: PredictedFrame, film: str) -> ShownFrame:
    import pandas as pd

    # types are given: a frame without nuclei has a header alone
    types = dict.fromkeys(NUCLEUS_COLUMNS, float) | {"label": int}
    nuclei = pd.read_csv(predicted.table, usecols=list(NUCLEUS_COLUMNS), dtype=types)[list(NUCLEUS_COLUMNS)]
    return ShownFrame(
        name=frame.name,
        shape=frame.shape,
        voxel_size=frame.require_voxel_size(),
        nuclei=nuclei,
        read_image=partial(_read_parts, frame),
        read_labels=partial(_read_label_parts, predicted.masks),
        film=film,
    )


def _add_tracks(
    shown: Sequence[ShownFrame], predicted: Sequence[PredictedFrame], table: Path
) -> tuple[list[ShownFrame], dict[int, int] | None]:
    """Add the tracks of a table to the frames; give the parents, None if the table is of other masks."""
    import pandas as pd

    try:
        numbers = ["track", "parent", "frame", "label"]
        tracks = pd.read_csv(
            table,
            usecols=[*numbers, *_PLACE],
            dtype=dict.fromkeys(_PLACE, float) | dict.fromkeys(numbers, int),
        )
    except ValueError:
        raise InputError(
            f"{table} is no table of tracks; remove it, or have nuclei3d track write it again"
        ) from None
    # tracks count frames in the natural order of the masks' names
    order = sorted(range(len(shown)), key=lambda at: natural_key(predicted[at].masks.name))
    linked = list(shown)
    for number, at in enumerate(order):
        own = tracks[tracks["frame"] == number].sort_values("label")
        nuclei = shown[at].nuclei.sort_values("label")
        same = own["label"].tolist() == nuclei["label"].tolist()
        if not (same and np.allclose(own[_PLACE], nuclei[_PLACE], rtol=1e-4, atol=0.01)):
            warn(f"{table} is not of these masks ({shown[at].name}); the page leaves tracks out")
            return list(shown), None
        linked[at] = replace(shown[at], nuclei=shown[at].nuclei.merge(own[["label", "track"]], on="label"))
    return linked, dict(zip(tracks["track"].tolist(), tracks["parent"].tolist(), strict=True))


def _read_label_parts(masks: Path) -> Iterator[tuple[Box, NDArray[np.uint32]]]:
    for box, labels in _read_parts(single_label_frame(masks)):
        yield box, to_labels(labels, str(masks))


def _read_parts(frame: Frame) -> Iterator[tuple[Box, NDArray[Any]]]:
    """Read a frame in parts that fit the memory: whole planes of a file, boxes of chunks."""
    depth, height, width = frame.shape
    if depth * height * width <= _PART_VOXELS:
        sides = frame.shape
    elif is_zarr(frame.path):
        sides = _PART_SIDES
    else:
        sides = (max(1, _PART_VOXELS // (height * width)), height, width)
    for z in range(0, depth, sides[0]):
        for y in range(0, height, sides[1]):
            for x in range(0, width, sides[2]):
                ends = np.minimum((z + sides[0], y + sides[1], x + sides[2]), frame.shape).tolist()
                box = (slice(z, ends[0]), slice(y, ends[1]), slice(x, ends[2]))
                yield box, frame.read_block(box)
