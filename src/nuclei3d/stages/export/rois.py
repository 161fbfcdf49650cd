"""Masks as regions of interest of ImageJ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.core.outlines import trace_outlines


def write_rois(path: Path, labels: NDArray[np.integer[Any]]) -> Path:
    """Write labels (Z, Y, X) as a zip for ImageJ's ROI manager: one polygon per nucleus, plane and piece.

    A region is called ``<label>-<plane>``, planes counted from 1 as ImageJ does, and lies in its plane of the
    stack. Holes are filled: a polygon has none.
    """
    from roifile import ImagejRoi, roiwrite

    rois = []
    for z, plane in enumerate(labels):
        pieces: dict[int, int] = {}
        for label, polygon in trace_outlines(plane):
            pieces[label] = pieces.get(label, 0) + 1
            piece = f"-{pieces[label]}" if pieces[label] > 1 else ""
            name = f"{label:04d}-{z + 1:04d}{piece}"
            # counted from 0 here, from 1 in the file
            rois.append(ImagejRoi.frompoints(polygon, name=name, position=z))
    roiwrite(path, rois)
    return path
