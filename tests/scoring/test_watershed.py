"""The baseline finds bright balls, cuts touching ones, and leaves noise-free emptiness alone."""

from pathlib import Path

import numpy as np
import pytest
import tifffile

from nuclei3d.errors import InputError
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.scoring.watershed import otsu_watershed
from scores_fixture import score_volumes


@pytest.mark.parametrize("size", [VoxelSize(0.5, 0.5, 0.5), VoxelSize(2.0, 0.5, 0.5)])
def test_touching_balls_are_told_apart(size: VoxelSize) -> None:
    shape = (int(24 / size.z), 64, 80)
    grid = np.meshgrid(*(np.arange(n) * e for n, e in zip(shape, size.zyx, strict=True)), indexing="ij")
    truth = np.zeros(shape, dtype=np.uint16)
    for label, centre in enumerate([(12, 10, 10), (12, 10, 19), (12, 22, 14), (12, 22, 31)], start=1):
        truth[sum((axis - c) ** 2 for axis, c in zip(grid, centre, strict=True)) <= 25] = label
    rng = np.random.default_rng(0)
    image = rng.poisson(np.where(truth > 0, 200, 20)).astype(np.uint16)
    labels = otsu_watershed(image, size, 10.0)
    metrics = score_volumes([truth], [labels])
    assert metrics.ap_at(0.75) == 1
    assert sorted(np.unique(labels)) == [0, 1, 2, 3, 4]


def test_a_constant_image_has_no_nuclei() -> None:
    labels = otsu_watershed(np.full((5, 6, 7), 9, dtype=np.uint8), VoxelSize(1, 1, 1), 3.0)
    assert labels.shape == (5, 6, 7)
    assert not labels.any()


def test_a_percentile_between_two_grey_values_is_no_trouble() -> None:
    # rounded to single precision it lies above the darkest voxels, whose root would be undefined
    image = np.random.default_rng(0).integers(20, 40, (5, 20, 20)).astype(np.float64)
    image.ravel()[:20] = np.linspace(19.1, 19.3, 20)
    image[1:4, 5:15, 5:15] += 200
    assert otsu_watershed(image, VoxelSize(1, 1, 1), 8.0).max() == 1


def test_a_plane_is_refused() -> None:
    with pytest.raises(InputError, match="volume"):
        otsu_watershed(np.zeros((5, 5)), VoxelSize(1, 1, 1), 3.0)


def test_a_real_embryo_is_found_about_as_well_as_published_for_such_baselines(bbbc050: Path) -> None:
    # science: an Otsu watershed reaches AP .65 on other embryos of the collection
    truths, predictions = [], []
    for frame in ("t351", "t401", "t451"):
        truths.append(tifffile.imread(bbbc050 / "Emb11" / "labels" / f"{frame}.tif"))
        image = tifffile.imread(bbbc050 / "Emb11" / "images" / f"{frame}.tif")
        predictions.append(otsu_watershed(image, VoxelSize(1.75, 0.8, 0.8), 14.0))
    assert 0.5 < score_volumes(truths, predictions).ap_at(0.5) < 0.85
