"""Scores of tracks in folders, where the truth has tracks: a part of `nuclei3d.stages.evaluate`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nuclei3d.console import progress_bar, say, warn
from nuclei3d.errors import InputError
from nuclei3d.stages.track_files import RESULT, TRUTH, read_track_masks, read_tracks, track_masks
from nuclei3d.tracks.accuracy import FrameMatch, match_frame, score_tracks

_COUNTS = ("n_divisions", "n_divisions_pred", "n_true", "n_pred")


def score_track_folders(truth: Path, found: Path, *, required: bool) -> dict[str, Any] | None:
    """Score the tracks below a folder against the true ones, in the form of the Cell Tracking Challenge.

    The truth's lie below `truth`, or beside it where it is a folder called labels. Embryos pair by the names
    of their folders, a lone one with a lone one. Scores are means over embryos, counts are sums, and
    ``embryos`` has each embryo's own. None where either side has no tracks; with `required` that is an error.
    """
    home = truth.parent if truth.name == "labels" else truth
    true, pred = _tables(home, TRUTH), _tables(found, RESULT)
    if not true or not pred:
        if required:
            where, table = (found, RESULT) if not pred else (home, TRUTH)
            raise InputError(f"{where} holds no {table}, so tracks cannot be scored")
        return None
    names = [(name, name) for name in true if name in pred]
    if len(true) == len(pred) == 1:
        names = [(next(iter(true)), next(iter(pred)))]
    if not names:
        raise InputError(
            f"no tracks of {found} have the name of an embryo with true tracks: found {', '.join(pred)} and "
            f"{', '.join(true)}"
        )
    try:
        embryos = {name: _score(true[name], pred[other]) for name, other in names}
    except InputError as error:
        # tracks of a part of a film, as of held-out frames, do not hinder other scores
        if required:
            raise
        warn(f"tracks are not scored: {error}")
        return None
    whole: dict[str, Any] = {}
    for key in next(iter(embryos.values())):
        values = [scores[key] for scores in embryos.values() if scores[key] is not None]
        whole[key] = sum(values) if key in _COUNTS else sum(values) / len(values) if values else None
    words = {"TRA": "tra", "DET": "det", "LNK": "lnk", "division F1": "division_f1"}
    shown = ", ".join(f"{word} {whole[key]:.3f}" for word, key in words.items() if whole[key] is not None)
    say(f"tracks of {len(embryos)} embryo{'s' if len(embryos) > 1 else ''}: {shown}")
    return {**whole, "embryos": embryos}


def _tables(folder: Path, name: str) -> dict[str, Path]:
    """Find the tables of tracks by their embryos' names."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob(name)):
        home = path.parent.resolve()
        embryo = home.parent.name if home.name == "tracks" else home.name
        if embryo in found:
            raise InputError(f"{found[embryo]} and {path} are both tracks of {embryo}; give one of them")
        found[embryo] = path
    return found


def _score(truth: Path, found: Path) -> dict[str, Any]:
    true, pred = read_tracks(truth), read_tracks(found)
    paths = track_masks(truth), track_masks(found)
    if len(paths[0]) != len(paths[1]):
        raise InputError(
            f"{truth.parent} has {len(paths[0])} frames and {found.parent} {len(paths[1])}; both must be of "
            "the same time-lapse"
        )

    def matches() -> Iterator[FrameMatch]:
        volumes = read_track_masks(paths[0], true), read_track_masks(paths[1], pred)
        with progress_bar("compare tracks", total=len(paths[0])) as bar:
            for one, other in zip(*volumes, strict=True):
                yield match_frame(one, other)
                bar.advance()

    scores = asdict(score_tracks(true, pred, matches()))
    return {name: None if math.isnan(value) else value for name, value in scores.items()}
