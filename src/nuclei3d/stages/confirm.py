"""Hysteresis over time: weak nuclei stay where their lineage holds one that counts by itself."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from nuclei3d.config.sections import TracksParams
from nuclei3d.console import say
from nuclei3d.images.frames import natural_key, read_labels, single_label_frame
from nuclei3d.images.tiff import write_labels
from nuclei3d.outputs import write_table
from nuclei3d.segmentation.likeness import with_nuclei
from nuclei3d.stages.nuclei_table import table_path
from nuclei3d.stages.pairing import Entry, find_label_entries
from nuclei3d.stages.predicted import (
    RECORD_FOLDER,
    PredictedFrame,
    find_done,
    forget,
    note_done,
    place_of,
)
from nuclei3d.stages.predictor import Predictor, Sure
from nuclei3d.stages.track import measure_masks, work_on_frames
from nuclei3d.stages.track_files import renumber
from nuclei3d.tracks.linking import link_nuclei
from nuclei3d.tracks.nuclei import Floats, Integers, Nuclei

CANDIDATES_FOLDER = Path(RECORD_FOLDER, "candidates")
"""In it are the masks with weak nuclei too, before tracks decide which stay."""


@dataclass(frozen=True)
class _Confirmed:
    """What stays of one frame's candidates, and how many of these would not count by themselves."""

    labels: Integers
    volumes_um3: Floats
    weak: int

    def digest(self, candidates: str, thresholds: Mapping[str, float | None]) -> str:
        """Digest what the frame's masks depend on: its candidates, and which of them stay, and why."""
        content = f"{candidates} {self.labels.tolist()} {sorted(thresholds.items())}"
        return hashlib.sha256(content.encode()).hexdigest()


def confirm(
    candidates: Sequence[PredictedFrame],
    predictors: Sequence[Predictor],
    sure: Sequence[Sure],
    params: TracksParams,
    out: Path,
) -> list[PredictedFrame]:
    """Write into `out` the masks and tables of candidates that their lineages confirm.

    Parameters
    ----------
    candidates
        Frames with weak nuclei too; those of each embryo, told by their names, are linked in the natural
        order of these.
    predictors, sure
        What predicts each frame without weak nuclei, and what counts by itself there.
    """
    entries = find_label_entries(*(frame.masks for frame in candidates))
    in_time = sorted(range(len(entries)), key=lambda at: natural_key(candidates[at].masks.name))
    confirmed: dict[int, _Confirmed] = {}
    for embryo in dict.fromkeys(entry.embryo for entry in entries):
        film = [at for at in in_time if entries[at].embryo == embryo]
        found = _confirm_film([entries[at] for at in film], params, [sure[at] for at in film])
        confirmed |= zip(film, found, strict=True)
    done: list[PredictedFrame] = []
    for at, frame in enumerate(candidates):
        thresholds = predictors[at].thresholds
        digest = confirmed[at].digest(frame.fingerprint, thresholds)
        new = find_done(out, frame.name, digest)
        if new is None:
            forget(out, frame.name)
            masks, table = out / frame.masks.name, table_path(out, frame.name)
            _write_confirmed(frame.masks, frame.table, confirmed[at], masks, table)
            made_by = {**frame.made_by, "thresholds": thresholds}
            new = replace(frame, masks=masks, table=table, fingerprint=digest, made_by=made_by)
            placed = {path: place_of(path) for path in (masks, table)}
            new = replace(new, nuclei=len(confirmed[at].labels), placed=placed)
            expected = sure[at].diameter_um
            if expected is not None:
                unlike = with_nuclei(frame.warnings, confirmed[at].volumes_um3, expected)
                new = replace(new, warnings=unlike)
            note_done(out, new)
        done.append(replace(new, done_before=frame.done_before, diameter_um=frame.diameter_um))
    weak = sum(each.weak for each in confirmed.values())
    left_out = sum(frame.nuclei for frame in candidates) - sum(frame.nuclei for frame in done)
    say(
        f"{weak} nuclei below the model's least score or volume stay, since others of their lineage are "
        f"above; {left_out} do not"
    )
    return done


def _confirm_film(entries: Sequence[Entry], params: TracksParams, sure: Sequence[Sure]) -> list[_Confirmed]:
    """Link the candidates of an embryo's frames; give those whose lineage holds one that counts by itself."""
    sizes = [entry.frame.require_voxel_size() for entry in entries]
    parts = work_on_frames("link", lambda at: measure_masks(entries[at], None, sizes[at], at), len(entries))
    nuclei = Nuclei.joined(parts)
    least = np.array([(each.score, each.volume_um3) for each in sure])[nuclei.frame]
    strong = ~(nuclei.score < least[:, 0]) & ~(nuclei.volume_um3 < least[:, 1])
    keep = link_nuclei(nuclei, params).confirmed(strong)
    chosen = [keep & (nuclei.frame == at) for at in range(len(entries))]
    return [
        _Confirmed(nuclei.label[own], nuclei.volume_um3[own], int(np.count_nonzero(own & ~strong)))
        for own in chosen
    ]


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
    write_table(new_table, header, ([new[int(row[0])], *row[1:]] for row in rows if int(row[0]) in new))
