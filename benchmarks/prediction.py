"""Whole prediction beside stock Cellpose 3: same weights, same volume, same machine.

    python benchmarks/prediction.py [--model models/nuclei_3d] [--repeats 3] [--peer-repeats 1]
        [--volumes embryo full] [--frame IMAGE] [--json]

Two volumes of 96 x 256 x 256 cubic voxels at the network's scale: nuclei in an ellipsoid that fills 40 % of
it (an embryo), and nuclei everywhere. Stock is `CellposeModel.eval(do_3D=True)` with its defaults; its runs
and ours take turns, so that both meet the same load. Peak memory is measured at 30 Mvox in processes of their
own, with three small filters in place of CPnet on both sides for all but the first batches, because stock
would take most of an hour; `--volumes` with nothing behind it measures the memory alone.

--frame IMAGE measures something else, on a CPU: the network pass over a real image with networks of width 32,
24 and 16 (the narrow ones untrained, which is as fast), by torch and by OpenVINO in float32, int8 and, where
the processor computes with it, bfloat16, with every second orthogonal plane, and stock, by turns. Give
OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nuclei3d.console import emit_json, say
from nuclei3d.images.frames import find_frames
from nuclei3d.networks.cpnet import choose_device, choose_precision, new_network
from nuclei3d.networks.folder import Model, load_model
from nuclei3d.segmentation import openvino_engine
from nuclei3d.segmentation.network_runner import NetworkRunner
from nuclei3d.segmentation.openvino_engine import has_openvino
from nuclei3d.segmentation.segmenter import Segmenter, segment_with_cellpose
from nuclei3d.segmentation.settings import SegmentationSettings
from shared import (
    CUBIC,
    Filters,
    Labels,
    add_network_options,
    ap_of,
    draw_volume,
    measure,
    measure_in_turns,
    new_parser,
    ratio_of,
)

SHAPE = (96, 256, 256)
MEMORY_SHAPE = (120, 500, 500)
SHARES = {"embryo": 0.4, "full": 1.0}
"""Share of each volume that nuclei fill."""
BARS = {
    "cpu": {"speedup_embryo": 4.0, "speedup_full": 2.0, "network_share": 0.85},
    "cuda": {"speedup_embryo": 12.0, "speedup_full": 5.0, "network_share": 0.6},
}
MEMORY_BAR = 1 / 3


def memory_of(which: str, diameter: float) -> float:
    """Peak memory in MB of one prediction at 30 Mvox with the filters, above that of the loaded program."""
    rng = np.random.default_rng(0)
    image, _ = draw_volume((40, 250, 250), diameter, 1.0, rng)
    image = np.tile(image, [size // part for size, part in zip(MEMORY_SHAPE, image.shape, strict=True)])
    settings = SegmentationSettings(diameter_px=diameter, nucleus_diameter_um=diameter)
    network, device = Filters(diameter), torch.device("cpu")
    warm = image[:20, :64, :64]

    def run(volume: NDArray[np.uint16]) -> int:
        if which == "ours":
            return len(Segmenter(network, settings, device).segment(volume, CUBIC).nuclei)
        from cellpose.models import CellposeModel

        model = CellposeModel(gpu=False, pretrained_model=False, diam_mean=diameter)
        model.net, model.net_ortho = network, None
        masks, _, _ = model.eval(
            volume, channels=[0, 0], z_axis=0, do_3D=True, diameter=diameter, anisotropy=1.0
        )
        return int(masks.max())

    run(warm)
    network.real_batches = 3
    timing, nuclei = measure(lambda: run(image), 1)
    say(f"memory, {which}: {timing.peak_mb:.0f} MB for {image.size / 1e6:.0f} Mvox, {nuclei} nuclei")
    return timing.peak_mb


def compare_memory(diameter: float) -> dict[str, float]:
    """Measure both sides in processes of their own."""
    peaks = {}
    for which in ("ours", "stock"):
        command = [sys.executable, __file__, "--memory-of", which, "--diameter", str(diameter)]
        run = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        peaks[which] = float(json.loads(run.stdout.splitlines()[-1])["peak_mb"])
    return peaks


def flops_per_pixel(network: nn.Module) -> float:
    """Floating point operations of a forward pass per pixel."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.cpu()(torch.zeros(1, 2, 128, 128))
    return float(counter.get_total_flops()) / 128**2


