"""Contrast is the signal over the noise of the surroundings, whatever the voxels."""

import numpy as np
import pytest
from numpy.typing import NDArray

from nuclei3d.errors import InputError
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.scoring.contrast import contrast_bin, contrast_edges, nucleus_contrast


def ball(
    shape: tuple[int, int, int], centre_um: float, radius_um: float, size: VoxelSize
) -> NDArray[np.bool_]:
    grid = np.meshgrid(*(np.arange(n) * e for n, e in zip(shape, size.zyx, strict=True)), indexing="ij")
    mask: NDArray[np.bool_] = sum((axis - centre_um) ** 2 for axis in grid) <= radius_um**2
    return mask


@pytest.mark.parametrize(
    "size", [VoxelSize(0.5, 0.5, 0.5), VoxelSize(2.0, 0.4, 0.4), VoxelSize(1.75, 0.8, 0.8)]
)
def test_contrast_is_signal_over_noise_at_any_anisotropy(size: VoxelSize) -> None:
    shape = tuple(int(24 / edge) for edge in size.zyx)
    mask = ball(shape, 12.0, 6.0, size)
    rng = np.random.default_rng(0)
    image = 100 + rng.normal(0, 5, shape) + 40 * mask
    contrast = nucleus_contrast(image, mask.astype(np.uint16), size)
    assert np.isnan(contrast[0])
    # the MAD of a few hundred voxels is known to some per cent
    assert contrast[1] == pytest.approx(40 / 5, rel=0.1)


def test_contrast_does_not_see_the_rim_nor_neighbours_nor_what_is_far() -> None:
    size = VoxelSize(0.5, 0.5, 0.5)
    mask = ball((48, 48, 48), 12.0, 5.0, size)
    rng = np.random.default_rng(1)
    plain = 100 + rng.normal(0, 5, mask.shape) + 50 * mask
    labels = mask.astype(np.uint16)
    expected = nucleus_contrast(plain, labels, size)[1]
    # a rim of other intensity, within 1 um of the surface on either side, less a voxel for its roughness
    rim = ball(mask.shape, 12.0, 5.5, size) & ~ball(mask.shape, 12.0, 4.5, size)
    # bright things farther away than 2 um
    far = ~ball(mask.shape, 12.0, 8.0, size)
    changed = plain.copy()
    changed[rim], changed[far] = 1000, 5000
    assert nucleus_contrast(changed, labels, size)[1] == expected
    # a bright neighbour that touches the shell is no background once it is labelled
    neighbour = (np.indices(mask.shape)[2] > 36) & ~mask
    changed = plain.copy()
    changed[neighbour] = 3000
    labels[neighbour] = 2
    assert nucleus_contrast(changed, labels, size)[1] == pytest.approx(expected, rel=0.15)


def test_contrast_does_not_change_with_gain_and_offset() -> None:
    size = VoxelSize(1.0, 0.5, 0.5)
    mask = ball((24, 48, 48), 12.0, 5.0, size)
    image = 100 + np.random.default_rng(2).normal(0, 5, mask.shape) + 20 * mask
    labels = mask.astype(np.uint16)
    np.testing.assert_allclose(
        nucleus_contrast(image, labels, size), nucleus_contrast(7 * image - 300, labels, size)
    )


def test_a_nucleus_darker_than_its_surroundings_has_negative_contrast() -> None:
    size = VoxelSize(1, 1, 1)
    mask = ball((20, 20, 20), 10.0, 4.0, size)
    image = 100 + np.random.default_rng(3).normal(0, 5, mask.shape) - 30 * mask
    assert nucleus_contrast(image, mask.astype(np.uint8), size)[1] < -4


def test_crowded_tiny_flat_and_absent_nuclei_are_defined_or_nan() -> None:
    size = VoxelSize(1, 1, 1)
    labels = np.zeros((12, 12, 12), dtype=np.uint16)
    labels[5, 5, 5] = 2
    flat = np.zeros(labels.shape, dtype=np.uint16)
    flat[5, 5, 5] = 100
    contrast = nucleus_contrast(flat, labels, size)
    assert np.isnan(contrast[1])
    assert np.isfinite(contrast[2])
    assert contrast[2] > 100
    full = np.ones((6, 6, 6), dtype=np.uint16)
    full[:, :, 3:] = 2
    assert np.isnan(nucleus_contrast(flat[:6, :6, :6], full, size)).all()


def test_bins_hold_a_fifth_each_and_keep_undefined_apart() -> None:
    contrast = np.append(np.random.default_rng(4).lognormal(size=1000), [np.nan, np.nan])
    edges = contrast_edges(contrast)
    bins = contrast_bin(contrast, edges)
    assert list(np.bincount(bins[bins >= 0])) == [200] * 5
    assert (bins[-2:] == -1).all()
    assert bins[np.nanargmin(contrast)] == 0
    assert bins[np.nanargmax(contrast)] == 4


def test_images_that_do_not_fit_and_nuclei_without_contrast_are_refused() -> None:
    with pytest.raises(InputError, match="shape"):
        nucleus_contrast(np.zeros((2, 3, 4)), np.zeros((2, 3, 5), int), VoxelSize(1, 1, 1))
    with pytest.raises(InputError, match="contrast"):
        contrast_edges(np.array([np.nan]))
