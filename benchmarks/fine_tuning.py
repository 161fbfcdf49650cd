"""Fine-tuning on few labelled frames of a new embryo of BBBC050, against its start model and from scratch.

    python benchmarks/fine_tuning.py --data DIR --model DIR --out DIR [--embryos Emb11 ...] [--frames 1 2 4 8]
                                     [--draws 3] [--crops 800] [--params FILE] [--set NAME=VALUE] [--json]

The rule, written before anything was scored. The start model must not have trained on the embryos that are
named (fold 1 of released_model.py: Emb11, Emb08, Emb05, Emb02). Of an embryo's 11 labelled frames each draw
takes, at random, 8 to train on (the smaller numbers are the first of them), one to choose epoch and
thresholds on, and the last two to score; all methods are scored on the same two.

start model   as it is, with its own thresholds
fine-tuned    train.fine_tune (unless given its defaults), --crops crops in 4 epochs;
              the epoch of the lowest validation loss, epoch 0 included; its thresholds chosen on the frame
              for that
from scratch  the parameter file's learning rate and warm-up, as many crops and epochs, chosen likewise

Nothing is tried twice and nothing is left out. The figures are means over the draws within an embryo, then
over embryos. A cell (embryo, draw, frames, method) that is done is not done again, one that was stopped goes
on; the draws come first in turn, so that the command may be stopped at any time and the table tells how many
embryos and draws it holds. Under --out: a folder for each cell, table.md and result.json.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from embryos import keep_parameters, score, split_of, train_on, with_split, write_result
from nuclei3d.config import Params
from nuclei3d.config.sections import FineTuneParams
from nuclei3d.console import say
from nuclei3d.networks.folder import load_model
from nuclei3d.stages.predict import predict
from nuclei3d.stages.start_model import scale_of
from shared import markdown, new_parser, params_of

METHODS = ("start model", "fine-tuned", "from scratch")
COLUMNS = {"AP .5": "0.50", "AP .75": "0.75", "SEG": "seg"}
TRAINED, EPOCHS, SCORED = 8, 4, 2


def link_frames(data: Path, embryo: str, draw: int, count: int, out: Path) -> Path:
    """Lay out the frames of a draw as three embryos: train, validation, test."""
    stems = sorted(path.name for path in (data / embryo / "labels").glob("*.tif"))
    order = np.random.default_rng([draw, int(embryo[3:])]).permutation(stems)
    parts = {"train": order[:count], "validation": order[TRAINED : TRAINED + 1], "test": order[-SCORED:]}
    for part, names in parts.items():
        for kind in ("images", "labels"):
            (out / part / kind).mkdir(parents=True, exist_ok=True)
            for name in names:
                link = out / part / kind / name
                if not link.is_symlink():
                    link.symlink_to((data / embryo / kind / name).resolve())
    return out


def params_for(params: Params, method: str, model: Path, crops: int) -> Params:
    """Give the parameters of a method's training."""
    changed: dict[str, Any] = {"epochs": EPOCHS, "crops_per_epoch": crops // EPOCHS}
    if method == "fine-tuned":
        gentle = params.train.fine_tune or FineTuneParams()
        changed |= {"start_from": str(model), **gentle.model_dump(), "epochs": EPOCHS}
    train = params.train.model_copy(update=changed)
    alone = {"baselines": (), "report": False, "bootstrap": 0, "surface_distances": False}
    alone["min_true_volume_um3"] = params.prepare.min_volume_um3
    sections = {
        "train": train,
        "calibrate": params.calibrate.model_copy(update={"volumes": None}),
        "evaluate": params.evaluate.model_copy(update=alone),
        "predict": params.predict.model_copy(update={"report": False}),
    }
    return with_split(params, ["train"], ["validation"], ()).model_copy(update=sections)


def score_cell(params: Params, data: Path, cell: Path, model: Path | None) -> dict[str, Any]:
    """Train (unless a model is given), segment and score; what was scored before is read."""
    done = cell / "scores.json"
    if not done.is_file():
        trained = model or train_on(params, data, cell)
        frames = split_of(with_split(params, ["test"], (), ()), data).train
        predict(params, [frame.image_path for frame in frames], str(trained), cell / "predictions" / "test")
        metrics = score(params, frames, cell / "predictions", cell)
        figures = {name: metrics["ap"].get(key, metrics.get(key)) for name, key in COLUMNS.items()}
        if model is None:
            finished = json.loads((cell / "model.checkpoint" / "finished.json").read_text())
            figures["epoch"] = finished["result"]["epoch"]
        done.write_text(json.dumps(figures) + "\n")
    return dict(json.loads(done.read_text()))


def summarise(cells: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Average over draws, then over embryos."""
    grouped: dict[tuple[int, str], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        grouped[cell["frames"], cell["method"]][cell["embryo"]].append(cell)
    rows = [
        {
            "frames": frames,
            "method": method,
            "embryos": len(embryos),
            "cells": sum(map(len, embryos.values())),
            **{
                column: statistics.mean(
                    statistics.mean(cell[column] for cell in draws) for draws in embryos.values()
                )
                for column in COLUMNS
            },
        }
        for (frames, method), embryos in sorted(grouped.items())
    ]
    lines = {
        f"{row['frames']} frames, {row['method']}": [
            str(row["embryos"]),
            str(row["cells"]),
            *(f"{row[column]:.3f}" for column in COLUMNS),
        ]
        for row in rows
    }
    return rows, markdown(["embryos", "cells", *COLUMNS], lines)


def main() -> None:
    """Read the command line, do what is not done, print the table after every cell's round."""
    parameters = Path(__file__).with_name("released_model.yaml")
    parser = new_parser(__doc__, whole=True, embryos=True, params=parameters)
    parser.add_argument("--model", type=Path, required=True, help="start model, not trained on --embryos")
    parser.add_argument("--embryos", nargs="+", default=["Emb11", "Emb08", "Emb05", "Emb02"])
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--crops", type=int, default=800)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    args = parser.parse_args()
    params = params_of(args)
    if scale_of(load_model(args.model))["train.diameter_px"] != params.train.diameter_px:
        raise SystemExit(f"{args.model} sees nuclei at another diameter than train.diameter_px")
    keep_parameters(params_for(params, "from scratch", args.model, args.crops), args.out)
    cells: list[dict[str, Any]] = []
    for draw in range(args.draws):
        for embryo in args.embryos:
            for count in args.frames:
                folder = args.out / embryo / f"draw{draw}"
                data = link_frames(args.data, embryo, draw, count, folder / f"frames{count}" / "data")
                for method in args.methods:
                    start = method == "start model"
                    cell = folder / ("start" if start else f"frames{count}/{method.replace(' ', '_')}")
                    chosen = params_for(params, method, args.model, args.crops)
                    figures = score_cell(chosen, data, cell, args.model if start else None)
                    say(f"=== {embryo}, draw {draw}, {count} frames, {method}: {figures}")
                    place = {"embryo": embryo, "draw": draw, "frames": count, "method": method}
                    cells.append(place | figures)
                rows, table = summarise(cells)
                (args.out / "table.md").write_text(table + "\n")
    write_result(args.out, {"crops": args.crops, "rows": rows, "cells": cells}, table, as_json=args.json)


if __name__ == "__main__":
    main()
