"""A fully 3D network against the 2D views, at the same training budget, on embryos it never saw.

    python benchmarks/full3d.py --data BBBC050 --out DIR [--profile cpu|gpu] [--arms NAME ...]
        [--minutes 6] [--json]

Arms on BBBC050, split by embryo: the first attempt in kind (targets tanh((c - x) / 5) in voxels, all axes
pooled alike, axes not balanced in the loss), heat targets alone, pooling by the voxel size alone, both, and
the 2D views. Two arms more train nothing: they predict with the networks of "2D views" and of "heat, pooling
by spacing" together (mode mixed), by mean and by consensus; their training is that of both. Further arms
train on simulated embryos of anisotropy 5.75 and 11.5. Each arm trains for `--minutes` and chooses its
thresholds on the validation embryo; the table is of the three test embryos. A training that was stopped goes
on, an arm that is done is not done again. On a CPU minutes and seconds are processor time, so that a busy
machine changes nothing, and the 3D network is the small one; the profile ``gpu`` counts the time of the clock
and trains the large one on more patches a step.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embryos import prepare_once, score, split_of, write_result
from nuclei3d.config import Params
from nuclei3d.config.loading import validate_params
from nuclei3d.console import say
from nuclei3d.flows import flows_3d
from nuclei3d.grid import resize_nearest
from nuclei3d.images.embryos import read_labelled
from nuclei3d.images.tiff import write_labels
from nuclei3d.networks.folder import load_model
from nuclei3d.segmentation.segmenter import Segmenter
from nuclei3d.stages.calibrate import with_thresholds
from nuclei3d.stages.labelled_frames import read_to_scale, spread_evenly
from nuclei3d.stages.simulate import simulate
from nuclei3d.stages.train import train
from nuclei3d.training.loop import StopTraining
from shared import markdown, new_parser

# column of the table: name in an arm's record
COLUMNS = {
    "AP .5": "ap_0.50",
    "AP .75": "ap_0.75",
    "SEG": "seg",
    "MUCov": "mucov",
    "recall, faintest fifth": "recall_faint",
    "precision": "precision",
    "z flow cosine": "cosine_z",
    "x flow cosine": "cosine_x",
    "s / Mvox": "seconds_per_mvox",
    "GPU GB": "peak_gpu_gb",
    "steps": "steps",
}
BBBC050 = {
    "train": [f"Emb{n:02d}" for n in (1, 2, 3, 5, 6, 7, 8)],
    "validation": ["Emb10"],
    "test": ["Emb04", "Emb09", "Emb11"],
}
SIMULATED = {"train": ["embryo_a"], "validation": ["embryo_b"], "test": ["embryo_c"]}
_COMMON = {
    "epochs": 10_000,
    "learning_rate": 2.0e-3,
    "schedule": "constant",
    "warmup_steps": 20,
    "ema": 0.98,
    "select": "last",
    "sampling": {"balance": "frames"},
    # what the ablation found best (docs/training.md)
    "augment": {"flip_z": False, "side_rotation": "none"},
}
_VIEWS = {
    "network": "views2d",
    "diameter_px": 17,
    "batch_size": 8,
    "crop_px": 128,
    "crops_per_epoch": 80,
    "sampling": {"balance": "frames", "nucleus_centred": 0.5},
}
_SOLID = {
    "network": "full3d",
    # the embryos' own pixels: anisotropy 2.2, at which the two kinds of pooling differ
    "diameter_px": 20.5,
    "batch_size": 2,
    "crops_per_epoch": 60,
    "validation_crops": 16,
}
_FIRST = {"profile": "small", "patch": [24, 64, 64], "pooling": "isotropic", "balance_axes": False}
_SPACING = {"profile": "small", "patch": [24, 64, 64]}
_UNBALANCED = {**_SPACING, "balance_axes": False}
# name: (data, targets, train)
ARMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tanh, isotropic pooling": ("bbbc050", "tanh", {**_SOLID, "full3d": _FIRST}),
    "heat, isotropic pooling": ("bbbc050", "heat", {**_SOLID, "full3d": {**_FIRST, "balance_axes": True}}),
    "tanh, pooling by spacing": (
        "bbbc050",
        "tanh",
        {**_SOLID, "full3d": _UNBALANCED},
    ),
    "heat, pooling by spacing": ("bbbc050", "heat", {**_SOLID, "full3d": _SPACING}),
    "2D views": ("bbbc050", "heat", _VIEWS),
    "simulated, anisotropy 5.75": (
        "simulated_5.75",
        "heat",
        {**_SOLID, "diameter_px": 27.3, "full3d": {"profile": "small", "patch": [12, 80, 80]}},
    ),
    "simulated, anisotropy 11.5": (
        "simulated_11.5",
        "heat",
        {**_SOLID, "diameter_px": 54.6, "full3d": {"profile": "small", "patch": [10, 128, 128]}},
    ),
}
# what the profile "gpu" changes
_GPU_VIEWS = {"batch_size": 32, "crops_per_epoch": 640, "ema": 0.995}
_GPU_SOLID = {"batch_size": 8, "crops_per_epoch": 160, "validation_crops": 32, "ema": 0.995}
_GPU_FULL3D = {"profile": "default"}
# name: (arm of the 2D network, arm of the 3D network, predict.fusion)
MIXED = {
    "2D views and 3D network, mixed": ("2D views", "heat, pooling by spacing", "mean"),
    "2D views and 3D network, mixed by consensus": ("2D views", "heat, pooling by spacing", "consensus"),
}
_SIMULATE = {
    "simulated_5.75": {"shape": [24, 128, 128], "voxel_size_um": [2.0, 0.348, 0.348], "frames": [6, 2, 2]},
    "simulated_11.5": {"shape": [24, 224, 224], "voxel_size_um": [2.0, 0.174, 0.174], "frames": [6, 2, 2]},
}


def place_of(arm: str, out: Path) -> Path:
    """Give the folder of an arm."""
    folder = out / "".join(c if c.isalnum() or c == "." else "_" for c in arm)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def params_of(arm: str, profile: str) -> Params:
    data, targets, settings = ARMS[arm]
    if profile == "gpu":
        solid = _GPU_SOLID | {"full3d": settings.get("full3d", {}) | _GPU_FULL3D}
        settings = settings | (_GPU_VIEWS if settings["network"] == "views2d" else solid)
    tree = {
        "seed": 0,
        "data": {"split": {"by": "embryo", **(SIMULATED if data in _SIMULATE else BBBC050)}},
        "prepare": {
            "downsample_xy": 1.0,
            "step_xy": 2,
            "step_xz": 4,
            "step_yz": 4,
            "sparse_share": 0.1,
            "targets": targets,
            "workers": 1,
        },
        "train": {**_COMMON, **settings, "name": "model"},
        "calibrate": {"volumes": 0},
        "evaluate": {"bootstrap": 200},
        "tracking": {"enabled": False},
    }
    if data in _SIMULATE:
        tree["simulate"] = {**_SIMULATE[data], "nuclei": 14}
    return validate_params(tree, "the benchmark")


def embryos_of(arm: str, data: Path, out: Path, profile: str) -> Path:
    """Give the embryos of an arm; simulated ones are made."""
    name = ARMS[arm][0]
    if name not in _SIMULATE:
        return data
    if not (out / name).is_dir():
        simulate(params_of(arm, profile), out / name)
    return out / name


def clock(profile: str) -> float:
    """Give the seconds that count: of the processor, or where a GPU computes, of the clock."""
    return time.process_time() if profile == "cpu" else time.perf_counter()


def train_arm(arm: str, data: Path, out: Path, minutes: float, profile: str) -> None:
    """Prepare what the arm needs and train it until its time is used up."""
    params = params_of(arm, profile)
    name, targets, settings = ARMS[arm]
    source, folder = embryos_of(arm, data, out, profile), place_of(arm, out)
    slices = prepare_once(params, source, out / f"{name}_{settings['network']}_{targets}")
    spent_file = folder / "train_seconds"
    before = float(spent_file.read_text()) if spent_file.is_file() else 0.0
    started, spent = time.process_time(), before

    def on_epoch(report: Any) -> None:
        nonlocal spent
        if profile == "cpu":
            spent = before + time.process_time() - started
        elif report.epoch > 1:
            # in the first epoch libraries choose their algorithms, which takes them longer than the training
            spent += report.seconds
        spent_file.write_text(f"{spent:.1f}\n")
        if spent >= 60 * minutes:
            raise StopTraining(f"{minutes:g} minutes are used up")

    train(params, slices, folder / "model", data=source, on_epoch=on_epoch)


def judge(arm: str, data: Path, out: Path, profile: str) -> dict[str, Any]:
    """Choose thresholds on the validation embryo; segment and judge the test embryo.

    A mixed arm predicts with the models of two others.
    """
    first, beside, fusion = MIXED.get(arm, (arm, None, "mean"))
    trained = [place_of(name, out) for name in (first, beside) if name is not None]
    params = params_of(first, profile)
    source, folder = embryos_of(first, data, out, profile), place_of(arm, out)
    model = load_model(trained[0] / "model")
    mixed_with = trained[1] / "model" if beside else None
    wished = params.predict.model_copy(update={"fusion": fusion, "volume_model": mixed_with})
    volumes = list(read_to_scale(spread_evenly(split_of(params, source).validation, 4), params, None))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    info, _ = with_thresholds(model.info, params.calibrate, Segmenter(model, wished, "auto"), volumes)
    segmenter = Segmenter(replace(model, info=info), wished, "auto")
    sums = np.zeros((3, 3))
    seconds = voxels = 0.0
    frames = split_of(params, source).test
    for frame in frames:
        volume = read_labelled(frame, params.data)
        started = clock(profile)
        flows = segmenter.flows(volume.image, volume.voxel_size)
        labels, _ = segmenter.label(flows, volume.image.shape)
        seconds += clock(profile) - started
        voxels += volume.image.size
        true_labels = resize_nearest(volume.labels, flows.shape).astype(np.uint32)
        truth, inside = flows_3d(true_labels, flows.voxel_size), true_labels > 0
        for axis in range(3):
            a, b = flows.flow[axis][inside].astype(np.float64), truth[axis][inside].astype(np.float64)
            sums[axis] += (a @ b, a @ a, b @ b)
        masks = folder / "pred" / frame.embryo / f"{frame.frame}_masks.ome.tif"
        write_labels(masks, labels, volume.voxel_size)
    metrics = score(params, frames, folder / "pred", folder)
    history = (trained[0] / "model" / "history.csv").read_text().splitlines()
    steps = (len(history) - 1) * -(-int(params.train.crops_per_epoch or 0) // params.train.batch_size)
    cosines = sums[:, 0] / np.sqrt(sums[:, 1] * sums[:, 2])
    return {
        "arm": arm,
        "ap_0.50": metrics["ap"]["0.50"],
        "ap_0.75": metrics["ap"]["0.75"],
        **{name: metrics[name] for name in ("seg", "mucov", "recall_faint", "precision", "recall")},
        "intervals": metrics.get("intervals", {}),
        **{f"cosine_{axis}": float(value) for axis, value in zip("zyx", cosines, strict=True)},
        "seconds_per_mvox": seconds / voxels * 1e6,
        "peak_gpu_gb": torch.cuda.max_memory_allocated() / 1e9 if segmenter.device.type == "cuda" else None,
        # steps of two networks are not of one kind: there is no sum
        "steps": steps if beside is None else None,
        "train_seconds": sum(float((place / "train_seconds").read_text()) for place in trained),
        "nuclei": metrics["n_true"],
    }


def run_arm(arm: str, data: Path, out: Path, minutes: float, profile: str) -> dict[str, Any]:
    """Train and judge an arm unless its record is there; before a mixed arm, those whose models it needs."""
    record = place_of(arm, out) / f"record_{minutes:g}.json"
    for needed in MIXED.get(arm, ())[:2]:
        run_arm(needed, data, out, minutes, profile)
    if not record.is_file():
        say(f"--- {arm}")
        if arm not in MIXED:
            train_arm(arm, data, out, minutes, profile)
        record.write_text(json.dumps(judge(arm, data, out, profile), indent=2) + "\n")
    result: dict[str, Any] = json.loads(record.read_text())
    return result


def main() -> None:
    parser = new_parser(__doc__, whole=True, embryos=True)
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *MIXED], default=[*ARMS, *MIXED], metavar="NAME")
    parser.add_argument("--profile", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--minutes", type=float, default=6.0, help="of each training")
    args = parser.parse_args()
    records = {arm: run_arm(arm, args.data, args.out, args.minutes, args.profile) for arm in args.arms}
    result: dict[str, Any] = {
        "minutes": args.minutes,
        "profile": args.profile,
        "arms": list(records.values()),
    }
    solid, views = records.get("heat, pooling by spacing"), records.get("2D views")
    if solid is not None and views is not None:
        result["faster_than_views"] = views["seconds_per_mvox"] / solid["seconds_per_mvox"]
    if simulated := [record["cosine_z"] for arm, record in records.items() if arm.startswith("simulated")]:
        result["z_flows_learned"] = min(simulated) >= 0.8

    def cell(value: float | None) -> str:
        return "" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"

    rows = {arm: [cell(record[key]) for key in COLUMNS.values()] for arm, record in records.items()}
    write_result(args.out, result, markdown(list(COLUMNS), rows), as_json=args.json)


if __name__ == "__main__":
    main()
