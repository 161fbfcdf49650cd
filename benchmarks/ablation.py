"""What each augmentation and each makeup of the training set is worth on real embryos (BBBC050).

    python benchmarks/ablation.py --data DIR --out DIR [--profile cpu|gpu] [--epochs N] [--arms A,B]
        [--folds N] [--only FOLD ...] [--json]

Every arm trains from scratch on the same training embryos and is measured in 3D on the test embryo of its
fold, which no choice has seen; folds differ in the test embryo and the seed. All arms have the same network,
number of steps, prediction and thresholds. The arms:

recipe        flips, rescaling, rotations by 90 degrees; planes with at least three nuclei, drawn alike
free          the recipe with free rotation, as stock Cellpose
brightness    the recipe with brightness changed linearly and by gamma, for whole crops
dimming       the recipe with single nuclei dimmed, shot noise put back
contrast      the recipe with planes of faint nuclei drawn more often
upright       the recipe without flips along z and rotations of xz and yz planes
sparse        the recipe with planes of fewer than three nuclei, and empty ones
all           dimming, contrast, sparse, and brightness together

Each training and each measured embryo is kept, so the script can be stopped and started at will. Intervals
are 95 %, by bootstrap over blocks of time within the test embryos; differences to the recipe are paired by
volume. On two cores the profile ``cpu`` takes about an hour and a half: few steps, small crops, every other
frame. That shows which changes help early in a training; more ``--epochs`` show what becomes of it, and the
profile ``gpu`` trains much longer, in larger batches. ``--only`` measures some folds, so that several
processes or jobs share the work; the call without it then reads what they left and draws the table.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.config import Params
from nuclei3d.config.loading import validate_params
from nuclei3d.console import say
from nuclei3d.images.embryos import find_embryos, read_labelled, split_embryos
from nuclei3d.outputs import whole_file
from nuclei3d.scoring.assessment import assess_volume
from nuclei3d.scoring.bootstrap import bootstrap_weights, percentile_interval, resampling_units
from nuclei3d.scoring.contrast import contrast_bin
from nuclei3d.segmentation.segmenter import Segmenter
from nuclei3d.stages.prepare import prepare
from nuclei3d.stages.train import train
from shared import EMBRYOS, markdown, new_parser

TEST_OF_FOLD = ("Emb11", "Emb09", "Emb04", "Emb02", "Emb06")

RECIPE: dict[str, Any] = {"sampling": {"sparse": 0.0}}
BRIGHTNESS = {"brightness_linear": 0.3, "brightness_gamma": 0.4}
DIMMING = {"dim_share": 0.4, "dim_min": 0.1}
ARMS: dict[str, dict[str, Any]] = {
    "recipe": RECIPE,
    "free": RECIPE | {"augment": {"rotation": "free", "side_rotation": "free"}},
    "upright": RECIPE | {"augment": {"flip_z": False, "side_rotation": "none"}},
    "brightness": RECIPE | {"augment": BRIGHTNESS},
    "dimming": RECIPE | {"augment": DIMMING},
    "contrast": {"sampling": {"sparse": 0.0, "contrast_power": 0.5}},
    "sparse": {"sampling": {"sparse": 1.0}},
    "all": {"sampling": {"sparse": 1.0, "contrast_power": 0.5}, "augment": BRIGHTNESS | DIMMING},
}


@dataclass(frozen=True)
class Profile:
    """How long the arms train, and how many frames of a test embryo are measured."""

    epochs: int
    crops_per_epoch: int
    batch_size: int
    crop_px: int
    learning_rate: float
    folds: int
    every_frame: int


TRAINED_WITH = ("epochs", "crops_per_epoch", "batch_size", "crop_px", "learning_rate")
PROFILES = {
    "cpu": Profile(10, 160, 8, 96, 2e-3, 3, 2),
    "gpu": Profile(20, 1600, 32, 128, 2e-3, 5, 1),
}


@dataclass(frozen=True)
class Counts:
    """What was counted in one volume."""

    embryo: str
    true: int
    predicted: int
    hits_50: int
    hits_75: int
    faintest: int
    faintest_found: int


def params_of(arm: str, fold: int, profile: Profile) -> Params:
    """Give the parameters of an arm in a fold; the validation embryo follows the test embryo."""
    test = TEST_OF_FOLD[fold]
    validation = EMBRYOS[(EMBRYOS.index(test) + 1) % len(EMBRYOS)]
    rest = [embryo for embryo in EMBRYOS if embryo not in (test, validation)]
    return validate_params(
        {
            "seed": fold,
            "data": {"split": {"train": rest, "validation": [validation], "test": [test]}},
            "prepare": {"downsample_xy": 1.0, "step_xy": 2, "step_xz": 8, "step_yz": 8, "sparse_share": 0.3},
            "train": {
                "name": arm,
                "diameter_px": 17.0,
                **{name: getattr(profile, name) for name in TRAINED_WITH},
                "select": "last",
                **ARMS[arm],
            },
            "tracking": {"enabled": False},
        },
        "the ablation",
    )


def measure(arm: str, fold: int, data: Path, out: Path, profile: Profile) -> list[Counts]:
    """Train an arm in a fold and count in its test volumes; what is done already is read."""
    record = out / f"fold{fold}" / f"{arm}.json"
    params = params_of(arm, fold, profile)
    settings_used = params.train.model_dump(mode="json")
    if record.is_file():
        saved = json.loads(record.read_text())
        if saved["train"] == settings_used:
            return [Counts(**row) for row in saved["volumes"]]
    slices = out / f"fold{fold}" / "slices"
    if not (slices / "summary.json").is_file():
        prepare(params_of("recipe", fold, profile), data, slices)
    model = out / f"fold{fold}" / "models" / arm
    began = time.perf_counter()
    result = train(params, slices, model)
    seconds = time.perf_counter() - began
    segmenter = Segmenter(model, params.predict)
    edges = json.loads((slices / "summary.json").read_text())["contrast_quintiles"]
    frames = split_embryos(find_embryos(data), params.data.split).test[:: profile.every_frame]
    volumes = []
    for frame in frames:
        volume = read_labelled(frame, params.data)
        found = segmenter.segment(volume.image, volume.voxel_size)
        assessed = assess_volume(
            volume.labels,
            found.labels,
            volume.voxel_size,
            image=volume.image,
            thresholds=(0.5, 0.75),
            surfaces=False,
        )
        faintest = contrast_bin(assessed.true.contrast, edges) == 0
        volumes.append(
            Counts(
                embryo=frame.embryo,
                true=int(assessed.tally.n_true),
                predicted=int(assessed.tally.n_pred),
                hits_50=int(assessed.tally.tp[0]),
                hits_75=int(assessed.tally.tp[1]),
                faintest=int(faintest.sum()),
                faintest_found=int(assessed.true.matched[faintest].sum()),
            )
        )
    found_out = {
        "train": settings_used,
        "training_seconds": seconds,
        "validation_loss": result.metrics.get("validation_loss"),
        "volumes": [vars(counts) for counts in volumes],
    }
    with whole_file(record) as path:
        path.write_text(json.dumps(found_out))
    return volumes


COLUMNS = ("AP .5", "AP .75", "recall of the faintest fifth", "precision")


def scores(volumes: Sequence[Counts], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pool volumes with weights (replicates, volumes) into the four columns (replicates, 4)."""

    def pooled(name: str) -> NDArray[np.float64]:
        return weights @ np.array([getattr(counts, name) for counts in volumes], dtype=np.float64)

    true, predicted, hits, hits_75 = map(pooled, ("true", "predicted", "hits_50", "hits_75"))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack(
            [
                hits / (true + predicted - hits),
                hits_75 / (true + predicted - hits_75),
                pooled("faintest_found") / pooled("faintest"),
                hits / predicted,
            ],
            axis=1,
        )


