"""Compiled filters of small images, in place."""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

Image = NDArray[np.float32]


@njit(cache=True, nogil=True)
def blur(image: Image, sigma_y: float, sigma_x: float) -> None:
    """Blur with a Gaussian in place, mirrored at the edges (cut at 3 sigma)."""
    height, width = image.shape
    if sigma_y > 0.0:
        reach = math.ceil(3.0 * sigma_y)
        kernel = np.empty(2 * reach + 1, np.float32)
        for k in range(2 * reach + 1):
            kernel[k] = math.exp(-0.5 * ((k - reach) / sigma_y) ** 2)
        kernel /= kernel.sum()
        source = image.copy()
        for i in range(height):
            for j in range(width):
                image[i, j] = 0.0
            for k in range(2 * reach + 1):
                row = i + k - reach
                if row < 0:
                    row = -row - 1
                if row >= height:
                    row = 2 * height - 1 - row
                row = min(max(row, 0), height - 1)
                weight = kernel[k]
                for j in range(width):
                    image[i, j] += weight * source[row, j]
    if sigma_x > 0.0:
        reach = math.ceil(3.0 * sigma_x)
        kernel = np.empty(2 * reach + 1, np.float32)
        for k in range(2 * reach + 1):
            kernel[k] = math.exp(-0.5 * ((k - reach) / sigma_x) ** 2)
        kernel /= kernel.sum()
        padded = np.empty(width + 2 * reach, np.float32)
        for i in range(height):
            for j in range(width + 2 * reach):
                column = j - reach
                if column < 0:
                    column = -column - 1
                if column >= width:
                    column = 2 * width - 1 - column
                padded[j] = image[i, min(max(column, 0), width - 1)]
            for j in range(width):
                total = np.float32(0.0)
                for k in range(2 * reach + 1):
                    total += kernel[k] * padded[j + k]
                image[i, j] = total


@njit(cache=True, nogil=True)
def coarsen(image: Image, factor_y: float, factor_x: float) -> None:
    """Average over blocks of about factor_y x factor_x pixels and interpolate back linearly, in place."""
    height, width = image.shape
    rows = max(1, round(height / factor_y))
    columns = max(1, round(width / factor_x))
    small = np.zeros((rows, columns), np.float32)
    counts = np.zeros((rows, columns), np.float32)
    for i in range(height):
        row = (i * rows) // height
        for j in range(width):
            column = (j * columns) // width
            small[row, column] += image[i, j]
            counts[row, column] += 1.0
    small /= counts
    for i in range(height):
        y = min(max((i + 0.5) * rows / height - 0.5, 0.0), rows - 1.0)
        y0 = min(int(y), max(rows - 2, 0))
        y1 = min(y0 + 1, rows - 1)
        fy = y - y0
        for j in range(width):
            x = min(max((j + 0.5) * columns / width - 0.5, 0.0), columns - 1.0)
            x0 = min(int(x), max(columns - 2, 0))
            x1 = min(x0 + 1, columns - 1)
            fx = x - x0
            upper = small[y0, x0] * (1 - fx) + small[y0, x1] * fx
            lower = small[y1, x0] * (1 - fx) + small[y1, x1] * fx
            image[i, j] = upper * (1 - fy) + lower * fy
