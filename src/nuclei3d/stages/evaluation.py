"""An evaluation: predicted label volumes beside the true ones, assessed, and the metrics of these."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from nuclei3d import __version__
from nuclei3d.config import Params
from nuclei3d.digests import digest_of_frame
from nuclei3d.errors import InputError
from nuclei3d.grid import available_threads
from nuclei3d.images.embryos import block_of
from nuclei3d.scoring.assessment import (
    Assessment,
    assess_volume,
    by_embryo,
    by_stage,
    count_by_contrast,
    summarise,
)
from nuclei3d.scoring.bootstrap import FEWEST_NUCLEI, Statistics, compare_paired
from nuclei3d.scoring.comparison import pooled_scores
from nuclei3d.scoring.contrast import contrast_edges
from nuclei3d.scoring.metrics import score
from nuclei3d.scoring.plausibility import looks_like_image
from nuclei3d.scoring.watershed import OTSU, otsu_watershed
from nuclei3d.stages import map_in_processes
from nuclei3d.stages.nuclei_table import read_column
from nuclei3d.stages.pairing import Entry, VolumePair

# Below so many voxels in all, starting processes takes longer than they save.
_WORTH_PROCESSES = 200_000_000


@dataclass(frozen=True)
class Evaluation:
    """Volumes assessed: by method, each in the order of `pairs`; `method` is the model's name among them.

    `digests` are those of the true labels and of the frames. `edges` part the contrast bins; None where no
    contrast is known.
    """

    params: Params
    method: str
    pairs: Sequence[VolumePair]
    digests: Sequence[tuple[str, str]]
    assessed: Mapping[str, Sequence[Assessment]]
    edges: Sequence[float] | None
    edges_from: str | None

    @classmethod
    def of(
        cls, params: Params, method: str, pairs: Sequence[VolumePair], edges: Sequence[float] | None = None
    ) -> Self:
        """Assess the model and the baselines; without `edges` those of the true labels are taken."""
        assessed, digests = _assess(params, pairs, method)
        contrast = np.concatenate([assessment.true.contrast for assessment in assessed[method]])
        edges_from: str | None = "true labels" if edges is None else "training labels"
        if not np.isfinite(contrast).any():
            edges = edges_from = None
        elif edges is None:
            edges = contrast_edges(contrast, params.evaluate.contrast_bins).tolist()
        return cls(params, method, pairs, digests, assessed, edges, edges_from)

    @property
    def own(self) -> Sequence[Assessment]:
        """The model's assessments."""
        return self.assessed[self.method]

    @cached_property
    def summaries(self) -> dict[str, dict[str, Any]]:
        """Pooled scores of each method, with intervals."""
        wanted = self.params.evaluate
        return {
            name: summarise(
                assessments,
                [pair.embryo for pair in self.pairs],
                thresholds=wanted.thresholds,
                contrast_edges=self.edges,
                replicates=wanted.bootstrap,
                over=wanted.resample,
                # The same draws for every method: their intervals differ by the method alone.
                rng=np.random.default_rng(self.params.seed),
            )
            for name, assessments in self.assessed.items()
        }

    def metrics(self) -> dict[str, Any]:
        """Put the scores of metrics.json together; the layout is the contract of the project."""
        thresholds, embryos = self.params.evaluate.thresholds, [pair.embryo for pair in self.pairs]
        volumes = {
            pair.name: {
                **score(assessment.tally, thresholds).as_json(),
                "embryo": pair.embryo,
                "frame": pair.frame,
                "truth_digest": digest,
                "frame_digest": frame_digest,
                "counts": assessment.tally.as_json(),
                "contrast_counts": self._counts_by_contrast(assessment),
            }
            for pair, assessment, (digest, frame_digest) in zip(
                self.pairs, self.own, self.digests, strict=True
            )
        }
        return {
            "nuclei3d": __version__,
            **self.summaries[self.method],
            "by_embryo": by_embryo(self.own, embryos, thresholds),
            "by_stage": by_stage(self.own, thresholds),
            "baselines": {
                name: {**item, "behind_model": self._lead(name)}
                for name, item in self.summaries.items()
                if name != self.method
            },
            "volumes": volumes,
            "contrast_edges": self.edges,
            "contrast_edges_from": self.edges_from,
        }

    def _counts_by_contrast(self, assessment: Assessment) -> dict[str, list[int]] | None:
        if self.edges is None:
            return None
        counts = vars(count_by_contrast([assessment], self.edges))
        return {name: part[0].astype(int).tolist() for name, part in counts.items()}

    def _pooled(self, method: str) -> Statistics:
        assessed, thresholds = self.assessed[method], self.params.evaluate.thresholds
        return pooled_scores(
            [each.tally for each in assessed], thresholds, list(map(self._counts_by_contrast, assessed))
        )

    def _lead(self, rival: str) -> dict[str, Any] | None:
        """Give the lead of the model over a baseline, in AP at .5 and in all metrics."""
        enough = sum(int(assessment.tally.n_true) for assessment in self.own) >= FEWEST_NUCLEI
        compared = compare_paired(
            self._pooled(rival),
            self._pooled(self.method),
            [pair.embryo for pair in self.pairs],
            replicates=self.params.evaluate.bootstrap if enough else 0,
            over=self.params.evaluate.resample,
            rng=np.random.default_rng(self.params.seed),
        )
        ap = compared.differences["ap_0.50"]
        if np.isnan([ap.difference, ap.low, ap.high]).any():
            return None
        return {
            "ap_0.50": ap.difference,
            "interval": [ap.low, ap.high],
            "metrics": {
                name: {"difference": pair.difference, "interval": [pair.low, pair.high]}
                for name, pair in compared.differences.items()
                if not np.isnan([pair.difference, pair.low, pair.high]).any()
            },
        }


