"""Dynamics: from a flow and a logit to labelled nuclei.

Every foreground voxel follows the flow in physical space to its sink (`trajectories`), sinks are grouped
by physical distance (`sinks`), and what flows to one sink is a nucleus, made whole and scored (`masks`).

All lengths are fractions of the nucleus' diameter, in um, so the same settings serve any grid: pass the voxel
size of the grid that the flow lies on.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.core.label_boxes import available_threads
from nuclei3d.core.segmentation.flow_field import LOGIT_UNITS, FlowField
from nuclei3d.core.segmentation.masks import clean_labels, keep_labels, score_labels
from nuclei3d.core.segmentation.sinks import group_sinks
from nuclei3d.core.segmentation.trajectories import BinGrid, follow
from nuclei3d.errors import InputError
from nuclei3d.volumes.voxel_size import VoxelSize

_PLANE_DEPTH = 1e4
"""Depth, in pixels, given to a lone plane: so deep that no heat is lost through it."""

_LEAST_SCORE = 0.01


@dataclass(frozen=True)
class MaskSettings:
    """How flows become masks. Lengths are fractions of the diameter of a typical nucleus.

    Attributes
    ----------
    cellprob_threshold : float
        Voxels with a (mean) logit above this are foreground.
    score_threshold : float
        Nuclei with a lower score (0..1, see `masks.score_labels`) are dropped. Those below 0.01 always
        are: their flow has nothing to do with their mask.
    min_volume_um3, max_volume_um3 : float
        Bounds of a nucleus' volume; no upper bound if None.
    min_volume_fraction : float
        Nuclei below this fraction of the volume of a typical nucleus are dropped in any case: what is left
        there are crumbs of the dynamics.
    step : float
        First step of a particle. It is never below the smallest voxel edge.
    bin_edge : float
        Edge of the bins in which end points are counted.
    sink_radius : float
        Sinks closer together than this are one.
    """

    cellprob_threshold: float = 0.0
    score_threshold: float = 0.0
    min_volume_um3: float = 0.0
    max_volume_um3: float | None = None
    min_volume_fraction: float = 0.01
    step: float = 1 / 20
    bin_edge: float = 1 / 16
    sink_radius: float = 0.2

    def bounds_um3(self, nucleus_diameter_um: float) -> tuple[float, float]:
        """Least and largest volume of a nucleus, in um3."""
        typical_um3 = np.pi / 6 * nucleus_diameter_um**3
        least = max(self.min_volume_um3, self.min_volume_fraction * typical_um3)
        return least, np.inf if self.max_volume_um3 is None else self.max_volume_um3


def masks_from_flows(
    flow: NDArray[np.floating[Any]],
    logit: NDArray[np.floating[Any]],
    voxel_size: VoxelSize,
    nucleus_diameter_um: float,
    settings: MaskSettings,
    *,
    threads: int | None = None,
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Segment nuclei from their flow.

    Parameters
    ----------
    flow : float16 or float32 array, shape (3, Z, Y, X)
        Direction to the nucleus' centre (z, y, x) in physical space, length about 1.
    logit : float16 or float32 array, shape (Z, Y, X)
        Logit of being inside a nucleus.
    voxel_size : VoxelSize
        Edges in um of a voxel of this grid, isotropic or not.
    nucleus_diameter_um : float
        Diameter of a typical nucleus.
    settings : MaskSettings
    threads : int, optional
        All processors by default.

    Returns
    -------
    labels : uint32 array, shape (Z, Y, X)
        Nuclei 1..n, each one 6-connected piece without holes; 0 is background.
    scores : float32 array, shape (n + 1,)
        Score in 0..1 by label; entry 0 is 0.

    Raises
    ------
    InputError
        If shapes do not fit or the diameter is not positive.
    """
    field = FlowField.of(flow, logit, voxel_size, threads)
    return masks_from_field(field, nucleus_diameter_um, settings, threads=threads)


