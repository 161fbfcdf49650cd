"""Measurements of nuclei against scikit-image and closed forms."""

import numpy as np
import pytest
from skimage.measure import regionprops

from nuclei3d.errors import InputError
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.segmentation.masks import measure_nuclei

VOXEL = VoxelSize(2.0, 0.5, 0.25)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.int32, ">u2", np.float16])
def test_measurements_equal_those_of_scikit_image(dtype) -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 4, 9], (5, 8, 11)).astype(np.uint32)
    image = rng.integers(0, 200, labels.shape).astype(dtype)
    scores = np.linspace(0, 0.9, 10)
    nuclei = measure_nuclei(labels, image, VOXEL, scores)
    expected = regionprops(labels.astype(int), image.astype(float), spacing=VOXEL.zyx)
    assert [n.label for n in nuclei] == [1, 4, 9]
    for nucleus, region in zip(nuclei, expected, strict=True):
        assert (nucleus.z_um, nucleus.y_um, nucleus.x_um) == pytest.approx(region.centroid)
        assert nucleus.volume_um3 == pytest.approx(region.area)
        assert nucleus.mean_intensity == pytest.approx(region.intensity_mean)
        assert nucleus.score == pytest.approx(scores[nucleus.label])


def test_no_labels_give_no_nuclei() -> None:
    empty = np.zeros((2, 3, 4), np.uint32)
    assert measure_nuclei(empty, empty, VOXEL, np.zeros(1)) == []


def test_shapes_and_scores_that_do_not_fit_are_refused() -> None:
    labels = np.ones((2, 3, 4), np.uint32)
    with pytest.raises(InputError, match="one shape"):
        measure_nuclei(labels, labels[:1], VOXEL, np.zeros(2))
    with pytest.raises(InputError, match="1 scores for labels up to 1"):
        measure_nuclei(labels, labels, VOXEL, np.zeros(1))
