"""The order of suspicion: what is unlike the others comes first, with the reason."""

import numpy as np
import pytest
from numpy.typing import NDArray

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.scoring.suspicion import _measure, find_missed, rank_nuclei

SIZE = VoxelSize(2.0, 0.5, 0.5)


def ellipsoid(
    shape: tuple[int, ...], centre: tuple[float, ...], radii: tuple[float, ...]
) -> NDArray[np.bool_]:
    """Voxels whose centres lie in an ellipsoid; centre and radii in um."""
    grid = np.indices(shape).transpose(1, 2, 3, 0) * SIZE.zyx
    return np.asarray((((grid - centre) / radii) ** 2).sum(axis=-1) <= 1)


def six(radius_um: float = 6.0) -> NDArray[np.uint32]:
    labels = np.zeros((16, 64, 96), np.uint32)
    for number in range(6):
        centre = (15.0, 8.0 + 15 * (number // 3), 8.0 + 15 * (number % 3))
        labels[ellipsoid(labels.shape, centre, (radius_um,) * 3)] = 10 * (number + 1)
    return labels


@pytest.mark.parametrize("radii", [(8.0, 8.0, 8.0), (12.0, 4.0, 7.0)])
def test_an_ellipsoid_of_any_axes_is_full(radii: tuple[float, float, float]) -> None:
    labels = ellipsoid((20, 60, 60), (19.0, 15.0, 14.5), radii).astype(np.uint32)
    centre, volume, fullness, cut = _measure(labels, SIZE)
    assert centre[0] == pytest.approx((19.0, 15.0, 14.5), abs=0.1)
    assert volume[0] == pytest.approx(4 / 3 * np.pi * np.prod(radii), rel=0.03)
    assert fullness[0] == pytest.approx(1, abs=0.02)
    assert not cut[0]


def test_two_balls_apart_are_as_empty_as_theory_says() -> None:
    # moments of two balls of radius r at a distance 2a: r^2/5 + a^2 along, r^2/5 across
    radius, apart = 5.0, 10.0
    labels = np.zeros((16, 64, 96), np.uint32)
    for x in (12.0, 12.0 + 2 * apart):
        labels[ellipsoid(labels.shape, (15.0, 15.0, x), (radius,) * 3)] = 1
    ellipsoid_volume = (5**1.5) * np.sqrt((radius**2 / 5 + apart**2) * (radius**2 / 5) ** 2)
    assert _measure(labels, SIZE)[2][0] == pytest.approx(2 * radius**3 / ellipsoid_volume, rel=0.03)


def test_like_nuclei_are_not_suspicious() -> None:
    assert [suspect.reasons for suspect in rank_nuclei(six(), SIZE)] == [()] * 6
    assert rank_nuclei(np.zeros((4, 4, 4), np.uint32), SIZE) == []


def test_what_is_odd_comes_first_with_its_reason() -> None:
    labels = six()
    labels[labels == 40] = 0
    labels[ellipsoid(labels.shape, (15.0, 23.0, 8.0), (3.0,) * 3)] = 40
    labels[labels == 20] = 10  # two nuclei with one number
    score = {10: 0.9, 30: 0.91, 40: 0.9, 50: 0.2, 60: 0.89}
    growth = {10: 1.0, 30: 1.0, 40: 1.0, 50: 1.0}
    agreement = {10: 0.9, 30: 0.1, 40: 0.9, 50: 0.9, 60: 0.9}
    ranked = rank_nuclei(labels, SIZE, score=score, growth=growth, agreement=agreement)
    why = {suspect.label: suspect.reasons for suspect in ranked}
    assert [suspect.oddness for suspect in ranked] == sorted((s.oddness for s in ranked), reverse=True)
    assert set(why[10]) == {"large", "no ellipsoid: two nuclei, or pieces"}
    assert why[30] == ("the model sees it otherwise (IoU 0.10)",)
    assert why[40] == ("small",)
    assert why[50] == ("low score (0.20)",)
    assert why[60] == ("not in the frame before",)
    (cut,) = [suspect for suspect in ranked if suspect.label == 40]
    assert cut.centre_um == pytest.approx((15.0, 23.0, 8.0), abs=0.3)
    assert cut.score == 0.9


def test_what_the_border_cuts_may_be_small() -> None:
    labels = six()
    labels[labels == 60] = 0
    labels[ellipsoid(labels.shape, (15.0, 23.0, 48.5), (5.0,) * 3)] = 60
    assert "small" not in {s.label: s.reasons for s in rank_nuclei(labels, SIZE)}[60]


def test_what_is_missed_is_where_a_nucleus_fits_outside_the_labels_not_their_rinds() -> None:
    truth = six()
    labels = np.where(np.isin(truth, (20, 60)), 0, six(5.0))
    # half of 60 has a mask after all
    labels[:, :, 76:][truth[:, :, 76:] == 60] = 60
    first, second = find_missed(labels, truth > 0, SIZE, 12.0)
    assert first.label == second.label == 0
    assert first.centre_um == pytest.approx((15.0, 8.0, 23.0), abs=1.0)
    assert (first.volume_um3 * 3 / 4 / np.pi) ** (1 / 3) == pytest.approx(6.0, abs=1.0)
    assert second.centre_um[1:] == pytest.approx((23.0, 35.0), abs=1.0)
    assert find_missed(truth, truth > 0, SIZE, 12.0) == []
