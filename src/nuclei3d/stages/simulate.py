"""Write synthetic embryos with exact labels in the layout of a data set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nuclei3d.config import Params
from nuclei3d.console import Bar, progress_bar, say
from nuclei3d.images.frames import read_labels
from nuclei3d.images.tiff import write_image, write_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.outputs import list_written, refuse_foreign_folder, whole_folder, write_json
from nuclei3d.simulation import simulate_embryo
from nuclei3d.stages.track_files import TRUTH, mask_name, renumber, write_track_table
from nuclei3d.tracks.nuclei import Tracks, trace_lineages

# Lies in the folder beside the embryos: says how they were made, and that the folder may be replaced.
RECORD = "simulation.json"


@dataclass(frozen=True)
class SimulatedEmbryo:
    """One embryo: its name and the number of labelled nuclei in each frame."""

    name: str
    nuclei: tuple[int, ...]


@dataclass(frozen=True)
class SimulateResult:
    """What was written, and where."""

    out: Path
    embryos: tuple[SimulatedEmbryo, ...]


def simulate(params: Params, out: Path) -> SimulateResult:
    """Write the embryos of the section `simulate` into ``<out>/<embryo>/{images,labels}/<frame>.tif``.

    The true tracks lie beside, in ``<out>/<embryo>/tracks``, in the form of the Cell Tracking Challenge.
    The same parameters and seed give the same bytes. An embryo does not depend on those listed after it.
    """
    refuse_foreign_folder(out, "earlier simulation", (RECORD, "embryos"), _embryos_in(out / RECORD))
    settings = params.simulate
    total = sum(settings.frames_of(index) for index in range(len(settings.embryos)))
    with whole_folder(out) as folder:
        with progress_bar("simulating frames", total) as bar:
            embryos = tuple(_write_embryos(params, folder, bar))
        record = {
            "seed": params.seed,
            "simulate": settings.model_dump(mode="json"),
            "embryos": [asdict(embryo) for embryo in embryos],
        }
        write_json(folder / RECORD, record)
        list_written(folder, digests=True)
    nuclei = sum(sum(embryo.nuclei) for embryo in embryos)
    say(f"{out}: {len(embryos)} embryos, {total} frames, {nuclei} labelled nuclei")
    return SimulateResult(out, embryos)


def _embryos_in(record: Path) -> list[str]:
    """Name the embryos of an earlier simulation, which of an older version alone says what is in it."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return [embryo["name"] for embryo in json.loads(record.read_text(encoding="utf-8"))["embryos"]]
    return []


def _write_embryos(params: Params, folder: Path, bar: Bar) -> Iterator[SimulatedEmbryo]:
    settings = params.simulate
    voxel_size = VoxelSize.of(settings.voxel_size_um)
    for index, name in enumerate(settings.embryos):
        bar.note(name)
        frames = settings.frames_of(index)
        digits = max(3, len(str(frames - 1)))
        for kind in ("images", "labels", "tracks"):
            (folder / name / kind).mkdir(parents=True)
        counts = []
        rng = np.random.default_rng([params.seed, index])
        seen = []
        for time, (image, labels, lineages) in enumerate(simulate_embryo(settings, rng, frames=frames)):
            file = f"t{time:0{digits}d}.tif"
            write_image(folder / name / "images" / file, image, voxel_size)
            write_labels(folder / name / "labels" / file, labels, voxel_size)
            counts.append(int(labels.max()))
            seen.append(lineages)
            bar.advance()
        _write_tracks(folder / name, trace_lineages(seen), frames, digits, voxel_size)
        yield SimulatedEmbryo(name, tuple(counts))


def _write_tracks(embryo: Path, tracks: Tracks, frames: int, digits: int, voxel_size: VoxelSize) -> None:
    nuclei, numbered = tracks.nuclei, tracks.numbered(split_gaps=True)
    for time in range(frames):
        own = nuclei.frame == time
        labels = read_labels(embryo / "labels" / f"t{time:0{digits}d}.tif")
        masks = renumber(labels, nuclei.label[own], numbered.track[own])
        write_labels(embryo / "tracks" / mask_name(TRUTH, time, frames), masks, voxel_size)
    write_track_table(embryo / "tracks" / TRUTH, nuclei, numbered)
