"""The diameter of nuclei from the image alone."""

from math import prod
from pathlib import Path

import numpy as np
import pytest

from nuclei3d.diameter import estimate_diameter, estimate_from_blocks, smooth_over_time
from nuclei3d.images.frames import read_labels, read_volume
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.intensity import measure_range, sampled_planes


def domes(
    shape: tuple[int, int, int],
    voxel_size: VoxelSize,
    diameter_um: float,
    within_um: tuple[float, float, float] | None = None,
) -> np.ndarray:
    """Nuclei, 1.5 diameters apart, that fall off from their middle, in noise."""
    extent = within_um or [n * e for n, e in zip(shape, voxel_size.zyx, strict=True)]
    image = np.zeros(shape, np.float32)
    z, y, x = (
        ((np.arange(n) + 0.5) * e).reshape([-1 if a == axis else 1 for a in range(3)])
        for axis, (n, e) in enumerate(zip(shape, voxel_size.zyx, strict=True))
    )
    centres = np.stack(
        np.meshgrid(*(np.arange(diameter_um, e - diameter_um / 2, 1.5 * diameter_um) for e in extent)), -1
    ).reshape(-1, 3)
    for centre in centres:
        squared = (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2
        image = np.maximum(image, 1 - 4 * squared / diameter_um**2)
    noise = np.random.default_rng(0).normal(100, 5, shape)
    return (noise + 200 * image).astype(np.uint16)


@pytest.mark.parametrize(
    ("voxel_size", "diameter_um"),
    [
        (VoxelSize(0.5, 0.5, 0.5), 8),
        (VoxelSize(2.0, 0.35, 0.35), 9),
        (VoxelSize(0.2, 0.1, 0.1), 2),
    ],
    ids=str,
)
def test_the_diameter_is_found_whatever_the_voxels(voxel_size, diameter_um):
    shape = tuple(round(4.5 * diameter_um / edge) for edge in voxel_size.zyx)
    found = estimate_diameter(domes(shape, voxel_size, diameter_um), voxel_size)
    assert found.diameter_um == pytest.approx(diameter_um, rel=0.15)
    assert abs(found.diameter_um - diameter_um) < 2 * found.error_um
    assert found.nuclei >= 8


@pytest.mark.parametrize("value", [0, 100], ids=["black", "noise"])
def test_where_nothing_stands_out_nothing_is_said(value):
    noise = np.random.default_rng(0).normal(value, value / 20, (24, 80, 80))
    assert estimate_diameter(noise, VoxelSize(1, 0.5, 0.5)) is None


def test_fill_changes_nothing():
    voxel_size = VoxelSize(1, 0.5, 0.5)
    image = domes((40, 80, 80), voxel_size, 9)
    padded = np.pad(image, ((0, 0), (30, 0), (0, 30)))
    found, expected = (estimate_diameter(each, voxel_size).diameter_um for each in (padded, image))
    assert found == pytest.approx(expected, rel=0.05)


def test_of_a_large_volume_only_blocks_with_nuclei_are_read(monkeypatch):
    monkeypatch.setattr("nuclei3d.diameter._BLOCK_VOXELS", 250_000)
    voxel_size = VoxelSize(1, 0.5, 0.5)
    # nuclei in a corner alone
    image = domes((40, 400, 400), voxel_size, 9, within_um=(40, 40, 40))
    read = []

    def read_block(box):
        read.append(image[box])
        return read[-1]

    planes = image[:: sampled_planes(image.shape).step]
    found = estimate_from_blocks(
        read_block, image.shape, planes, voxel_size, measure_range(planes, sampled=True)
    )
    assert found.diameter_um == pytest.approx(9, rel=0.15)
    assert sum(prod(block.shape) for block in read) <= 3 * 250_000
    assert read[0].max() > 250


def test_over_time_a_frame_that_says_little_is_forgotten():
    times = [0, 2, 4, 6, 8, 10]
    smooth = smooth_over_time(times, [24, 24, 5, 24, 12, 12], 11)
    assert len(smooth) == 11
    assert smooth[:3] == pytest.approx(24, rel=0.1)
    assert smooth[-1] == pytest.approx(12, rel=0.1)
    assert (np.diff(smooth) <= 1e-9).all()
    assert smooth_over_time([0], [9.0], 1) == pytest.approx(9)


@pytest.mark.parametrize(("embryo", "frame"), [("Emb04", "t101"), ("Emb02", "t451")])
def test_on_real_embryos_it_is_near_the_labels(bbbc050: Path, embryo, frame):
    image, voxel_size = read_volume(bbbc050 / embryo / "images" / f"{frame}.tif")
    voxels = np.bincount(read_labels(bbbc050 / embryo / "labels" / f"{frame}.tif").ravel())[1:]
    true_um = np.median((6 / np.pi * voxels[voxels > 0] * voxel_size.volume_um3) ** (1 / 3))
    assert estimate_diameter(image, voxel_size).diameter_um == pytest.approx(true_um, rel=0.15)
