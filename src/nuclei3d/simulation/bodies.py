"""Chromatin bodies of synthetic nuclei on a grid that is fine in z, and the labels that follow.

The fine grid divides each camera plane into sub-planes about as thick as a pixel is wide, so that what an
anisotropic voxel holds is an average and not a sample at its middle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from nuclei3d.simulation.cells import ANAPHASE_MINUTES, METAPHASE_MINUTES, TELOPHASE_MINUTES, Cell

_PATTERN_STEP_UM = 0.35
_PATTERN_EDGE = 48
_LEAST_SWELL, _MOST_SWELL = -0.35, 0.5
Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class FineGrid:
    """Camera planes divided in z: `parts` sub-planes each; `step` (z, y, x) in um."""

    shape: tuple[int, int, int]
    parts: int
    step: tuple[float, float, float]

    @classmethod
    def under(cls, shape: tuple[int, int, int], voxel_um: tuple[float, float, float]) -> FineGrid:
        """Make the grid whose sub-planes are about as thick as a pixel is wide.

        Their number is odd, so that more than half of a voxel is never a tie: ties would shrink every label.
        """
        z, y, x = voxel_um
        parts = 2 * max(0, round((z / min(y, x) - 1) / 2)) + 1
        return cls((shape[0] * parts, shape[1], shape[2]), parts, (z / parts, y, x))


@dataclass(frozen=True)
class Body:
    """A piece of chromatin: an ellipsoid with smooth bumps.

    Half axes in um along the rows of `frame`; `density` is its light against the typical nucleus;
    `nucleoli` are (centre, radius) in units of the half axes, where there is little chromatin.
    """

    position: NDArray[np.float64]
    frame: NDArray[np.float64]
    half_axes_um: NDArray[np.float64]
    bumps: NDArray[np.float64]
    density: float
    texture: float
    texture_seed: NDArray[np.float64]
    nucleoli: tuple[tuple[NDArray[np.float64], float], ...]


@dataclass(frozen=True)
class Scene:
    """What the microscope is to see.

    Light per volume, 1 for the typical nucleus, float32 on the fine grid, and uint16 labels (Z, Y, X) on the
    camera's planes; `shown` is the place of each label's body among the bodies drawn.
    """

    density: NDArray[np.float32]
    labels: NDArray[np.uint16]
    shown: NDArray[np.int64]


def chromatin(cell: Cell, texture: float) -> Body:
    """Shape and density of a cell's chromatin at its place in the cycle.

    Interphase is an ellipsoid that grows; metaphase a plate across the axis of division; a daughter in
    anaphase half of it, later a small ball. Density rises as volume falls, for the DNA stays.
    """
    rest = cell.cycle - cell.age
    light = math.exp(cell.log_brightness)
    nucleoli: tuple[tuple[NDArray[np.float64], float], ...] = ()
    bumps = 0.5 * cell.bumps
    if rest < METAPHASE_MINUTES:
        axes = cell.radius_um * np.array([0.42, 0.95, 0.85])
        light *= 2.2
        texture = 0.5 * texture
    elif cell.age < ANAPHASE_MINUTES:
        axes = cell.radius_um * np.array([0.36, 0.75, 0.7])
        light *= 1.9
        texture = 0.5 * texture
    else:
        birth = ANAPHASE_MINUTES + TELOPHASE_MINUTES
        grown = min(1.0, (cell.age - ANAPHASE_MINUTES) / birth)
        size = 0.66 + 0.28 * grown + 0.06 * cell.age / cell.cycle
        axes = cell.radius_um * size * cell.elongation
        light *= size**-1.2
        bumps = cell.bumps
        nucleoli = _nucleoli(cell, grown)
    return Body(cell.position, cell.frame, axes, bumps, light, texture, cell.texture_seed, nucleoli)


def chromatin_pattern(rng: np.random.Generator) -> NDArray[np.float32]:
    """Periodic cube of clumped texture, mean 0, standard deviation 1, that nuclei are cut from."""
    noise = rng.normal(size=(_PATTERN_EDGE,) * 3)
    fine = ndimage.gaussian_filter(noise, 0.5 / _PATTERN_STEP_UM, mode="wrap")
    coarse = ndimage.gaussian_filter(noise[::-1], 1.1 / _PATTERN_STEP_UM, mode="wrap")
    pattern = fine / fine.std() + coarse / coarse.std()
    return np.asarray(pattern / pattern.std(), dtype=np.float32)


def draw_scene(
    bodies: Sequence[Body],
    fragments: Sequence[Body],
    grid: FineGrid,
    pattern: NDArray[np.float32],
) -> Scene:
    """Put bodies on the fine grid and label the camera's voxels 1..n in their order, those without a voxel
    left out.

    Where bodies would overlap, a point belongs to the one in which it lies deeper. A camera voxel is labelled
    where more than half of it is chromatin, with the body that holds most of it. Fragments (debris) are seen,
    never labelled, and only where no body is.
    """
    owner = np.zeros(grid.shape, dtype=np.int32)
    depth = np.ones(grid.shape, dtype=np.float32)
    pieces: list[tuple[int, Box, NDArray[np.float32]]] = []
    everything = [*bodies, *fragments]
    for number, body in enumerate(everything, start=1):
        box = _bounding_box(body, grid)
        if box is None:
            continue
        inner = _body_coordinates(body, box, grid)
        level = _level(body, inner)
        nearer = level < depth[box]
        if number > len(bodies):
            nearer &= owner[box] == 0
        depth[box][nearer] = level[nearer]
        owner[box][nearer] = number
        pieces.append((number, box, inner))
    density = np.zeros(grid.shape, dtype=np.float32)
    for number, box, inner in pieces:
        own = owner[box] == number
        density[box][own] = _chromatin_density(everything[number - 1], inner[:, own], pattern)
    owner[owner > len(bodies)] = 0
    return Scene(density, *_majority_labels(owner, [piece[:2] for piece in pieces], grid))


def _majority_labels(
    owner: NDArray[np.int32], boxes: Sequence[tuple[int, Box]], grid: FineGrid
) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """Give the labels and the place of each label's body."""
    parts = grid.parts
    planes = (grid.shape[0] // parts, parts, *grid.shape[1:])
    chromatin_share = (owner.reshape(planes) > 0).sum(axis=1)
    labels = np.zeros((planes[0], *grid.shape[1:]), dtype=np.uint16)
    most = np.zeros(labels.shape, dtype=np.int32)
    for number, (z, y, x) in boxes:
        part = owner[z, y, x]
        share = (part.reshape(-1, parts, *part.shape[1:]) == number).sum(axis=1)
        coarse = (slice(z.start // parts, z.stop // parts), y, x)
        wins = share > most[coarse]
        most[coarse][wins] = share[wins]
        labels[coarse][wins] = number
    labels[2 * chromatin_share <= parts] = 0
    present = np.unique(labels[labels > 0])
    renumbered = np.zeros(int(labels.max()) + 1, dtype=np.uint16)
    renumbered[present] = np.arange(1, len(present) + 1)
    return np.asarray(renumbered[labels]), present.astype(np.int64) - 1


def _nucleoli(cell: Cell, grown: float) -> tuple[tuple[NDArray[np.float64], float], ...]:
    """One to three, fixed for life by the cell's seed; they appear as the nucleus grows."""
    rng = np.random.default_rng(np.floor(cell.texture_seed * 1e6).astype(np.int64))
    found = []
    for _ in range(int(rng.integers(1, 4))):
        direction = rng.normal(size=3)
        centre = direction / np.linalg.norm(direction) * rng.uniform(0.1, 0.55)
        found.append((centre, float(rng.uniform(0.2, 0.32)) * grown))
    return tuple(found)


def _bounding_box(body: Body, grid: FineGrid) -> Box | None:
    """Smallest box around the body, whole camera planes in z; None where it is outside the field."""
    swell = 1.0 + min(_MOST_SWELL, float(np.abs(body.bumps).sum()))
    # Half extent of an ellipsoid along a space axis: length of that axis' column of (half axes * frame).
    reach = swell * np.linalg.norm(body.half_axes_um[:, None] * body.frame, axis=0)
    slices = []
    for axis, size in enumerate(grid.shape):
        unit = grid.parts if axis == 0 else 1
        step = grid.step[axis] * unit
        low = max(0, math.floor((body.position[axis] - reach[axis]) / step))
        high = min(size // unit, math.ceil((body.position[axis] + reach[axis]) / step))
        if low >= high:
            return None
        slices.append(slice(low * unit, high * unit))
    return (slices[0], slices[1], slices[2])


def _body_coordinates(body: Body, box: Box, grid: FineGrid) -> NDArray[np.float32]:
    """Coordinates (3, ...) in um along the body's own axes of the box's sample points."""
    axes = [
        (np.arange(part.start, part.stop) + 0.5) * step - centre
        for part, step, centre in zip(box, grid.step, body.position, strict=True)
    ]
    z, y, x = (axis.astype(np.float32) for axis in axes)
    turn = body.frame.astype(np.float32)
    return np.stack(
        [row[0] * z[:, None, None] + row[1] * y[None, :, None] + row[2] * x[None, None, :] for row in turn]
    )


def _level(body: Body, inner: NDArray[np.float32]) -> NDArray[np.float32]:
    """Distance from the centre as a share of the distance of the surface: below 1 is inside."""
    a, b, c = inner / body.half_axes_um.astype(np.float32)[:, None, None, None]
    radius = np.sqrt(a * a + b * b + c * c) + np.float32(1e-6)
    a, b, c = a / radius, b / radius, c / radius
    k = body.bumps.astype(np.float32)
    # Polynomials of degree two and three on the unit sphere, each at most 1: the smooth bumps of a nucleus.
    swell = k[0] * a * b + k[1] * b * c + k[2] * a * c + k[3] * (a * a - b * b) + k[4] * a * b * c * 3
    swell += k[5] * a * (a * a - 3 * b * b) + k[6] * b * (b * b - 3 * c * c) + k[7] * c * (c * c - 3 * a * a)
    return np.asarray(radius / (1 + np.clip(swell, _LEAST_SWELL, _MOST_SWELL)), dtype=np.float32)


def _chromatin_density(
    body: Body, inner: NDArray[np.float32], pattern: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Density at points (3, n) given in the body's coordinates."""
    where = (inner + body.texture_seed.astype(np.float32)[:, None]) / np.float32(_PATTERN_STEP_UM)
    clumps = ndimage.map_coordinates(pattern, where, order=1, mode="grid-wrap")
    spread = np.float32(body.texture)
    density = np.float32(body.density) * np.exp(spread * clumps - spread * spread / 2)
    unit = inner / body.half_axes_um.astype(np.float32)[:, None]
    for centre, radius in body.nucleoli:
        far = ((unit - centre.astype(np.float32)[:, None]) ** 2).sum(axis=0)
        density = density * (1 - np.float32(0.8) * (far < radius * radius))
    return np.asarray(density, dtype=np.float32)
