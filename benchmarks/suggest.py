"""What `suggest` is worth on BBBC050: is there more wrong in its blocks, and do they teach more than others?

    python benchmarks/suggest.py --data DIR --model MODEL --out DIR [--parts rank rounds] [--json]

MODEL has trained on none of --embryos; every second of their frames is used. All flows are kept in --flows
and taken from there; a step whose output is there is not done again.

rank    Frames are tiled with blocks of the size that is suggested. Spearman's correlation of a block's
        uncertainty with its errors, nuclei missed or false at IoU .5, by their share of voxels: over all
        blocks; within frames (the mean of those with errors); of sums over frames; and of the
        rates per nucleus found, where at least half of one was. Beside it that of the number of nuclei found,
        which alone tells much: where there are many nuclei there are many errors.

rounds  The first of --embryos is scored, the others are new. In each round five blocks are chosen, by
        `suggest` or at random among blocks with anything uncertain, labelled with the truth (all nuclei that
        they cut), and the model of the round before is trained on all blocks so far (--crops crops, nothing
        else of the old data). AP at .5 and .75 pooled over --scored frames, thresholds as of MODEL.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from embryos import EMBRYOS, keep_parameters, prepare_once, with_split
from nuclei3d.config import Params
from nuclei3d.config.sections import FineTuneParams
from nuclei3d.console import emit_json, say
from nuclei3d.grid import resize_nearest
from nuclei3d.images.embryos import EmbryoFrame, LabelledVolume, find_embryos, read_labelled
from nuclei3d.images.tiff import write_image, write_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.scoring.matching import match, overlap_table
from nuclei3d.segmentation.flow_field import FlowField
from nuclei3d.segmentation.segmenter import Segmenter
from nuclei3d.segmentation.settings import SegmentationSettings
from nuclei3d.segmentation.uncertainty import (
    BLOCK_DIAMETERS,
    Block,
    Place,
    choose_blocks,
    find_blocks,
    measure_uncertainty,
    sum_cells,
)
from nuclei3d.stages.train import train
from nuclei3d.stages.training_data import read_summary
from shared import new_parser, params_of

BLOCKS = 5
WAYS = ("suggested", "random")


@dataclass(frozen=True)
class Bench:
    """The frames, the model that all starts from, and where flows are kept."""

    params: Params
    frames: Sequence[EmbryoFrame]
    model: Path
    settings: SegmentationSettings
    flows: Path

    @property
    def edge_um(self) -> float:
        """Edge of a block."""
        return BLOCK_DIAMETERS * self.settings.nucleus_diameter_um

    def read(self, frame: EmbryoFrame) -> LabelledVolume:
        """Read a frame."""
        return read_labelled(frame, self.params.data)

    def flows_of(self, frame: EmbryoFrame, model: Path, folder: Path) -> FlowField:
        """Run a model over a frame, once."""
        kept = folder / f"{frame.embryo}_{frame.frame}.npz"
        if not kept.is_file():
            volume = self.read(frame)
            segmenter = Segmenter(model, self.settings)
            found = segmenter.flows(volume.image, volume.voxel_size)
            folder.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(kept, packed=found.packed, grid=found.voxel_size.zyx)
        with np.load(kept) as stored:
            return FlowField(stored["packed"], VoxelSize.of(stored["grid"]))

    def segment(self, flows: FlowField, shape: Sequence[int]) -> NDArray[np.uint32]:
        """Label flows on a grid of that shape with the thresholds of the first model."""
        from nuclei3d.segmentation.dynamics import label_flows

        return label_flows(flows, tuple(shape), self.settings)[0]


def shares(labels: NDArray[np.uint32], chosen: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Give each voxel its share of its label, where the label is chosen (by number)."""
    voxels = np.maximum(np.bincount(labels.ravel(), minlength=len(chosen)), 1)
    return (np.where(chosen, 1 / voxels, 0)).astype(np.float32)[labels]


