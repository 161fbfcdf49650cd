"""What the benchmarks on real embryos (BBBC050) share: splits, training and prediction, scores, tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nuclei3d.config import Params
from nuclei3d.images.embryos import EmbryoFrame, Split, find_embryos, split_embryos
from nuclei3d.stages.evaluate import evaluate
from nuclei3d.stages.predict import predict
from nuclei3d.stages.prepare import prepare
from nuclei3d.stages.train import train
from shared import markdown

EMBRYOS = tuple(f"Emb{number:02d}" for number in range(1, 12))
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
# The sections that decide what a network becomes and finds.
DECISIVE = ("seed", "data", "normalization", "prepare", "train", "calibrate", "predict")


def keep_parameters(params: Params, out: Path) -> None:
    """Refuse to mix steps made with different parameters in one folder."""
    tree = params.model_dump(mode="json")
    text = json.dumps({name: tree[name] for name in DECISIVE}, indent=2) + "\n"
    path = out / "parameters.json"
    if path.is_file() and path.read_text() != text:
        raise SystemExit(f"{out} was begun with other parameters (see {path}); give those, or another --out")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def with_split(
    params: Params, train: Sequence[str], validation: Sequence[str], test: Sequence[str]
) -> Params:
    """Give the parameters with embryos named for each part."""
    named = {"by": "embryo", "train": tuple(train), "validation": tuple(validation), "test": tuple(test)}
    split = params.data.split.model_copy(update=named)
    return params.model_copy(update={"data": params.data.model_copy(update={"split": split})})


def split_of(params: Params, data: Path) -> Split:
    """Find the frames of each part."""
    return split_embryos(find_embryos(data), params.data.split)


def prepare_once(params: Params, data: Path, slices: Path) -> Path:
    """Cut the slices unless they are there."""
    if not slices.is_dir():
        prepare(params, data, slices)
    return slices


def train_on(params: Params, data: Path, folder: Path) -> Path:
    """Prepare and train in a folder, as far as that is not done; give the model."""
    train(params, prepare_once(params, data, folder / "slices"), folder / "model", data=data)
    return folder / "model"


def predict_frames(params: Params, frames: Iterable[EmbryoFrame], model: Path, out: Path) -> None:
    """Segment frames into a folder for each embryo; those that are done are passed over."""
    by_embryo: dict[str, list[Path]] = {}
    for frame in frames:
        by_embryo.setdefault(frame.embryo, []).append(frame.image_path)
    for embryo, images in by_embryo.items():
        predict(params, images, str(model), out / embryo)


def score(
    params: Params, frames: Iterable[EmbryoFrame], pred: Path, out: Path, **options: Any
) -> dict[str, Any]:
    """Evaluate predictions of some frames into ``out/evaluation``; give what metrics.json holds."""
    truth, images = out / "truth" / "labels", out / "truth" / "images"
    only: dict[tuple[Path, int | None], tuple[float, float] | None] = {}
    for frame in frames:
        # the shape that `evaluate` pairs with predictions
        assert frame.label_path is not None
        for target, source in ((truth, frame.label_path), (images, frame.image_path)):
            link = target / frame.embryo / source.name
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(source.resolve())
        only[truth / frame.embryo / frame.label_path.name, frame.label_time] = frame.share
    return evaluate(params, truth, pred, out / "evaluation", images=images, only=only, **options).metrics


def figures_of(metrics: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Give the figures of the table, and recall by contrast, of a method and its baselines."""
    methods = {method: metrics, **metrics["baselines"]}
    return {
        "metrics": {name: described(values, COLUMNS) for name, values in methods.items()},
        "recall_by_contrast": {
            name: [bin_["recall"] for bin_ in values["recall_by_contrast"]]
            for name, values in methods.items()
        },
    }


def described(metrics: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Give a figure and its 95 % interval for each column of a table."""
    return {column: _figure(metrics, key) for column, key in columns.items()}


def _figure(metrics: Mapping[str, Any], name: str) -> dict[str, Any]:
    if name == "recall_faint":
        return {"value": metrics[name], "interval": metrics["recall_by_contrast"][0]["interval"]}
    section, _, threshold = name.rpartition("_")
    if section == "recall_at_precision":
        found = metrics[section][threshold] or {}
        return {"value": found.get("recall_faint"), "interval": found.get("recall_faint_interval")}
    value = metrics["ap"][threshold] if section == "ap" else metrics[name]
    return {"value": value, "interval": metrics["intervals"].get(name)}


def table_of(rows: Mapping[str, Mapping[str, Any]], corner: str = "", sign: str = "") -> str:
    """Draw figures with their intervals, as far as they are defined, in Markdown."""

    def cell(figure: Mapping[str, Any]) -> str:
        if figure["value"] is None:
            return "undefined"
        if figure["interval"] is None:
            return f"{figure['value']:{sign}.3f}"
        low, high = figure["interval"]
        return f"{figure['value']:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"

    columns = list(next(iter(rows.values()), ()))
    return markdown(
        columns, {name: [cell(each) for each in row.values()] for name, row in rows.items()}, corner
    )


def write_result(out: Path, result: Mapping[str, Any], table: str, *, as_json: bool) -> None:
    """Write result.json and table.md, and print one of them."""
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    (out / "table.md").write_text(table + "\n")
    print(json.dumps(result) if as_json else table)