def compare(
    name: str,
    volume: tuple[NDArray[np.uint16], Labels],
    network: nn.Module,
    settings: SegmentationSettings,
    device: torch.device,
    repeats: tuple[int, int],
    report: dict[str, Any],
) -> None:
    """Time ours and stock by turns on one volume; note speed-up and average precision."""
    image, truth = volume
    Segmenter(network, settings, device).segment(image[:24, :64, :64], CUBIC)
    both = measure_in_turns(
        {
            "ours": (lambda: Segmenter(network, settings, device).segment(image, CUBIC), repeats[0]),
            "stock": (lambda: segment_with_cellpose(image, CUBIC, network, settings, device), repeats[1]),
        }
    )
    (own, result), (peer, masks) = both["ours"], both["stock"]
    share = result.seconds["network"] / result.seconds["total"]
    ap = {"ours": ap_of(truth, result.labels, 0.5, 0.75), "stock": ap_of(truth, masks, 0.5, 0.75)}
    wall, processor = ratio_of(peer.seconds, own.seconds), ratio_of(peer.cpu_seconds, own.cpu_seconds)
    report[f"speedup_{name}"] = wall["median"]
    report[name] = {
        "nuclei": int(truth.max()),
        "speedup": wall,
        "speedup_cpu": processor,
        "ours": {**own.as_json(), "steps_s": {k: round(v, 2) for k, v in result.seconds.items()}},
        "stock": peer.as_json(),
        "network_share": round(share, 3),
        "ap_50_75": ap,
    }
    say(f"{name}: ours {own}, {100 * share:.0f} % inside the network; stock {peer}")
    spreads = [
        f"{each['median']:.1f} ({each['least']:.1f} to {each['most']:.1f})" for each in (wall, processor)
    ]
    say(f"{name}: {spreads[0]} x as fast, {spreads[1]} x by processor time; AP .5, .75: {ap}")


def compare_networks(path: Path, model: Model, scale: float, repeats: tuple[int, int]) -> dict[str, Any]:
    """Time the pass of narrower and rounded networks over a frame, by turns with stock: a row for each."""
    (frame,) = find_frames(path)
    voxel_size = frame.require_voxel_size()
    image = frame.read()
    image = image[tuple(slice(round(size * scale)) for size in image.shape)]
    settings = Segmenter(model, {"precision": "float32"}, "cpu").settings
    bfloat16 = choose_precision("auto", torch.device("cpu")) == torch.bfloat16
    passes: dict[str, tuple[nn.Module, dict[str, Any]]] = {}
    for width in (32, 24, 16):
        wide = model.info.width == width
        network = model.network if wide else new_network(model.info.diameter_px, 0, width)
        passes[f"torch, width {width}"] = network, {"engine": "torch"}
        if has_openvino():
            passes[f"OpenVINO, width {width}"] = network, {"engine": "openvino"}
            passes[f"OpenVINO int8, width {width}"] = network, {"precision": "int8"}
        if bfloat16:
            passes[f"torch bfloat16, width {width}"] = network, {"engine": "torch", "precision": "bfloat16"}
        if bfloat16 and has_openvino():
            passes[f"OpenVINO bfloat16, width {width}"] = network, {"precision": "bfloat16"}
    passes["torch, every second xz and yz plane"] = model.network, {"engine": "torch", "orthogonal_step": 2}
    if has_openvino():
        both = {"precision": "int8", "orthogonal_step": 2}
        passes["OpenVINO int8, every second xz and yz plane"] = model.network, both
    # no row compiles anew what it compiled before
    openvino_engine.MOST_COMPILED = len(passes)
    works: dict[str, tuple[Callable[[], Any], int]] = {}
    for name, (network, chosen) in passes.items():
        # channels last, as the first run leaves it, must not change a network that others measure
        segmenter = Segmenter(copy.deepcopy(network), replace(settings, **chosen), torch.device("cpu"))
        segmenter.flows(image[:8], voxel_size)
        works[name] = partial(segmenter.flows, image, voxel_size), repeats[0]
    stock = partial(segment_with_cellpose, image, voxel_size, model.network, settings, torch.device("cpu"))
    done = {
        name: timing
        for name, (timing, _) in measure_in_turns({**works, "stock": (stock, repeats[1])}).items()
    }
    rows = {
        name: {**timing.as_json(), "speedup_cpu": ratio_of(done["stock"].cpu_seconds, timing.cpu_seconds)}
        for name, timing in done.items()
    }
    for name, row in rows.items():
        ratio = row["speedup_cpu"]
        say(
            f"{name}: {row['cpu_median_s']:.1f} s of processor time, {ratio['median']} ({ratio['least']} to "
            f"{ratio['most']}) x stock, {row['peak_mb']:.0f} MB"
        )
    return {"frame": path.name, "voxels": int(image.size), "threads": torch.get_num_threads(), "passes": rows}


