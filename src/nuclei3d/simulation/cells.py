"""Cells of a synthetic embryo: they push each other, wander, grow and divide.

Positions are in um from the corner of the field, order (z, y, x); time is in minutes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nuclei3d.config.sections import SimulateParams

METAPHASE_MINUTES = 14.0
ANAPHASE_MINUTES = 10.0
TELOPHASE_MINUTES = 14.0
_STEP_MINUTES = 2.0
_FAINT_LOG_RANGE = (math.log(0.22), math.log(0.45))


@dataclass(frozen=True)
class Cell:
    """One cell: where it is, how it looks, and where it stands in its cycle.

    position
        Centre in um, (z, y, x).
    frame
        (3, 3) rotation from space to the body's own axes; the first is the axis of division.
    radius_um, elongation, bumps
        Radius of the sphere of equal volume when grown; factors of the three half axes (product 1);
        coefficients of the smooth deformation.
    spacing
        Radius that it claims against neighbours, as a multiple of its radius.
    log_brightness, faint
        Logarithm of its light against the typical nucleus; whether it belongs to the faint tail.
    age, cycle
        Minutes since its birth; minutes from birth to division.
    texture_seed
        Where in the chromatin pattern it lies, (3,) in um; fixed for life.
    lineage
        Number of its founder, then 0 or 1 for each division since: its mother's is this without the last.
    """

    position: NDArray[np.float64]
    frame: NDArray[np.float64]
    radius_um: float
    elongation: NDArray[np.float64]
    bumps: NDArray[np.float64]
    spacing: float
    log_brightness: float
    faint: bool
    age: float
    cycle: float
    texture_seed: NDArray[np.float64]
    lineage: tuple[int, ...] = ()


def found_embryo(params: SimulateParams, rng: np.random.Generator) -> list[Cell]:
    """Place the first cells in a ball at the middle of the field and let them find their places."""
    count = max(1, round(params.nuclei * rng.uniform(0.85, 1.15)))
    field = np.multiply(params.shape, params.voxel_size_um)
    ball = min(0.3 * field.min(), 0.62 * params.nucleus_diameter_um * count ** (1 / 3))
    cells = []
    for number in range(count):
        direction = rng.normal(size=3)
        offset = direction / np.linalg.norm(direction) * ball * rng.random() ** (1 / 3)
        cell = _new_cell(field / 2 + offset, params, rng)
        cells.append(replace(cell, age=cell.cycle * rng.random(), lineage=(number,)))
    for _ in range(60):
        cells = _moved(cells, params, field, rng, wander=0.0)
    return cells


def pass_time(
    cells: list[Cell], minutes: float, params: SimulateParams, rng: np.random.Generator
) -> list[Cell]:
    """Give the cells as they are some minutes later: moved, grown, divided."""
    field = np.multiply(params.shape, params.voxel_size_um)
    steps = max(1, math.ceil(minutes / _STEP_MINUTES))
    step = minutes / steps
    for _ in range(steps):
        older: list[Cell] = []
        for cell in cells:
            aged = replace(cell, age=cell.age + step)
            older += _divided(aged, params, rng) if aged.age >= aged.cycle else [aged]
        cells = _moved(older, params, field, rng, wander=0.25 * math.sqrt(step))
    return cells


def _new_cell(position: NDArray[np.float64], params: SimulateParams, rng: np.random.Generator) -> Cell:
    faint = bool(rng.random() < params.faint_share)
    return Cell(
        position=position,
        frame=_random_rotation(rng),
        radius_um=params.nucleus_diameter_um / 2 * math.exp(params.size_variation * rng.normal()),
        elongation=_random_elongation(params, rng),
        bumps=params.shape_variation * rng.normal(size=8),
        spacing=rng.uniform(0.94, 1.04) if rng.random() < params.closeness else rng.uniform(1.1, 1.4),
        log_brightness=_random_brightness(faint, params, rng),
        faint=faint,
        age=0.0,
        cycle=params.cell_cycle_minutes * math.exp(0.12 * rng.normal()),
        texture_seed=rng.uniform(0, 100, size=3),
    )


def _divided(mother: Cell, params: SimulateParams, rng: np.random.Generator) -> list[Cell]:
    """Two daughters on the mother's axis; they take after her in size and brightness."""
    daughters = []
    for which, side in enumerate((-1.0, 1.0)):
        faint = bool(rng.random() < params.faint_share)
        fresh = _random_brightness(faint, params, rng)
        inherited = fresh if faint or mother.faint else 0.6 * mother.log_brightness + 0.8 * fresh
        size = math.exp(params.size_variation * 0.5 * rng.normal())
        daughters.append(
            replace(
                _new_cell(mother.position + side * 0.42 * mother.radius_um * mother.frame[0], params, rng),
                frame=mother.frame,
                # Embryonic nuclei shrink from one generation to the next.
                radius_um=0.96 * mother.radius_um * size,
                log_brightness=inherited,
                faint=faint,
                # What was beyond a whole cycle stays on the daughters' clock.
                age=mother.age - mother.cycle,
                lineage=(*mother.lineage, which),
            )
        )
    return daughters