def summarise(measured: dict[str, list[Counts]], replicates: int = 2000) -> dict[str, Any]:
    """Give each arm's scores with intervals, and the differences to the recipe, paired by volume."""
    first = next(iter(measured.values()))
    units = resampling_units([counts.embryo for counts in first], "time")
    weights = bootstrap_weights(units, replicates, np.random.default_rng(0))
    once = np.ones((1, len(first)))
    base = measured.get("recipe")
    table: dict[str, Any] = {"resampled": units.words, "volumes": len(first), "arms": {}}

    def by_column(values: NDArray[np.float64], samples: NDArray[np.float64]) -> dict[str, Any]:
        low, high = percentile_interval(samples)
        return {name: {"value": values[i], "low": low[i], "high": high[i]} for i, name in enumerate(COLUMNS)}

    for arm, volumes in measured.items():
        value, samples = scores(volumes, once)[0], scores(volumes, weights)
        row = by_column(value, samples)
        if base is not None and arm != "recipe":
            change = value - scores(base, once)[0], samples - scores(base, weights)
            row["change"] = by_column(*change)
        table["arms"][arm] = row
    return table


def as_markdown(table: dict[str, Any]) -> str:
    """Give the table, and the table of differences, in Markdown."""

    def cells(row: dict[str, Any], sign: str) -> list[str]:
        return [
            f"{entry['value']:{sign}.3f} ({entry['low']:{sign}.3f} to {entry['high']:{sign}.3f})"
            for entry in (row[name] for name in COLUMNS)
        ]

    arms = table["arms"]
    changes = {arm: cells(row["change"], "+") for arm, row in arms.items() if "change" in row}
    own = markdown(COLUMNS, {arm: cells(row, "") for arm, row in arms.items()}, "arm")
    return own + "\n\n" + markdown(COLUMNS, changes, "change to the recipe")