def main() -> None:
    parser = new_parser(__doc__)
    add_network_options(parser)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer-repeats", type=int, default=1)
    parser.add_argument("--volumes", nargs="*", choices=tuple(SHARES), default=list(SHARES))
    parser.add_argument("--frame", type=Path, help="measure networks on this image instead")
    parser.add_argument("--scale", type=float, default=1.0, help="shrink the volumes, to try things out")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--engine", default="auto", choices=["auto", "torch", "openvino"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--memory-of", choices=["ours", "stock"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        emit_json({"peak_mb": memory_of(arguments.memory_of, arguments.diameter)})
        return
    if arguments.frame is not None:
        repeats = (arguments.repeats, arguments.peer_repeats)
        emit_json(compare_networks(arguments.frame, load_model(arguments.model), arguments.scale, repeats))
        return
    device = choose_device(arguments.device)
    network = load_model(arguments.model).network
    with torch.no_grad():
        network.get_parameter("diam_mean").fill_(arguments.diameter)
    settings = SegmentationSettings(
        diameter_px=arguments.diameter,
        nucleus_diameter_um=arguments.diameter,
        precision=arguments.precision,
        engine=arguments.engine,
    )
    engine = arguments.engine
    if engine == "auto":
        engine = "openvino" if device.type == "cpu" and has_openvino() else "torch"
    shape = tuple(round(size * arguments.scale) for size in SHAPE)
    report: dict[str, Any] = {
        "voxels": int(np.prod(shape)),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "engine": engine,
        "precision": str(choose_precision(arguments.precision, device)),
    }
    repeats = (arguments.repeats, arguments.peer_repeats)
    for name in arguments.volumes:
        volume = draw_volume(shape, arguments.diameter, SHARES[name], np.random.default_rng(1))
        compare(name, volume, network, settings, device, repeats, report)
    if arguments.volumes:
        report["network_share"] = min(report[name]["network_share"] for name in arguments.volumes)
    if device.type == "cuda":
        runner = NetworkRunner(network, device, precision=choose_precision(arguments.precision, device))
        planes = torch.rand((runner.planes_per_batch(256 * 256), 256, 256), device=device)
        runner.run(planes)
        timing, _ = measure(lambda: float(runner.run(planes)[0, 0, 0, 0]), 10)
        operations = flops_per_pixel(network) * planes.numel()
        report["teraflops"] = round(operations / timing.median / 1e12, 1)
    if arguments.memory:
        peaks = compare_memory(arguments.diameter)
        report["memory_mb"] = peaks
        report["memory_ratio"] = round(peaks["ours"] / peaks["stock"], 3)
    bars = BARS[device.type]
    report["passed"] = all(report[key] >= bar for key, bar in bars.items() if key in report) and (
        report.get("memory_ratio", 0) <= MEMORY_BAR
    )
    if arguments.json:
        emit_json(report)


if __name__ == "__main__":
    main()
