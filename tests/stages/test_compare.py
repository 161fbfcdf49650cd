"""The comparison sees a small difference that every embryo shares, and none where there is none."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nuclei3d.config import Params
from nuclei3d.errors import InputError
from nuclei3d.images.tiff import write_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.stages.compare import compare
from nuclei3d.stages.evaluate import evaluate

SIZE = VoxelSize(1, 1, 1)
PARAMS = Params.model_validate({"evaluate": {"bootstrap": 400, "report": False}})


def boxes(count: int, missing: set[int]) -> NDArray[np.uint16]:
    labels = np.zeros((4, 4, 4 * count), dtype=np.uint16)
    for label in range(1, count + 1):
        if label not in missing:
            labels[1:3, 1:3, 4 * label - 3 : 4 * label - 1] = label
    return labels


def write(root: Path, name: str, missing: dict[str, set[int]]) -> Path:
    """Evaluate a method that misses the given nuclei of ten embryos with 6 to 15 nuclei each."""
    for index in range(10):
        embryo = f"E{index}"
        write_labels(root / f"truth/{embryo}/labels/t0.tif", boxes(6 + index, set()), SIZE)
        write_labels(root / f"{name}/{embryo}/t0.tif", boxes(6 + index, missing.get(embryo, set())), SIZE)
    evaluate(PARAMS, root / "truth", root / name, root / f"out_{name}")
    return root / f"out_{name}"


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("compare")
    every = {f"E{k}": {1} for k in range(10)}
    return {
        "good": write(root, "good", {}),
        # one more nucleus missed in every embryo
        "worse": write(root, "worse", every),
        # the same number missed as `worse`, elsewhere
        "other": write(root, "other", {f"E{k}": {2} for k in range(10)}),
        # better in half of the embryos, worse in the others
        "mixed": write(root, "mixed", {f"E{k}": {1, 2} for k in range(5)}),
    }


def test_a_difference_in_every_embryo_is_real(outs: dict[str, Path], tmp_path: Path) -> None:
    result = compare(PARAMS, outs["worse"], outs["good"], tmp_path / "folder")
    assert result.verdict.startswith("B is really better than A: mean AP (IoU .5 to .9)")
    assert {"ap_mean", "ap_0.50", "ap_0.90", "pq", "seg", "recall"} <= set(result.better)
    assert result.worse == ()
    assert "PQ, SEG" in result.verdict
    gap = result.differences["ap_0.50"]
    # 105 nuclei, 10 missed
    assert gap.a == pytest.approx(95 / 105)
    assert gap.difference == pytest.approx(10 / 105)
    assert 0 < gap.low < 10 / 105 < gap.high
    assert gap.real
    # nobody invented anything
    assert not result.differences["precision"].real
    written = json.loads((tmp_path / "folder/compare.json").read_text())
    assert written["verdict"] == result.verdict
    assert written["differences"][0]["metric"] == "ap_0.50"
    assert written["differences"][0]["low"] == gap.low
    backwards = compare(PARAMS, outs["good"], outs["worse"] / "metrics.json")
    assert backwards.verdict.startswith("B is really worse than A")


def test_volumes_that_were_evaluated_from_another_folder_are_the_same(
    outs: dict[str, Path], tmp_path: Path
) -> None:
    tree = json.loads((outs["good"] / "metrics.json").read_text())
    tree["volumes"] = {f"elsewhere/{name}": volume for name, volume in tree["volumes"].items()}
    (tmp_path / "metrics.json").write_text(json.dumps(tree))
    found = compare(PARAMS, outs["worse"], tmp_path)
    assert found.differences == compare(PARAMS, outs["worse"], outs["good"]).differences
    # truths that are twice there tell nothing
    for volume in tree["volumes"].values():
        volume["truth_digest"] = "the same"
    (tmp_path / "metrics.json").write_text(json.dumps(tree))
    with pytest.raises(InputError, match="share no volume"):
        compare(PARAMS, outs["worse"], tmp_path)


def test_the_start_model_of_a_side_is_told(outs, tmp_path, capsys):
    metrics = json.loads((outs["good"] / "metrics.json").read_text())
    worse = json.loads((outs["worse"] / "metrics.json").read_text())
    lead = {"ap_0.50": 10 / 105, "interval": [0.08, 0.11]}
    metrics["baselines"]["start model (old)"] = worse | {"behind_model": lead}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    result = compare(PARAMS, outs["worse"], tmp_path)
    assert result.start_models["b"]["ap"]["0.50"] == pytest.approx(95 / 105)
    assert "start model (old) of B: AP at .5 0.905; B leads by +0.095" in capsys.readouterr().err
    assert result.start_models.keys() == {"b"}


def test_equal_and_mixed_results_are_no_real_difference(outs: dict[str, Path]) -> None:
    assert compare(PARAMS, outs["worse"], outs["other"]).verdict.startswith("no real difference")
    assert compare(PARAMS, outs["worse"], outs["mixed"]).verdict.startswith("no real difference")


def test_the_primary_metric_is_a_parameter_and_others_that_surely_differ_are_named(outs, tmp_path):
    params = PARAMS.model_copy(
        update={"evaluate": PARAMS.evaluate.model_copy(update={"primary_metric": "det"})}
    )
    result = compare(params, outs["worse"], outs["good"])
    assert result.verdict.startswith("B is really better than A: DET")
    # AP .5 as it is, and outlines that fit worse in A: DET cannot tell, SEG and AP at high IoU can
    tree = json.loads((outs["good"] / "metrics.json").read_text())
    for volume in tree["volumes"].values():
        volume["counts"]["tp"][-3:] = [0, 0, 0]
        volume["counts"]["majority_iou"] *= 0.8
    loose = tmp_path / "loose.json"
    loose.write_text(json.dumps(tree))
    result = compare(params, loose, outs["good"])
    assert result.verdict.startswith("no real difference in DET")
    assert result.verdict.endswith("but B is surely better in mean AP (IoU .5 to .9), SEG, AP at .80 .85 .90")


def test_embryos_that_a_model_was_trained_on_are_not_judged_on(outs, tmp_path):
    def seen(part: str, *volumes: str) -> Path:
        tree = json.loads((outs["good"] / "metrics.json").read_text())
        for name in volumes:
            tree["volumes"][name]["seen"] = part
        path = tmp_path / "seen.json"
        path.write_text(json.dumps({**tree, "training_frames_known": True}))
        return path

    result = compare(PARAMS, outs["worse"], seen("train", "E3/t0", "E4/t0"))
    assert result.volumes == 8
    assert "2 volumes are of embryos that one of the models was trained on" in result.warnings[0]
    # of A nothing is known
    assert "the model of A was trained on is not known" in result.warnings[1]
    assert "(evaluate with --model)" in result.warnings[1]
    tree = {**json.loads((outs["worse"] / "metrics.json").read_text()), "model": {"name": "old"}}
    (tmp_path / "old.json").write_text(json.dumps(tree))
    told = compare(PARAMS, tmp_path / "old.json", seen("train")).warnings
    assert len(told) == 1
    assert told[0].endswith("(it, or one that it started from, is of a version that did not record it)")
    result = compare(PARAMS, outs["worse"], seen("validation", "E3/t0"))
    assert result.volumes == 10
    assert "were chosen on E3/t0" in result.warnings[0]
    with pytest.raises(InputError, match="trained on the embryos of E0/t0, E1/t0, E2/t0 and 7 more"):
        compare(PARAMS, seen("train", *(f"E{k}/t0" for k in range(10))), outs["worse"])


def test_pairing_makes_the_interval_of_the_difference_narrower_than_those_of_the_methods(outs):
    result = compare(PARAMS, outs["mixed"], outs["good"])
    metrics = json.loads((outs["mixed"] / "metrics.json").read_text())
    gap = result.differences["ap_0.50"]
    low, high = metrics["intervals"]["ap_0.50"]
    assert gap.high - gap.low <= high - low + 1e-12


def test_only_shared_volumes_count_and_the_reader_is_told(outs: dict[str, Path], tmp_path: Path) -> None:
    tree = json.loads((outs["good"] / "metrics.json").read_text())
    del tree["volumes"]["E3/t0"]
    part = tmp_path / "metrics.json"
    part.write_text(json.dumps(tree))
    result = compare(PARAMS, outs["worse"], part, tmp_path / "result.json")
    assert result.volumes == 9
    assert any("left out" in note for note in result.notes)
    assert (tmp_path / "result.json").is_file()


def test_another_truth_no_shared_volume_and_files_of_another_kind_are_refused(outs, tmp_path):
    tree = json.loads((outs["good"] / "metrics.json").read_text())
    tree["volumes"]["E3/t0"]["truth_digest"] = "0"
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(tree))
    with pytest.raises(InputError, match="other true labels"):
        compare(PARAMS, outs["good"], changed)
    tree["volumes"] = {"X/t0": tree["volumes"]["E3/t0"]}
    changed.write_text(json.dumps(tree))
    with pytest.raises(InputError, match="share no volume"):
        compare(PARAMS, outs["good"], changed)
    changed.write_text('{"ap": {}}')
    with pytest.raises(InputError, match=r"no metrics\.json.*ap"):
        compare(PARAMS, outs["good"], changed)
    changed.write_text("no json")
    with pytest.raises(InputError, match="not valid JSON"):
        compare(PARAMS, outs["good"], changed)
    with pytest.raises(InputError, match="cannot read"):
        compare(PARAMS, outs["good"], tmp_path / "nowhere.json")
