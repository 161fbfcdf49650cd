"""Small labelled volumes of touching balls, and sets of them for tests of the 3D training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.flows import flows_3d
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.training.samples import (
    SampleArrays,
    SampleInfo,
    SampleNuclei,
    SampleSet,
    SampleView,
    measure_flow_power,
    quantise_flows,
    quantise_image,
)

UNKNOWN_NUCLEI = SampleNuclei(np.empty((0, 3), np.float32), np.empty(0, np.float32), np.empty(0, np.float32))


def stack_samples(
    infos: Sequence[SampleInfo],
    images: Sequence[NDArray[np.generic]],
    labels: Sequence[NDArray[np.integer[Any]]],
    flows: Sequence[NDArray[np.floating[Any]]],
    nuclei: Sequence[SampleNuclei] | None = None,
) -> SampleSet:
    """Pack samples given as arrays: images and labels (Z, Y, X), flows (components, Z, Y, X) from -1 to 1."""
    stored = [quantise_image(image) for image in images]
    arrays = [
        SampleArrays(
            np.ascontiguousarray(pixels), sample_labels.astype(np.uint16), quantise_flows(sample_flows)
        )
        for (pixels, _, _), sample_labels, sample_flows in zip(stored, labels, flows, strict=True)
    ]
    power = [measure_flow_power(*each) for each in zip(flows, labels, strict=True)]
    return SampleSet(
        infos=tuple(infos),
        step=np.array([step for _, step, _ in stored]),
        offset=np.array([offset for _, _, offset in stored]),
        nuclei=tuple(nuclei) if nuclei is not None else (UNKNOWN_NUCLEI,) * len(infos),
        flow_power=np.array(power, dtype=np.float64).reshape(-1, 3),
        read=arrays.__getitem__,
    )


def sample_info(
    view: SampleView,
    labels: NDArray[np.integer[Any]],
    voxel_size: VoxelSize,
    number: int = 0,
    part: str = "train",
    embryo: str = "e1",
) -> SampleInfo:
    """Describe a sample (Z, Y, X); planes have a number in their frame, volumes are a frame each."""
    frame = f"t{number:03d}" if view == "volume" else "t000"
    return SampleInfo(
        file=f"{part}/{embryo}_{frame}" + ("" if view == "volume" else f"_{view}_{number:04d}"),
        embryo=embryo,
        frame=frame,
        view=view,
        index=0 if view == "volume" else number,
        nuclei=len(np.unique(labels)) - 1,
        min_contrast=2.0 + number,
        norm_low=50.0,
        norm_high=450.0,
        shape=labels.shape,
        voxel_size=voxel_size,
    )


def draw_volume(
    rng: np.random.Generator,
    voxel_size: VoxelSize,
    shape: tuple[int, int, int],
    nuclei: int = 8,
    diameter_um: float = 12.0,
) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Draw a noisy image of balls, some touching, and its labels 1..n without gaps."""
    edges = np.array(voxel_size.zyx)
    at = (np.stack(np.indices(shape), axis=-1) + 0.5) * edges
    labels = np.zeros(shape, np.uint16)
    centres: list[NDArray[np.float64]] = []
    for _ in range(200 * nuclei):
        centre = rng.uniform(0.35 * diameter_um, np.array(shape) * edges - 0.35 * diameter_um)
        if len(centres) < nuclei and all(np.linalg.norm(centre - o) > 0.95 * diameter_um for o in centres):
            centres.append(centre)
    distance = np.full(shape, diameter_um / 2)
    for number, centre in enumerate(centres, start=1):
        own = np.linalg.norm(at - centre, axis=-1)
        labels[own < distance] = number
        distance = np.minimum(distance, own)
    brightness = np.concatenate([[0], rng.uniform(150, 400, len(centres))])
    return rng.poisson(50 + brightness[labels]).astype(np.uint16), labels


def nucleus_table(labels: NDArray[np.uint16], voxel_size: VoxelSize) -> SampleNuclei:
    numbers = range(1, int(labels.max()) + 1)
    where = [np.argwhere(labels == number) for number in numbers]
    return SampleNuclei(
        np.array([each.mean(axis=0) + 0.5 for each in where], np.float32).reshape(-1, 3),
        np.array([len(each) * voxel_size.volume_um3 for each in where], np.float32),
        np.arange(len(where), dtype=np.float32) + 1,
    )


def make_volumes(
    count: int = 2,
    voxel_size: VoxelSize = VoxelSize(2.0, 1.0, 1.0),
    shape: tuple[int, int, int] = (20, 40, 40),
    seed: int = 0,
    **settings: float,
) -> SampleSet:
    """Make a set of volumes."""
    rng = np.random.default_rng(seed)
    drawn = [draw_volume(rng, voxel_size, shape, **settings) for _ in range(count)]
    return stack_samples(
        [sample_info("volume", labels, voxel_size, number) for number, (_, labels) in enumerate(drawn)],
        [image for image, _ in drawn],
        [labels for _, labels in drawn],
        [flows_3d(labels, voxel_size) for _, labels in drawn],
        [nucleus_table(labels, voxel_size) for _, labels in drawn],
    )
