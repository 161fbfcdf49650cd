"""Compiled solution of the steady heat equation inside the connected pieces of labels of a volume.

The kernels work without the GIL and in one thread each: callers spread nuclei over threads.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Heat = NDArray[np.float64]


@njit(cache=True, nogil=True)
def _convergence(shape: tuple[int, int, int], coupling: Floats) -> float:
    """Bound on the spectral radius of Jacobi's iteration inside a box of `shape`, with heat 0 around it.

    A piece lies within its box, and a smaller domain has a smaller radius.
    """
    radius = 0.0
    for axis in range(3):
        radius += coupling[axis] * np.cos(np.pi / (shape[axis] + 1))
    return 2.0 * radius


@njit(cache=True, nogil=True)
def faintest_heat(extent: Floats, volume: float) -> float:
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


@njit(cache=True, nogil=True, fastmath=True)
def _sweep(
    old: Heat, new: Heat, inside: Heat, spans: NDArray[np.int32], coupling: Floats, relaxation: float
) -> None:
    """One Chebyshev step, new <- relaxation (mean of old's neighbours - new) + new, on the spans of rows."""
    depth, height, _ = old.shape
    omega = old.dtype.type(relaxation)
    wz = old.dtype.type(coupling[0])
    wy = old.dtype.type(coupling[1])
    wx = old.dtype.type(coupling[2])
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
                out[x] += omega * (mask[x] * mean - out[x])


@njit(cache=True, nogil=True)
def steady_heat(
    inside: Heat,
    spans: NDArray[np.int32],
    centre: tuple[int, int, int],
    edges: Floats,
    tolerance: float,
) -> Heat:
    """Solve the steady heat equation in a piece: a source at the centre, heat 0 outside.

    The 7-point Laplacian has weights 1 / edge^2, so the equation is that of the physical piece. It is solved
    by Jacobi's iteration with Chebyshev acceleration (Golub and Varga 1961), whose number of steps grows
    with the diameter of the piece, not with its square, and follows from `tolerance` and the box alone.
    """
    shape = inside.shape
    coupling = 1.0 / edges**2
    coupling = coupling / (2.0 * coupling.sum())
    rho = _convergence((shape[0] - 2, shape[1] - 2, shape[2] - 2), coupling)
    rate = rho / (1.0 + np.sqrt(1.0 - rho * rho))
    rounds = 2
    if rate > 0.0:
        rounds = max(2, int(np.ceil(np.log(tolerance / 2.0) / np.log(rate))))
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
        new[cz, cy, cx] += inside.dtype.type(relaxation)
        old, new = new, old
    return old


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
    z0, z1, y0, y1, x0, x1 = box
    size = (z1 - z0 + 3, y1 - y0 + 3, x1 - x0 + 3)
    free = np.zeros(size, np.bool_)
    total = 0
    for z in range(z0, z1 + 1):
        for y in range(y0, y1 + 1):
            for x in range(x0, x1 + 1):
                if labels[z, y, x] == label:
                    free[z - z0 + 1, y - y0 + 1, x - x0 + 1] = True
                    total += 1
    members = np.empty((total, 3), np.int32)
    for sz in range(1, size[0] - 1):
        for sy in range(1, size[1] - 1):
            for sx in range(1, size[2] - 1):
                if free[sz, sy, sx]:
                    count = take_piece(free, sz, sy, sx, members)
                    if count > 1:
                        _piece_flows_3d(members[:count], (z0 - 1, y0 - 1, x0 - 1), edges, tolerance, flows)


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
    extent = (high - low + 1) * edges
    heat_tolerance = max(tolerance * faintest_heat(extent, count * edges.prod()), 1e-15)
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
    heat = steady_heat(inside, spans, centre, edges, heat_tolerance)
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
def many_nucleus_flows_3d(
    labels: NDArray[np.uint32],
    chosen: NDArray[np.int64],
    boxes: NDArray[np.int32],
    edges: Floats,
    tolerance: float,
    flows: NDArray[np.float32],
) -> None:
    """Do `nucleus_flows_3d` for each chosen label; `boxes` has a row for each label number."""
    for label in chosen:
        nucleus_flows_3d(labels, label, boxes[label], edges, tolerance, flows)
