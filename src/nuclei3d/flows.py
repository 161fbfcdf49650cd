"""Flow targets: at every voxel of a nucleus the unit vector that leads to its centre.

Heat is set free at the centre of a nucleus, spreads inside it only, and the normalised gradient of the
heat is the flow (Stringer et al., Cellpose, Nature Methods 2021). Each connected piece of a label is
treated on its own, inside its own bounding box: a touching neighbour is background to it, label numbers
may have gaps, and the pieces of a label that is split flow each to their own centre (heat cannot cross
background, so anything else would leave the smaller pieces without a flow). The centre is the voxel of
the piece that lies closest to the piece's mean position. A piece of one voxel has no direction: flow 0.

Compiled code works without the GIL and in one thread: callers spread nuclei or planes over threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from nuclei3d.errors import InputError
from nuclei3d.grid import compact_labels, find_boxes, share_labels
from nuclei3d.images.voxel_size import VoxelSize

Labels = NDArray[np.integer[Any]]
Floats = NDArray[np.float64]

_TANH_VOXELS = 5.0


def flows_2d(labels: Labels) -> NDArray[np.float32]:
    """Compute the flow of every pixel of a labelled plane (Y, X), as Cellpose's training targets.

    For labels of one piece this is Cellpose's own target (`masks_to_flows` on the CPU): heat from the
    centre, spread by the mean over 3 x 3 pixels, 2 (height + width) times, each nucleus as often as its
    own size asks. Runs in one thread and without the GIL. Numbers may have gaps; 0 (or less) is background.

    Gives float32 (2, Y, X): unit vectors (dy, dx) in pixels, 0 on the background and at the centres of
    symmetric pieces.
    """
    _check(labels, 2)
    flows = np.zeros((2, *labels.shape), np.float32)
    _piece_flows_2d(np.ascontiguousarray(labels, dtype=np.int64), flows)
    return flows


def flows_3d(
    labels: Labels, voxel_size: VoxelSize, *, tolerance: float = 1e-3, threads: int | None = None
) -> NDArray[np.float32]:
    """Compute the flow of every voxel of a labelled volume (Z, Y, X), in physical space.

    The steady heat of a source at the nucleus' centre, with heat 0 outside the nucleus, is solved in um:
    neighbours exchange heat with the weight 1 / (voxel edge)^2 and gradients are taken per um, so a nucleus
    has the same flows whatever the voxels it was sampled with. That heat has no maximum but its source
    (maximum principle), so every flow line ends at the centre, in concave nuclei too.

    In `labels` 0 (or less) is background, numbers may have gaps. The iteration of the heat ends at an error
    of `tolerance`, relative to the heat at the far ends of a nucleus; the nuclei are shared between
    `threads`, all processors by default. Gives float32 (3, Z, Y, X): unit vectors (dz, dy, dx), of length 1
    in um, 0 on the background and in pieces of one voxel.
    """
    _check(labels, 3)
    volume = compact_labels(labels)
    where = find_boxes(volume)
    flows = np.zeros((3, *volume.shape), np.float32)
    edges = np.array(voxel_size.zyx) / min(voxel_size.zyx)

    def work(chosen: NDArray[np.int64]) -> None:
        for label in chosen:
            nucleus_flows_3d(volume, label, where.boxes[label], edges, tolerance, flows)

    share_labels(work, where, threads)
    return flows


def tanh_flows_3d(labels: Labels) -> NDArray[np.float32]:
    """Compute the targets of Cellpose3D (Eschweiler et al. 2022), for comparison: float32 (3, Z, Y, X).

    Along each axis tanh of the distance to the centre of the nucleus (its mean position) over 5 voxels,
    whatever the size of a voxel: at high anisotropy hardly anything is left along z.
    """
    _check(labels, 3)
    volume = compact_labels(labels)
    count = np.maximum(np.bincount(volume.ravel()), 1)
    flows = np.zeros((3, *volume.shape), np.float32)
    inside = volume > 0
    for axis, size in enumerate(volume.shape):
        along = [1, 1, 1]
        along[axis] = size
        place = np.broadcast_to(np.arange(size, dtype=np.float64).reshape(along), volume.shape)
        centre = np.bincount(volume.ravel(), weights=place.ravel()) / count
        flows[axis][inside] = np.tanh((centre[volume[inside]] - place[inside]) / _TANH_VOXELS)
    return flows


def _check(labels: Labels, ndim: int) -> None:
    if labels.ndim != ndim or not np.issubdtype(labels.dtype, np.integer):
        raise InputError(
            f"flow targets: expected integer labels with {ndim} axes, got {labels.dtype} {labels.shape}"
        )


@njit(cache=True, nogil=True)
def nucleus_flows_3d(
    labels: NDArray[np.uint32],
    label: int,
    box: NDArray[np.int32],
    edges: Floats,
    tolerance: float,
    flows: NDArray[np.float32],
) -> None:
    """Write the flows (dz, dy, dx) of every 6-connected piece of one label into `flows` (3, Z, Y, X).

    `box` holds first and last index of the label on each axis; `edges` are the voxel's edges (z, y, x).
    """
    free, total = cut_label(labels, label, box)
    origin = (box[0] - 1, box[2] - 1, box[4] - 1)
    members = np.empty((total, 3), np.int32)
    for sz in range(1, free.shape[0] - 1):
        for sy in range(1, free.shape[1] - 1):
            for sx in range(1, free.shape[2] - 1):
                if free[sz, sy, sx]:
                    count = take_piece(free, sz, sy, sx, members)
                    if count > 1:
                        _piece_flows_3d(members[:count], origin, edges, tolerance, flows)


@njit(cache=True, nogil=True)
def cut_label(
    labels: NDArray[np.uint32], label: int, box: NDArray[np.int32]
) -> tuple[NDArray[np.bool_], int]:
    """Say where in a box, with a border of one voxel added, a label lies, and count its voxels."""
    z0, z1, y0, y1, x0, x1 = box
    inside = np.zeros((z1 - z0 + 3, y1 - y0 + 3, x1 - x0 + 3), np.bool_)
    total = 0
    for z in range(z0, z1 + 1):
        for y in range(y0, y1 + 1):
            for x in range(x0, x1 + 1):
                if labels[z, y, x] == label:
                    inside[z - z0 + 1, y - y0 + 1, x - x0 + 1] = True
                    total += 1
    return inside, total


@njit(cache=True, nogil=True)
def take_piece(free: NDArray[np.bool_], sz: int, sy: int, sx: int, members: NDArray[np.int32]) -> int:
    """Flood from a seed over 6-neighbours; list the voxels in `members`, take them out of `free`, count them.

    `free` must have an empty border of one voxel.
    """
    free[sz, sy, sx] = False
    members[0, 0] = sz
    members[0, 1] = sy
    members[0, 2] = sx
    count = 1
    done = 0
    while done < count:
        z = members[done, 0]
        y = members[done, 1]
        x = members[done, 2]
        done += 1
        for axis in range(3):
            for side in (-1, 1):
                nz = z + side if axis == 0 else z
                ny = y + side if axis == 1 else y
                nx = x + side if axis == 2 else x
                if free[nz, ny, nx]:
                    free[nz, ny, nx] = False
                    members[count, 0] = nz
                    members[count, 1] = ny
                    members[count, 2] = nx
                    count += 1
    return count


@njit(cache=True, nogil=True)
def _piece_flows_3d(
    members: NDArray[np.int32],
    origin: tuple[int, int, int],
    edges: Floats,
    tolerance: float,
    flows: NDArray[np.float32],
) -> None:
    """Diffuse heat in one piece, given by its voxels relative to `origin`, and write its flows."""
    count = len(members)
    low = np.array([members[0, 0], members[0, 1], members[0, 2]])
    high = low.copy()
    mean = np.zeros(3)
    for i in range(count):
        for axis in range(3):
            at = members[i, axis]
            low[axis] = min(low[axis], at)
            high[axis] = max(high[axis], at)
            mean[axis] += at
    mean /= count
    best = np.inf
    central = 0
    for i in range(count):
        distance = 0.0
        for axis in range(3):
            distance += ((members[i, axis] - mean[axis]) * edges[axis]) ** 2
        if distance < best - 1e-9:
            best = distance
            central = i
    inside = np.zeros((high[0] - low[0] + 3, high[1] - low[1] + 3, high[2] - low[2] + 3), np.float64)
    spans = np.zeros((inside.shape[0], inside.shape[1], 2), np.int32)
    spans[:, :, 0] = inside.shape[2]
    for i in range(count):
        z = members[i, 0] - low[0] + 1
        y = members[i, 1] - low[1] + 1
        x = members[i, 2] - low[2] + 1
        inside[z, y, x] = 1
        spans[z, y, 0] = min(spans[z, y, 0], x)
        spans[z, y, 1] = max(spans[z, y, 1], x + 1)
    centre = (
        members[central, 0] - low[0] + 1,
        members[central, 1] - low[1] + 1,
        members[central, 2] - low[2] + 1,
    )
    rho, rounds = heat_rounds(np.array(inside.shape), edges, count, tolerance)
    heat = _steady_heat(inside, spans, centre, edges, rho, rounds)
    for i in range(count):
        z = members[i, 0] - low[0] + 1
        y = members[i, 1] - low[1] + 1
        x = members[i, 2] - low[2] + 1
        dz = (heat[z + 1, y, x] - heat[z - 1, y, x]) / edges[0]
        dy = (heat[z, y + 1, x] - heat[z, y - 1, x]) / edges[1]
        dx = (heat[z, y, x + 1] - heat[z, y, x - 1]) / edges[2]
        norm = np.sqrt(dz * dz + dy * dy + dx * dx)
        if norm > 0.0:
            gz = members[i, 0] + origin[0]
            gy = members[i, 1] + origin[1]
            gx = members[i, 2] + origin[2]
            flows[0, gz, gy, gx] = dz / norm
            flows[1, gz, gy, gx] = dy / norm
            flows[2, gz, gy, gx] = dx / norm


@njit(cache=True, nogil=True)
def heat_rounds(
    shape: NDArray[np.integer[Any]], edges: Floats, voxels: int, tolerance: float
) -> tuple[float, int]:
    """Plan the iteration of a piece's heat: the spectral radius, and after how many rounds it ends.

    `shape` is that of the piece's box with a border of one voxel; of the piece itself only the number of
    `voxels` counts, and the relative `tolerance` at its far ends.
    """
    coupling = 1.0 / edges**2
    coupling = coupling / (2.0 * coupling.sum())
    # Bound on the spectral radius of Jacobi's iteration inside the piece's box, with heat 0 around it: a
    # smaller domain, as the piece is, has a smaller radius.
    rho = 0.0
    for axis in range(3):
        rho += coupling[axis] * np.cos(np.pi / (shape[axis] - 1))
    rho *= 2.0
    rate = rho / (1.0 + np.sqrt(1.0 - rho * rho))
    rounds = 2
    if rate > 0.0:
        extent = (shape - 2) * edges
        heat_tolerance = max(tolerance * _faintest_heat(extent, voxels * edges.prod()), 1e-15)
        rounds = max(2, int(np.ceil(np.log(heat_tolerance / 2.0) / np.log(rate))))
    return rho, rounds


@njit(cache=True, nogil=True)
def _steady_heat(
    inside: Floats,
    spans: NDArray[np.int32],
    centre: tuple[int, int, int],
    edges: Floats,
    rho: float,
    rounds: int,
) -> Floats:
    """Solve the steady heat equation in a piece: a source at the centre, heat 0 outside.

    The 7-point Laplacian has weights 1 / edge^2, so the equation is that of the physical piece. It is solved
    by Jacobi's iteration with Chebyshev acceleration (Golub and Varga 1961), whose number of steps
    (`heat_rounds`) grows with the diameter of the piece, not with its square.
    """
    coupling = 1.0 / edges**2
    coupling = coupling / (2.0 * coupling.sum())
    old = np.zeros_like(inside)
    new = np.zeros_like(inside)
    cz, cy, cx = centre
    relaxation = 1.0
    for step in range(rounds):
        if step == 1:
            relaxation = 1.0 / (1.0 - rho * rho / 2.0)
        elif step > 1:
            relaxation = 1.0 / (1.0 - rho * rho * relaxation / 4.0)
        _sweep(old, new, inside, spans, coupling, relaxation)
        new[cz, cy, cx] += relaxation
        old, new = new, old
    return old


@njit(cache=True, nogil=True, fastmath=True)
def _sweep(
    old: Floats, new: Floats, inside: Floats, spans: NDArray[np.int32], coupling: Floats, relaxation: float
) -> None:
    """One Chebyshev step, new <- relaxation (mean of old's neighbours - new) + new, on the spans of rows."""
    depth, height, _ = old.shape
    wz, wy, wx = coupling[0], coupling[1], coupling[2]
    for z in range(1, depth - 1):
        for y in range(1, height - 1):
            start = spans[z, y, 0]
            stop = spans[z, y, 1]
            if start >= stop:
                continue
            here = old[z, y]
            above = old[z - 1, y]
            below = old[z + 1, y]
            north = old[z, y - 1]
            south = old[z, y + 1]
            mask = inside[z, y]
            out = new[z, y]
            for x in range(start, stop):
                mean = (
                    wz * (above[x] + below[x]) + wy * (north[x] + south[x]) + wx * (here[x - 1] + here[x + 1])
                )
                out[x] += relaxation * (mask[x] * mean - out[x])


@njit(cache=True, nogil=True)
def _faintest_heat(extent: Floats, volume: float) -> float:
    """Estimate the heat at the far ends of a piece as a fraction of that at its centre.

    Along a body of widths a and b heat falls as exp(-pi sqrt(1/a^2 + 1/b^2) distance). A width is the extent
    or, where that is less (thin pieces that lie aslant), the one of an ellipsoid of the same volume.
    """
    longest = int(np.argmax(extent))
    product = extent[0] * extent[1] * extent[2]
    decay = 0.0
    for axis in range(3):
        if axis != longest:
            width = min(extent[axis], 6.0 / np.pi * volume * extent[axis] / product)
            decay += 1.0 / (width * width)
    return float(np.exp(-np.pi * np.sqrt(decay) * extent[longest] / 2.0))


@njit(cache=True, nogil=True)
def _piece_flows_2d(labels: NDArray[np.int64], flows: NDArray[np.float32]) -> None:
    """Write the flows (dy, dx) of every 8-connected piece of `labels` (Y, X) into `flows` (2, Y, X)."""
    height, width = labels.shape
    seen = np.zeros((height, width), np.bool_)
    members = np.empty((labels.size, 2), np.int32)
    for y0 in range(height):
        for x0 in range(width):
            label = labels[y0, x0]
            if label <= 0 or seen[y0, x0]:
                continue
            seen[y0, x0] = True
            members[0, 0] = y0
            members[0, 1] = x0
            count = 1
            done = 0
            top, bottom, left, right = y0, y0, x0, x0
            sum_y = 0.0
            sum_x = 0.0
            while done < count:
                y = members[done, 0]
                x = members[done, 1]
                done += 1
                sum_y += y
                sum_x += x
                top = min(top, y)
                bottom = max(bottom, y)
                left = min(left, x)
                right = max(right, x)
                for ny in range(max(y - 1, 0), min(y + 2, height)):
                    for nx in range(max(x - 1, 0), min(x + 2, width)):
                        if labels[ny, nx] == label and not seen[ny, nx]:
                            seen[ny, nx] = True
                            members[count, 0] = ny
                            members[count, 1] = nx
                            count += 1
            mean_y = sum_y / count
            mean_x = sum_x / count
            # The pixel closest to the mean; of equally close ones the first in reading order, as Cellpose.
            best = np.inf
            cy, cx = y0, x0
            for i in range(count):
                y = members[i, 0]
                x = members[i, 1]
                distance = (y - mean_y) ** 2 + (x - mean_x) ** 2
                if distance < best or (distance == best and (y < cy or (y == cy and x < cx))):
                    best = distance
                    cy, cx = y, x
            box_height = bottom - top + 3
            box_width = right - left + 3
            inside = np.zeros((box_height, box_width))
            for i in range(count):
                inside[members[i, 0] - top + 1, members[i, 1] - left + 1] = 1.0 / 9.0
            heat = np.zeros((box_height, box_width))
            rows = np.zeros((box_height, box_width))
            _diffuse_2d(heat, rows, inside, cy - top + 1, cx - left + 1, 2 * (box_height + box_width))
            for i in range(count):
                y = members[i, 0]
                x = members[i, 1]
                by = y - top + 1
                bx = x - left + 1
                dy = heat[by + 1, bx] - heat[by - 1, bx]
                dx = heat[by, bx + 1] - heat[by, bx - 1]
                # hypot does not underflow where little heat has arrived; the square would.
                norm = np.hypot(dy, dx)
                if norm > 0.0:
                    flows[0, y, x] = dy / norm
                    flows[1, y, x] = dx / norm


@njit(cache=True, nogil=True)
def _diffuse_2d(heat: Floats, rows: Floats, inside: Floats, cy: int, cx: int, rounds: int) -> None:
    """Add one unit of heat at the centre and take the mean over 3 x 3 pixels, `rounds` times, in place.

    All arrays have the shape of the piece's box with a border of one pixel, where heat stays 0.
    The mean is taken as sums along x, then along y: 4 additions a pixel instead of 8.
    """
    height, width = heat.shape
    for _ in range(rounds):
        heat[cy, cx] += 1.0
        for y in range(1, height - 1):
            for x in range(1, width - 1):
                rows[y, x] = heat[y, x - 1] + heat[y, x] + heat[y, x + 1]
        for y in range(1, height - 1):
            for x in range(1, width - 1):
                heat[y, x] = (rows[y - 1, x] + rows[y, x] + rows[y + 1, x]) * inside[y, x]
