"""suggest: images and a model in, out the blocks of unlabelled frames whose labels would help most."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nuclei3d.client import is_service
from nuclei3d.config import Params
from nuclei3d.console import progress_bar, say, warn
from nuclei3d.errors import InputError
from nuclei3d.grid import resize_nearest
from nuclei3d.images.embryos import EmbryoFrame, find_embryo, find_embryos
from nuclei3d.images.frames import Frame, check_image, frame_stem, single_label_frame
from nuclei3d.images.ome_zarr import is_zarr
from nuclei3d.images.tiff import write_image
from nuclei3d.images.unknown import KNOWN_MARK, read_partial_labels
from nuclei3d.outputs import free_path, whole_file, write_table
from nuclei3d.segmentation.segmenter import Segmenter
from nuclei3d.stages.diameters import time_lapse_of
from nuclei3d.stages.predict import find_all
from nuclei3d.stages.predictor import open_local

if TYPE_CHECKING:
    from nuclei3d.segmentation.uncertainty import Block, Place

TABLE_FILE = "suggestions.csv"
SHEET_FILE = "suggestions.png"
KNOWN_FOLDER = "known"
EARLIER_FOLDER = "earlier"

_MOST_FRAMES = 24
"""Of an embryo that are looked at, evenly in time: neighbours show the same."""

_UNLIKE_FACTOR = 2.0
"""How often a block counts in a frame that is unlike the training: there a model may be wrong and sure."""


@dataclass(frozen=True)
class Suggestion:
    """A block to label: voxels z0 to z1 (without z1) and so on, its uncertainty in nuclei, and why."""

    embryo: str
    frame: str
    z0: int
    z1: int
    y0: int
    y1: int
    x0: int
    x1: int
    uncertainty: float
    reason: str
    image: Path


@dataclass(frozen=True)
class SuggestResult:
    """Blocks, most helpful first; frames that were looked at, and that have labels; files."""

    blocks: tuple[Suggestion, ...]
    looked_at: int
    labelled: tuple[str, ...]
    files: tuple[Path, ...]


@dataclass(frozen=True)
class _Candidate:
    """A frame that may be labelled, its time among those of its embryo, and the labels it has."""

    frame: Frame
    embryo: str
    time: int
    times: int
    stored: EmbryoFrame | None = None

    @property
    def name(self) -> str:
        return f"{self.embryo}/{self.frame.name}"

    def read_unknown(self, unknown_label: int | None) -> NDArray[np.bool_] | None:
        """Read where nobody looked (z, y, x); None where somebody looked everywhere."""
        if self.stored is None or self.stored.label_path is None:
            return np.ones(self.frame.shape, bool)
        labels = single_label_frame(self.stored.label_path, self.stored.label_time)
        return read_partial_labels(labels, unknown_label)[1]


@dataclass(frozen=True)
class _Found:
    """A block, where it is, what is unlike the training there, and the file of its frame's candidates."""

    candidate: _Candidate
    block: Block
    place: Place
    unlike: tuple[str, ...]
    nuclei: Path


def suggest(
    params: Params,
    inputs: Sequence[Path],
    model: str,
    out: Path | None = None,
    *,
    count: int = 10,
    known: bool = False,
) -> SuggestResult:
    """Rank blocks of frames by what a model is unsure of there, spread over time and embryos.

    Frames that are labelled all over are passed over, as is what is known of others. Of each embryo at most
    24 frames are looked at. Inputs are data sets, embryos, or images as `nuclei3d.stages.predict.predict`
    takes them: files of one folder, and the time points of a file, are then an embryo. The model is a folder,
    weights file or ``models:/name@alias``. `out` gets `TABLE_FILE` and `SHEET_FILE` (None: nothing is
    written) and, if `known`, ``known/<embryo>/<frame>_known.tif`` of each chosen frame: 1 in its blocks and
    all over the nuclei that they cut, and where it was known before. Of an earlier call that suggested
    otherwise, what lies in `out` is moved to `EARLIER_FOLDER` in it. InputError is raised if nothing is
    unlabelled, a frame is larger than the memory, or the model is a service.
    """
    from nuclei3d.segmentation.uncertainty import BLOCK_DIAMETERS, choose_blocks

    if count < 1:
        raise InputError(f"--count {count}: give 1 or more")
    if known and out is None:
        raise InputError("--known writes masks into the folder of --out: give it")
    if is_service(model):
        raise InputError(f"{model} is a service, which does not say what it is unsure of; give the model")
    candidates, labelled = _without_labelled(_find_candidates(params, inputs), params)
    segmenter = open_local(params, model).segmenter
    _require_memory(candidates, segmenter, params)
    edge_um = BLOCK_DIAMETERS * segmenter.settings.nucleus_diameter_um
    found: list[_Found] = []
    with tempfile.TemporaryDirectory() as folder:
        with progress_bar("suggest", total=len(candidates)) as bar:
            for number, candidate in enumerate(candidates):
                bar.note(candidate.name)
                nuclei = Path(folder, f"{number}.npz")
                found += _look_at(candidate, segmenter, params, edge_um, count, nuclei)
                bar.advance()
        worth = [each.block.uncertainty * (_UNLIKE_FACTOR if each.unlike else 1) for each in found]
        chosen = [found[at] for at in choose_blocks(worth, [each.place for each in found], count, edge_um)]
        blocks = tuple(_suggestion(each) for each in chosen)
        files = () if out is None else _write(out, chosen, blocks, params if known else None)
    for one in found:
        for text in one.unlike:
            warn(f"{one.candidate.name}: {text}")
    for rank, each in enumerate(blocks, start=1):
        place = f"z {each.z0}-{each.z1} y {each.y0}-{each.y1} x {each.x0}-{each.x1}"
        say(f"{rank:3d}. {each.embryo}/{each.frame} {place}: {each.reason}")
    where = "" if out is None else f"; a picture of each: {out / SHEET_FILE}"
    say(f"{len(blocks)} blocks to label, of {len(candidates)} frames{where}")
    return SuggestResult(blocks, len(candidates), labelled, files)


