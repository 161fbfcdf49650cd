"""Speed of flow targets and of dynamics with masks on the CPU, beside stock Cellpose 3 in the same process.

    python benchmarks/postprocessing.py [--repeats 3] [--peer-repeats 1] [--json]

About 6 Mvox with about 140 touching nuclei of 35 px. Targets in 2D are those of all planes of one
direction; dynamics get exact 3D flows and include masks, cleaning and, in ours, the score of each nucleus.
Compiled code is warmed up on a small volume first. Both may use all processors (`OMP_NUM_THREADS` for the
peer's torch, `NUMBA_NUM_THREADS` for ours).
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.console import emit_json, say
from nuclei3d.core.dynamics import MaskSettings, masks_from_flows
from nuclei3d.core.flow_targets import flows_2d, flows_3d
from nuclei3d.core.label_boxes import available_threads
from nuclei3d.core.matching import average_precision, overlap_table
from nuclei3d.volumes.voxel_size import VoxelSize
from shapes import touching_nuclei
from timing import Timing, measure

DIAMETER = 35.0
CUBIC = VoxelSize(1, 1, 1)
BARS = {"targets_3d_speedup": 30.0, "dynamics_speedup": 15.0, "targets_2d_speedup": 5.0}


def ours_2d(labels: NDArray[np.uint32]) -> None:
    for plane in labels:
        flows_2d(plane)


def stock_2d(labels: NDArray[np.int64]) -> None:
    from cellpose import dynamics

    for plane in labels:
        if plane.any():
            dynamics.masks_to_flows(plane)


def ours_masks(flow: NDArray[np.float32], logit: NDArray[np.float32]) -> NDArray[np.uint32]:
    return masks_from_flows(flow, logit, CUBIC, DIAMETER, MaskSettings())[0]


def stock_masks(flow: NDArray[np.float32], logit: NDArray[np.float32]) -> NDArray[np.uint32]:
    import torch
    from cellpose import dynamics

    masks = dynamics.resize_and_compute_masks(
        5 * flow, logit, niter=200, do_3D=True, min_size=15, device=torch.device("cpu")
    )
    return np.asarray(masks, np.uint32)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--peer-repeats", type=int, default=1, help="repeats of stock Cellpose, which is slow"
    )
    parser.add_argument("--side", type=int, default=184, help="edge of the volume in voxels")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    arguments = parser.parse_args()

    import torch
    from cellpose import dynamics

    box = (float(arguments.side),) * 3
    labels = touching_nuclei(box, 139, DIAMETER, CUBIC, 0)
    wide = labels.astype(np.int64)
    logit = np.where(labels > 0, 5.0, -5.0).astype(np.float32)
    say(f"{labels.size / 1e6:.1f} Mvox, {labels.max()} nuclei fill {100 * (labels > 0).mean():.0f} %")

    small = labels[:40, :40, :40].copy()
    ours_2d(small)
    ours_masks(flows_3d(small, CUBIC), np.where(small > 0, 5.0, -5.0).astype(np.float32))
    stock_2d(small.astype(np.int64)[:2])

    cpu = torch.device("cpu")
    timings: dict[str, dict[str, Timing]] = {name: {} for name in ("targets_2d", "targets_3d", "dynamics")}
    timings["targets_2d"]["ours"], _ = measure(lambda: ours_2d(labels), arguments.repeats)
    timings["targets_3d"]["ours"], flow = measure(lambda: flows_3d(labels, CUBIC), arguments.repeats)
    timings["dynamics"]["ours"], found = measure(lambda: ours_masks(flow, logit), arguments.repeats)
    timings["targets_2d"]["stock"], _ = measure(lambda: stock_2d(wide), arguments.peer_repeats)
    timings["dynamics"]["stock"], stock_found = measure(
        lambda: stock_masks(flow, logit), arguments.peer_repeats
    )
    timings["targets_3d"]["stock"], _ = measure(
        lambda: dynamics.masks_to_flows_gpu_3d(wide, device=cpu), arguments.peer_repeats
    )

    report: dict[str, Any] = {
        "voxels": int(labels.size),
        "nuclei": int(labels.max()),
        "threads": {"ours": available_threads(), "stock": torch.get_num_threads()},
    }
    for name, pair in timings.items():
        speedup = pair["stock"].median / pair["ours"].median
        # The least favourable pair of repeats: the spread of the ratio.
        least = min(pair["stock"].seconds) / max(pair["ours"].seconds)
        report[f"{name}_speedup"] = round(speedup, 1)
        report[f"{name}_speedup_least"] = round(least, 1)
        report[name] = {way: timing.as_json() for way, timing in pair.items()}
        say(
            f"{name}: ours {pair['ours'].median:.2f} s, stock {pair['stock'].median:.1f} s, "
            f"{speedup:.0f} x (at least {least:.0f} x); bar {BARS[f'{name}_speedup']:.0f} x"
        )
    report["ap_90"] = {
        "ours": float(average_precision(overlap_table(labels, found), (0.9,))[0]),
        "stock": float(average_precision(overlap_table(labels, stock_found), (0.9,))[0]),
    }
    report["passed"] = all(report[key] >= bar for key, bar in BARS.items())
    if arguments.json:
        emit_json(report)


if __name__ == "__main__":
    main()
