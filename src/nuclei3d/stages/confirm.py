"""Hysteresis over time: weak nuclei stay where their lineage holds one that counts by itself."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nuclei3d.config.sections import TracksParams
from nuclei3d.console import say
from nuclei3d.images.frames import read_labels, single_label_frame
from nuclei3d.images.tiff import write_labels
from nuclei3d.outputs import whole_file
from nuclei3d.stages.pairing import find_label_entries
from nuclei3d.stages.predicted import PredictedFrame, find_done, forget, note_done, table_path
from nuclei3d.stages.predictor import Sure
from nuclei3d.stages.time_lapse import RECORD_FOLDER
from nuclei3d.stages.track import measure_masks, work_on_frames
from nuclei3d.stages.track_files import renumber
from nuclei3d.tracks.linking import link_nuclei
from nuclei3d.tracks.nuclei import Integers, Nuclei

CANDIDATES_FOLDER = Path(RECORD_FOLDER, "candidates")
"""In it are the masks with weak nuclei too, before tracks decide which stay."""


@dataclass(frozen=True)
class _Confirmed:
    """The labels that stay of one frame's candidates, and how many of them would not count by themselves."""

    labels: Integers
    weak: int

    def digest(self, candidates: str) -> str:
        """Digest what the frame's masks depend on: its candidates, and which of them stay."""
        return hashlib.sha256(f"{candidates} {self.labels.tolist()}".encode()).hexdigest()


def confirm(
    candidates: Sequence[PredictedFrame],
    fingerprints: Sequence[str],
    params: TracksParams,
    sure: Sequence[Sure],
    out: Path,
) -> tuple[list[PredictedFrame], list[str]]:
    """Write into `out` the masks and tables of candidates that their lineages confirm.

    Gives the frames, and a digest of what each was made from.

    Parameters
    ----------
    candidates, fingerprints
        Frames in the order of time, with weak nuclei too, and what says of each whether it changed.
    sure
        What counts as a nucleus by itself in each frame.
    """
    done: list[PredictedFrame] = []
    confirmed = _confirm_nuclei([frame.masks for frame in candidates], params, sure)
    digests = [each.digest(known) for each, known in zip(confirmed, fingerprints, strict=True)]
    for frame, each, digest in zip(candidates, confirmed, digests, strict=True):
        if find_done(out, frame.name, digest) is None:
            forget(out, frame.name)
            masks, table = out / frame.masks.name, table_path(out, frame.name)
            _write_confirmed(frame.masks, frame.table, each, masks, table)
            new = replace(frame, masks=masks, table=table, nuclei=len(each.labels), done_before=False)
            note_done(out, new, digest)
        found = find_done(out, frame.name, digest) or frame
        done.append(replace(found, done_before=frame.done_before, diameter_um=frame.diameter_um))
    total = sum(frame.nuclei for frame in candidates)
    say(
        f"{sum(each.weak for each in confirmed)} nuclei below the model's least score or volume stay, since "
        f"others of their lineage are above; {total - sum(frame.nuclei for frame in done)} do not"
    )
    return done, digests


def _confirm_nuclei(masks: Sequence[Path], params: TracksParams, sure: Sequence[Sure]) -> list[_Confirmed]:
    """Link the candidates of a film's frames; give those whose lineage holds one that counts by itself."""
    entries = [find_label_entries(path)[0] for path in masks]
    size = entries[0].frame.require_voxel_size()
    parts = work_on_frames("link", lambda at: measure_masks(entries[at], None, size, at), len(entries))
    nuclei = Nuclei.joined(parts)
    least = np.array([(each.score, each.volume_um3) for each in sure])[nuclei.frame]
    strong = ~(nuclei.score < least[:, 0]) & ~(nuclei.volume_um3 < least[:, 1])
    keep = link_nuclei(nuclei, params).confirmed(strong)
    chosen = [keep & (nuclei.frame == at) for at in range(len(entries))]
    return [_Confirmed(nuclei.label[own], int(np.count_nonzero(own & ~strong))) for own in chosen]


def _write_confirmed(
    masks: Path, table: Path, confirmed: _Confirmed, new_masks: Path, new_table: Path
) -> None:
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