def masks_from_field(
    field: FlowField, nucleus_diameter_um: float, settings: MaskSettings, *, threads: int | None = None
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Segment nuclei from their flow; parameters, results and errors as `masks_from_flows`."""
    if not (np.isfinite(nucleus_diameter_um) and nucleus_diameter_um > 0):
        raise InputError(f"dynamics: the nucleus diameter must be positive, got {nucleus_diameter_um} um")
    labels = _sink_of_each_voxel(field, nucleus_diameter_um, settings, threads)
    bounds_um3 = settings.bounds_um3(nucleus_diameter_um)
    scores = finish_labels(labels, field, bounds_um3, settings.score_threshold, threads=threads)
    return labels, scores


def masks_2d_from_flows(
    flow: NDArray[np.floating[Any]],
    logit: NDArray[np.floating[Any]],
    diameter_px: float,
    settings: MaskSettings,
) -> NDArray[np.uint32]:
    """Segment the nuclei of one plane by the same dynamics, for stitching.

    Bounds of the volume do not apply to a plane: they are for the stitched nucleus. Works in one thread.

    Parameters
    ----------
    flow : float array, shape (2, Y, X)
        Direction to the centre (y, x), length about 1.
    logit : float array, shape (Y, X)
    diameter_px : float
        Diameter of a typical nucleus in pixels.
    settings : MaskSettings

    Returns
    -------
    uint32 array, shape (Y, X)
        Labels 1..n; 0 is background.

    Raises
    ------
    InputError
        If shapes do not fit or the diameter is not positive.
    """
    if logit.ndim != 2 or flow.shape != (2, *logit.shape):
        raise InputError(
            f"dynamics: flow {flow.shape} and logit {logit.shape} do not fit; expected (2, Y, X) and (Y, X)"
        )
    if not (np.isfinite(diameter_px) and diameter_px > 0):
        raise InputError(f"dynamics: the nucleus diameter must be positive, got {diameter_px} pixels")
    volume_flow = np.zeros((3, 1, *logit.shape), np.float32)
    volume_flow[1:, 0] = flow
    plane = VoxelSize(_PLANE_DEPTH, 1.0, 1.0)
    field = FlowField.of(volume_flow, logit[np.newaxis], plane, 1)
    labels = _sink_of_each_voxel(field, diameter_px, settings, 1)
    min_pixels = settings.min_volume_fraction * np.pi / 4 * diameter_px**2
    bounds = (min_pixels * plane.volume_um3, np.inf)
    finish_labels(labels, field, bounds, settings.score_threshold, threads=1)
    return np.asarray(labels[0])


def finish_labels(
    labels: NDArray[np.uint32],
    field: FlowField,
    bounds_um3: tuple[float, float],
    score_threshold: float,
    *,
    threads: int | None = None,
) -> NDArray[np.float32]:
    """Make labels whole, score them and drop those that are no nuclei, in place.

    Parameters
    ----------
    labels : uint32 array, shape (Z, Y, X)
        Raw labels; afterwards 1..n, each one 6-connected piece without holes.
    field : FlowField
        Of that shape.
    bounds_um3 : tuple of float
        Least and largest volume.
    score_threshold : float
        Labels with a lower score are dropped; those below 0.01 always are.
    threads : int, optional
        All processors by default.

    Returns
    -------
    float32 array, shape (n + 1,)
        Score in 0..1 by label; entry 0 is 0.
    """
    least, most = (bound / field.voxel_size.volume_um3 for bound in bounds_um3)
    where = clean_labels(labels, least, most, threads)
    scores = score_labels(labels, where, field, threads)
    keep = scores >= max(score_threshold, _LEAST_SCORE)
    keep[0] = True
    if keep.all():
        return scores
    keep_labels(labels, keep)
    return scores[keep]


def _sink_of_each_voxel(
    field: FlowField, diameter_um: float, settings: MaskSettings, threads: int | None
) -> NDArray[np.uint32]:
    """Label every foreground voxel with the number of the sink that it flows to."""
    threads = available_threads() if threads is None else threads
    shape, voxel_size = field.shape, field.voxel_size
    ends = np.empty(shape, np.uint32)
    edges = np.array(voxel_size.zyx, np.float32)
    in_use = [edge for edge, length in zip(voxel_size.zyx, shape, strict=True) if length > 1] or [1.0]
    # Bins finer than voxels would only cost memory.
    bin_um = max(settings.bin_edge * diameter_um, 0.75 * float(np.prod(in_use)) ** (1 / len(in_use)))
    grid = BinGrid.over(shape, voxel_size, bin_um)
    step_um = max(settings.step * diameter_um, min(voxel_size.zyx))
    rounds = 40 + int(4 * diameter_um / step_um)
    bin_edges = np.array(grid.edges_um, np.float32)
    threshold = settings.cellprob_threshold * LOGIT_UNITS

    def run(start: int, stop: int) -> int:
        steps = (step_um, 0.15 * step_um, rounds)
        return int(follow(field.packed, threshold, edges, *steps, bin_edges, grid.shape, ends, start, stop))

    slabs = np.linspace(0, shape[0], min(shape[0], 8 * threads) + 1).astype(int)
    with ThreadPoolExecutor(threads) as pool:
        foreground = sum(pool.map(run, slabs[:-1], slabs[1:]))
    if foreground > 0:
        group_sinks(ends, grid, settings.sink_radius * diameter_um)
    return ends
