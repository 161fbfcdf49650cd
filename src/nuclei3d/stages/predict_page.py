"""The page beside a prediction: its frames read again, a part at a time, and put into one HTML file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d import __version__
from nuclei3d.console import progress_bar, say
from nuclei3d.images.frames import Frame, single_label_frame, to_labels
from nuclei3d.images.ome_zarr import is_zarr
from nuclei3d.outputs import whole_file
from nuclei3d.report.prediction import (
    QUANTITIES,
    ShownFrame,
    made_from_of,
    odd_numbers,
    write_prediction_page,
)
from nuclei3d.report.projections import Box

if TYPE_CHECKING:
    from nuclei3d.stages.predict import PredictedFrame

PAGE_FILE = "prediction.html"
# Voxels that are read at a time, and the sides of such a part where the file is cut into chunks.
_PART_VOXELS = 32_000_000
_PART_SIDES = (64, 512, 1024)


def write_page(
    out: Path, frames: Sequence[Frame], predicted: Sequence[PredictedFrame], warnings: Sequence[str] = ()
) -> Path:
    """Write `PAGE_FILE` of predicted frames into `out`, or leave the one there that shows just these.

    Parameters
    ----------
    frames, predicted
        The images, and masks and tables of each, in the order of time.
    warnings
        Of the prediction; the page says them.
    """
    page = out / PAGE_FILE
    made_from = _digest(predicted, warnings)
    if made_from_of(page) == made_from:
        return page
    shown = [_show(frame, result) for frame, result in zip(frames, predicted, strict=True)]
    for line in odd_numbers(shown):
        say(f"warning: {line}")
    with whole_file(page) as partial_page, progress_bar("page", total=len(shown)) as bar:
        write_prediction_page(
            partial_page, shown, made_from=made_from, warnings=warnings, advance=bar.advance
        )
    return page


def _digest(predicted: Sequence[PredictedFrame], warnings: Sequence[str]) -> str:
    """Digest of what a page shows; files are told apart by size and time of change."""
    content = [__version__, *warnings]
    for frame in predicted:
        states = (path.stat() for path in (frame.masks, frame.table))
        content += [frame.name, *(f"{state.st_size} {state.st_mtime_ns}" for state in states)]
    return hashlib.sha256("\n".join(content).encode()).hexdigest()


def _show(frame: Frame, predicted: PredictedFrame) -> ShownFrame:
    import pandas as pd

    nuclei = pd.read_csv(predicted.table, usecols=list(QUANTITIES))[list(QUANTITIES)]
    return ShownFrame(
        name=frame.name,
        shape=frame.shape,
        voxel_size=frame.require_voxel_size(),
        nuclei=nuclei,
        read_image=partial(_read_parts, frame),
        read_labels=partial(_read_label_parts, predicted.masks),
    )


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
                starts = (z, y, x)
                box = tuple(
                    slice(start, min(start + side, n))
                    for start, side, n in zip(starts, sides, frame.shape, strict=True)
                )
                yield box, frame.read_block(box)
