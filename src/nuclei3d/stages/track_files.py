"""Tracks in files: the Cell Tracking Challenge's form and its scores, GEFF, tables for people and napari."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d import __version__
from nuclei3d.console import progress_bar, say, some_of, warn
from nuclei3d.digests import digest_of
from nuclei3d.errors import InputError
from nuclei3d.images.frames import list_volumes, read_labels
from nuclei3d.outputs import write_json, write_table
from nuclei3d.tracks.accuracy import FrameMatch, match_frame, score_tracks
from nuclei3d.tracks.nuclei import Integers, Nuclei, NumberedTracks, Tracks

#: The table of tracks in the Challenge's form: of results, and of the truth.
RESULT, TRUTH = "res_track.txt", "man_track.txt"
COLUMNS = (
    "track", "parent", "frame", "label", "z_um", "y_um", "x_um", "volume_um3", "mean_intensity", "score",
    "seen_once",
)  # fmt: skip
_COUNTS = ("n_divisions", "n_divisions_pred", "n_true", "n_pred")
MASKS_FILE = "masks.json"
_MASKS = {RESULT: "mask", TRUTH: "man_track"}


def mask_name(table: str, frame: int, frames: int) -> str:
    """Name the masks of a frame that belong to `RESULT` or `TRUTH`, of so many frames."""
    return f"{_MASKS[table]}{frame:0{max(3, len(str(frames - 1)))}d}.tif"


def write_track_table(path: Path, nuclei: Nuclei, numbered: NumberedTracks) -> None:
    """Write the Challenge's table: number, first frame, last frame and parent of each track."""
    count = len(numbered.parent)
    first, last = np.full(count, nuclei.n_frames), np.zeros(count, np.int64)
    np.minimum.at(first, numbered.track, nuclei.frame)
    np.maximum.at(last, numbered.track, nuclei.frame)
    rows = zip(range(1, count), first[1:], last[1:], numbered.parent[1:], strict=True)
    path.write_text("".join(" ".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")


def read_tracks(path: Path) -> Tracks:
    """Read the Challenge's table; of the nuclei only frame and label are known.

    Raises InputError where it is no such table or contradicts itself.
    """
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        table = {int(line[0]): (int(line[1]), int(line[2]), int(line[3])) for line in lines}
    except (OSError, ValueError, IndexError):
        raise InputError(
            f"{path} is no table of tracks; expected lines of number, first frame, last frame and parent"
        ) from None
    rows: list[tuple[int, int]] = []
    for number, (first, last, parent) in table.items():
        if number < 1 or not 0 <= first <= last:
            raise InputError(f"{path}: track {number} from frame {first} to {last} cannot be")
        if parent and (parent not in table or table[parent][1] >= first):
            raise InputError(f"{path}: parent {parent} of track {number} must end before frame {first}")
        rows += [(frame, number) for frame in range(first, last + 1)]
    rows.sort()
    place = {row: at for at, row in enumerate(rows)}
    predecessor = np.full(len(rows), -1, np.int64)
    for at, (frame, number) in enumerate(rows):
        first, _, parent = table[number]
        if frame > first:
            predecessor[at] = place[frame - 1, number]
        elif parent:
            predecessor[at] = place[table[parent][1], parent]
    frames, labels = (np.array(rows, np.int64).reshape(-1, 2).T).copy()
    return Tracks(Nuclei.unmeasured(frames, labels), predecessor)


def find_table(folder: Path) -> Path:
    """Find the one table of true tracks at or below a folder."""
    found = sorted(folder.rglob(TRUTH))
    if len(found) != 1:
        raise InputError(
            f"{folder} holds {len(found)} files {TRUTH}; give a folder of one embryo's true tracks"
        )
    return found[0]


def track_masks(table: Path) -> list[Path]:
    """List the masks beside a table of tracks, in the order of the frames."""
    pattern = re.compile(rf"{_MASKS[table.name]}\d+\.tiff?", re.IGNORECASE)
    found = [path for path in list_volumes(table.parent) if pattern.fullmatch(path.name)]
    if not found:
        raise InputError(
            f"{table.parent} holds {table.name} but no {mask_name(table.name, 0, 1)}; they belong together"
        )
    return found


def read_track_masks(paths: Sequence[Path], tracks: Tracks) -> Iterator[NDArray[np.uint32]]:
    """Read masks frame by frame and check that they hold the very tracks of the table."""
    nuclei = tracks.nuclei
    if nuclei.n_frames > len(paths):
        raise InputError(
            f"{paths[0].parent} has masks of {len(paths)} frames and tracks up to frame {nuclei.n_frames - 1}"
        )
    for frame, path in enumerate(paths):
        labels = read_labels(path)
        present = np.unique(labels)
        expected = nuclei.label[nuclei.frame == frame]
        wrong = np.setxor1d(present[present > 0], expected)
        if len(wrong):
            raise InputError(f"{path}: track {wrong[0]} is in the masks or in the table, not in both")
        yield labels


def note_masks(folder: Path, masks: Sequence[Path]) -> None:
    """Note beside tracks which masks they link, by content."""
    files = list(dict.fromkeys(masks))
    write_json(folder / MASKS_FILE, {file.name: digest_of(file) for file in files})


def _warn_of_other_masks(tracks: Path, masks: Path) -> None:
    """Warn where masks changed since tracks linked them: the tracks' scores are not theirs."""
    try:
        linked: dict[str, str] = json.loads((tracks / MASKS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # of another program, or of a version that did not note them
    home = tracks.resolve()
    changed = []
    for name, digest in linked.items():
        beside = [path for path in masks.rglob(escape(name)) if not _is_hidden(path, masks)]
        found = [path for path in beside if home not in path.resolve().parents]
        if found and digest not in map(digest_of, found):
            changed.append(name)
    if changed:
        warn(
            f"the tracks in {tracks} are of other masks than {masks} holds ({some_of(changed)}), and so are "
            "their scores; run nuclei3d track again"
        )


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def renumber(labels: NDArray[np.uint32], old: Integers, new: Integers) -> NDArray[np.uint32]:
    """Give labels other numbers; those that are not among the `old` become background."""
    table = np.zeros(max(int(labels.max(initial=0)), int(old.max(initial=0))) + 1, np.uint32)
    table[old] = new
    return np.asarray(table[labels])


def write_nuclei_table(path: Path, tracks: Tracks, numbered: NumberedTracks) -> None:
    """Write one row a nucleus: track by track, each by its frames; what is not known is an empty cell.

    ``seen_once`` is 1 where no frame before or behind has the nucleus: often debris or a piece of another.
    """
    nuclei, once = tracks.nuclei, tracks.seen_once
    rows = []
    for row in np.lexsort((nuclei.frame, numbered.track)):
        track, size = numbered.track[row], (nuclei.volume_um3[row], nuclei.intensity[row], nuclei.score[row])
        numbers = (track, numbered.parent[track], nuclei.frame[row], nuclei.label[row])
        values = (*nuclei.position_um[row], *size)
        cells = ("" if math.isnan(value) else f"{value:.6g}" for value in values)
        rows.append((*numbers, *cells, int(once[row])))
    write_table(path, COLUMNS, rows)


def write_napari(path: Path, nuclei: Nuclei, numbered: NumberedTracks) -> None:
    """Write what napari's layer of tracks takes: rows of track, t, z, y, x (um), and the graph in JSON."""
    order = np.lexsort((nuclei.frame, numbered.track))
    table = np.column_stack([numbered.track, nuclei.frame, nuclei.position_um])[order]
    header = "track_id,t,z,y,x"
    np.savetxt(path, table, fmt=["%d", "%d", *["%.4f"] * 3], delimiter=",", header=header, comments="")
    graph = {number: [int(p)] for number, p in enumerate(numbered.parent) if p}
    path.with_suffix(".json").write_text(json.dumps(graph) + "\n", encoding="utf-8")


def write_geff(path: Path, tracks: Tracks, numbered: NumberedTracks) -> None:
    """Write the graph of nuclei as GEFF (Graph Exchange File Format), which Mastodon and TrackMate read."""
    from geff import GeffMetadata
    from geff.core_io import write_arrays
    from geff_spec import Axis

    nuclei = tracks.nuclei
    lineage = np.zeros(len(nuclei), np.int64)
    for row, origin in enumerate(tracks.predecessor):
        lineage[row] = lineage[origin] if origin >= 0 else numbered.track[row]
    columns = {
        "t": nuclei.frame,
        **dict(zip("zyx", nuclei.position_um.T.copy(), strict=True)),
        "track": numbered.track,
        "lineage": lineage,
        "label": nuclei.label,
        "volume_um3": nuclei.volume_um3,
        "mean_intensity": nuclei.intensity,
        "score": nuclei.score,
        "radius_um": (3 / (4 * np.pi) * nuclei.volume_um3) ** (1 / 3),
    }
    known = {name: values for name, values in columns.items() if not np.isnan(values).all()}
    write_arrays(
        path,
        np.arange(len(nuclei), dtype=np.uint64),
        {
            name: {
                "values": np.nan_to_num(values) if values.dtype.kind == "f" else values,
                "missing": np.isnan(values) if np.isnan(values).any() else None,
            }
            for name, values in known.items()
        },
        tracks.edges.astype(np.uint64),
        {},
        GeffMetadata(
            directed=True,
            axes=[
                Axis(name="t", type="time", unit="frame"),
                *(Axis(name=name, type="space", unit="micrometer") for name in "zyx"),
            ],
            node_props_metadata={},
            edge_props_metadata={},
            track_node_props={"tracklet": "track", "lineage": "lineage"},
            sphere="radius_um",
            extra={"nuclei3d": __version__},
        ),
    )


def score_track_folders(truth: Path, found: Path, masks: Path, *, required: bool) -> dict[str, Any] | None:
    """Score the tracks below a folder against the true ones, in the form of the Cell Tracking Challenge.

    Tracks of other masks than lie below `masks` now are warned of.

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
    for _, name in names:
        _warn_of_other_masks(pred[name].parent, masks)
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
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob(name)):
        if _is_hidden(path, folder):
            continue  # left half-written by a process that was killed, or of masks that are no more
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
