"""Labels as programs spoil them are recognised, good ones pass."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import zoom

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.scoring.alignment import label_offset_um
from nuclei3d.scoring.plausibility import find_label_faults
from volumes_fixture import draw_volume

VOXEL = VoxelSize(2.0, 1.0, 1.0)
IMAGE, LABELS = draw_volume(np.random.default_rng(3), VOXEL, (24, 64, 64), nuclei=16)


def kinds(labels: NDArray[np.integer]) -> list[str]:  # type: ignore[type-arg]
    return [fault.kind for fault in find_label_faults(labels, VOXEL)]


def plane_by_plane(start_anew: bool) -> NDArray[np.int64]:
    result, last = np.zeros(LABELS.shape, np.int64), 0
    for z, plane in enumerate(LABELS):
        there, numbers = np.unique(plane, return_inverse=True)
        own = numbers.reshape(plane.shape)
        result[z] = np.where(own > 0, own + (0 if start_anew else last), 0)
        last += len(there) - 1
    return result


def interpolated(*factors: float) -> NDArray[np.int64]:
    return np.rint(zoom(10.0 * LABELS, factors, order=1)).astype(np.int64)


def with_crumbs() -> NDArray[np.uint16]:
    labels = LABELS.copy()
    z, y, x = np.argwhere(labels[2:-2, 2:-2, 2:-2] == 0)[500] + 2
    labels[z, y, x] = 99
    return labels


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (IMAGE, "intensities"),
        (255 * (LABELS > 0), "binary"),
        (LABELS + 1, "background"),
        (plane_by_plane(start_anew=True), "planes"),
        (plane_by_plane(start_anew=False), "planes"),
        (interpolated(1, 2, 2), "interpolated"),
        (interpolated(3, 1, 1), "interpolated"),
        (np.where(LABELS == 2, 1, LABELS), "pieces"),
        (with_crumbs(), "crumbs"),
    ],
)
def test_a_fault_is_named(labels: NDArray[np.integer], kind: str) -> None:  # type: ignore[type-arg]
    assert kinds(labels) == [kind]


@pytest.mark.parametrize("labels", [LABELS, np.zeros_like(LABELS), LABELS * (LABELS == 3), 1000 * LABELS])
def test_good_labels_pass(labels: NDArray[np.uint16]) -> None:
    assert kinds(labels) == []


def test_crumbs_that_are_left_out_anyway_are_not_said() -> None:
    (fault,) = find_label_faults(with_crumbs(), VOXEL)
    assert "99" in fault.words
    assert find_label_faults(with_crumbs(), VOXEL, min_volume_um3=3.0) == []


def test_an_offset_of_the_labels_is_measured_in_um() -> None:
    still = label_offset_um(IMAGE, LABELS, VOXEL)
    assert still == pytest.approx([0, 0, 0], abs=0.15)
    moved = label_offset_um(IMAGE, np.roll(LABELS, (1, 2, -1), (0, 1, 2)), VOXEL)
    assert moved == pytest.approx([2, 2, -1], abs=0.25)


def test_there_is_no_offset_without_nuclei() -> None:
    assert label_offset_um(IMAGE, np.zeros_like(LABELS), VOXEL) is None
