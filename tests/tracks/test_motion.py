"""The embryo's motion is found from its nuclei, whatever they do by themselves."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from nuclei3d.tracks.linking import RigidMotion, find_motion, follow_motion

Floats = NDArray[np.float64]


def embryo(rng: np.random.Generator, count: int = 60) -> Floats:
    """Nuclei of diameter 9, none closer than 8."""
    places: list[Floats] = []
    while len(places) < count:
        place = rng.uniform(-35, 35, 3)
        if np.linalg.norm(place) < 35 and all(np.linalg.norm(place - other) > 8 for other in places):
            places.append(place)
    return np.array(places)


def motion(degrees: float, shift: float, rng: np.random.Generator) -> RigidMotion:
    axis, way = rng.normal(size=(2, 3))
    turn = Rotation.from_rotvec(np.radians(degrees) * axis / np.linalg.norm(axis)).as_matrix()
    return RigidMotion(turn, shift * way / np.linalg.norm(way))


@pytest.mark.parametrize(("degrees", "shift"), [(0, 0), (3, 2), (8, 6), (2, 15), (0, 30)])
def test_drift_and_rotation_are_found_among_wandering_nuclei(degrees: float, shift: float) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        before = embryo(rng)
        true = motion(degrees, shift, rng)
        after = true(before + rng.normal(0, 0.8, before.shape))
        # some divide, some are missed, some are not there
        lost = rng.random(len(after)) < 0.1
        after = np.concatenate([after[~lost], after[:5] + rng.normal(0, 4, (5, 3))])
        error = np.linalg.norm(find_motion(before, after, 9.0)(before) - true(before), axis=1)
        assert np.median(error) < 0.8, (seed, np.median(error))


def test_nothing_is_read_out_of_two_nuclei() -> None:
    found = find_motion(np.zeros((2, 3)), np.ones((2, 3)), 9.0)
    np.testing.assert_array_equal(found(np.zeros((1, 3))), np.zeros((1, 3)))


def test_few_nuclei_drift_and_do_not_turn() -> None:
    before = np.array([[0, 0, 0], [20, 0, 0], [0, 20, 0], [0, 0, 20], [20, 20, 0]], float)
    found = find_motion(before, before + np.array([1, 2, 1]), 9.0)
    np.testing.assert_array_equal(found.rotation, np.eye(3))
    np.testing.assert_allclose(found.shift, [1, 2, 1])


def test_a_film_is_brought_back_to_its_first_frame() -> None:
    rng = np.random.default_rng(0)
    places = embryo(rng)
    film, moved = [places], places
    for _ in range(6):
        moved = motion(4, 3, rng)(moved)
        film.append(moved)
    film.insert(3, np.zeros((0, 3)))
    for back, seen in zip(follow_motion(film, 9.0), film, strict=True):
        if len(seen):
            np.testing.assert_allclose(back(seen), places, atol=1e-6)