def _find_candidates(params: Params, inputs: Sequence[Path]) -> list[_Candidate]:
    found: list[tuple[Path, _Candidate]] = []
    plain: list[Path] = []
    for source in (Path(each).absolute() for each in inputs):
        embryos = _embryos_of(source)
        if not embryos:
            plain.append(source)
        for folder in embryos:
            stored = {frame.frame: frame for frame in find_embryo(folder).frames}
            for frame in find_all([folder / "images"], params):
                if frame.name in stored and source in (frame.path, *frame.path.parents):
                    own = stored[frame.name]
                    found.append((folder, _Candidate(frame, folder.name, own.index, len(stored), own)))
    movies: dict[Path, list[Frame]] = {}
    for frame in find_all(plain, params) if plain else ():
        movies.setdefault(time_lapse_of(frame), []).append(frame)
    for home, frames in movies.items():
        name = frame_stem(home)
        found += [(home, _Candidate(each, name, time, len(frames))) for time, each in enumerate(frames)]
    homes: dict[str, Path] = {}
    for home, each in found:
        if homes.setdefault(each.embryo, home) != home:
            raise InputError(
                f"{homes[each.embryo]} and {home} are both called {each.embryo}; rename one of them"
            )
    return list({(each.frame.path, each.frame.time): each for _, each in found}.values())


def _embryos_of(source: Path) -> list[Path]:
    """Give the folders of the embryos that an input holds, is or belongs to; none of plain images."""
    if (source / "images").is_dir():
        return [source]
    if "images" in (source.name, source.parent.name):
        return [source.parent if source.name == "images" else source.parent.parent]
    if source.is_dir() and not is_zarr(source) and any(source.glob("*/images/")):
        return [source / embryo.name for embryo in find_embryos(source)]
    return []


def _without_labelled(
    candidates: Sequence[_Candidate], params: Params
) -> tuple[list[_Candidate], tuple[str, ...]]:
    """Leave out what is labelled all over, and say it; of the rest choose frames evenly in time."""
    left: dict[str, list[_Candidate]] = {}
    labelled: dict[str, list[str]] = {}
    for each in candidates:
        if each.read_unknown(params.data.unknown_label) is None:
            labelled.setdefault(each.embryo, []).append(each.name)
        else:
            left.setdefault(each.embryo, []).append(each)
    for embryo, names in labelled.items():
        say(f"{embryo}: {len(names)} labelled frames passed over")
    if not left:
        raise InputError("all frames are labelled: nothing is left to suggest")
    chosen: list[_Candidate] = []
    for embryo, frames in left.items():
        places = np.linspace(0, len(frames) - 1, min(len(frames), _MOST_FRAMES)).round().astype(int)
        if len(places) < len(frames):
            say(f"{embryo}: {len(places)} of {len(frames)} unlabelled frames are looked at, evenly in time")
        chosen += [frames[at] for at in places]
    return chosen, tuple(name for names in labelled.values() for name in names)


def _require_memory(candidates: Sequence[_Candidate], segmenter: Segmenter, params: Params) -> None:
    from nuclei3d.stages.predict_blocks import BlockRun, required_gb

    room = BlockRun.of(params.predict).worker_gb
    for each in candidates:
        if (needed := required_gb(each.frame, segmenter.settings)) > room:
            raise InputError(
                f"{each.frame.path} would need {needed:.1f} GB of memory, {room:.1f} are free; give a part "
                "of it"
            )


