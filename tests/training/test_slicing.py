import numpy as np
import pytest

from nuclei3d.errors import InputError
from nuclei3d.images.embryos import LabelledVolume
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.training.slicing import (
    cut_planes,
    downsample,
    drop_slivers,
    drop_small_labels,
    sphere_diameter_um,
)


def columns_of_nuclei(shape: tuple[int, int, int], count: int) -> np.ndarray:
    """Boxes side by side in x, through all of z and y."""
    labels = np.zeros(shape, np.uint32)
    width = shape[2] // count
    for k in range(count):
        labels[:, :, k * width : (k + 1) * width - 2] = k + 1
    return labels


def labelled(labels: np.ndarray, *zyx: float) -> LabelledVolume:
    return LabelledVolume(labels.astype(np.uint16), labels, VoxelSize(*(zyx or (1, 1, 1))))


def test_the_recipe_gives_the_number_of_planes_that_its_rule_predicts() -> None:
    # shaped like the recipe's at a quarter of its width: anisotropy 11.5, 2x down in xy, 5.75x up in z
    labels = columns_of_nuclei((12, 128, 128), 4)
    volume = labelled(labels, 2.0, 0.174, 0.174)
    volume = downsample(volume, 2.0, isotropic=True)
    assert volume.labels.shape == (69, 64, 64)
    planes = list(cut_planes(volume, {"xy": 1, "xz": 12, "yz": 12}, min_nuclei=3, min_area_px=15))
    by_view = {view: sum(plane.view == view for plane in planes) for view in ("xy", "xz", "yz")}
    # every xy plane; xz planes at 6, 18, ... 54; a yz plane cuts one nucleus only
    assert by_view == {"xy": 69, "xz": 5, "yz": 0}
    # 97 frames of this shape: in total
    assert 97 * sum(by_view.values()) == 97 * (69 + len(range(6, 64, 12)))


def test_a_linear_ramp_stays_linear_through_the_resampling() -> None:
    ramp = np.broadcast_to(np.arange(10, dtype=np.float32)[:, None, None], (10, 8, 8))
    volume = LabelledVolume(ramp, np.zeros((10, 8, 8), np.uint32), VoxelSize(3.0, 1.0, 1.0))
    volume = downsample(volume, 1.0, isotropic=True)
    assert volume.image.shape == (30, 8, 8)
    inner = volume.image[2:-2, 4, 4]
    np.testing.assert_allclose(np.diff(inner), 1 / 3, atol=1e-5)


def test_slivers_are_dropped_and_the_rest_renumbered() -> None:
    plane = np.zeros((10, 10), np.uint32)
    plane[:5, :5] = 7
    plane[6, 6] = 8
    plane[6:, :4] = 40
    kept, label_of = drop_slivers(plane, min_area_px=10)
    assert label_of.tolist() == [0, 7, 40]
    np.testing.assert_array_equal(kept > 0, (plane == 7) | (plane == 40))


def test_a_plane_without_background_keeps_its_labels() -> None:
    kept, label_of = drop_slivers(np.full((4, 4), 3, np.uint32), min_area_px=1)
    assert kept.min() == 1
    assert label_of.tolist() == [0, 3]


def test_sparse_planes_are_kept_in_their_share() -> None:
    labels = np.zeros((40, 8, 8), np.uint32)
    volume = labelled(labels)
    planes = list(
        cut_planes(volume, {"xy": 1, "xz": 0, "yz": 0}, min_nuclei=3, min_area_px=1, sparse_share=0.25)
    )
    assert len(planes) == 10
    assert all(plane.nuclei == 0 for plane in planes)


def test_step_zero_means_no_plane() -> None:
    labels = np.zeros((5, 8, 8), np.uint32)
    volume = labelled(labels)
    planes = cut_planes(volume, {"xy": 1, "xz": 0}, min_nuclei=0, min_area_px=1)
    assert [(plane.view, plane.index) for plane in planes] == [("xy", k) for k in range(5)]


def test_small_labels_become_background_and_the_others_keep_their_numbers() -> None:
    labels = np.zeros((4, 8, 8), np.uint16)
    labels[0, 0, :2], labels[1:3, 2:6, 2:6], labels[3, 7, 7] = 3, 5, 9
    kept, dropped = drop_small_labels(labels, VoxelSize(2.0, 0.5, 0.5), 1.1)
    assert (dropped, sorted(np.unique(kept))) == (2, [0, 5])
    assert np.array_equal(kept == 5, labels == 5)
    assert drop_small_labels(labels, VoxelSize(2.0, 0.5, 0.5), 0.0) == (labels, 0)


def test_downsampling_to_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="downsample_xy"):
        downsample(labelled(np.zeros((4, 8, 8), np.uint32)), 100, isotropic=True)


def test_the_diameter_of_a_sphere_of_known_volume() -> None:
    assert sphere_diameter_um(4 / 3 * np.pi * 5**3) == pytest.approx(10)
