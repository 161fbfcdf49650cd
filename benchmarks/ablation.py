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

Each training and each measured frame is kept, so the script can be stopped and started at will. Intervals
are 95 %, by bootstrap over blocks of time within the test embryos; differences to the recipe are paired by
volume; the faintest fifth is that of the true nuclei measured. On two cores the profile ``cpu`` takes about
an hour and a half: few steps, small crops, every other frame. That shows which changes help early in a
training; more ``--epochs`` show what becomes of it, and the profile ``gpu`` trains much longer, in larger
batches. ``--only`` measures some folds, so that several processes or jobs share the work; the call without it
then reads what they left and draws the table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from embryos import EMBRYOS, described, predict_frames, prepare_once, score, split_of, table_of, write_result
from nuclei3d.config import Params
from nuclei3d.config.loading import validate_params
from nuclei3d.console import say
from nuclei3d.images.embryos import EmbryoFrame
from nuclei3d.stages.compare import compare
from nuclei3d.stages.train import train
from shared import new_parser

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
# column of the table: name of the figure in metrics.json
COLUMNS = {
    "AP .5": "ap_0.50",
    "AP .75": "ap_0.75",
    "recall of the faintest fifth": "recall_faint",
    "precision": "precision",
}


@dataclass(frozen=True)
class Profile:
    """How long the arms train, and how many frames of a test embryo are measured."""

    epochs: int
    crops_per_epoch: int
    batch_size: int
    crop_px: int
    folds: int
    every_frame: int


PROFILES = {"cpu": Profile(10, 160, 8, 96, 3, 2), "gpu": Profile(20, 1600, 32, 128, 5, 1)}


def params_of(arm: str, fold: int, profile: Profile) -> Params:
    """Give the parameters of an arm in a fold; the validation embryo follows the test embryo."""
    test = TEST_OF_FOLD[fold]
    validation = EMBRYOS[(EMBRYOS.index(test) + 1) % len(EMBRYOS)]
    rest = [embryo for embryo in EMBRYOS if embryo not in (test, validation)]
    trained_with = ("epochs", "crops_per_epoch", "batch_size", "crop_px")
    return validate_params(
        {
            "seed": fold,
            "data": {"split": {"train": rest, "validation": [validation], "test": [test]}},
            "prepare": {"downsample_xy": 1.0, "step_xy": 2, "step_xz": 8, "step_yz": 8, "sparse_share": 0.3},
            "train": {
                "name": arm,
                "diameter_px": 17.0,
                "learning_rate": 2e-3,
                **{name: getattr(profile, name) for name in trained_with},
                "select": "last",
                **ARMS[arm],
            },
            "evaluate": {
                "bootstrap": 2000,
                "resample": "time",
                "baselines": [],
                "surface_distances": False,
                "report": False,
            },
            "tracking": {"enabled": False},
        },
        "the ablation",
    )


def main() -> None:
    """Read the command line, measure what is missing, print the tables."""
    parser = new_parser(__doc__, embryos=True)
    parser.add_argument("--profile", choices=tuple(PROFILES), default="cpu")
    parser.add_argument("--arms", default=",".join(ARMS), help="names, separated by commas")
    parser.add_argument("--epochs", type=int, help="of each training (default: the profile's)")
    parser.add_argument("--folds", type=int, help="number of folds (default: the profile's)")
    parser.add_argument("--only", type=int, nargs="+", help="measure these folds (from 0), draw no table")
    options = parser.parse_args()
    profile, data = PROFILES[options.profile], options.data
    arms = options.arms.split(",")
    if unknown := set(arms) - set(ARMS):
        parser.error(f"unknown arm {sorted(unknown)[0]}; known: {', '.join(ARMS)}")
    folds = min(options.folds or profile.folds, len(TEST_OF_FOLD))
    out: Path = options.out / options.profile
    if options.epochs is not None and options.epochs != profile.epochs:
        profile = replace(profile, epochs=options.epochs)
        out = options.out / f"{options.profile}_{options.epochs}"
    frames: list[EmbryoFrame] = []
    # fold by fold, so that a run cut short compares all arms on the same embryos
    for fold in options.only or range(folds):
        recipe = params_of("recipe", fold, profile)
        slices = prepare_once(recipe, data, out / f"fold{fold}" / "slices")
        tests = split_of(recipe, data).test[:: profile.every_frame]
        frames += tests
        for arm in arms:
            say(f"--- fold {fold + 1} of {folds}: {arm}")
            model = out / f"fold{fold}" / "models" / arm
            train(params_of(arm, fold, profile), slices, model)
            predict_frames(params_of(arm, fold, profile), tests, model, out / "arms" / arm / "predictions")
    if options.only:
        return
    judged = params_of("recipe", 0, profile)
    table: dict[str, Any] = {"profile": options.profile, "settings": vars(profile), "folds": folds}
    rows, changes = {}, {}
    for arm in arms:
        metrics = score(judged, frames, out / "arms" / arm / "predictions", out / "arms" / arm)
        rows[arm] = described(metrics, COLUMNS)
        if arm != "recipe" and "recipe" in arms:
            pair = compare(judged, *(out / "arms" / name / "evaluation" for name in ("recipe", arm)))
            differences = {column: pair.differences[key] for column, key in COLUMNS.items()}
            changes[arm] = {
                column: {"value": each.difference, "interval": [each.low, each.high]}
                for column, each in differences.items()
            }
    table |= {"volumes": len(frames), "nuclei": metrics["n_true"], "arms": rows, "changes": changes}
    text = table_of(rows, "arm") + "\n\n" + table_of(changes, "change to the recipe", "+")
    write_result(out, table, text, as_json=options.json)


if __name__ == "__main__":
    main()
