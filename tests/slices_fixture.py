"""A small slice data set, made as prepare makes it, and planes for tests of the training."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.flows import flows_2d
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.stages.training_data import SliceSummary, describe_samples, plane_flows, store_sample
from nuclei3d.training.samples import SampleInfo, SampleSet, SampleView
from nuclei3d.views import VIEWS
from volumes_fixture import sample_info, stack_samples


def draw_plane(
    rng: np.random.Generator, size: int = 64, nuclei: int = 9, radius: float = 7.0
) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Draw an image of noisy discs, some touching, and its labels 1..n without gaps."""
    y, x = np.mgrid[:size, :size]
    labels = np.zeros((size, size), np.uint16)
    for _ in range(nuclei):
        cy, cx = rng.uniform(0, size, 2)
        disc = (y - cy) ** 2 + (x - cx) ** 2 < (radius * rng.uniform(0.8, 1.2)) ** 2
        labels[disc & (labels == 0)] = labels.max() + 1
    labels = np.unique(labels, return_inverse=True)[1].reshape(labels.shape).astype(np.uint16)
    brightness = np.concatenate([[0], rng.uniform(100, 400, int(labels.max()))])
    return rng.poisson(50 + brightness[labels]).astype(np.uint16), labels


def plane_info(view: SampleView, labels: NDArray[np.uint16], *place: Any) -> SampleInfo:
    """Describe a plane (Y, X); what follows is its number, part and embryo."""
    return sample_info(view, labels[None], VoxelSize(0.5, 0.5, 0.5), *place)


def one_plane(image: NDArray[np.uint16], labels: NDArray[np.uint16], view: SampleView = "xy") -> SampleSet:
    """Make a set of one plane (Y, X)."""
    return stack_samples(
        [plane_info(view, labels)], [image[None]], [labels[None]], [flows_2d(labels)[:, None]]
    )


def make_planes(count: int = 6, size: int = 64, seed: int = 0, nuclei: int = 9) -> SampleSet:
    """Make planes of the three views in turn."""
    rng = np.random.default_rng(seed)
    drawn = [draw_plane(rng, size, nuclei) for _ in range(count)]
    return stack_samples(
        [plane_info(VIEWS[i % 3], labels, i) for i, (_, labels) in enumerate(drawn)],
        [image[None] for image, _ in drawn],
        [labels[None] for _, labels in drawn],
        [flows_2d(labels)[:, None] for _, labels in drawn],
    )


def write_slices(folder: Path, train: int = 6, validation: int = 3, size: int = 64, seed: int = 0) -> Path:
    """Write a slice data set as prepare does."""
    rng = np.random.default_rng(seed)
    samples = []
    for part, embryo, count in (("train", "e1", train), ("validation", "e2", validation)):
        (folder / part).mkdir(parents=True)
        for number in range(count):
            image, labels = draw_plane(rng, size)
            info = plane_info(VIEWS[number % 3], labels, number, part, embryo)
            flows = plane_flows(labels)[:, None]
            samples.append(store_sample(folder, part, info, image[None], labels[None], flows))
    summary = SliceSummary(
        data=Path("absent"),
        nucleus_diameter_um=7.0,
        voxel_um=0.5,
        diameter_px=14.0,
        contrast_quintiles=(1.0, 2.0, 3.0, 4.0),
        md5=hashlib.md5("".join(sample.md5 for sample in samples).encode()).hexdigest(),
    )
    describe_samples(folder, summary, samples)
    return folder