def _assess(
    params: Params, pairs: Sequence[VolumePair], method: str
) -> tuple[dict[str, list[Assessment]], list[tuple[str, str]]]:
    """Assess the model first, the given baselines and, where there are images, Otsu's watershed.

    Gives the assessments of each method in the order of `pairs`, and digests of the true labels and of the
    frames. Otsu's diameter is that of the true nuclei: its scores depend on the frames alone.
    """
    voxels = sum(math.prod(pair.truth.frame.shape) for pair in pairs)
    workers = min(available_threads(), len(pairs)) if voxels >= _WORTH_PROCESSES else 1
    results = map_in_processes("evaluate", partial(_assess_methods, params, method), pairs, workers=workers)
    digests = [digest for digest, _ in results]
    assessed = {name: [found[name] for _, found in results] for name in (method, *pairs[0].baselines)}
    volumes_um3 = np.concatenate([own.true.volume_um3 for own in assessed[method]])
    possible = len(volumes_um3) and all(pair.physical and pair.image is not None for pair in pairs)
    if "otsu" in params.evaluate.baselines and possible:
        diameter_um = float((6 / np.pi * np.median(volumes_um3)) ** (1 / 3))
        contrasts = [own.true.contrast for own in assessed[method]]
        otsu = partial(_assess_otsu, params, diameter_um)
        assessed[OTSU] = map_in_processes("Otsu baseline", otsu, pairs, contrasts, workers=workers)
    return assessed, digests


def _assess_methods(
    params: Params, method: str, pair: VolumePair
) -> tuple[tuple[str, str], dict[str, Assessment]]:
    true, unknown = pair.read_truth()
    _refuse_image(true, pair.truth)
    image = pair.read_image() if pair.physical else None
    assess = _assessing(params, pair, image, unknown)
    found: dict[str, Assessment] = {}
    for name, entry in {method: pair.pred, **pair.baselines}.items():
        predicted = pair.read_prediction(entry, true.shape)
        _refuse_image(predicted, entry)
        contrast = found[method].true.contrast if found else None
        found[name] = assess(true, predicted, scores=read_column(entry, predicted), true_contrast=contrast)
    return (_digest_of(true, unknown), _digest_of_frame(image, true, pair)), found


def _digest_of_frame(image: NDArray[Any] | None, true: NDArray[np.uint32], pair: VolumePair) -> str:
    """Digest the part of a frame that counts, as prepare does."""
    if pair.share is None:
        return digest_of_frame(image, true)
    whole, _ = pair.read_whole_truth()
    block = block_of(whole, pair.share, str(pair.truth.frame.path))
    return digest_of_frame(None if image is None else image[block], true[block])


def _refuse_image(labels: NDArray[np.uint32], entry: Entry) -> None:
    if looks_like_image(labels):
        raise InputError(
            f"{entry.frame.path} holds intensities, not labels; give the folder of the label volumes"
        )


def _assess_otsu(
    params: Params, diameter_um: float, pair: VolumePair, true_contrast: NDArray[np.float64]
) -> Assessment:
    image = pair.read_image()
    assert image is not None
    true, unknown = pair.read_truth()
    found = otsu_watershed(image, pair.voxel_size, diameter_um)
    return _assessing(params, pair, image, unknown)(true, found, true_contrast=true_contrast)


def _assessing(
    params: Params, pair: VolumePair, image: NDArray[Any] | None, unknown: NDArray[np.bool_] | None
) -> Callable[..., Assessment]:
    """Give `assess_volume` with what is the same of all methods."""
    return partial(
        assess_volume,
        voxel_size=pair.voxel_size,
        image=image,
        thresholds=params.evaluate.thresholds,
        surfaces=params.evaluate.surface_distances,
        unknown=unknown,
    )


def _digest_of(labels: NDArray[np.uint32], unknown: NDArray[np.bool_] | None) -> str:
    """Give a short fingerprint, by which two evaluations know that they used the same truth."""
    digest = hashlib.blake2b(repr(labels.shape).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(labels, dtype="<u4").data)
    if unknown is not None:
        digest.update(np.packbits(unknown).data)
    return digest.hexdigest()
