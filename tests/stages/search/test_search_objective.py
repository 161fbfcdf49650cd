"""What a trial is judged by, and a real but tiny search from embryos to a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nuclei3d.config import load_params
from nuclei3d.config.sections import SearchParams
from nuclei3d.errors import InputError
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.scoring.assessment import Assessment, assess_volume
from nuclei3d.stages.search.objective import validation_frames, value_of, without_idle_work
from nuclei3d.stages.search.study import search

FAINT = SearchParams(objective="faint_recall", precision=0.75)


def row_of_nuclei(brightness: list[float], scores: list[float | None], ghosts: list[float]) -> Assessment:
    """Nuclei in a row, each as bright as told; those with a score are found exactly; ghosts are false."""
    count = len(brightness) + len(ghosts)
    truth = np.zeros((6, 12, 12 * count), np.uint16)
    found = np.zeros_like(truth)
    image = np.random.default_rng(0).normal(100, 1, truth.shape)
    given: dict[int, float] = {}
    for place, score in enumerate([*scores, *ghosts]):
        box = np.s_[1:5, 2:10, 12 * place + 2 : 12 * place + 10]
        if place < len(brightness):
            truth[box] = place + 1
            image[box] += brightness[place]
        if score is not None:
            found[box] = place + 1
            given[place + 1] = score
    return assess_volume(truth, found, VoxelSize(2.0, 0.5, 0.5), image=image, scores=given, surfaces=False)


def test_ap_is_that_of_the_pooled_volumes() -> None:
    first = row_of_nuclei([50, 50, 50], [1.0, 1.0, None], ghosts=[1.0])
    second = row_of_nuclei([50], [1.0], ghosts=[])
    # 3 found, 1 missed, 1 false
    assert value_of([first, second], SearchParams(), ()) == pytest.approx(3 / 5)


def test_faint_recall_is_read_where_the_precision_is_reached() -> None:
    # by falling score: found .9, found .8, found .7 (faint), ghost .6, found .5 (faint), ghosts .4 .3
    volume = row_of_nuclei([80, 80, 8, 8, 8], [0.9, 0.8, 0.7, 0.5, None], ghosts=[0.6, 0.4, 0.3])
    # cut at .5 the precision is 4/5 and two of three faint nuclei are kept; cut at .4 it is 4/6
    assert value_of([volume], FAINT, [30.0]) == pytest.approx(2 / 3)
    strict = FAINT.model_copy(update={"precision": 0.9})
    assert value_of([volume], strict, [30.0]) == pytest.approx(1 / 3)


def test_a_model_without_the_precision_scores_below_0_by_what_it_misses() -> None:
    volume = row_of_nuclei([80, 8], [0.5, None], ghosts=[0.9, 0.8, 0.7])
    assert value_of([volume], FAINT, [30.0]) == pytest.approx(1 / 4 - 0.75)
    silent = row_of_nuclei([80, 8], [None, None], ghosts=[])
    assert value_of([silent], FAINT, [30.0]) == pytest.approx(-0.75)


def test_volumes_that_cannot_tell_models_apart_are_refused() -> None:
    with pytest.raises(InputError, match="no nuclei"):
        value_of([row_of_nuclei([], [], ghosts=[0.9])], SearchParams(), ())
    with pytest.raises(InputError, match="as faint as"):
        value_of([row_of_nuclei([80], [0.9], ghosts=[])], FAINT, [30.0])


def test_missing_embryos_are_told_before_any_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--data"):
        validation_frames(load_params(None), tmp_path / "nowhere")


@pytest.mark.slow
def test_a_real_search_from_embryos_to_a_model(tmp_path: Path) -> None:
    """Slow: it prepares embryos and trains twice, if only for an epoch or two."""
    from nuclei3d.networks.folder import load_model
    from nuclei3d.stages.prepare import prepare
    from nuclei3d.stages.simulate import simulate

    overrides = [
        "tracking.enabled=false",
        "simulate.frames=1",
        "simulate.shape=[8,48,48]",
        "simulate.nuclei=4",
        "prepare.downsample_xy=1",
        "prepare.min_nuclei=1",
        "prepare.step_xz=8",
        "prepare.step_yz=8",
        "prepare.workers=1",
        "train.diameter_px=12",
        "train.crop_px=32",
        "train.min_train_masks=1",
        "train.epochs=2",
        "train.crops_per_epoch=8",
        "train.batch_size=4",
        "train.validation_crops=4",
        "search.epochs=null",
        "search.batch_size=null",
        "search.prune=false",
    ]
    params = load_params(None, overrides)
    simulate(params, tmp_path / "data")
    prepare(params, tmp_path / "data", tmp_path / "slices")
    result = search(params, tmp_path / "slices", tmp_path / "search", trials=2)
    assert result.trials["finished"] == 2
    assert 0 <= result.best.value <= 1
    assert result.model is not None
    assert load_model(result.model).info.diameter_px == 12
    for row in json.loads((tmp_path / "search" / "study.json").read_text())["trials"]:
        assert list(row["curve"]) == ["500", "1000"]
        assert all(-10 < value < 0 for value in row["curve"].values()), "minus the validation loss"


def test_thresholds_are_chosen_only_where_the_value_depends_on_them() -> None:
    fixed = ["cellprob_threshold=0.5", "outline_threshold=0", "min_volume_um3=10"]
    fixed = [f"predict.{each}" for each in fixed]
    assert without_idle_work(load_params(None)).calibrate.volumes
    assert without_idle_work(load_params(None, fixed)).calibrate.volumes
    # the score is cut where the precision is reached, whatever the model says
    assert (
        without_idle_work(load_params(None, [*fixed, "search.objective=faint_recall"])).calibrate.volumes == 0
    )
    assert (
        without_idle_work(load_params(None, [*fixed, "predict.score_threshold=0.1"])).calibrate.volumes == 0
    )
    assert not without_idle_work(load_params(None)).tracking.enabled
