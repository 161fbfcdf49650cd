"""The nuclei of a time-lapse as one table, and the tracks that link them.

A *track* is one nucleus from its first frame (the film's, or its birth) to its last (the film's, its
division, or where it is lost); a frame in which it was missed does not end it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.grid import compact_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.segmentation.masks import measure_nuclei

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Nuclei:
    """One row a nucleus, in the order of frames, then labels.

    The frame (from 0) and the number in that frame's masks are int64 (n,), `position_um` is float64 (n, 3),
    the centroid (z, y, x), the centre of the first voxel being at 0, all else float64 (n,); nan where it is
    not known. The intensity is the mean over the nucleus.
    """

    frame: Integers
    label: Integers
    position_um: Floats
    volume_um3: Floats
    intensity: Floats
    score: Floats

    def __len__(self) -> int:
        return len(self.frame)

    @classmethod
    def unmeasured(cls, frame: Integers, label: Integers) -> Nuclei:
        """Make a table of nuclei of which no more is known."""
        unknown = np.full(len(frame), np.nan)
        return cls(frame, label, np.full((len(frame), 3), np.nan), unknown, unknown, unknown)

    @property
    def n_frames(self) -> int:
        """Number of frames up to the last that holds a nucleus."""
        return int(self.frame[-1]) + 1 if len(self) else 0

    @property
    def diameter_um(self) -> float:
        """Diameter of the sphere of the median volume."""
        return float((6 / np.pi * np.median(self.volume_um3)) ** (1 / 3))

    def rows_by_frame(self) -> list[slice]:
        """Give where the rows of each frame are."""
        bounds = np.searchsorted(self.frame, np.arange(self.n_frames + 1))
        return [slice(int(a), int(b)) for a, b in pairwise(bounds)]

    @classmethod
    def joined(cls, parts: Iterable[Nuclei]) -> Nuclei:
        """Put the tables of frames, in their order, into one."""
        tables = list(parts)
        return cls(*(np.concatenate([getattr(t, field.name) for t in tables]) for field in fields(cls)))


def measure_frame(
    labels: NDArray[np.integer[Any]], voxel_size: VoxelSize, frame: int, image: NDArray[Any] | None = None
) -> Nuclei:
    """Measure the nuclei of one frame's masks (Z, Y, X), whose numbers may have gaps.

    Without an image the intensity is nan, as the score always is.
    """
    compact = compact_labels(labels)
    unknown = np.full(int(compact.max(initial=0)) + 1, np.nan)
    found = measure_nuclei(compact, compact if image is None else image, voxel_size, unknown)
    numbers = np.array([nucleus.label for nucleus in found], np.int64)
    if len(numbers) and numbers[-1] != labels.max():
        # numbers far too high for a table by number
        numbers = np.unique(labels[labels > 0]).astype(np.int64)
    intensity = [nucleus.mean_intensity for nucleus in found]
    return Nuclei(
        frame=np.full(len(numbers), frame, np.int64),
        label=numbers,
        position_um=np.array([(n.z_um, n.y_um, n.x_um) for n in found]).reshape(-1, 3),
        volume_um3=np.array([nucleus.volume_um3 for nucleus in found]),
        intensity=np.array(intensity) if image is not None else np.full(len(found), np.nan),
        score=np.full(len(found), np.nan),
    )


@dataclass(frozen=True)
class Tracks:
    """Nuclei, each with the row of the nucleus from which it came (-1: none); two of one are daughters."""

    nuclei: Nuclei
    predecessor: Integers

    @property
    def edges(self) -> Integers:
        """Rows (from, to) of every link, int64 (m, 2)."""
        to = np.flatnonzero(self.predecessor >= 0)
        return np.stack([self.predecessor[to], to], axis=1)

    @property
    def divisions(self) -> Integers:
        """Rows of the mothers."""
        count = np.bincount(self.predecessor[self.predecessor >= 0], minlength=len(self.nuclei))
        return np.flatnonzero(count > 1).astype(np.int64)

    @property
    def seen_once(self) -> NDArray[np.bool_]:
        """Tell of each nucleus whether it is linked to none, though frames lie before and behind it."""
        alone = self.predecessor < 0
        alone[self.edges[:, 0]] = False
        frame = self.nuclei.frame
        return np.asarray(alone & (frame > 0) & (frame < self.nuclei.n_frames - 1))

    def confirmed(self, sure: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Tell of each nucleus whether its lineage, from the first mother on, holds one that is `sure` (n,).

        So a nucleus that is faint or small in one frame counts by the others: hysteresis over time.
        """
        lineage = np.arange(len(self.nuclei))
        for row in np.flatnonzero(self.predecessor >= 0):
            lineage[row] = lineage[self.predecessor[row]]
        held = np.zeros(len(lineage), bool)
        held[lineage[sure]] = True
        return np.asarray(held[lineage])

    def numbered(self, *, split_gaps: bool = False) -> NumberedTracks:
        """Number the tracks 1..n by their first row.

        With `split_gaps` a track ends where its nucleus is missing, and goes on under a new number whose
        parent it is: the Cell Tracking Challenge wants it so.
        """
        before = self.predecessor
        frame = self.nuclei.frame
        count = np.bincount(before[before >= 0], minlength=len(before) + 1)
        track = np.zeros(len(before), np.int64)
        parent = [0]
        for row, origin in enumerate(before):
            gap = split_gaps and origin >= 0 and frame[row] - frame[origin] > 1
            if origin >= 0 and count[origin] == 1 and not gap:
                track[row] = track[origin]
                continue
            parent.append(int(track[origin]) if origin >= 0 else 0)
            track[row] = len(parent) - 1
        return NumberedTracks(track, np.array(parent, np.int64))


def trace_lineages(frames: Sequence[Sequence[tuple[int, ...]]]) -> Tracks:
    """Make tracks of the lineages of labels 1..n of each frame; the mother's is all but the last number.

    A cell that is not seen for some frames is linked over them, and one whose mother was never seen to the
    youngest ancestor that was.
    """
    last: dict[tuple[int, ...], int] = {}
    predecessor: list[int] = []
    for lineages in frames:
        first = len(predecessor)
        for lineage in lineages:
            known = lineage
            while known and known not in last:
                known = known[:-1]
            predecessor.append(last.get(known, -1))
        last.update({lineage: first + place for place, lineage in enumerate(lineages)})
    counts = [len(lineages) for lineages in frames]
    frame = np.repeat(np.arange(len(frames)), counts)
    label = np.concatenate([np.arange(1, count + 1) for count in counts]) if frames else frame
    return Tracks(Nuclei.unmeasured(frame, label), np.array(predecessor, np.int64))


@dataclass(frozen=True)
class NumberedTracks:
    """Number of each row's track, int64 (n,), and by it that of its parent, int64 (tracks + 1,); 0: none."""

    track: Integers
    parent: Integers