def unmatched(labels: NDArray[np.int64], matched: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Tell by number which labels have no partner."""
    wrong = np.zeros(int(labels.max(initial=0)) + 1, bool)
    wrong[labels] = True
    wrong[labels[matched]] = False
    return wrong


def rank(bench: Bench) -> dict[str, Any]:
    """Measure how well the uncertainty of blocks tells their errors."""
    table: list[NDArray[np.float64]] = []
    of_frame: list[NDArray[np.int64]] = []
    for number, frame in enumerate(bench.frames):
        flows = bench.flows_of(frame, bench.model, bench.flows)
        uncertain = measure_uncertainty(flows, bench.settings)
        found = bench.segment(flows, flows.shape)
        truth = np.asarray(resize_nearest(bench.read(frame).labels, flows.shape), np.uint32)
        overlaps = overlap_table(truth, found)
        pairs = match(overlaps, 0.5)
        errors = shares(truth, unmatched(overlaps.true_labels, pairs.true_index))
        errors += shares(found, unmatched(overlaps.pred_labels, pairs.pred_index))
        cells = [
            max(1, round(n * edge / bench.edge_um))
            for n, edge in zip(flows.shape, flows.voxel_size.zyx, strict=True)
        ]
        everything = np.arange(int(found.max(initial=0)) + 1) > 0
        volumes = (uncertain.nuclei + uncertain.foreground, shares(found, everything), errors)
        table.append(np.stack([sum_cells(each, cells).ravel() for each in volumes]))
        of_frame.append(np.full(table[-1].shape[1], number))
    blocks, frames = np.concatenate(table, axis=1), np.concatenate(of_frame)
    sums = np.stack([each.sum(axis=1) for each in table], axis=1)
    errors, found = blocks[2], blocks[1]
    busy = found >= 0.5
    result: dict[str, Any] = {
        "frames": len(table),
        "blocks": len(errors),
        "errors": round(float(errors.sum()), 1),
        "expected": round(float(blocks[0].sum()), 1),
    }
    for name, row in (("uncertainty", 0), ("nuclei found", 1)):
        within = [
            correlation(blocks[row, frames == number], errors[frames == number])
            for number in range(len(table))
            if errors[frames == number].any()
        ]
        result[name] = {
            "blocks": correlation(blocks[row], errors),
            "within frames": round(float(np.nanmean(within)), 3),
            "frames": correlation(sums[row], sums[2]),
            "rates": correlation(
                blocks[row, busy] / (found[busy] if row == 0 else 1), errors[busy] / found[busy]
            ),
        }
        say(f"{name}: {result[name]}")
    return result


def correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Give Spearman's correlation; nan where one side is constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return round(float(spearmanr(a, b)[0]), 3)


def choose(
    bench: Bench, frames: Sequence[EmbryoFrame], model: Path, flows: Path, way: str, seed: int, known: Path
) -> list[tuple[EmbryoFrame, Block]]:
    """Choose five blocks of frames, of what is not known there yet."""
    found: list[tuple[EmbryoFrame, Block]] = []
    places: list[Place] = []
    for frame in frames:
        field = bench.flows_of(frame, model, flows)
        volume = bench.read(frame)
        unknown = None
        if (mask := known / f"{frame.embryo}_{frame.frame}.npy").is_file():
            unknown = ~np.asarray(resize_nearest(np.load(mask), field.shape), bool)
        uncertain = measure_uncertainty(field, bench.settings)
        for block in find_blocks(
            uncertain, volume.labels.shape, volume.voxel_size, bench.edge_um, 20, unknown
        ):
            centre = [
                (part.start + part.stop) / 2 * edge
                for part, edge in zip(block.box, volume.voxel_size.zyx, strict=True)
            ]
            found.append((frame, block))
            places.append(Place(frame.embryo, frame.index, 11, (centre[0], centre[1], centre[2])))
    if way == "random":
        drawn = np.random.default_rng(seed).permutation(len(found))[:BLOCKS].tolist()
    else:
        drawn = choose_blocks([block.uncertainty for _, block in found], places, BLOCKS, bench.edge_um)
    return [found[at] for at in drawn]


def label(bench: Bench, chosen: Sequence[tuple[EmbryoFrame, Block]], known: Path, data: Path) -> int:
    """Write the truth of the chosen blocks, and of those before, as a data set; give the nuclei in them."""
    known.mkdir(parents=True, exist_ok=True)
    nuclei = 0
    for frame, block in chosen:
        labels = bench.read(frame).labels
        path = known / f"{frame.embryo}_{frame.frame}.npy"
        mask = np.load(path) if path.is_file() else np.zeros(labels.shape, bool)
        cut = np.setdiff1d(labels[block.box], 0)
        nuclei += len(cut)
        mask[block.box] = True
        np.save(path, mask | np.isin(labels, cut))
    for frame in bench.frames:
        path = known / f"{frame.embryo}_{frame.frame}.npy"
        if path.is_file():
            volume, mask = bench.read(frame), np.load(path)
            folder = data / frame.embryo
            write_image(folder / "images" / f"{frame.frame}.tif", volume.image, volume.voxel_size)
            write_labels(
                folder / "labels" / f"{frame.frame}.tif", np.where(mask, volume.labels, 0), volume.voxel_size
            )
            write_image(folder / "labels" / f"{frame.frame}_known.tif", mask, volume.voxel_size)
    return nuclei


def score(bench: Bench, frames: Sequence[EmbryoFrame], model: Path, flows: Path) -> dict[str, float]:
    """Give the AP of a model, pooled over frames."""
    hits, total = np.zeros(2), np.zeros(2)
    for frame in frames:
        truth = bench.read(frame).labels
        overlaps = overlap_table(truth, bench.segment(bench.flows_of(frame, model, flows), truth.shape))
        found = np.array([match(overlaps, iou).tp for iou in (0.5, 0.75)])
        hits += found
        total += overlaps.n_true + overlaps.n_pred - found
    return {
        name: round(float(value), 4) for name, value in zip(("ap_50", "ap_75"), hits / total, strict=True)
    }


def rounds(bench: Bench, out: Path, scored: int, draws: int, count: int, crops: int) -> dict[str, Any]:
    """Label, train and score round by round, each way."""
    first = bench.frames[0].embryo
    new = [frame for frame in bench.frames if frame.embryo != first]
    # the latest, which have most nuclei
    held_out = [frame for frame in bench.frames if frame.embryo == first][-scored:]
    result: dict[str, Any] = {"scored": [f"{each.embryo}/{each.frame}" for each in held_out]}
    result["start"] = score(bench, held_out, bench.model, bench.flows)
    say(f"start: {result['start']}")
    for draw in range(draws):
        for way in WAYS:
            model, flows = bench.model, bench.flows
            for number in range(1, count + 1):
                folder = out / f"draw{draw}" / way / f"round{number}"
                done = folder / "round.json"
                if not done.is_file():
                    before = folder.parent / f"round{number - 1}" / "known"
                    seed = 100 * draw + number
                    chosen = choose(bench, new, model, flows, way, seed, before)
                    known = folder / "known"
                    known.mkdir(parents=True, exist_ok=True)
                    for mask in before.glob("*.npy") if before.is_dir() else ():
                        (known / mask.name).write_bytes(mask.read_bytes())
                    nuclei = label(bench, chosen, known, folder / "data")
                    trained = fine_tune(bench, folder, model, seed, crops)
                    entry = {
                        "blocks": [f"{frame.embryo}/{frame.frame} {block.box}" for frame, block in chosen],
                        "nuclei": nuclei,
                        **score(bench, held_out, trained, folder / "flows"),
                    }
                    done.write_text(json.dumps(entry, indent=1, default=str) + "\n")
                model, flows = folder / "model", folder / "flows"
                entry = json.loads(done.read_text())
                result.setdefault(way, {}).setdefault(f"draw{draw}", []).append(entry)
                say(f"draw {draw}, {way}, round {number}: {entry}")
    return result


def fine_tune(bench: Bench, folder: Path, start: Path, seed: int, crops: int) -> Path:
    """Train a model further on a data set of blocks; give the model."""
    data = folder / "data"
    params = with_split(bench.params, [each.name for each in find_embryos(data)], (), ())
    settings = {
        "start_from": str(start),
        "epochs": 1,
        "crops_per_epoch": crops,
        "learning_rate": (bench.params.train.fine_tune or FineTuneParams()).learning_rate,
        "warmup_steps": 10,
        "min_train_masks": 1,
        "select": "last",
        "ema": 0.0,
    }
    params = params.model_copy(
        update={
            "seed": seed,
            "train": params.train.model_copy(update=settings),
            "prepare": params.prepare.model_copy(update={"min_nuclei": 1}),
            "calibrate": params.calibrate.model_copy(update={"volumes": 0}),
            "tracking": params.tracking.model_copy(update={"enabled": False}),
        }
    )
    slices = prepare_once(params, data, folder / "slices")
    # the scale at which the first model sees nuclei, whatever the size of those in the blocks
    found_um = read_summary(slices).nucleus_diameter_um
    diameter_px = bench.settings.diameter_px * found_um / bench.settings.nucleus_diameter_um
    scaled = params.train.model_copy(update={"diameter_px": diameter_px})
    train(params.model_copy(update={"train": scaled}), slices, folder / "model", data=data)
    return folder / "model"


def main() -> None:
    parser = new_parser(
        __doc__, whole=True, embryos=True, params=Path(__file__).with_name("released_model.yaml")
    )
    parser.add_argument("--model", type=Path, required=True, help="model that has not seen --embryos")
    parser.add_argument("--embryos", nargs="+", choices=EMBRYOS, default=["Emb11", "Emb08", "Emb05", "Emb02"])
    parser.add_argument("--flows", type=Path, help="folder of flows of --model; by default in --out")
    parser.add_argument("--parts", nargs="+", choices=("rank", "rounds"), default=["rank", "rounds"])
    parser.add_argument("--scored", type=int, default=3, help="frames of the first embryo that are scored")
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--crops", type=int, default=300, help="of a round's training")
    args = parser.parse_args()
    params = params_of(args)
    keep_parameters(params, args.out)
    embryos = {embryo.name: embryo for embryo in find_embryos(args.data)}
    frames = [frame for name in args.embryos for frame in embryos[name].labelled[1::2]]
    settings = Segmenter(args.model, params.predict).settings
    bench = Bench(params, frames, args.model, settings, args.flows or args.out / "flows")
    report: dict[str, Any] = {}
    if "rank" in args.parts:
        report["rank"] = rank(bench)
    if "rounds" in args.parts:
        report["rounds"] = rounds(bench, args.out, args.scored, args.draws, args.rounds, args.crops)
    (args.out / "result.json").write_text(json.dumps(report, indent=2) + "\n")
    if args.json:
        emit_json(report)


if __name__ == "__main__":
    main()
