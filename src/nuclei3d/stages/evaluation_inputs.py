"""What the evaluation reads: pairs of volumes, their images, scores, and facts about the training data."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.config import Params
from nuclei3d.console import say
from nuclei3d.core.slicing import drop_small_labels
from nuclei3d.errors import InputError
from nuclei3d.stages.pairing import (
    Entry,
    find_image_entries,
    find_label_entries,
    pair_entries,
    refuse_doubt,
)
from nuclei3d.volumes.checks import check_image
from nuclei3d.volumes.listing import frame_stem
from nuclei3d.volumes.voxel_size import VoxelSize

#: Name of the baseline that the evaluation makes itself.
OTSU = "Otsu + watershed"


@dataclass(frozen=True)
class VolumePair:
    """A true volume with all that belongs to it.

    Attributes
    ----------
    name
        ``<embryo>/<frame>``, unique.
    pred
        The prediction of the model.
    image
        None where there is none.
    voxel_size
        In um if `physical`; else of unit length, because no file says it.
    baselines
        Predictions of other methods by their names.
    min_true_volume_um3
        True labels below are background.
    """

    name: str
    embryo: str
    frame: str
    truth: Entry
    pred: Entry
    image: Entry | None
    voxel_size: VoxelSize
    physical: bool
    baselines: dict[str, Entry] = field(default_factory=dict)
    min_true_volume_um3: float = 0.0

    def read_truth(self) -> NDArray[np.uint32]:
        """Read the true labels that count."""
        labels = self.truth.read_labels()
        kept, _ = drop_small_labels(labels, self.voxel_size, self.min_true_volume_um3)
        return np.asarray(kept, np.uint32)

    def read_prediction(self, method: Entry, shape: tuple[int, ...]) -> NDArray[np.uint32]:
        """Read predicted labels and check that they lie on the grid of the truth."""
        labels = method.read_labels()
        _check_shape(labels.shape, shape, method, self.truth)
        return labels

    def read_image(self) -> NDArray[Any] | None:
        """Read and check the image; None where there is none."""
        if self.image is None:
            return None
        image = self.image.frame.read()
        check_image(image, str(self.image.frame.path))
        _check_shape(image.shape, self.truth.frame.shape, self.image, self.truth)
        return image


@dataclass(frozen=True)
class Pairing:
    """The pairs, and what found no partner (paths, for the reader)."""

    pairs: list[VolumePair]
    truths_alone: list[str]
    predictions_alone: list[str]


@dataclass(frozen=True)
class TrainingFacts:
    """What summary.json of a slice data set fixes for the evaluation; None where it is not known."""

    contrast_edges: tuple[float, ...] | None = None
    nucleus_diameter_um: float | None = None


def pair_volumes(
    params: Params,
    truth: Path,
    pred: Path,
    images: Path | None,
    baselines: Mapping[str, Path],
    only: Collection[Path] | None = None,
) -> Pairing:
    """Find which prediction, image and baseline belongs to each true volume.

    Parameters
    ----------
    only
        The files of true labels that count, of all that lie below `truth`; None: all.

    Raises
    ------
    InputError
        If a folder holds nothing to read, nothing pairs, it is in doubt what pairs, or a baseline lacks
        volumes that are paired.
    """
    truths, predictions = find_label_entries(truth), find_label_entries(pred)
    if only is not None:
        wanted = {path.resolve() for path in only}
        truths = [entry for entry in truths if wanted & {*_with_parents(entry.frame.path.resolve())}]
    matched = pair_entries(truths, predictions)
    refuse_doubt(truths, predictions, matched)
    if not matched:
        raise InputError(
            f"no volume of {pred} has the name of one of {truth}: found {_examples(predictions)} and "
            f"{_examples(truths)}; a prediction is called like its truth, with or without _masks at its "
            "end, and lies in a folder of the embryo's name or has that name before its own"
        )
    image_of = _find_images(truths, truth, images, params.data.channel)
    others = {name: dict(_by_truth(truths, find_label_entries(path))) for name, path in baselines.items()}
    for name, found in others.items():
        missing = [entry for entry, _ in matched if id(entry) not in found]
        if missing:
            raise InputError(
                f"the baseline '{name}' ({baselines[name]}) has no volume for {_examples(missing)}; "
                "baselines must hold all volumes that are evaluated"
            )
    given = None if params.data.voxel_size_um is None else VoxelSize.of(params.data.voxel_size_um)
    names = _names([entry for entry, _ in matched])
    pairs = []
    for name, (entry, prediction) in zip(names, matched, strict=True):
        image = image_of.get(id(entry))
        size = given or _first_voxel_size(entry, image, prediction)
        if size is None and params.evaluate.min_true_volume_um3:
            raise InputError(
                f"evaluate.min_true_volume_um3 needs a voxel size, and none of the files of {name} has one; "
                "give --set data.voxel_size_um=[Z,Y,X]"
            )
        pairs.append(
            VolumePair(
                name=name,
                embryo=entry.embryo,
                frame=entry.short,
                truth=entry,
                pred=prediction,
                image=image,
                voxel_size=size or VoxelSize(1, 1, 1),
                physical=size is not None,
                baselines={method: found[id(entry)] for method, found in others.items()},
                min_true_volume_um3=params.evaluate.min_true_volume_um3,
            )
        )
    _tell_voxel_sizes(pairs, given)
    paired_truths = {id(entry) for entry, _ in matched}
    paired_predictions = {id(prediction) for _, prediction in matched}
    return Pairing(
        pairs,
        [entry.key for entry in truths if id(entry) not in paired_truths],
        [entry.key for entry in predictions if id(entry) not in paired_predictions],
    )


def read_scores(prediction: Entry) -> dict[int, float] | None:
    """Read the scores that `nuclei3d predict` writes beside its masks; None where there are none."""
    stem = frame_stem(prediction.frame.path)
    path = prediction.frame.path.with_name(stem.removesuffix("_masks") + "_nuclei.csv")
    if prediction.frame.time is not None or not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"label", "score"} <= rows[0].keys():
        return None
    try:
        scores = {int(row["label"]): float(row["score"]) for row in rows if row["score"]}
    except (TypeError, ValueError):
        raise InputError(
            f"{path}: cannot read the columns label and score; remove the file or have predict write it again"
        ) from None
    return scores if all(math.isfinite(value) for value in scores.values()) else None


def read_training_facts(summary: Path | None) -> TrainingFacts:
    """Read the bins of contrast and the diameter of nuclei from a slice data set or its summary.json."""
    if summary is None:
        return TrainingFacts()
    path = summary / "summary.json" if summary.is_dir() else summary
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        edges = tuple(float(edge) for edge in tree["contrast_quintiles"])
        diameter_um = float(tree["nucleus_diameter_um"])
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; nuclei3d prepare writes it") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is no summary.json of nuclei3d prepare") from None
    if list(edges) != sorted(edges) or diameter_um <= 0:
        raise InputError(f"{path}: contrast_quintiles must ascend and nucleus_diameter_um be positive")
    return TrainingFacts(edges, diameter_um)


def digest_of(labels: NDArray[np.uint32]) -> str:
    """Give a short fingerprint of labels, by which two evaluations know that they used the same truth."""
    digest = hashlib.blake2b(repr(labels.shape).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(labels, dtype="<u4").data)
    return digest.hexdigest()


def _with_parents(path: Path) -> tuple[Path, ...]:
    # an array of labels lies inside the zarr that is named
    return (path, *path.parents)


def _find_images(
    truths: Sequence[Entry], truth: Path, images: Path | None, channel: str | int | None
) -> dict[int, Entry]:
    if images is not None:
        found = dict(_by_truth(truths, find_image_entries(images, channel)))
        if not found:
            raise InputError(
                f"no image of {images} has the name of a true volume such as {_examples(truths)}; images are "
                "called like their labels"
            )
        return found
    if not truth.is_dir():
        return {}
    folder = truth.parent if truth.name == "labels" else truth
    label_paths = {entry.frame.path for entry in truths}
    try:
        beside = [
            entry for entry in find_image_entries(folder, channel) if entry.frame.path not in label_paths
        ]
    except InputError:
        # Nobody named these files as images: what cannot be read among them is not ours to judge.
        return {}
    return {id(entry): image for entry, image in pair_entries(truths, beside, by_name_only=True)}


def _by_truth(truths: Sequence[Entry], others: Sequence[Entry]) -> list[tuple[int, Entry]]:
    return [(id(entry), other) for entry, other in pair_entries(truths, others)]


def _first_voxel_size(*entries: Entry | None) -> VoxelSize | None:
    return next((e.frame.voxel_size for e in entries if e is not None and e.frame.voxel_size), None)


def _tell_voxel_sizes(pairs: Sequence[VolumePair], given: VoxelSize | None) -> None:
    unknown = [pair for pair in pairs if not pair.physical]
    if unknown:
        say(
            f"{unknown[0].truth.frame.path} does not state its voxel size: distances are in voxels and "
            "contrast is not measured; give it with --set data.voxel_size_um=[z,y,x]"
        )
    for pair in pairs:
        stated, path = _first_voxel_size(pair.truth, pair.image), pair.truth.frame.path
        if given is not None and stated is not None and stated.differs_from(given):
            say(f"{path}: the file says voxels of {stated}, the given {given} is used instead")
            return


def _names(entries: Sequence[Entry]) -> list[str]:
    names = [f"{entry.embryo}/{entry.short}" for entry in entries]
    return [name if names.count(name) == 1 else entry.key for name, entry in zip(names, entries, strict=True)]


def _check_shape(found: tuple[int, ...], expected: tuple[int, ...], entry: Entry, truth: Entry) -> None:
    if found != expected:
        raise InputError(
            f"{entry.frame.path} has {_by(found)} voxels and {truth.frame.path} {_by(expected)}; both must "
            "lie on the same grid, so write the prediction at the resolution of the labels"
        )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _examples(entries: Sequence[Entry]) -> str:
    shown = ", ".join(entry.key for entry in entries[:3])
    return shown if len(entries) <= 3 else f"{shown} and {len(entries) - 3} more"
