"""Synthetic embryos with exact labels: nuclei that divide and move, seen through a light-sheet microscope.

Cells push each other, wander, grow and divide; positions are in um from the corner of the field, order
(z, y, x), time is in minutes. They become bodies of chromatin, and labels, on a grid that is fine in z: it
divides each camera plane into sub-planes about as thick as a pixel is wide, so that what an anisotropic voxel
holds is an average and not a sample at its middle. Then they are photographed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from nuclei3d.config.sections import SimulateParams

METAPHASE_MINUTES = 14.0
ANAPHASE_MINUTES = 10.0
TELOPHASE_MINUTES = 14.0
_STEP_MINUTES = 2.0
_FAINT_LOG_RANGE = (math.log(0.22), math.log(0.45))
_PATTERN_STEP_UM = 0.35
_PATTERN_EDGE = 48
_LEAST_SWELL, _MOST_SWELL = -0.35, 0.5
Box = tuple[slice, slice, slice]
# A nucleus loses about this share of its light to the blur, so its median is that much below its density.
_LEFT_AFTER_BLUR = 0.7
_GLOW_SHARE = 0.12
_GLOW_UM = 4.0


class FilmFrame(NamedTuple):
    """One frame: uint16 counts and uint16 labels 1..n, both (Z, Y, X), and each label's `Cell.lineage`."""

    image: NDArray[np.uint16]
    labels: NDArray[np.uint16]
    lineages: tuple[tuple[int, ...], ...]


def simulate_embryo(
    params: SimulateParams, rng: np.random.Generator, *, frames: int | None = None
) -> Iterator[FilmFrame]:
    """Film one embryo: the same state of `rng` gives the same film; `frames` None takes the first embryo's
    number.

    In the labels of a frame 0 is background. A voxel is labelled where more than half of it lies in nuclei,
    with the nucleus that holds most of it.
    """
    grid = FineGrid.under(params.shape, params.voxel_size_um)
    pattern = chromatin_pattern(rng)
    illumination = Illumination.drawn(rng)
    cells = found_embryo(params, rng)
    fragments = _draw_fragments(params, rng)
    for index in range(params.frames_of(0) if frames is None else frames):
        if index:
            cells = pass_time(cells, params.minutes_per_frame, params, rng)
        bodies = [_visible(chromatin(cell, params.texture), params) for cell in cells]
        scene = draw_scene(bodies, _at_rim(fragments, cells), grid, pattern)
        photons = expose(scene.density, _cytoplasm(cells, params), grid, illumination, params)
        seen = tuple(cells[place].lineage for place in scene.shown)
        yield FilmFrame(photograph(photons, params, rng), scene.labels, seen)


def _visible(body: Body, params: SimulateParams) -> Body:
    """Lift a body that would drown in the noise to the faintest contrast that is wanted."""
    left = float(light_at_depth(body.position[:1], params)[0])
    noise = background_noise(params, left)
    least = params.faintest_contrast * noise / (params.photons * left * _LEFT_AFTER_BLUR)
    return replace(body, density=max(body.density, least))


def _draw_fragments(params: SimulateParams, rng: np.random.Generator) -> list[Body]:
    """Polar bodies and pieces of dead cells; their places are against the embryo's middle, 1 at its rim."""
    fragments = []
    for _ in range(int(rng.poisson(params.debris))):
        direction = rng.normal(size=3)
        direction /= np.linalg.norm(direction)
        radius = params.nucleus_diameter_um * rng.uniform(0.08, 0.15)
        light = math.exp(rng.normal(0.2, 0.4))
        place = direction * rng.uniform(1.0, 1.5)
        axes, bumps, seed = np.full(3, radius), np.zeros(8), np.zeros(3)
        fragments.append(Body(place, np.eye(3), axes, bumps, light, 0.0, seed, ()))
    return fragments


def _at_rim(fragments: Sequence[Body], cells: Sequence[Cell]) -> list[Body]:
    """Fragments ride at the rim of the cluster of cells."""
    places = np.array([cell.position for cell in cells])
    middle = places.mean(axis=0)
    rim = places.std(axis=0) * 2 + 2.0
    return [replace(fragment, position=middle + fragment.position * rim) for fragment in fragments]


