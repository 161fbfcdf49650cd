"""Speed of flow targets and of dynamics with masks on the CPU, beside stock Cellpose 3 in the same process.

    python benchmarks/postprocessing.py [--repeats 3] [--peer-repeats 1] [--json]

About 6 Mvox with about 140 touching nuclei of 35 px. Targets in 2D are those of all planes of one
direction; dynamics get exact 3D flows and include masks, cleaning and, in ours, the score of each nucleus.
Compiled code is warmed up on a small volume first. Both may use all processors (`OMP_NUM_THREADS` for the
peer's torch, `NUMBA_NUM_THREADS` for ours).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.console import emit_json, say
from nuclei3d.flows import flows_2d, flows_3d
from nuclei3d.grid import available_threads
from nuclei3d.segmentation.dynamics import masks_from_field
from nuclei3d.segmentation.flow_field import FlowField
from nuclei3d.segmentation.settings import MaskSettings
from shared import CUBIC, ap_of, measure_in_turns, new_parser, ratio_of, touching_nuclei

DIAMETER = 35.0
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
    return masks_from_field(FlowField.of(flow, logit, CUBIC), DIAMETER, MaskSettings())[0]


def stock_masks(flow: NDArray[np.float32], logit: NDArray[np.float32]) -> NDArray[np.uint32]:
    import torch
    from cellpose import dynamics

    masks = dynamics.resize_and_compute_masks(
        5 * flow, logit, niter=200, do_3D=True, min_size=15, device=torch.device("cpu")
    )
    return np.asarray(masks, np.uint32)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--peer-repeats", type=int, default=1, help="repeats of stock Cellpose, which is slow"
    )
    parser.add_argument("--side", type=int, default=184, help="edge of the volume in voxels")
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
    report: dict[str, Any] = {
        "voxels": int(labels.size),
        "nuclei": int(labels.max()),
        "threads": {"ours": available_threads(), "stock": torch.get_num_threads()},
    }

    def compare(name: str, ours: Callable[[], Any], stock: Callable[[], Any]) -> tuple[Any, Any]:
        """Time both by turns, note and tell the result; give what both computed last."""
        both = measure_in_turns({"ours": (ours, arguments.repeats), "stock": (stock, arguments.peer_repeats)})
        (own, own_result), (peer, peer_result) = both["ours"], both["stock"]
        wall, processor = ratio_of(peer.seconds, own.seconds), ratio_of(peer.cpu_seconds, own.cpu_seconds)
        report[f"{name}_speedup"] = wall["median"]
        report[f"{name}_speedup_least"] = wall["least"]
        report[f"{name}_speedup_cpu"] = processor["median"]
        report[name] = {"ours": own.as_json(), "stock": peer.as_json()}
        say(
            f"{name}: ours {own.median:.2f} s ({own.cpu_median:.2f} s of processor time), stock "
            f"{peer.median:.1f} s ({peer.cpu_median:.1f} s): {wall['median']:.0f} x as fast; bar "
            f"{BARS[f'{name}_speedup']:.0f} x"
        )
        return own_result, peer_result

    compare("targets_2d", lambda: ours_2d(labels), lambda: stock_2d(wide))
    flow = flows_3d(labels, CUBIC)
    found, stock_found = compare(
        "dynamics", lambda: ours_masks(flow, logit), lambda: stock_masks(flow, logit)
    )
    compare(
        "targets_3d",
        lambda: flows_3d(labels, CUBIC),
        lambda: dynamics.masks_to_flows_gpu_3d(wide, device=cpu),
    )
    report["ap_90"] = {"ours": ap_of(labels, found, 0.9)[0], "stock": ap_of(labels, stock_found, 0.9)[0]}
    report["passed"] = all(report[key] >= bar for key, bar in BARS.items())
    if arguments.json:
        emit_json(report)


if __name__ == "__main__":
    main()