def _moved(
    cells: list[Cell],
    params: SimulateParams,
    field: NDArray[np.float64],
    rng: np.random.Generator,
    wander: float,
) -> list[Cell]:
    """One overdamped step: repulsion below the contact distance, adhesion above it, a wall, wandering."""
    position = np.array([cell.position for cell in cells])
    reach = np.array([cell.spacing * _claimed_radius(cell) for cell in cells])
    apart = position[:, None] - position[None]
    distance = np.linalg.norm(apart, axis=2) + 1e-9
    contact = reach[:, None] + reach[None]
    gap = distance - contact
    pull = np.where(gap < 0, -0.4 * gap, -0.02 * np.minimum(gap, 2.0) * (gap < 0.4 * contact))
    np.fill_diagonal(pull, 0.0)
    shift = (pull[..., None] * apart / distance[..., None]).sum(axis=1)
    shift -= 0.002 * (position - field / 2)
    for index, cell in enumerate(cells):
        if cell.age < ANAPHASE_MINUTES + TELOPHASE_MINUTES:
            # The spindle drives sisters apart faster than contact would.
            sister = int(np.argsort(distance[index])[1]) if len(cells) > 1 else index
            along = float(apart[index, sister] @ cell.frame[0])
            shift[index] += math.copysign(0.25, along) * cell.frame[0]
    position = position + np.clip(shift, -1.5, 1.5) + wander * rng.normal(size=position.shape)
    inner = 0.5 * field - np.minimum(0.75 * params.nucleus_diameter_um / 2, 0.25 * field)
    out = np.linalg.norm((position - field / 2) / inner, axis=1, keepdims=True)
    position = field / 2 + (position - field / 2) / np.maximum(out, 1.0)
    turns = 0.03 * wander * rng.normal(size=(len(cells), 3))
    return [
        replace(cell, position=place, frame=cell.frame @ _rotation_about(turn))
        for cell, place, turn in zip(cells, position, turns, strict=True)
    ]


def _claimed_radius(cell: Cell) -> float:
    """Radius of the cell's room: newborn daughters share their mother's and widen to their own."""
    grown = min(1.0, 0.55 + 0.45 * cell.age / (ANAPHASE_MINUTES + TELOPHASE_MINUTES))
    return cell.radius_um * grown


def _random_brightness(faint: bool, params: SimulateParams, rng: np.random.Generator) -> float:
    if faint:
        return float(rng.uniform(*_FAINT_LOG_RANGE))
    return float(params.brightness_variation * np.clip(rng.normal(), -1.8, 3.0))


def _random_elongation(params: SimulateParams, rng: np.random.Generator) -> NDArray[np.float64]:
    logs = 1.8 * params.shape_variation * rng.normal(size=3)
    return np.asarray(np.exp(logs - logs.mean()))


def _random_rotation(rng: np.random.Generator) -> NDArray[np.float64]:
    """Rotation drawn uniformly: the orthogonal factor of a Gaussian matrix with the signs fixed."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    if np.linalg.det(q) < 0:
        q[0] = -q[0]
    return np.asarray(q)


def _rotation_about(turn: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotation by the vector's length (radians) about its direction (Rodrigues' formula)."""
    angle = float(np.linalg.norm(turn))
    if angle < 1e-12:
        return np.eye(3)
    a, b, c = turn / angle
    cross = np.array([[0.0, -c, b], [c, 0.0, -a], [-b, a, 0.0]])
    return np.asarray(np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross)