def _cytoplasm(cells: Sequence[Cell], params: SimulateParams) -> NDArray[np.float32]:
    """Where there is cytoplasm, 0..1 on the camera's voxels: the cells' surroundings, smoothed."""
    # A quarter of the resolution in xy is enough for so smooth a thing.
    shape = (params.shape[0], -(-params.shape[1] // 4), -(-params.shape[2] // 4))
    step = np.multiply(params.voxel_size_um, np.divide(params.shape, shape))
    axes = [((np.arange(n) + 0.5) * s).astype(np.float32) for n, s in zip(shape, step, strict=True)]
    nearest = np.full(shape, np.inf, dtype=np.float32)
    for cell in cells:
        z, y, x = ((axis - np.float32(c)) ** 2 for axis, c in zip(axes, cell.position, strict=True))
        square = z[:, None, None] + y[None, :, None] + x[None, None, :]
        nearest = np.minimum(nearest, np.sqrt(square) / np.float32(cell.radius_um))
    soft = 1 / (1 + np.exp(4 * (nearest - np.float32(1.6))))
    factors = np.divide(params.shape, shape)
    return np.asarray(ndimage.zoom(soft, factors, order=1, grid_mode=True, mode="nearest"), dtype=np.float32)


@dataclass(frozen=True)
class Illumination:
    """What is uneven in one embryo's film, fixed over its frames.

    `slopes` (3,) are the change of the background across the field along z, y, x; `waves` (n, 5) are
    amplitude, phase and waves per field in z, y, x.
    """

    slopes: NDArray[np.float64]
    waves: NDArray[np.float64]

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> Illumination:
        """Draw slopes and three slow waves."""
        waves = np.column_stack(
            [rng.uniform(0.2, 0.5, 3), rng.uniform(0, 2 * np.pi, 3), rng.uniform(-1.2, 1.2, (3, 3))]
        )
        return cls(rng.uniform(-0.6, 0.6, 3), waves)

    def background(self, shape: tuple[int, int, int], unevenness: float) -> NDArray[np.float32]:
        """Relative light of the background, mean about 1, on the camera's voxels."""
        z, y, x = (((np.arange(n) + 0.5) / n - 0.5).astype(np.float32) for n in shape)
        z, y, x = z[:, None, None], y[None, :, None], x[None, None, :]
        field = self.slopes[0] * z + self.slopes[1] * y + self.slopes[2] * x
        for amplitude, phase, *waves in self.waves:
            field = field + amplitude * np.cos(
                phase + 2 * np.pi * (waves[0] * z + waves[1] * y + waves[2] * x)
            )
        return np.asarray(np.clip(1 + unevenness * field, 0.1, None), dtype=np.float32)


def light_at_depth(depth_um: NDArray[np.float64], params: SimulateParams) -> NDArray[np.float64]:
    """Share of the light that is left at a depth (exponential attenuation)."""
    return np.asarray(np.exp(-np.clip(depth_um, 0, None) / params.attenuation_um))


def background_noise(params: SimulateParams, left: float) -> float:
    """Shot and read noise of a voxel of cytoplasm in photons, where this share of the light is left."""
    light = params.background_photons + params.haze * params.photons * left
    return float(np.sqrt(light + (params.camera_noise / params.camera_gain) ** 2))


def expose(
    density: NDArray[np.float32],
    cytoplasm: NDArray[np.float32],
    grid: FineGrid,
    illumination: Illumination,
    params: SimulateParams,
) -> NDArray[np.float32]:
    """Mean photons per camera voxel, of light on the fine grid and of cytoplasm (0..1, camera voxels).

    Light fades with depth, is blurred by the point spread function on the fine grid, and is then averaged
    over the sub-planes of each camera plane. A wide faint glow stands for scattered light.
    """
    depth = (np.arange(grid.shape[0]) + 0.5) * grid.step[0]
    lit = density * light_at_depth(depth, params).astype(np.float32)[:, None, None]
    sigma = np.divide(params.psf_um, grid.step)
    blurred = ndimage.gaussian_filter(lit, sigma, truncate=3.0, mode="constant")
    nuclei = blurred.reshape(-1, grid.parts, *grid.shape[1:]).mean(axis=1)
    left = light_at_depth((np.arange(params.shape[0]) + 0.5) * params.voxel_size_um[0], params)
    haze = params.haze * cytoplasm * left.astype(np.float32)[:, None, None]
    light = (1 - _GLOW_SHARE) * nuclei + _GLOW_SHARE * _glow(nuclei, params) + haze
    stray = params.background_photons * illumination.background(params.shape, params.unevenness)
    return np.asarray(params.photons * light + stray, dtype=np.float32)


def photograph(
    photons: NDArray[np.float32], params: SimulateParams, rng: np.random.Generator
) -> NDArray[np.uint16]:
    """Counts of the camera: shot noise, gain, read noise, offset, and the ceiling of its bit depth."""
    counts = params.camera_offset + params.camera_gain * rng.poisson(photons).astype(np.float32)
    counts += params.camera_noise * rng.standard_normal(photons.shape, dtype=np.float32)
    return np.asarray(np.clip(np.rint(counts), 0, 2**params.camera_bits - 1), dtype=np.uint16)


def _glow(nuclei: NDArray[np.float32], params: SimulateParams) -> NDArray[np.float32]:
    """Scattered light: the picture under a wide blur, computed on every fourth pixel of xy."""
    thin = ndimage.zoom(nuclei, (1, 0.25, 0.25), order=1, grid_mode=True, mode="grid-constant")
    sigma = _GLOW_UM / np.multiply(params.voxel_size_um, np.divide(nuclei.shape, thin.shape))
    wide = ndimage.gaussian_filter(thin, sigma, mode="constant")
    factors = np.divide(nuclei.shape, wide.shape)
    return np.asarray(ndimage.zoom(wide, factors, order=1, grid_mode=True, mode="nearest"))


@dataclass(frozen=True)
class Cell:
    """One cell: where it is, how it looks, and where it stands in its cycle.

    `position` is its centre (z, y, x), `frame` a (3, 3) rotation from space to the body's own axes, of which
    the first is the axis of division. `radius_um` is that of the sphere of equal volume when grown,
    `elongation` the factors of the half axes (product 1), `bumps` the coefficients of the smooth deformation,
    `spacing` the radius that it claims against neighbours as a multiple of its own. `log_brightness` is the
    logarithm of its light against the typical nucleus; `faint` ones belong to the faint tail. `age` and
    `cycle` are minutes since birth, and from birth to division; `texture_seed` is its place (3,) in the
    chromatin pattern in um, fixed for life. `lineage` is the number of its founder, then 0 or 1 for each
    division since: its mother's is this without the last.
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
    bodies: Sequence[Body], fragments: Sequence[Body], grid: FineGrid, pattern: NDArray[np.float32]
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
