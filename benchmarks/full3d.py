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
and trains the large one on more patches a step. The peak of the memory is that of the process that predicts.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nuclei3d.config import Params
from nuclei3d.config.loading import validate_params
from nuclei3d.console import say
from shared import markdown, new_parser

# column of the table: name in an arm's record
COLUMNS = {
    "AP .5": "ap_0.50",
    "AP .75": "ap_0.75",
    "SEG": "seg",
    "MUCov": "mucov",
    "faint recall": "recall_faint",
    "z flow cosine": "cosine_z",
    "x flow cosine": "cosine_x",
    "s / Mvox": "seconds_per_mvox",
    "peak GB": "peak_gb",
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


def slug(name: str) -> str:
    return "".join(c if c.isalnum() or c == "." else "_" for c in name)


def train_settings(arm: str, profile: str) -> dict[str, Any]:
    """Give the parameters of an arm's training."""
    _, _, train = ARMS[arm]
    if profile == "cpu":
        return train
    if train["network"] == "views2d":
        return train | _GPU_VIEWS
    return train | _GPU_SOLID | {"full3d": train["full3d"] | _GPU_FULL3D}


def params_of(arm: str, profile: str) -> Params:
    data, targets, _ = ARMS[arm]
    train = train_settings(arm, profile)
    split = BBBC050 if data == "bbbc050" else SIMULATED
    tree = {
        "seed": 0,
        "data": {"split": {"by": "embryo", **split}},
        "prepare": {
            "downsample_xy": 1.0,
            "step_xy": 2,
            "step_xz": 4,
            "step_yz": 4,
            "sparse_share": 0.1,
            "targets": targets,
            "workers": 1,
        },
        "train": {**_COMMON, **train, "name": "model"},
        "calibrate": {"volumes": 0},
        "evaluate": {"bootstrap": 200},
        "tracking": {"enabled": False},
    }
    if data in _SIMULATE:
        tree["simulate"] = {**_SIMULATE[data], "nuclei": 14}
    return validate_params(tree, "the benchmark")


def data_folder(arm: str, data: Path, out: Path, profile: str) -> Path:
    """Give the embryos of an arm; simulated ones are made."""
    from nuclei3d.stages.simulate import simulate

    name = ARMS[arm][0]
    if name == "bbbc050":
        return data
    folder = out / name
    if not folder.is_dir():
        simulate(params_of(arm, profile), folder)
    return folder


def clock(profile: str) -> float:
    """Give the seconds that count: of the processor, or where a GPU computes, of the clock."""
    return time.process_time() if profile == "cpu" else time.perf_counter()


def train_arm(arm: str, data: Path, out: Path, minutes: float, profile: str) -> None:
    """Prepare what the arm needs and train it until its time is used up."""
    from nuclei3d.stages.prepare import prepare
    from nuclei3d.stages.train import train
    from nuclei3d.training.loop import StopTraining

    params = params_of(arm, profile)
    name, targets, settings = ARMS[arm]
    slices = out / f"{name}_{settings['network']}_{targets}"
    source = data_folder(arm, data, out, profile)
    if not slices.is_dir():
        prepare(params, source, slices)
    folder = out / slug(arm)
    folder.mkdir(exist_ok=True)
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


def predict_arm(arm: str, data: Path, out: Path, profile: str) -> dict[str, Any]:
    """Choose thresholds on the validation embryo; segment and judge the test embryo.

    A mixed arm predicts with the models of two others.
    """
    from dataclasses import replace

    from nuclei3d.flows import flows_3d
    from nuclei3d.grid import resize_nearest
    from nuclei3d.images.embryos import find_embryos, read_labelled, split_embryos
    from nuclei3d.images.tiff import write_image, write_labels
    from nuclei3d.networks.folder import load_model
    from nuclei3d.segmentation.segmenter import Segmenter
    from nuclei3d.stages.calibrate import read_calibration_volumes, with_thresholds
    from nuclei3d.stages.evaluate import evaluate

    first, beside, fusion = MIXED.get(arm, (arm, None, "mean"))
    trained = [first] if beside is None else [first, beside]
    params = params_of(first, profile)
    params = params.model_copy(update={"predict": params.predict.model_copy(update={"fusion": fusion})})
    source = data_folder(first, data, out, profile)
    folder = out / slug(arm)
    folder.mkdir(exist_ok=True)
    model, *others = (load_model(out / slug(name) / "model") for name in trained)
    wished = params.predict.model_copy(update={"volume_model": others[0].path.parent if others else None})
    wanted = params.calibrate.model_copy(update={"volumes": 4})
    volumes = read_calibration_volumes(params.model_copy(update={"calibrate": wanted}), source)
    info, _ = with_thresholds(model.info, wanted, Segmenter(model, wished, "auto"), volumes)
    segmenter = Segmenter(replace(model, info=info), wished, "auto")
    sums = np.zeros((3, 3))
    seconds = voxels = 0.0
    for frame in split_embryos(find_embryos(source), params.data.split).test:
        volume = read_labelled(frame, params.data)
        started = clock(profile)
        flows = segmenter.flows(volume.image, volume.voxel_size)
        labels, _ = segmenter.label(flows, volume.image.shape)
        seconds += clock(profile) - started
        voxels += volume.image.size
        true_labels = resize_nearest(volume.labels, flows.shape).astype(np.uint32)
        truth = flows_3d(true_labels, flows.voxel_size)
        inside = true_labels > 0
        flow = flows.flow
        for axis in range(3):
            a, b = flow[axis][inside].astype(np.float64), truth[axis][inside].astype(np.float64)
            sums[axis] += (a @ b, a @ a, b @ b)
        place = Path(frame.embryo) / f"{frame.frame}.ome.tif"
        write_labels(
            folder / "pred" / frame.embryo / f"{frame.frame}_masks.ome.tif", labels, volume.voxel_size
        )
        write_labels(folder / "truth" / place, volume.labels.astype(np.uint32), volume.voxel_size)
        write_image(folder / "images" / place, volume.image, volume.voxel_size)
    evaluate(params, folder / "truth", folder / "pred", folder / "evaluation", images=folder / "images")
    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
    history = (out / slug(first) / "model" / "history.csv").read_text().splitlines()
    train = params.train
    steps = (len(history) - 1) * -(-int(train.crops_per_epoch or 0) // train.batch_size)
    cosines = sums[:, 0] / np.sqrt(sums[:, 1] * sums[:, 2])
    return {
        "arm": arm,
        "ap_0.50": metrics["ap"]["0.50"],
        "ap_0.75": metrics["ap"]["0.75"],
        **{name: metrics[name] for name in ("seg", "mucov", "recall_faint", "precision", "recall")},
        "intervals": metrics.get("intervals", {}),
        **{f"cosine_{axis}": float(value) for axis, value in zip("zyx", cosines, strict=True)},
        "seconds_per_mvox": seconds / voxels * 1e6,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "peak_gpu_gb": torch.cuda.max_memory_allocated() / 1e9 if segmenter.device.type == "cuda" else None,
        # steps of two networks are not of one kind: there is no sum
        "steps": steps if beside is None else None,
        "train_seconds": sum(float((out / slug(name) / "train_seconds").read_text()) for name in trained),
        "nuclei": metrics["n_true"],
    }


def run_arm(arm: str, data: Path, out: Path, minutes: float, profile: str) -> dict[str, Any]:
    """Train and judge an arm, each in a process of its own, unless its record is there.

    Before a mixed arm come those whose models it needs.
    """
    record = out / slug(arm) / f"record_{minutes:g}.json"
    for needed in MIXED.get(arm, ())[:2]:
        run_arm(needed, data, out, minutes, profile)
    if not record.is_file():
        say(f"--- {arm}")
        for step in ("predict",) if arm in MIXED else ("train", "predict"):
            command = [sys.executable, __file__, "--data", str(data), "--out", str(out), "--profile", profile]
            command += ["--minutes", str(minutes), "--arms", arm, "--step", step]
            subprocess.run(command, check=True)
    result: dict[str, Any] = json.loads(record.read_text())
    return result


def as_markdown(records: list[dict[str, Any]]) -> str:
    """Draw the table."""

    def cell(value: float | None) -> str:
        return "" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"

    rows = {record["arm"]: [cell(record[key]) for key in COLUMNS.values()] for record in records}
    return markdown(list(COLUMNS), rows)


def main() -> None:
    parser = new_parser(__doc__, whole=True)
    parser.add_argument("--data", type=Path, required=True, help="folder of the embryos (BBBC050)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *MIXED], default=[*ARMS, *MIXED], metavar="NAME")
    parser.add_argument("--profile", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--minutes", type=float, default=6.0, help="of each training")
    parser.add_argument("--step", choices=["train", "predict"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.step == "train":
        train_arm(args.arms[0], args.data, args.out, args.minutes, args.profile)
        return
    if args.step == "predict":
        record = predict_arm(args.arms[0], args.data, args.out, args.profile)
        path = args.out / slug(args.arms[0]) / f"record_{args.minutes:g}.json"
        path.write_text(json.dumps(record, indent=2) + "\n")
        return
    records = [run_arm(arm, args.data, args.out, args.minutes, args.profile) for arm in args.arms]
    solid, views = (
        next((r for r in records if r["arm"] == name), None)
        for name in ("heat, pooling by spacing", "2D views")
    )
    result: dict[str, Any] = {"minutes": args.minutes, "profile": args.profile, "arms": records}
    if solid is not None and views is not None:
        result["faster_than_views"] = views["seconds_per_mvox"] / solid["seconds_per_mvox"]
    simulated = [r["cosine_z"] for r in records if r["arm"].startswith("simulated")]
    if simulated:
        result["z_flows_learned"] = min(simulated) >= 0.8
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    (args.out / "table.md").write_text(as_markdown(records) + "\n")
    print(json.dumps(result) if args.json else as_markdown(records))


if __name__ == "__main__":
    main()
