"""Compiled heat diffusion inside the connected pieces of labels of a plane.

The kernels work without the GIL and in one thread: callers spread planes over threads or processes.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]


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


@njit(cache=True, nogil=True)
def piece_flows_2d(labels: NDArray[np.int64], flows: NDArray[np.float32]) -> None:
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
