"""The diameter of nuclei from the image alone."""

from pathlib import Path

import numpy as np
import pytest

from nuclei3d.diameter import choose_blocks, estimate_diameter, smooth_over_time
from nuclei3d.images.frames import read_labels, read_volume
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.intensity import measure_boxes, measure_range, sampled_boxes


def domes(
    shape: tuple[int, int, int],
    voxel_size: VoxelSize,
    diameter_um: float,
    within_um: tuple[float, float, float] | None = None,
    noise: float = 5,
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
    background = np.random.default_rng(0).normal(10 * noise + 50, noise, shape)
    return (background + 200 * image).astype(np.uint16)


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


@pytest.mark.parametrize("noise", [50, 100])
def test_nuclei_in_noise_are_seen(noise):
    voxel_size = VoxelSize(1, 0.5, 0.5)
    found = estimate_diameter(domes((36, 72, 72), voxel_size, 9, noise=noise), voxel_size)
    assert found.diameter_um == pytest.approx(9, rel=0.15)
    assert found.nuclei >= 6


def test_a_layer_of_nuclei_in_a_deep_volume_is_found(monkeypatch):
    monkeypatch.setattr("nuclei3d.intensity._MAX_SAMPLES", 1_000_000)
    monkeypatch.setattr("nuclei3d.diameter._BLOCK_VOXELS", 250_000)
    voxel_size = VoxelSize(1, 0.5, 0.5)
    image = np.random.default_rng(0).normal(100, 5, (160, 256, 256)).astype(np.uint16)
    image[55:79] = domes((24, 256, 256), voxel_size, 9)
    assert estimate_diameter(image, voxel_size).diameter_um == pytest.approx(9, rel=0.15)


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
    boxes = sampled_boxes(image.shape)
    parts = [image[box] for box in boxes]
    intensity = measure_boxes(parts)
    chosen = choose_blocks(image.shape, boxes, parts, voxel_size, intensity)
    blocks = [image[box] for box in chosen]
    assert sum(block.size for block in blocks) <= 3 * 250_000
    assert blocks[0].max() > 250
    assert estimate_diameter(image, voxel_size).diameter_um == pytest.approx(9, rel=0.15)


def test_over_time_a_frame_that_says_little_is_forgotten():
    times = [0, 2, 4, 6, 8, 10]
    smooth = smooth_over_time(times, [24, 24, 5, 24, 12, 12], 11)
    assert len(smooth) == 11
    assert smooth[:3] == pytest.approx(24, rel=0.1)
    assert smooth[-1] == pytest.approx(12, rel=0.1)
    assert (np.diff(smooth) <= 1e-9).all()
    assert smooth_over_time([0], [9.0], 1) == pytest.approx(9)


def test_noise_and_neighbours_change_nothing_on_a_real_embryo(bbbc050: Path, monkeypatch):
    monkeypatch.setattr("nuclei3d.intensity._MAX_SAMPLES", 2_000_000)
    image, voxel_size = read_volume(bbbc050 / "Emb08" / "images" / "t351.tif")
    alone = estimate_diameter(image, voxel_size).diameter_um
    noise = 4 * measure_range(image).noise
    noisy = np.random.default_rng(0).normal(image, noise).clip(0).astype(np.uint16)
    assert estimate_diameter(noisy, voxel_size).diameter_um == pytest.approx(alone, rel=0.05)
    mosaic = np.tile(image, (1, 3, 3))
    assert estimate_diameter(mosaic, voxel_size).diameter_um == pytest.approx(alone, rel=0.1)


@pytest.mark.parametrize(("embryo", "frame"), [("Emb04", "t101"), ("Emb02", "t451")])
def test_on_real_embryos_it_is_near_the_labels(bbbc050: Path, embryo, frame):
    image, voxel_size = read_volume(bbbc050 / embryo / "images" / f"{frame}.tif")
    voxels = np.bincount(read_labels(bbbc050 / embryo / "labels" / f"{frame}.tif").ravel())[1:]
    true_um = np.median((6 / np.pi * voxels[voxels > 0] * voxel_size.volume_um3) ** (1 / 3))
    assert estimate_diameter(image, voxel_size).diameter_um == pytest.approx(true_um, rel=0.15)
