"""Hysteresis over time: weak nuclei stay where their lineage holds one that counts by itself."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nuclei3d.config.sections import TracksParams
from nuclei3d.images.frames import read_labels, single_label_frame
from nuclei3d.images.tiff import write_labels
from nuclei3d.outputs import whole_file
from nuclei3d.stages.pairing import find_label_entries
from nuclei3d.stages.track import measure_masks, work_on_frames
from nuclei3d.stages.track_files import renumber
from nuclei3d.tracks.linking import link_nuclei
from nuclei3d.tracks.nuclei import Integers, Nuclei


@dataclass(frozen=True)
class Sure:
    """Least score and volume (um3) of a nucleus that counts by itself."""

    score: float
    volume_um3: float


@dataclass(frozen=True)
class Confirmed:
    """The labels that stay of one frame's candidates, and how many of them would not count by themselves."""

    labels: Integers
    weak: int

    def digest(self, candidates: str) -> str:
        """Digest what the frame's masks depend on: its candidates, and which of them stay."""
        return hashlib.sha256(f"{candidates} {self.labels.tolist()}".encode()).hexdigest()


def confirm_nuclei(masks: Sequence[Path], params: TracksParams, sure: Sequence[Sure]) -> list[Confirmed]:
    """Link the candidates of a film's frames; give those whose lineage holds one that counts by itself.

    Parameters
    ----------
    masks
        Files of masks as `nuclei3d.stages.predict.predict` writes them, in the order of time, with their
        tables beside them.
    sure
        What counts by itself in each frame.
    """
    entries = [find_label_entries(path)[0] for path in masks]
    size = entries[0].frame.require_voxel_size()
    parts = work_on_frames("link", lambda at: measure_masks(entries[at], None, size, at), len(entries))
    nuclei = Nuclei.joined(parts)
    least = np.array([(each.score, each.volume_um3) for each in sure])[nuclei.frame]
    strong = ~(nuclei.score < least[:, 0]) & ~(nuclei.volume_um3 < least[:, 1])
    keep = link_nuclei(nuclei, params).confirmed(strong)
    chosen = [keep & (nuclei.frame == at) for at in range(len(entries))]
    return [Confirmed(nuclei.label[own], int(np.count_nonzero(own & ~strong))) for own in chosen]


def write_confirmed(masks: Path, table: Path, confirmed: Confirmed, new_masks: Path, new_table: Path) -> None:
    """Write masks and table anew with the labels that stay, numbered 1..n; each whole or not at all."""
    numbers = np.arange(1, len(confirmed.labels) + 1)
    labels = renumber(read_labels(masks), confirmed.labels, numbers)
    write_labels(new_masks, labels, single_label_frame(masks).require_voxel_size())
    new = dict(zip(confirmed.labels.tolist(), numbers.tolist(), strict=True))
    with table.open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file))
    with whole_file(new_table) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([new[int(row[0])], *row[1:]] for row in rows if int(row[0]) in new)
