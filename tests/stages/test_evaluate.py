"""The evaluation stage on folders of label volumes, with and without images."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from nuclei3d.config import Params
from nuclei3d.console import warned
from nuclei3d.errors import InputError
from nuclei3d.images.tiff import write_image, write_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.cpnet import new_network
from nuclei3d.networks.folder import ModelInfo, save_model
from nuclei3d.scoring.watershed import OTSU
from nuclei3d.stages.evaluate import evaluate, read_baselines
from nuclei3d.stages.prepare import prepare
from nuclei3d.stages.training_data import SliceSummary

SIZE = VoxelSize(2.0, 0.5, 0.5)
NOISE = np.random.default_rng(0).integers(0, 900, (6, 9, 9)).astype(np.uint32)
QUICK = Params.model_validate({"evaluate": {"bootstrap": 50}})


def scene(seed: int) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Draw an image of six balls and their labels; the sixth is faint."""
    rng = np.random.default_rng(seed)
    grid = np.meshgrid(np.arange(12) * 2.0, np.arange(60) * 0.5, np.arange(72) * 0.5, indexing="ij")
    labels = np.zeros((12, 60, 72), dtype=np.uint16)
    brightness = np.zeros(labels.shape)
    for label in range(1, 7):
        centre = (6 + 12 * (label % 2), 7 + 14 * (label % 2), 6 + 11 * ((label - 1) // 2))
        ball = sum((axis - c) ** 2 for axis, c in zip(grid, centre, strict=True)) <= 16
        labels[ball] = label
        brightness[ball] = 15 if label == 6 else 100 + 10 * label
    return rng.poisson(20 + brightness).astype(np.uint16), labels


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write data in the layout of the project and predictions that miss 6 and invent one nucleus a frame."""
    root = tmp_path_factory.mktemp("evaluation")
    for embryo in ("A", "B"):
        for frame in range(3):
            image, labels = scene(frame)
            pred = np.where(labels == 6, 0, labels).astype(np.uint16)
            pred[:3, :8, -8:] = 7
            write_image(root / f"data/{embryo}/images/t{frame}.tif", image, SIZE)
            write_labels(root / f"data/{embryo}/labels/t{frame}.tif", labels, SIZE)
            write_labels(root / f"pred/{embryo}/t{frame}_masks.ome.tif", pred, SIZE)
            rows = [f"{label},{0.9 if label < 7 else 0.2}" for label in (1, 2, 3, 4, 5, 7)]
            (root / f"pred/{embryo}/t{frame}_nuclei.csv").write_text("\n".join(["label,score", *rows]) + "\n")
    return root


@pytest.fixture(scope="module")
def metrics(folders: Path) -> dict[str, Any]:
    evaluate(QUICK, folders / "data", folders / "pred", folders / "out")
    loaded: dict[str, Any] = json.loads((folders / "out/metrics.json").read_text())
    return loaded


def test_metrics_json_keeps_the_contract(metrics: dict[str, Any]) -> None:
    keys = [f"{t:.2f}" for t in np.arange(0.5, 0.91, 0.05)]
    for part in (metrics, metrics["volumes"]["A/t0"]):
        assert list(part["ap"]) == keys
        assert list(part["f1"]) == keys
        for name in ("pq", "seg", "det", "mucov", "foreground_iou", "precision"):
            assert 0 < part[name] < 1
        assert (part["splits"], part["merges"]) == (0, 0)
    assert sorted(metrics["volumes"]) == ["A/t0", "A/t1", "A/t2", "B/t0", "B/t1", "B/t2"]
    assert (metrics["n_true"], metrics["n_pred"]) == (36, 36)
    # five of six found, one of six false
    assert metrics["ap"]["0.50"] == pytest.approx(5 / 7)
    assert metrics["recall"] == pytest.approx(5 / 6)
    bins = metrics["recall_by_contrast"]
    assert len(bins) == 5
    for entry in bins:
        assert {"n", "recall", "interval", "precision"} <= set(entry)
    # the sixth of each frame is the faintest: it fills the faintest bin but for one of seven or eight
    assert metrics["recall_faint"] == bins[0]["recall"] < 0.3
    assert metrics["recall_bright"] == 1
    assert metrics["recall_at_precision"]["0.95"]["score"] == pytest.approx(0.9)


def test_otsu_stands_beside_the_model(metrics: dict[str, Any]) -> None:
    baseline = metrics["baselines"][OTSU]
    assert baseline["ap"]["0.50"] > 0.6
    low, high = baseline["behind_model"]["interval"]
    assert low <= baseline["behind_model"]["ap_0.50"] <= high


def test_every_true_and_every_false_nucleus_is_listed_in_um(folders: Path, metrics: dict[str, Any]) -> None:
    with (folders / "out/nuclei.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 36 + 6
    assert sum(row["outcome"] == "missed" for row in rows) == 6
    assert {row["label"] for row in rows if row["outcome"] == "missed"} == {"6"}
    assert {row["label"] for row in rows if row["outcome"] == "false"} == {"7"}
    first = rows[0]
    assert (first["volume"], first["embryo"], first["frame"]) == ("A/t0", "A", "t0")
    assert float(first["z_um"]) == pytest.approx(18, abs=0.3)
    assert float(first["y_um"]) == pytest.approx(21, abs=0.3)
    assert float(first["volume_um3"]) == pytest.approx(4 / 3 * np.pi * 4**3, rel=0.1)
    assert float(first["contrast"]) > 10
    assert first["partner"] == "1"


def test_all_files_are_written_and_the_report_holds_no_link_to_the_network(folders, metrics):
    out = folders / "out"
    for name in ("report.html", "figures/scores.png", "figures/overlay.png", "figures/worst_nuclei.png"):
        assert (out / name).stat().st_size > 5000
    page = (out / "report.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert "finds 83 %" in page
    with (out / "plots/ap_by_iou.csv").open(newline="") as file:
        assert {row["method"] for row in csv.DictReader(file)} == {"model", OTSU}


def test_an_evaluation_repeated_is_the_same_and_replaces_the_older(folders: Path) -> None:
    params = Params.model_validate({"evaluate": {"bootstrap": 50, "report": False, "baselines": []}})
    first = evaluate(params, folders / "data", folders / "pred", folders / "again").metrics
    second = evaluate(params, folders / "data", folders / "pred", folders / "again").metrics
    assert first == second
    assert not (folders / "again/report.html").exists()


def test_several_processes_find_the_same(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = Params.model_validate({"evaluate": {"bootstrap": 50, "report": False}})
    alone = evaluate(params, folders / "data", folders / "pred", folders / "alone").metrics
    monkeypatch.setattr("nuclei3d.stages.evaluation._WORTH_PROCESSES", 0)
    assert evaluate(params, folders / "data", folders / "pred", folders / "shared").metrics == alone


def test_label_volumes_without_images_are_scored_without_contrast(folders: Path, tmp_path: Path) -> None:
    for frame in range(2):
        for name in ("truth", "pred"):
            _, labels = scene(frame)
            (tmp_path / name).mkdir(exist_ok=True)
            # no voxel size, 32-bit labels with gaps, as other programs write them
            tifffile.imwrite(tmp_path / name / f"v{frame}.tif", labels.astype(np.int32) * 1000)
    result = evaluate(QUICK, tmp_path / "truth", tmp_path / "pred", tmp_path / "out")
    assert result.metrics["ap"]["0.90"] == 1
    assert result.metrics["recall_by_contrast"] == []
    assert result.metrics["recall_faint"] is None
    assert result.metrics["baselines"] == {}
    assert "recall_faint" not in result.scores
    assert result.as_json()["ap_0.50"] == 1
    assert (tmp_path / "out/report.html").is_file()


def test_contrast_bins_come_from_the_training_set_if_it_is_named_and_otsu_from_the_frames(folders, tmp_path):
    sizes = {"nucleus_diameter_um": 30.0, "voxel_um": 1.0, "diameter_px": 30.0}
    facts = SliceSummary(data=tmp_path, contrast_quintiles=(5.0, 10.0, 20.0, 30.0), md5="feed", **sizes)
    (tmp_path / "summary.json").write_text(facts.model_dump_json())
    metrics = evaluate(QUICK, folders / "data", folders / "pred", tmp_path / "out", summary=tmp_path).metrics
    assert metrics["contrast_edges"] == [5, 10, 20, 30]
    assert metrics["contrast_edges_from"] == "training labels"
    # only the faint sixth of each frame lies below a contrast of 5
    assert metrics["recall_by_contrast"][0]["n"] == 6
    assert metrics["recall_faint"] == 0
    alone = evaluate(QUICK, folders / "data", folders / "pred", tmp_path / "alone").metrics
    assert metrics["baselines"][OTSU]["seg"] == alone["baselines"][OTSU]["seg"]


def test_other_methods_can_be_put_beside(folders: Path, tmp_path: Path) -> None:
    baselines = {"perfect": folders / "data"}
    metrics = evaluate(
        QUICK, folders / "data", folders / "pred", tmp_path / "out", baselines=baselines
    ).metrics
    assert metrics["baselines"]["perfect"]["ap"]["0.90"] == 1
    assert metrics["baselines"]["perfect"]["behind_model"]["interval"][1] < 0


def test_volumes_that_the_model_knows_are_told_by_their_voxels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, (embryo, elsewhere) in enumerate((("a", "x"), ("b", "y"), ("c", "z"))):
        image, labels = scene(seed)
        labels[labels == seed + 1] = 0
        write_image(tmp_path / f"data/{embryo}/images/t0.tif", image, SIZE)
        write_labels(tmp_path / f"data/{embryo}/labels/t0.tif", labels, SIZE)
        # saved again in another type, under another name
        write_image(tmp_path / f"again/{elsewhere}/images/f7.tif", image.astype(np.float32), SIZE)
        write_labels(tmp_path / f"again/{elsewhere}/labels/f7.tif", labels.astype(np.uint8), SIZE)
        write_labels(tmp_path / f"pred/{elsewhere}/f7.tif", labels, SIZE)
    split = {"by": "embryo", "train": ["a"], "validation": ["b"], "test": ["c"]}
    cut = {"downsample_xy": 1, "min_nuclei": 1, "workers": 1, "step_xy": 6, "step_xz": 30, "step_yz": 30}
    params = Params.model_validate(
        {"data": {"split": split}, "prepare": cut, "evaluate": {"bootstrap": 0, "report": False}}
    )
    summary = prepare(params, tmp_path / "data", tmp_path / "slices").summary
    info = ModelInfo(diameter_px=17, frames=summary.frame_digests)
    save_model(tmp_path / "model", new_network(17, 0), info, "a card")
    told = {"model": tmp_path / "model", "out": tmp_path / "out"}
    metrics = evaluate(params, tmp_path / "again", tmp_path / "pred", **told).metrics
    seen = {name: volume.get("seen") for name, volume in metrics["volumes"].items()}
    assert seen == {"x/f7": "train", "y/f7": "validation", "z/f7": None}
    assert metrics["training_frames_known"]
    assert "the model was trained on x/f7" in metrics["warnings"][0]
    assert "chosen on y/f7" in metrics["warnings"][1]
    assert list(warned) == metrics["warnings"]
    assert "warning: the model was trained on x/f7" in capsys.readouterr().err
    # of whose predictions nothing is said, nothing is known
    metrics = evaluate(params, tmp_path / "again", tmp_path / "pred", tmp_path / "out").metrics
    assert not metrics["training_frames_known"]
    assert "warnings" not in metrics


def test_fewer_than_ten_nuclei_give_no_interval(
    folders: Path, metrics: dict[str, Any], tmp_path: Path
) -> None:
    # 36 nuclei in all, fewer than ten in all bins of contrast but the brightest
    assert metrics["intervals"]["recall"]
    bins = metrics["recall_by_contrast"]
    assert [entry["n"] < 10 for entry in bins] == [True, True, True, True, False]
    assert [entry["interval"] is None for entry in bins] == [True, True, True, True, False]
    for frame in ("t0", "t1"):
        for kind, source in (("truth", "data/A/labels"), ("pred", "data/B/labels")):
            labels = tifffile.imread(folders / source / f"{frame}.tif")
            write_labels(tmp_path / kind / f"{frame}.tif", np.where(labels > 4, 0, labels), SIZE)
    few = evaluate(QUICK, tmp_path / "truth", tmp_path / "pred", tmp_path / "out").metrics
    assert few["n_true"] == 8
    assert few["intervals"] == {}


def test_debris_among_the_true_labels_can_be_left_out(tmp_path: Path) -> None:
    _, labels = scene(0)
    labels[0, 0, 0] = 9
    write_labels(tmp_path / "truth/t0.tif", labels, SIZE)
    write_labels(tmp_path / "pred/t0.tif", np.where(labels == 9, 0, labels).astype(np.uint16), SIZE)
    for least, missed in ((0.0, 1), (1.0, 0)):
        chosen = QUICK.evaluate.model_copy(update={"min_true_volume_um3": least, "report": False})
        params = QUICK.model_copy(update={"evaluate": chosen})
        evaluate(params, tmp_path / "truth", tmp_path / "pred", tmp_path / "out")
        found = json.loads((tmp_path / "out/metrics.json").read_text())
        assert (found["n_true"] - found["n_pred"], found["precision"]) == (missed, 1.0)


def test_history_of_the_training_is_drawn(folders: Path, tmp_path: Path) -> None:
    history = tmp_path / "history.csv"
    history.write_text("epoch,train_loss,validation_loss,volume_ap\n1,2.0,2.1,\n2,1.0,1.4,0.5\n")
    evaluate(QUICK, folders / "data", folders / "pred", tmp_path / "out", history=history)
    page = (tmp_path / "out/report.html").read_text()
    assert "Loss of the training" in page
    assert "Average precision on the validation volumes" in page


def test_the_real_embryos_and_otsu_agree_with_what_is_known(bbbc050: Path, tmp_path: Path) -> None:
    # A plain Otsu watershed has SEG .529 and AP .648 on other embryos; truth is compared with itself, and
    # Otsu is the baseline.
    metrics = evaluate(
        Params.model_validate({"evaluate": {"report": False, "surface_distances": False}}),
        bbbc050 / "Emb11",
        bbbc050 / "Emb11" / "labels",
        tmp_path / "out",
    ).metrics
    assert metrics["ap"]["0.90"] == 1
    assert metrics["n_true"] == 159
    baseline = metrics["baselines"][OTSU]
    assert 0.5 < baseline["seg"] < 0.75
    assert 0.5 < baseline["ap"]["0.50"] < 0.8
    recalls = [entry["recall"] for entry in baseline["recall_by_contrast"]]
    assert recalls[0] < recalls[-1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: (root / "pred/v0.tif").rename(root / "pred/w.tif"), "no volume of"),
        (lambda root: tifffile.imwrite(root / "pred/v0.tif", np.zeros((7, 9, 9), np.uint8)), "same grid"),
        (lambda root: tifffile.imwrite(root / "pred/v0.tif", np.full((6, 9, 9), 0.5, np.float32)), "float32"),
        (lambda root: tifffile.imwrite(root / "pred/v0.tif", np.full((6, 9, 9), -1, np.int16)), "negative"),
        (lambda root: os.truncate(root / "truth/v0.tif", 200), "v0.tif"),
        (lambda root: write_labels(root / "truth/v0.tif", NOISE, SIZE), r"truth.v0.tif holds intensities"),
        (lambda root: write_labels(root / "pred/v1.tif", NOISE, SIZE), r"pred.v1.tif holds intensities"),
        (lambda root: (root / "out/notes.txt").write_text("mine"), "is no evaluation"),
        (
            lambda root: [
                (root / "out" / name).write_text('{"volumes": {}}') for name in ("metrics.json", "mine.txt")
            ],
            "mine",
        ),
        (lambda root: (root / "pred/v0_nuclei.csv").write_text("label,score\n1,high\n"), "score"),
        (lambda root: tifffile.imwrite(root / "images/v0.tif", np.zeros((6, 9, 8), np.uint8)), "same grid"),
        (lambda root: (root / "images/v0.tif").rename(root / "images/w.tif"), "no image"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(tmp_path: Path, change: Any, words: str) -> None:
    labels = np.zeros((6, 9, 9), dtype=np.uint16)
    labels[1:3, 2:6, 2:6] = 1
    for name in ("truth", "pred", "images", "out"):
        (tmp_path / name).mkdir()
        for index in range(2):
            if name != "out":
                write_labels(tmp_path / name / f"v{index}.tif", labels, SIZE)
    if words in ("no volume of", "no image"):
        (tmp_path / ("pred" if words == "no volume of" else "images") / "v1.tif").unlink()
        (tmp_path / "truth/v2.tif").write_bytes((tmp_path / "truth/v1.tif").read_bytes())
    (tmp_path / "out").rmdir() if words not in ("is no evaluation", "mine") else None
    change(tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        evaluate(QUICK, tmp_path / "truth", tmp_path / "pred", tmp_path / "out", images=tmp_path / "images")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "out/metrics.json").exists() == (words == "mine")
    assert not list(tmp_path.glob(".out*"))


def test_a_baseline_must_hold_all_volumes_and_have_a_name_of_its_own(folders: Path, tmp_path: Path) -> None:
    truth, pred = folders / "data", folders / "pred"
    with pytest.raises(InputError, match="has no volume for"):
        evaluate(QUICK, truth, pred, tmp_path / "o", baselines={"half": folders / "pred/A"})
    with pytest.raises(InputError, match="taken"):
        evaluate(QUICK, truth, pred, tmp_path / "o", baselines={OTSU: pred})


def test_only_the_frames_that_are_asked_for_count(folders: Path, tmp_path: Path) -> None:
    params = Params.model_validate({"evaluate": {"bootstrap": 0, "report": False, "baselines": []}})
    labels = folders / "data" / "A" / "labels"
    result = evaluate(
        params,
        folders / "data",
        folders / "pred" / "A",
        tmp_path / "out",
        only={(labels / "t1.tif", None): None},
    )
    assert list(result.metrics["volumes"]) == ["A/t1"]
    assert result.metrics["unpaired"]["truth"] == []


def test_baselines_are_named_on_the_command_line() -> None:
    assert read_baselines(["stardist=a/b", "two words=c=d"]) == {
        "stardist": Path("a/b"),
        "two words": Path("c=d"),
    }
    for wrong, message in (
        (["folder"], "NAME|a name"),
        (["=x"], "a name"),
        (["a=x", "a=y"], "two baselines"),
    ):
        with pytest.raises(InputError, match=message):
            read_baselines(wrong)
