"""The work of one block: read, segment, and leave labels and scores in the folder of intermediate results."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nuclei3d.core.networks import choose_device
from nuclei3d.core.segmentation.blocks import Box
from nuclei3d.core.segmentation.prediction import label_volume
from nuclei3d.core.segmentation.settings import SegmentationSettings
from nuclei3d.models.folder import load_model
from nuclei3d.volumes.checks import check_image
from nuclei3d.volumes.frames import Frame
from nuclei3d.volumes.whole import whole_file


@dataclass(frozen=True)
class BlockTask:
    """All that a worker needs for one block, and where its results are.

    Attributes
    ----------
    frame
        The whole volume.
    outer
        The box of it that is read and segmented.
    weights
        File of the model.
    orthogonal_weights
        File of another model for the xz and yz planes.
    volume_weights
        File of the 3D model of mode ``mixed``.
    settings
        With the range of intensities of the whole frame.
    device
        ``auto``, ``cpu`` or ``cuda``.
    threads
        For torch; None for all.
    labels_file
        Appears when the block is done.
    """

    frame: Frame
    outer: Box
    weights: Path
    orthogonal_weights: Path | None
    volume_weights: Path | None
    settings: SegmentationSettings
    device: str
    threads: int | None
    labels_file: Path

    @property
    def scores_file(self) -> Path:
        """Where the scores go."""
        return self.labels_file.with_name(f"{self.labels_file.stem}_scores.npy")

    @property
    def is_done(self) -> bool:
        """Whether the block was segmented, now or by a run before."""
        return self.labels_file.is_file() and self.scores_file.is_file()

    def open_labels(self) -> NDArray[np.uint32]:
        """Open the labels (z, y, x) of the outer box; they stay on disk."""
        labels: NDArray[np.uint32] = np.load(self.labels_file, mmap_mode="r", allow_pickle=False)
        return labels

    def read_scores(self) -> NDArray[np.float32]:
        """Read the score of each label; entry 0 is unused."""
        scores: NDArray[np.float32] = np.load(self.scores_file, allow_pickle=False)
        return scores


def segment_block(task: BlockTask) -> int:
    """Segment one block and write its labels and scores; runs in a worker.

    Returns
    -------
    int
        Number of nuclei.
    """
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    image = task.frame.read_block(task.outer)
    check_image(image, str(task.frame.path))
    labels, scores, _ = label_volume(
        image,
        task.frame.require_voxel_size(),
        _network(task.weights),
        task.settings,
        choose_device(task.device),
        orthogonal_network=_network(task.orthogonal_weights) if task.orthogonal_weights else None,
        volume_network=_network(task.volume_weights) if task.volume_weights else None,
    )
    with whole_file(task.scores_file) as partial, partial.open("wb") as file:
        np.save(file, scores, allow_pickle=False)
    with whole_file(task.labels_file) as partial, partial.open("wb") as file:
        np.save(file, labels, allow_pickle=False)
    return len(scores) - 1


@lru_cache(maxsize=3)
def _network(weights: Path) -> Any:
    return load_model(weights).network
