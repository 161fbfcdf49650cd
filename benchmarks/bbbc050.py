"""Train on BBBC050, choose on one embryo, report on another, with stock Cellpose and Otsu beside it.

    python benchmarks/bbbc050.py --data DIR --out DIR [--params FILE] [--json]

The embryos of the split in the parameter file are used: training embryos for the slices, the validation
embryo for thresholds and choice, the test embryo for the table. Stock Cellpose trains on the same slices
with the same network, number of crops and crop size (``cellpose.train.train_seg``), and segments with
``CellposeModel.eval(do_3D=True)``. A step whose output is there is not done again.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from nuclei3d.config import Params, load_params
from nuclei3d.images.embryos import EmbryoFrame, find_embryos, read_labelled, split_embryos
from nuclei3d.images.tiff import write_labels
from nuclei3d.networks.folder import load_model
from nuclei3d.stages.evaluate import evaluate
from nuclei3d.stages.predict import predict
from nuclei3d.stages.prepare import prepare
from nuclei3d.stages.train import train
from shared import markdown, new_parser, once

OURS = "nuclei3d"
STOCK = "stock Cellpose 3.1.1.3, do_3D"
# column of the table: name of the figure in metrics.json
COLUMNS = {
    "SEG": "seg",
    "MUCov": "mucov",
    "foreground IoU": "foreground_iou",
    "AP .5": "ap_0.50",
    "AP .75": "ap_0.75",
    "precision": "precision",
    "recall": "recall",
    "recall, faintest fifth": "recall_faint",
    "... at precision .9": "recall_at_precision_0.90",
}


def train_stock(params: Params, slices: Path, out: Path) -> None:
    """Train stock Cellpose on the same slices (those that its rule admits) with as many crops."""
    import torch
    from cellpose.models import CellposeModel
    from cellpose.train import train_seg

    logging.basicConfig(level=logging.INFO)
    settings = params.train
    torch.manual_seed(params.seed)
    with (slices / "manifest.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["part"] == "train"]
    files = [slices / row["file"] for row in rows if int(row["nuclei"]) >= settings.min_train_masks]
    images = [tifffile.imread(path) for path in files]
    targets = [tifffile.imread(path.with_name(path.stem + "_flows.tif")) for path in files]
    model = CellposeModel(gpu=settings.device != "cpu" and torch.cuda.is_available(), pretrained_model=False)
    model.net.diam_mean.data[:] = settings.diameter_px
    out.mkdir(parents=True, exist_ok=True)
    train_seg(
        model.net,
        train_data=images,
        train_labels=targets,
        channels=[0, 0],
        batch_size=settings.batch_size,
        n_epochs=settings.epochs,
        nimg_per_epoch=settings.crops_per_epoch,
        bsize=settings.crop_px,
        min_train_masks=settings.min_train_masks,
        save_path=str(out),
        model_name="stock",
    )


def predict_stock(
    weights: Path, frames: list[EmbryoFrame], params: Params, diameter_um: float, out: Path
) -> None:
    """Segment with stock Cellpose as its users do: diameter and anisotropy given, all else default."""
    import torch
    from cellpose.models import CellposeModel

    model = CellposeModel(gpu=torch.cuda.is_available(), pretrained_model=str(weights))
    for frame in frames:
        volume = read_labelled(frame, params.data)
        masks, _, _ = model.eval(
            volume.image,
            channels=[0, 0],
            do_3D=True,
            z_axis=0,
            diameter=diameter_um / volume.voxel_size.x,
            anisotropy=volume.voxel_size.anisotropy,
        )
        target = out / frame.embryo / f"{frame.frame}_masks.ome.tif"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_labels(target, masks.astype(np.uint32), volume.voxel_size)


def run(params: Params, data: Path, out: Path) -> dict[str, Any]:
    """Do every step that is not done yet and gather the table."""
    out.mkdir(parents=True, exist_ok=True)
    times: dict[str, float] = {}
    slices, ours = out / "slices", out / "models" / params.train.name
    once(out, "prepare", times, lambda: prepare(params, data, slices))
    summary = json.loads((slices / "summary.json").read_text())
    diameter_um = summary["nucleus_diameter_um"]
    split = split_embryos(find_embryos(data), params.data.split)
    test = list(split.test)
    once(out, "train", times, lambda: train(params, slices, ours, data=data))
    predict_once(params, sorted({frame.embryo for frame in test}), data, ours, out, times, out / "ours")
    once(out, "stock_train", times, lambda: train_stock(params, slices, out / "stock_model"))
    weights, stock = out / "stock_model" / "models" / "stock", out / "stock"
    once(out, "stock_predict", times, lambda: predict_stock(weights, test, params, diameter_um, stock))
    truth, images = out / "truth" / "labels", out / "truth" / "images"
    once(out, "truth", times, lambda: gather_truth(test, truth, images))
    evaluate(
        params,
        truth,
        out / "ours",
        out / "evaluation",
        images=images,
        baselines={STOCK: stock},
        summary=slices,
        history=ours / "history.csv",
        method=OURS,
    )
    metrics = json.loads((out / "evaluation" / "metrics.json").read_text())
    info = load_model(ours).info
    return {
        "test": sorted({frame.embryo for frame in test}),
        "volumes": len(test),
        "nuclei": metrics["n_true"],
        "thresholds": {"cellprob": info.cellprob_threshold, "score": info.score_threshold},
        "seconds": times,
        **figures_of(metrics, OURS),
    }


def predict_once(
    params: Params,
    embryos: Iterable[str],
    data: Path,
    model: Path,
    record: Path,
    times: dict[str, float],
    out: Path,
) -> None:
    """Predict all frames of some embryos, each a step of its own."""
    for embryo in embryos:
        images, masks = [data / embryo / "images"], out / embryo
        once(
            record,
            f"predict_{embryo}",
            times,
            lambda images=images, masks=masks: predict(params, images, str(model), masks),
        )


def figures_of(metrics: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Give the figures of the table, and recall by contrast, of a method and its baselines."""
    methods = {method: metrics, **metrics["baselines"]}
    return {
        "metrics": {
            name: {column: describe(values, key) for column, key in COLUMNS.items()}
            for name, values in methods.items()
        },
        "recall_by_contrast": {
            name: [bin_["recall"] for bin_ in values["recall_by_contrast"]]
            for name, values in methods.items()
        },
    }