def _look_at(
    candidate: _Candidate, segmenter: Segmenter, params: Params, edge_um: float, count: int, nuclei: Path
) -> list[_Found]:
    """Find the blocks of a frame, and write its candidates for nuclei and which of them are kept."""
    from nuclei3d.segmentation.likeness import find_unlikeness
    from nuclei3d.segmentation.settings import with_ranges
    from nuclei3d.segmentation.uncertainty import Place, find_blocks, measure_uncertainty

    frame, voxel_size = candidate.frame, candidate.frame.require_voxel_size()
    image = frame.read()
    check_image(image, str(frame.path))
    settings = with_ranges(segmenter.settings, image)
    flows = segmenter.with_settings(settings).flows(image, voxel_size)
    uncertain = measure_uncertainty(flows, settings)
    unknown = candidate.read_unknown(params.data.unknown_label)
    assert unknown is not None
    unlike = find_unlikeness(
        np.bincount(uncertain.labels.ravel(), minlength=len(uncertain.kept))[uncertain.kept]
        * flows.voxel_size.volume_um3,
        voxel_size,
        settings.nucleus_diameter_um,
        segmenter.models["main"].info.training,
        settings.intensity_range,
    )
    np.savez_compressed(nuclei, labels=uncertain.labels, kept=uncertain.kept)
    found = []
    there = np.asarray(resize_nearest(unknown, flows.shape), bool)
    for block in find_blocks(uncertain, frame.shape, voxel_size, edge_um, count, there):
        z, y, x = (
            edge * (part.start + part.stop) / 2 for edge, part in zip(voxel_size.zyx, block.box, strict=True)
        )
        place = Place(candidate.embryo, candidate.time, candidate.times, (z, y, x))
        found.append(_Found(candidate, block, place, tuple(unlike), nuclei))
    return found


def _suggestion(found: _Found) -> Suggestion:
    block, frame = found.block, found.candidate.frame
    reasons = []
    if block.doubtful or block.dropped:
        reasons.append(
            f"candidates with scores near the threshold: {block.doubtful} above, {block.dropped} below"
        )
    if block.foreground > 0.1:
        reasons.append(f"foreground of {block.foreground:.1f} nuclei in none")
    if not reasons:
        reasons.append("nothing in particular: elsewhere the model is surer, or blocks are chosen already")
    if found.unlike:
        reasons.append("the frame is unlike the training")
    z, y, x = block.box
    return Suggestion(
        found.candidate.embryo,
        frame.name,
        z0=z.start,
        z1=z.stop,
        y0=y.start,
        y1=y.stop,
        x0=x.start,
        x1=x.stop,
        uncertainty=round(block.uncertainty, 3),
        reason=", ".join(reasons),
        image=frame.path,
    )


def _read_nuclei(found: _Found) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
    """Read a frame's candidates on the image's grid (z, y, x), and which of them are kept."""
    with np.load(found.nuclei) as stored:
        labels = resize_nearest(stored["labels"], found.candidate.frame.shape)
        return np.asarray(labels, np.uint32), stored["kept"]


def _write(
    out: Path, chosen: Sequence[_Found], blocks: Sequence[Suggestion], known: Params | None
) -> tuple[Path, ...]:
    """Write table and sheet and, given parameters, masks of what is known once the blocks are labelled."""
    from nuclei3d.report.figures import ShownBlock, draw_blocks

    files = [out / TABLE_FILE, out / SHEET_FILE]
    with whole_file(files[0]) as new:
        write_table(new, [each.name for each in fields(Suggestion)], (astuple(each) for each in blocks))
        if files[0].is_file() and files[0].read_bytes() != new.read_bytes():
            _lay_earlier_aside(out)
    masks: dict[Path, NDArray[np.bool_]] = {}
    shown = []
    for rank, each in enumerate(chosen, start=1):
        labels, kept = _read_nuclei(each)
        box, frame = each.block.box, each.candidate.frame
        voxel_size = frame.require_voxel_size()
        z, y, x = (
            slice(max(0, part.start - margin), part.stop + margin)
            for part in box
            for margin in [(part.stop - part.start) // 4]
        )
        around = (z, y, x)
        title = f"{rank}. {each.candidate.name}\nuncertainty {each.block.uncertainty:.1f} nuclei"
        shown.append(
            ShownBlock(
                title,
                frame.read_block(around),
                labels[around],
                kept,
                voxel_size,
                around,
                box,
                each.block.focus,
            )
        )
        if known is not None:
            path = out / KNOWN_FOLDER / each.candidate.embryo / f"{frame.name}{KNOWN_MARK}.tif"
            if path not in masks:
                unknown = each.candidate.read_unknown(known.data.unknown_label)
                masks[path] = np.zeros(frame.shape, bool) if unknown is None else ~unknown
            masks[path][box] = True
            masks[path] |= np.isin(labels, np.setdiff1d(labels[box], 0))
            write_image(path, masks[path], voxel_size)
    with whole_file(files[1]) as partial:
        draw_blocks(shown, partial)
    return (*files, *masks)


def _lay_earlier_aside(out: Path) -> None:
    """Move away what an earlier call wrote; somebody may have worked on it."""
    earlier = free_path(out / EARLIER_FOLDER)
    for path in (out / TABLE_FILE, out / SHEET_FILE, *out.glob(f"{KNOWN_FOLDER}/*/*{KNOWN_MARK}.tif")):
        if path.is_file():
            kept = earlier / path.relative_to(out)
            kept.parent.mkdir(parents=True, exist_ok=True)
            path.replace(kept)
    say(f"{out} held other suggestions: moved to {earlier}")
