"""StarDist-3D on a fold of BBBC050: trained for a processor time, thresholds from the validation embryo.

    python -m venv stardist && stardist/bin/pip install tensorflow-cpu==2.21 stardist==0.9.2
    stardist/bin/python benchmarks/stardist3d.py --data EMBRYOS --out DIR --minutes 60
    python benchmarks/stardist3d.py --data EMBRYOS --out DIR --score [--model MODEL]

The first two run in an environment of their own, the last in ours. EMBRYOS is the folder ``embryos`` that
released_model.py lays out (repaired labels), the fold is its first: Emb11, Emb08, Emb05 and Emb02 are held
out, Emb10 validates. StarDist does what its own example for 3D does (percentiles 1 and 99.8, rays by golden
spiral with the anisotropy of the labels, grid from it, flips and turns in the plane, brightness; best weights
by validation loss; thresholds by `optimize_thresholds`), but its rate sinks to zero over the minutes given.
They are processor time of the training alone, so that other work on the machine does not count; a training
that is stopped begins anew. The score is the one of released_model.py; --model adds its row.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

HELD_OUT, VALIDATION = ("Emb11", "Emb08", "Emb05", "Emb02"), "Emb10"
TRAINING = ("Emb01", "Emb03", "Emb04", "Emb06", "Emb07", "Emb09")
SPACING_UM = (1.75, 0.8, 0.8)
LEAST_VOXELS = 150
"""Labels below are debris; all methods train without them."""
STEPS_PER_EPOCH, PATCH, RATE = 25, (32, 96, 96), 3e-4


def read(data: Path, embryos: tuple[str, ...], kind: str) -> list[tuple[str, Any]]:
    """Read the images (normalised) or labels (without debris) of some embryos: name, (z, y, x)."""
    from csbdeep.utils import normalize
    from skimage.morphology import remove_small_objects

    found = []
    for embryo in embryos:
        for path in sorted((data / embryo / kind).glob("*.tif")):
            volume = tifffile.imread(path)
            if kind == "images":
                volume = normalize(volume, 1, 99.8, axis=(0, 1, 2))
            else:
                volume = remove_small_objects(volume.astype(np.int32), max_size=LEAST_VOXELS - 1)
            found.append((f"{embryo}/{path.stem}", volume))
    return found


def volumes(data: Path, embryos: tuple[str, ...], kind: str) -> list[Any]:
    return [volume for _, volume in read(data, embryos, kind)]


def train(data: Path, out: Path, minutes: float, seed: int) -> Any:
    """Train until the processor time is used up; choose the thresholds; give the model."""
    import keras
    from stardist import Rays_GoldenSpiral, calculate_extents
    from stardist.models import Config3D, StarDist3D

    labels = [label for label in volumes(data, TRAINING, "labels")]
    extents = calculate_extents(labels)
    anisotropy = tuple(np.max(extents) / extents)
    grid = tuple(1 if a > 1.5 else 2 for a in anisotropy)
    config = Config3D(
        rays=Rays_GoldenSpiral(96, anisotropy=anisotropy),
        grid=grid,
        anisotropy=anisotropy,
        train_patch_size=PATCH,
        train_batch_size=1,
        train_learning_rate=RATE,
        train_reduce_lr=None,
        train_tensorboard=False,
    )
    model = StarDist3D(config, name="stardist", basedir=str(out))
    random, begun = np.random.default_rng(seed), time.process_time()

    def augment(image: Any, label: Any) -> tuple[Any, Any]:
        turns, axis = random.integers(4), random.integers(3)
        image, label = (np.rot90(each, turns, (1, 2)) for each in (image, label))
        if axis:
            image, label = np.flip(image, axis), np.flip(label, axis)
        return image * random.uniform(0.6, 2) + random.uniform(-0.2, 0.2), label

    class UntilSpent(keras.callbacks.Callback):  # type: ignore[misc]
        """Lower the rate by a cosine over the time; end the training when it is used up."""

        def on_train_batch_end(self, batch: int, logs: object = None) -> None:
            share = (time.process_time() - begun) / (60 * minutes)
            self.model.optimizer.learning_rate.assign(RATE * 0.5 * (1 + math.cos(math.pi * min(1, share))))
            if share >= 1:
                self.model.stop_training = True

    model.prepare_for_training()
    model.callbacks.append(UntilSpent())
    seen = volumes(data, (VALIDATION,), "images"), volumes(data, (VALIDATION,), "labels")
    model.train(
        *(volumes(data, TRAINING, "images"), labels),
        validation_data=seen,
        augmenter=augment,
        seed=seed,
        epochs=10_000,
        steps_per_epoch=STEPS_PER_EPOCH,
    )
    model.optimize_thresholds(*seen)
    return model


def predict(model: Any, data: Path, out: Path) -> None:
    """Segment the held-out embryos."""
    for name, image in read(data, HELD_OUT, "images"):
        labels, _ = model.predict_instances(image)
        path = out / "predictions" / f"{name}_masks.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        spacing = {"axes": "ZYX", "spacing": SPACING_UM[0], "unit": "um"}
        resolution = (1 / SPACING_UM[2], 1 / SPACING_UM[1])
        tifffile.imwrite(path, labels.astype(np.uint16), imagej=True, metadata=spacing, resolution=resolution)


def score_both(data: Path, out: Path, model: str | None) -> str:
    """Score the predictions of StarDist, and of a model of ours, on the held-out embryos."""
    from embryos import COLUMNS, described, predict_frames, score, split_of, table_of, with_split
    from nuclei3d.config import load_params

    params = load_params(Path(__file__).with_name("released_model.yaml"), [])
    params = with_split(params, TRAINING, (VALIDATION,), HELD_OUT)
    least = params.evaluate.model_copy(update={"min_true_volume_um3": params.prepare.min_volume_um3})
    params = params.model_copy(update={"evaluate": least})
    frames = split_of(params, data).test
    if model:
        predict_frames(params, frames, Path(model), out / "ours")
    methods = {"StarDist-3D": "predictions", **({"nuclei3d": "ours"} if model else {})}
    rows: dict[str, Any] = {}
    for method, folder in methods.items():
        metrics = score(params, frames, out / folder, out / "scores" / folder, method=method)
        rows[method] = described(metrics, COLUMNS)
        rows |= {name: described(each, COLUMNS) for name, each in metrics["baselines"].items()}
    return table_of(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="embryos as released_model.py lays them out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60, help="processor time of the training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--score", action="store_true", help="score what was predicted (in our environment)")
    parser.add_argument("--model", help="with --score: a model of ours, trained on the same fold")
    options = parser.parse_args()
    if options.score:
        print(score_both(options.data, options.out, options.model))
    else:
        predict(train(options.data, options.out, options.minutes, options.seed), options.data, options.out)


if __name__ == "__main__":
    main()