def describe(metrics: dict[str, Any], name: str) -> dict[str, Any]:
    """Give a figure and its 95 % interval."""
    if name == "recall_faint":
        return {"value": metrics[name], "interval": metrics["recall_by_contrast"][0]["interval"]}
    if name.startswith("recall_at_precision_"):
        found = metrics["recall_at_precision"][name.rpartition("_")[2]]
        if found is None:
            return {"value": None, "interval": None}
        return {"value": found["recall_faint"], "interval": found["recall_faint_interval"]}
    section, _, threshold = name.partition("_")
    value = metrics["ap"][threshold] if section == "ap" else metrics[name]
    return {"value": value, "interval": metrics["intervals"].get(name)}


def gather_truth(frames: list[EmbryoFrame], labels: Path, images: Path) -> None:
    """Link the test frames into folders by embryo, the shape that `evaluate` pairs with predictions."""
    for frame in frames:
        for target, source in ((labels, frame.label_path), (images, frame.image_path)):
            assert source is not None
            link = target / frame.embryo / source.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(source.resolve())


def as_markdown(result: dict[str, Any]) -> str:
    """Draw the table of the README: figures with 95 % intervals."""
    rows = {method: [as_cell(each) for each in row.values()] for method, row in result["metrics"].items()}
    return markdown(list(COLUMNS), rows)


def as_cell(figure: dict[str, Any]) -> str:
    """Write a figure with its interval, as far as they are defined."""
    if figure["value"] is None:
        return "undefined"
    if figure["interval"] is None:
        return f"{figure['value']:.3f}"
    low, high = figure["interval"]
    return f"{figure['value']:.3f} ({low:.2f}-{high:.2f})"


def main() -> None:
    parser = new_parser(__doc__, whole=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--params", type=Path, default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    args = parser.parse_args()
    result = run(load_params(args.params, args.overrides), args.data, args.out)
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    (args.out / "table.md").write_text(as_markdown(result) + "\n")
    print(json.dumps(result) if args.json else as_markdown(result))


if __name__ == "__main__":
    main()
