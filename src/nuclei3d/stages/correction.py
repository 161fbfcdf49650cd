"""A frame to correct: its most suspicious nuclei first, and corrections into the data set."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from nuclei3d.config import Params
from nuclei3d.console import progress_bar
from nuclei3d.errors import InputError
from nuclei3d.grid import resize_nearest
from nuclei3d.images.frames import Frame, check_image, to_labels
from nuclei3d.images.unknown import read_partial_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.scoring.matching import overlap_table, relabel_sequential
from nuclei3d.scoring.suspicion import Suspect, find_missed, rank_nuclei
from nuclei3d.stages.import_labels import ImportResult, NewLabels, label_target, list_frames, store_labels
from nuclei3d.stages.nuclei_table import read_column
from nuclei3d.stages.pairing import Entry, find_label_entries, first_voxel_size
from nuclei3d.stages.view import choose_layers
from nuclei3d.tracks.linking import link_nuclei
from nuclei3d.tracks.nuclei import Nuclei, measure_frame


class Foreground(NamedTuple):
    """What a model takes for nuclei, bool (z, y, x), and the diameter of a typical one."""

    where: NDArray[np.bool_]
    voxel_size: VoxelSize
    diameter_um: float


@dataclass(frozen=True)
class Correction:
    """A frame to correct: image and labels (Z, Y, X) as they were opened, and where they go.

    `folder` is the embryo's in the data set, `frame` the frame's name there, `source` where the labels came
    from; `known` is what earlier corrections looked at (None: all, or nothing is known of it). `score`,
    `growth` and `agreement` are by label, as `rank_nuclei` takes them; `foreground` is what a model takes for
    nuclei, None where it does not say it.
    """

    params: Params
    folder: Path
    frame: str
    image: Frame
    volume: NDArray[Any]
    labels: NDArray[np.uint32]
    voxel_size: VoxelSize
    source: Path
    known: NDArray[np.bool_] | None = None
    score: Mapping[int, float] | None = None
    growth: Mapping[int, float] | None = None
    agreement: Mapping[int, float] | None = None
    foreground: Foreground | None = None

    def rank(self, labels: NDArray[np.integer[Any]]) -> list[Suspect]:
        """List the nuclei of labels, and where the model sees others, most suspicious first."""
        nuclei = rank_nuclei(
            labels, self.voxel_size, score=self.score, growth=self.growth, agreement=self.agreement
        )
        if self.foreground is None:
            return nuclei
        there = np.asarray(resize_nearest(labels, self.foreground.where.shape), labels.dtype)
        return sorted([*find_missed(there, *self.foreground), *nuclei], key=lambda each: -each.oddness)

    def save(
        self,
        labels: NDArray[np.integer[Any]],
        seen: Collection[int],
        places_um: Collection[tuple[float, float, float]] = (),
        *,
        only_seen: bool,
    ) -> ImportResult:
        """Store corrected labels in the data set.

        With `only_seen` nothing counts as labelled but what `known_region` gives and earlier corrections
        looked at; the other labels are kept in the file, for the next time. Errors as those of
        `store_labels`, and if nothing was looked at.
        """
        unknown = None
        if only_seen:
            known = known_region(labels, self.labels, seen, self.voxel_size, places_um)
            unknown = ~known if self.known is None else ~(known | self.known)
            if unknown.all():
                raise InputError("nothing was looked at yet: choose nuclei in the list, or save all")
        new = NewLabels(
            self.source,
            self.image,
            self.frame,
            to_labels(labels, str(self.source)),
            None if unknown is None or not unknown.any() else unknown,
            self.voxel_size,
        )
        return store_labels(self.params, self.folder, [new], overwrite=True)


def known_region(
    labels: NDArray[np.integer[Any]],
    opened: NDArray[np.integer[Any]],
    seen: Collection[int],
    voxel_size: VoxelSize,
    places_um: Collection[tuple[float, float, float]] = (),
) -> NDArray[np.bool_]:
    """Say what was looked at: nuclei and places seen, what was changed, and half a nucleus around these.

    Labels are (z, y, x), as they are now and as they were opened; `seen` are numbers of nuclei, `places_um`
    places (z, y, x) in none, the first voxel being at 0. Around is what lies nearer to what was seen than to
    nuclei that were not; their own voxels do not count.
    """
    numbers = list(seen)
    looked = np.isin(labels, numbers) & (labels > 0) | np.isin(opened, numbers) & (opened > 0)
    looked |= labels != opened
    for place in places_um:
        looked[tuple(round(at / edge) for at, edge in zip(place, voxel_size.zyx, strict=True))] = True
    others = (labels > 0) & ~looked
    if not looked.any():
        return looked
    sizes = np.bincount(relabel_sequential(labels)[0].ravel())[1:]
    volume_um3 = float(np.median(sizes)) * voxel_size.volume_um3 if len(sizes) else 0.0
    radius_um = (volume_um3 * 3 / (4 * np.pi)) ** (1 / 3)
    away = distance_transform_edt(~looked, sampling=voxel_size.zyx)
    near = away <= radius_um
    if others.any():
        near &= away < distance_transform_edt(~others, sampling=voxel_size.zyx)
    return np.asarray(near, np.bool_)


def open_correction(
    params: Params,
    image: Path,
    masks: Path | None = None,
    model: str | None = None,
    data: Path | None = None,
    embryo: str | None = None,
    *,
    overwrite: bool = False,
) -> Correction:
    """Read what is to be corrected; arguments as those of `correct`."""
    entry, layers = choose_layers(image, [masks] if masks else [], params.data.channel)
    folder, name = _place_of(entry, data, embryo)
    there = list_frames(folder)
    target = label_target(folder, name, there.get(name))
    if masks is None and model is None:
        if not target.exists():
            raise InputError(
                f"nothing to correct: {target} is not there; give --masks, or --model to make them"
            )
        layers = [("labels", find_label_entries(target)[0])]
    own = bool(layers) and layers[0][1].frame.path.resolve() == target.resolve()
    if target.exists() and not own and not overwrite:
        raise InputError(
            f"{target} is there already; go on with it (leave out --masks and --model), or replace it "
            "(--overwrite)"
        )
    size = VoxelSize.given(params.data.voxel_size_um)
    size = (
        size or first_voxel_size(entry, *(layer for _, layer in layers)) or entry.frame.require_voxel_size()
    )
    volume = entry.frame.read()
    check_image(volume, str(entry.frame.path))
    predicted, score, foreground = None, None, None
    if model is not None:
        with progress_bar("segment", total=1) as bar:
            predicted, score, foreground = _ask(params, model, volume, size)
            bar.advance(1)
    labels, source, known, growth, agreement = predicted, entry.frame.path, None, None, None
    if layers:
        (_, layer) = layers[0]
        labels, known = _read(layer, params, with_known=own)
        if labels.shape != volume.shape:
            raise InputError(
                f"{layer.frame.path} has the shape {labels.shape}, its image {entry.frame.path} "
                f"{volume.shape}; both must be equal"
            )
        if predicted is not None:
            table = overlap_table(labels, predicted)
            agreement = dict(zip(table.true_labels.tolist(), table.best_true_iou.tolist(), strict=True))
        source, score = layer.frame.path, read_column(layer, labels)
        growth = _growth(layer, labels, size, params)
    assert labels is not None
    place = (params, folder, name, entry.frame, volume)
    return Correction(*place, labels, size, source, known, score, growth, agreement, foreground)


def _ask(
    params: Params, model: str, volume: NDArray[Any], size: VoxelSize
) -> tuple[NDArray[np.uint32], dict[int, float], Foreground | None]:
    """Have a model segment a volume: labels, scores by label, and its foreground, if it says it."""
    from nuclei3d.stages.predictor import LocalPredictor, open_model

    predictor, foreground = open_model(params, model), None
    if isinstance(predictor, LocalPredictor) and predictor.segmenter.settings.mode != "cellpose":
        segmenter, settings = predictor.segmenter, predictor.segmenter.settings
        flows = segmenter.flows(volume, size)
        labels, scores = segmenter.label(flows, volume.shape)
        where = flows.logit > settings.masks.cellprob_threshold
        foreground = Foreground(where, flows.voxel_size, settings.nucleus_diameter_um)
    else:
        found = predictor.segment(volume, size)
        labels, scores = found.labels, found.scores
    return labels, dict(enumerate(scores.tolist())), foreground


def _place_of(entry: Entry, data: Path | None, embryo: str | None) -> tuple[Path, str]:
    """Give the embryo's folder and the frame's name there: where the image lies, if in a data set."""
    path = entry.frame.path
    home = next((folder for folder in path.parents if folder.name == "images"), None)
    if home is not None and data in (None, home.parent.parent) and embryo in (None, home.parent.name):
        return home.parent, entry.frame.name
    return (data or Path("data")) / (embryo or entry.embryo), entry.stem


def _read(
    layer: Entry, params: Params, *, with_known: bool
) -> tuple[NDArray[np.uint32], NDArray[np.bool_] | None]:
    """Read labels with those that do not count, and, if asked for, what is known."""
    stored, unknown = layer.frame.read(), params.data.unknown_label
    labels = to_labels(np.where(stored == unknown, 0, stored), str(layer.frame.path))
    if not with_known:
        return labels, None
    where = read_partial_labels(layer.frame, unknown)[1]
    return labels, np.ones(labels.shape, bool) if where is None else ~where


def _growth(
    layer: Entry, labels: NDArray[np.uint32], size: VoxelSize, params: Params
) -> dict[int, float] | None:
    """Give the volume of each nucleus over that in the frame before, if one lies beside it."""
    try:
        beside = [each for each in find_label_entries(layer.frame.path.parent) if each.embryo == layer.embryo]
        at = [(each.frame.path, each.frame.time) for each in beside].index(
            (layer.frame.path, layer.frame.time)
        )
        before = _read(beside[at - 1], params, with_known=False)[0] if at else None
    except (InputError, ValueError):
        return None  # there is no time-lapse around it
    if before is None or before.shape != labels.shape or not before.any():
        return None
    nuclei = Nuclei.joined([measure_frame(before, size, 0), measure_frame(labels, size, 1)])
    tracks = link_nuclei(nuclei, params.tracks)
    return {
        int(nuclei.label[to]): float(nuclei.volume_um3[to] / nuclei.volume_um3[origin])
        for origin, to in tracks.edges
    }