def main() -> None:
    """Read the command line, measure what is missing, print the table."""
    parser = new_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the embryos of BBBC050")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--profile", choices=tuple(PROFILES), default="cpu")
    parser.add_argument("--arms", default=",".join(ARMS), help="names, separated by commas")
    parser.add_argument("--epochs", type=int, help="of each training (default: the profile's)")
    parser.add_argument("--folds", type=int, help="number of folds (default: the profile's)")
    parser.add_argument("--only", type=int, nargs="+", help="measure these folds (from 0), draw no table")
    options = parser.parse_args()
    profile = PROFILES[options.profile]
    arms = options.arms.split(",")
    if unknown := set(arms) - set(ARMS):
        parser.error(f"unknown arm {sorted(unknown)[0]}; known: {', '.join(ARMS)}")
    folds = min(options.folds or profile.folds, len(TEST_OF_FOLD))
    out = options.out / options.profile
    if options.epochs is not None and options.epochs != profile.epochs:
        profile = replace(profile, epochs=options.epochs)
        out = options.out / f"{options.profile}_{options.epochs}"
    measured: dict[str, list[Counts]] = {arm: [] for arm in arms}
    # fold by fold, so that a run cut short compares all arms on the same embryos
    for fold in options.only or range(folds):
        for arm in arms:
            say(f"--- fold {fold + 1} of {folds}: {arm}")
            measured[arm] += measure(arm, fold, options.data, out, profile)
    if options.only:
        return
    table = summarise(measured) | {"profile": options.profile, "settings": vars(profile), "folds": folds}
    text = as_markdown(table)
    for name, content in (("ablation.md", text), ("ablation.json", json.dumps(table, indent=2))):
        with whole_file(out / name) as path:
            path.write_text(content + "\n")
    say(text)
    if options.json:
        print(json.dumps(table))


if __name__ == "__main__":
    main()
