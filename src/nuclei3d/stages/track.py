"""track: the masks of a time-lapse in, nuclei linked over time out. Two passes, each frame by frame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from nuclei3d.config import Params
from nuclei3d.config.loading import write_values
from nuclei3d.config.sections import TracksParams
from nuclei3d.console import progress_bar, say, some_of
from nuclei3d.errors import InputError
from nuclei3d.grid import available_threads
from nuclei3d.images.frames import check_image, natural_key, say_passed_over
from nuclei3d.images.tiff import write_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.outputs import list_written, refuse_foreign_folder, whole_folder
from nuclei3d.stages import Result
from nuclei3d.stages.nuclei_table import read_column
from nuclei3d.stages.pairing import (
    Entry,
    find_image_entries,
    find_label_entries,
    first_voxel_size,
    pair_entries,
)
from nuclei3d.stages.predicted import tell_changed_images
from nuclei3d.stages.track_files import (
    MASKS_FILE,
    RESULT,
    find_table,
    mask_name,
    note_masks,
    read_track_masks,
    read_tracks,
    renumber,
    track_masks,
    write_geff,
    write_napari,
    write_nuclei_table,
    write_track_table,
)
from nuclei3d.tracks.accuracy import match_frame
from nuclei3d.tracks.learning import TRIALS, KnownFilm, learn_tracks
from nuclei3d.tracks.linking import link_nuclei
from nuclei3d.tracks.nuclei import Floats, Nuclei, measure_frame

_WRITTEN = (
    "mask*.tif",
    "*_masks.ome.tif",
    "masks.json",
    "tracks.geff",
    "tracks.csv",
    "napari_tracks.*",
    "*.html",
)
"""Beside RESULT, what is in the folder of a tracking."""


@dataclass(frozen=True)
class TrackResult:
    """What was found, and where it is."""

    out: Path
    frames: int
    nuclei: int
    tracks: int
    divisions: int
    seen_once: int
    learnt: dict[str, Any] = field(default_factory=dict)
    """Parameters that were chosen on true tracks, where these are others than were given."""


def track(
    params: Params,
    masks: Path,
    out: Path,
    *,
    files: Sequence[Path] = (),
    images: Path | None = None,
    same_numbers: bool = False,
    learn: Path | None = None,
    apply: bool = False,
    params_file: Path | None = None,
) -> TrackResult:
    """Link the nuclei of one embryo's time-lapse.

    `masks` are a folder of label volumes, one a frame, in the natural order of their names, or one with a
    time axis; of the `files` among them, if any are given, and it is said that others are passed over. The
    sections ``tracks`` and ``data`` (voxel size, channel) count. `out` is replaced if it holds
    an older tracking. It gets the Cell Tracking Challenge's masks and res_track.txt, tracks.geff, tracks.csv
    (one row a nucleus), napari_tracks.csv with napari_tracks.json and, for `same_numbers`,
    ``<stem>_masks.ome.tif``, in which a nucleus has one number over time, gaps included. The intensity is
    that of the `images`; without them it comes, as the score does, from the table that predict writes beside
    the masks, where there is one. `learn` is a folder with the true tracks of this time-lapse (man_track.txt
    and its masks): the parameters that do best on them are chosen, said, and used, and with `apply` written
    into `params_file`.
    """
    if apply and (learn is None or params_file is None or not params_file.is_file()):
        raise InputError(
            "--apply writes what --learn DIR chose into params.yaml; give both, or --params FILE"
        )
    refuse_foreign_folder(out, "tracking", (MASKS_FILE, ""), (RESULT, *_WRITTEN))
    target = out.resolve()
    # tracks may lie in the folder of the masks, and hold masks of their own
    entries = [e for e in find_label_entries(masks) if target not in e.frame.path.resolve().parents]
    if files:
        chosen = find_label_entries(*files)
        keys = {entry.key for entry in chosen}
        others = [entry.key for entry in entries if entry.key not in keys]
        entries = sorted(chosen, key=lambda entry: natural_key(entry.frame.path.name))
        say_passed_over(masks, others, "masks of frames that are not to be linked")
    embryos = list(dict.fromkeys(entry.embryo for entry in entries))
    if len(embryos) > 1:
        raise InputError(
            f"{masks} holds masks of several embryos ({some_of(embryos)}); track them one by one, each "
            "into a folder of its own"
        )
    seen = _images_of(entries, images, params)
    size = VoxelSize.given(params.data.voxel_size_um)
    first = size or first_voxel_size(*entries, *seen) or entries[0].frame.require_voxel_size()
    sizes = [size or first_voxel_size(*both) or first for both in zip(entries, seen, strict=True)]

    def measure(frame: int) -> Nuclei:
        return measure_masks(entries[frame], seen[frame], sizes[frame], frame)

    nuclei = Nuclei.joined(work_on_frames("measure", measure, len(entries)))
    settings = params.tracks
    if learn is not None:
        settings = _learn(settings, entries, nuclei, learn)
    tracks = link_nuclei(nuclei, settings)
    numbered, pieces = tracks.numbered(), tracks.numbered(split_gaps=True)
    rows = np.searchsorted(nuclei.frame, np.arange(len(entries) + 1))
    with whole_folder(out) as folder:

        def write(frame: int) -> None:
            own = slice(rows[frame], rows[frame + 1])
            labels, old = entries[frame].read_labels(), nuclei.label[own]
            name = mask_name(RESULT, frame, len(entries))
            write_labels(folder / name, renumber(labels, old, pieces.track[own]), sizes[frame])
            if same_numbers:
                name = f"{entries[frame].stem}_masks.ome.tif"
                write_labels(folder / name, renumber(labels, old, numbered.track[own]), sizes[frame])

        work_on_frames("write masks", write, len(entries))
        note_masks(folder, [entry.frame.path for entry in entries])
        write_track_table(folder / RESULT, nuclei, pieces)
        write_geff(folder / "tracks.geff", tracks, numbered)
        write_nuclei_table(folder / "tracks.csv", tracks, numbered)
        write_napari(folder / "napari_tracks.csv", nuclei, numbered)
        list_written(folder, digests=True)
    result = TrackResult(
        *(out, len(entries), len(nuclei), len(numbered.parent) - 1, len(tracks.divisions)),
        seen_once=int(tracks.seen_once.sum()),
        learnt=_changed(params.tracks, settings),
    )
    found = f"{result.tracks} tracks, {result.divisions} divisions, {result.seen_once} nuclei seen once only"
    say(f"{result.nuclei} nuclei in {result.frames} frames: {found}: {out}")
    if apply and params_file is not None and result.learnt:
        write_values(params_file, result.learnt)
        say(f"written into {params_file}")
    return result


def _learn(params: TracksParams, entries: Sequence[Entry], nuclei: Nuclei, truth: Path) -> TracksParams:
    """Choose the parameters with which these nuclei are linked most like the true ones."""
    table = find_table(truth)
    true, paths = read_tracks(table), track_masks(table)
    if len(paths) != len(entries):
        raise InputError(f"{table.parent} has {len(paths)} frames, the masks have {len(entries)}")
    matches = []
    for own, labels in zip(entries, read_track_masks(paths, true), strict=True):
        masks = own.read_labels()
        if masks.shape != labels.shape:
            raise InputError(f"{own.frame.path} and the masks of {table.parent} differ in shape")
        matches.append(match_frame(labels, masks))
    film = KnownFilm.of(nuclei, true, matches)
    before = film.count(params)
    with progress_bar("learn", total=TRIALS) as bar:
        learnt, after = learn_tracks([film], params, bar.advance)
    say(
        f"learnt from {table}: F1 of links {before.link_f1:.3f} -> {after.link_f1:.3f}, of "
        f"{len(true.divisions)} divisions {before.division_f1:.3f} -> {after.division_f1:.3f}"
    )
    for name, value in _changed(params, learnt).items():
        say(f"  {name}={value}")
    return learnt


def _changed(before: TracksParams, after: TracksParams) -> dict[str, Any]:
    return {f"tracks.{name}": value for name, value in after if value != getattr(before, name)}


def _images_of(entries: Sequence[Entry], images: Path | None, params: Params) -> list[Entry | None]:
    if images is None:
        return [None] * len(entries)
    pairs = pair_entries(entries, find_image_entries(images, params.data.channel))
    if not pairs:
        raise InputError(f"no image of {images} has the name of a volume of masks such as {entries[0].key}")
    tell_changed_images((masks.frame.path, image.frame) for masks, image in pairs.items())
    return [pairs.get(entry) for entry in entries]


def measure_masks(entry: Entry, image: Entry | None, size: VoxelSize, frame: int) -> Nuclei:
    """Measure the nuclei of a frame's masks, with its image or the table that predict wrote beside them."""
    volume = None
    if image is not None:
        volume = image.frame.read()
        check_image(volume, str(image.frame.path))
        if volume.shape != entry.frame.shape:
            raise InputError(
                f"{image.frame.path} and {entry.frame.path} differ in shape; give the masks' images"
            )
    labels = entry.read_labels()
    nuclei = measure_frame(labels, size, frame, volume)

    def column(name: str) -> Floats | None:
        known = read_column(entry, labels, name)
        return None if known is None else np.array([known.get(int(n), np.nan) for n in nuclei.label])

    score = column("score")
    intensity = column("mean_intensity") if image is None else None
    return replace(
        nuclei,
        score=nuclei.score if score is None else score,
        intensity=nuclei.intensity if intensity is None else intensity,
    )


def work_on_frames(words: str, work: Callable[[int], Result], count: int) -> list[Result]:
    """Do frame after frame, a few at a time: reading, packing and counting leave Python's lock."""
    with progress_bar(words, total=count) as bar, ThreadPoolExecutor(available_threads()) as pool:
        results: list[Result] = []
        for result in pool.map(work, range(count)):
            results.append(result)
            bar.advance()
        return results
