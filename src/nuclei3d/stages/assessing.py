"""The heavy part of the evaluation: every method on every volume, several volumes at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from nuclei3d.config import Params
from nuclei3d.console import progress_bar
from nuclei3d.core.scoring.assessment import Assessment, assess_volume
from nuclei3d.core.scoring.watershed import otsu_watershed
from nuclei3d.stages.evaluation_inputs import OTSU, TrainingFacts, VolumePair, digest_of, read_scores

Task = TypeVar("Task")
Result = TypeVar("Result")

# Below so many voxels in all, starting processes takes longer than they save.
_WORTH_PROCESSES = 200_000_000


def assess_pairs(
    params: Params, pairs: Sequence[VolumePair], facts: TrainingFacts, method: str
) -> tuple[dict[str, list[Assessment]], list[str]]:
    """Assess the model, the given baselines and, where there are images, Otsu's watershed.

    Each process holds one volume at a time.

    Parameters
    ----------
    facts
        The diameter of nuclei for the watershed; None there: the median of the true nuclei.
    method
        Name of the model.

    Returns
    -------
    assessed
        Per method its assessments, in the order of `pairs`; the model first.
    digests
        Fingerprints of the true labels.
    """
    results = _map("evaluate", partial(_assess_methods, params=params, method=method), pairs)
    digests = [digest for digest, _ in results]
    assessed = {name: [found[name] for _, found in results] for name in (method, *pairs[0].baselines)}
    diameter_um = facts.nucleus_diameter_um or _median_diameter_um(assessed[method])
    possible = all(pair.physical and pair.image is not None for pair in pairs)
    if "otsu" in params.evaluate.baselines and possible and diameter_um is not None:
        tasks = [(pair, own.true.contrast) for pair, own in zip(pairs, assessed[method], strict=True)]
        work = partial(_assess_otsu, params=params, diameter_um=diameter_um)
        assessed[OTSU] = _map("Otsu baseline", work, tasks)
    return assessed, digests


def _map(words: str, work: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
    voxels = sum(int(np.prod(_pair_of(task).truth.frame.shape)) for task in tasks)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(usable, len(tasks)) if voxels >= _WORTH_PROCESSES else 1
    results: list[Result] = []
    with progress_bar(words, total=len(tasks)) as bar:
        if workers == 1:
            for task in tasks:
                results.append(work(task))
                bar.advance()
        else:
            # spawned, not forked: threads of numerical libraries do not survive a fork
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                for result in pool.map(work, tasks):
                    results.append(result)
                    bar.advance()
    return results


def _pair_of(task: object) -> VolumePair:
    pair = task[0] if isinstance(task, tuple) else task
    assert isinstance(pair, VolumePair)
    return pair


def _assess_methods(pair: VolumePair, params: Params, method: str) -> tuple[str, dict[str, Assessment]]:
    true = pair.read_truth()
    image = pair.read_image() if pair.physical else None
    found: dict[str, Assessment] = {}
    for name, entry in {method: pair.pred, **pair.baselines}.items():
        found[name] = assess_volume(
            true,
            pair.read_prediction(entry, true.shape),
            pair.voxel_size,
            image=image,
            scores=read_scores(entry),
            thresholds=params.evaluate.thresholds,
            surfaces=params.evaluate.surface_distances,
            true_contrast=found[method].true.contrast if found else None,
        )
    return digest_of(true), found


def _assess_otsu(
    task: tuple[VolumePair, NDArray[np.float64]], params: Params, diameter_um: float
) -> Assessment:
    pair, true_contrast = task
    image = pair.read_image()
    assert image is not None
    return assess_volume(
        pair.read_truth(),
        otsu_watershed(image, pair.voxel_size, diameter_um),
        pair.voxel_size,
        image=image,
        thresholds=params.evaluate.thresholds,
        surfaces=params.evaluate.surface_distances,
        true_contrast=true_contrast,
    )


def _median_diameter_um(assessments: Sequence[Assessment]) -> float | None:
    volumes = np.concatenate([assessment.true.volume_um3 for assessment in assessments])
    return float((6 / np.pi * np.median(volumes)) ** (1 / 3)) if len(volumes) else None
