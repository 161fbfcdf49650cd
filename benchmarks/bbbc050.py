"""Train on BBBC050, choose on one embryo, report on another, with stock Cellpose and Otsu beside it.

    python benchmarks/bbbc050.py --data DIR --out DIR [--params FILE] [--json]

The embryos of the split in the parameter file are used: training embryos for the slices, the validation
embryo for thresholds and choice, the test embryo for the table. Stock Cellpose trains on the same slices
with the same network, number of crops and crop size (``cellpose.train.train_seg``), and segments with
``CellposeModel.eval(do_3D=True)``. A step whose output is there is not done again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embryos import (
    figures_of,
    keep_parameters,
    predict_frames,
    score,
    split_of,
    table_of,
    train_on,
    write_result,
)
from nuclei3d.config import Params
from nuclei3d.images.embryos import EmbryoFrame, read_labelled
from nuclei3d.images.tiff import write_labels
from nuclei3d.networks.cpnet import choose_device, new_network
from nuclei3d.networks.folder import load_model
from nuclei3d.outputs import whole_folder
from nuclei3d.stages.export.cellpose import write_training_set
from nuclei3d.stages.training_data import read_summary
from shared import new_parser, params_of, train_with_stock

OURS = "nuclei3d"
STOCK = "stock Cellpose 3.1.1.3, do_3D"


def train_stock(params: Params, slices: Path, out: Path) -> Path:
    """Train stock Cellpose on the same slices with as many crops; give its weights."""
    weights = out / "models" / "stock"
    if not weights.is_file():
        logging.basicConfig(level=logging.INFO)
        if not (out / "planes").is_dir():
            with whole_folder(out / "planes") as folder:
                write_training_set(slices, folder)
        torch.manual_seed(params.seed)
        network = new_network(params.train.diameter_px, params.seed).to(choose_device(params.train.device))
        train_with_stock(network, slices, out / "planes", params.train, out)
    return weights


def predict_stock(
    weights: Path, frames: Iterable[EmbryoFrame], params: Params, diameter_um: float, out: Path
) -> None:
    """Segment with stock Cellpose as its users do: diameter and anisotropy given, all else default."""
    from cellpose.models import CellposeModel

    model = CellposeModel(gpu=torch.cuda.is_available(), pretrained_model=str(weights))
    for frame in frames:
        target = out / frame.embryo / f"{frame.frame}_masks.ome.tif"
        if target.is_file():
            continue
        volume = read_labelled(frame, params.data)
        masks, _, _ = model.eval(
            volume.image,
            channels=[0, 0],
            do_3D=True,
            z_axis=0,
            diameter=diameter_um / volume.voxel_size.x,
            anisotropy=volume.voxel_size.anisotropy,
        )
        write_labels(target, masks.astype(np.uint32), volume.voxel_size)


def main() -> None:
    parser = new_parser(__doc__, whole=True, embryos=True, params=Path(__file__).with_suffix(".yaml"))
    args = parser.parse_args()
    params, data, out = params_of(args), args.data, args.out
    keep_parameters(params, out)
    test = split_of(params, data).test
    ours, slices = train_on(params, data, out), out / "slices"
    predict_frames(params, test, ours, out / "ours")
    weights = train_stock(params, slices, out / "stock_model")
    diameter_um = read_summary(slices).nucleus_diameter_um
    predict_stock(weights, test, params, diameter_um, out / "stock")
    metrics = score(
        params,
        test,
        out / "ours",
        out,
        baselines={STOCK: out / "stock"},
        summary=slices,
        history=ours / "history.csv",
        method=OURS,
    )
    info = load_model(ours).info
    result: dict[str, Any] = {
        "test": sorted({frame.embryo for frame in test}),
        "volumes": len(test),
        "nuclei": metrics["n_true"],
        "thresholds": {"cellprob": info.cellprob_threshold, "score": info.score_threshold},
        **figures_of(metrics, OURS),
    }
    write_result(out, result, table_of(result["metrics"]), as_json=args.json)


if __name__ == "__main__":
    main()
