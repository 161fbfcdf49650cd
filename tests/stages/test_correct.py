"""Corrections: what is opened, where they go, what counts as looked at, and napari's panel."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from numpy.typing import NDArray

from nuclei3d.config import Params
from nuclei3d.errors import InputError
from nuclei3d.images.embryos import find_embryos, read_labelled
from nuclei3d.images.frames import read_labels
from nuclei3d.images.tiff import write_image, write_labels
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.stages.correct import correct
from nuclei3d.stages.correction import Correction, Foreground, known_region, open_correction

SIZE = VoxelSize(2.0, 1.0, 1.0)
SHAPE = (12, 40, 60)
CENTRES = {1: (6, 10, 12), 2: (6, 28, 14), 3: (5, 10, 40), 4: (6, 29, 44)}


def balls(**radii: float) -> NDArray[np.uint32]:
    z, y, x = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    labels = np.zeros(SHAPE, np.uint32)
    for number, (cz, cy, cx) in CENTRES.items():
        radius = radii.get(f"r{number}", 6.0)
        labels[(2 * (z - cz)) ** 2 + (y - cy) ** 2 + (x - cx) ** 2 <= radius**2] = number
    return labels


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """An embryo of two frames without labels, and masks of both: in t001 nucleus 4 has shrunk."""
    for frame, labels in (("t000", balls()), ("t001", balls(r4=4.0))):
        noise = np.random.default_rng(0).normal(100, 5, SHAPE)
        write_image(tmp_path / f"data/e1/images/{frame}.tif", (noise + 400 * (labels > 0)).astype("u2"), SIZE)
        write_labels(tmp_path / f"pred/{frame}_masks.ome.tif", labels, SIZE)
    table = "label,score\n1,0.9\n2,0.91\n3,0.9\n4,0.3\n"
    (tmp_path / "pred/t000_nuclei.csv").write_text(table)
    return tmp_path / "data"


def opened(data: Path, frame: str = "t000", **options: Any) -> Correction:
    masks = data.parent / f"pred/{frame}_masks.ome.tif"
    return open_correction(Params(), data / f"e1/images/{frame}.tif", masks, **options)


def test_the_masks_scores_are_found_and_rank(data: Path) -> None:
    correction = opened(data)
    assert (correction.folder, correction.frame) == (data / "e1", "t000")
    first = correction.rank(correction.labels)[0]
    assert (first.label, first.reasons) == (4, ("low score (0.30)",))


def test_what_changed_since_the_frame_before_ranks(data: Path) -> None:
    correction = opened(data, "t001")
    share = np.count_nonzero(balls(r4=4.0) == 4) / np.count_nonzero(balls() == 4)
    assert correction.growth == pytest.approx({1: 1.0, 2: 1.0, 3: 1.0, 4: share})
    first = correction.rank(correction.labels)[0]
    assert first.label == 4
    assert f"{share:.2g} x its volume before" in first.reasons
    assert opened(data, "t000").growth is None


def test_an_image_from_elsewhere_goes_where_it_is_told(data: Path, tmp_path: Path) -> None:
    raw = tmp_path / "film" / "t007.tif"
    write_image(raw, np.asarray(balls() * 100, np.uint16), SIZE)
    masks = tmp_path / "pred/t000_masks.ome.tif"
    correction = open_correction(Params(), raw, masks, data=data)
    assert (correction.folder, correction.frame) == (data / "film", "t007")
    correction = open_correction(Params(), raw, masks, data=data, embryo="e9")
    correction.save(correction.labels, (), only_seen=False)
    assert [embryo.name for embryo in find_embryos(data)] == ["e1", "e9"]
    assert np.array_equal(read_labels(data / "e9/labels/t007.tif"), balls())


def test_what_was_looked_at_reaches_half_way_to_the_others() -> None:
    labels = balls()
    known = known_region(labels, labels, {1}, SIZE)
    assert known[labels == 1].all()
    assert not known[np.isin(labels, (2, 3, 4))].any()
    # 1 and 2 lie 18 um apart, 6 um of it between them; the radius of a nucleus is 6 um
    line = known[6, :, 12]
    assert line[:16].all()
    assert not line[22:].any()
    assert known[6, 10, 12 + 11]
    assert not known[6, 10, 12 + 14]
    assert not known_region(labels, labels, (), SIZE).any()


def test_what_was_changed_was_looked_at() -> None:
    before = balls()
    after = np.where(before == 3, 0, before)
    known = known_region(after, before, (), SIZE)
    assert known[before == 3].all()
    assert not known[after > 0].any()


def test_only_what_was_looked_at_counts_and_adds_up(data: Path) -> None:
    correction = opened(data)
    labels = correction.labels.copy()
    labels[labels == 1] = 0
    with pytest.raises(InputError, match="nothing was looked at yet"):
        correction.save(correction.labels, (), only_seen=True)
    assert not (data / "e1/labels").exists()
    result = correction.save(labels, {2}, only_seen=True)
    assert result.frames[0].nuclei == 1
    frame = find_embryos(data)[0].labelled[0]
    first = read_labelled(frame, Params().data)
    assert first.unknown is not None
    assert set(np.unique(first.labels)) == {0, 2}
    assert not first.unknown[balls() == 1].any()
    # the next time: the others are still there, and what was known stays known
    again = open_correction(Params(), data / "e1/images/t000.tif")
    assert set(np.unique(again.labels)) == {0, 2, 3, 4}
    again.save(again.labels, {3}, only_seen=True)
    second = read_labelled(frame, Params().data)
    assert second.unknown is not None
    assert set(np.unique(second.labels)) == {0, 2, 3}
    assert not second.unknown[~first.unknown].any()
    assert second.unknown[balls() == 4].all()
    again.save(again.labels, (), only_seen=False)
    assert read_labelled(frame, Params().data).unknown is None


def test_other_masks_do_not_replace_labels_unasked(data: Path) -> None:
    write_labels(data / "e1/labels/t000.tif", balls(), SIZE)
    with pytest.raises(InputError, match=r"t000\.tif is there already; go on with it .*--overwrite"):
        opened(data)
    assert opened(data, overwrite=True).labels.max() == 4


def test_a_model_finds_what_to_correct_or_disputes_it(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(
        labels=np.where(balls() == 2, 0, balls()), scores=np.array([0, 0.5, 0, 0.25, 0.5], np.float32)
    )
    predictor = SimpleNamespace(segment=lambda volume, size: found)
    monkeypatch.setattr("nuclei3d.stages.predictor.open_model", lambda params, model: predictor)
    disputed = opened(data, "t001", model="m").agreement
    assert disputed is not None
    assert (disputed[1], disputed[2]) == (1.0, 0.0)
    alone = open_correction(Params(), data / "e1/images/t000.tif", model="m")
    assert np.array_equal(alone.labels, found.labels)
    assert alone.score is not None
    assert alone.score[3] == 0.25


def test_without_masks_model_or_labels_there_is_nothing_to_correct(data: Path) -> None:
    with pytest.raises(InputError, match="nothing to correct"):
        open_correction(Params(), data / "e1/images/t000.tif")


def test_without_napari_the_other_way_is_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"nuclei3d\[view\].*nuclei3d import"):
        correct(Params(), data / "e1/images/t000.tif")


def test_without_a_screen_one_line_says_so(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(InputError, match="needs a screen"):
        correct(Params(), data / "e1/images/t000.tif")


def test_what_was_not_saved_replaces_nothing_that_was_rescued_before(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = sys.modules["nuclei3d.stages.correct"]
    monkeypatch.setattr(module, "require_napari", lambda *_: None)
    monkeypatch.setattr(module, "show", lambda *_: MagicMock())
    monkeypatch.setitem(sys.modules, "napari", MagicMock())
    panels = MagicMock()
    monkeypatch.setitem(sys.modules, "nuclei3d.stages.correction_panel", panels)
    for labels in (balls(), balls() > 0):
        panels.CorrectionPanel.return_value.layer.data = labels
        correct(Params(), data / "e1/images/t000.tif", tmp_path / "pred/t000_masks.ome.tif")
    rescued = (tmp_path / "unsaved" / f"e1_t000_masks{number}.ome.tif" for number in ("", "_2"))
    assert [read_labels(path).max() for path in rescued] == [4, 1]


needs_napari = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("napari", "qtpy", "PySide6")),
    reason="napari is not installed: pip install 'nuclei3d[view]'",
)


@pytest.fixture
def qt(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Qt without a screen; it draws no canvas (OpenGL), so napari's model stands for its window."""
    monkeypatch.setenv("QT_QPA_PLATFORM", "offscreen")
    try:
        from qtpy.QtWidgets import QApplication
    except ImportError as error:
        pytest.skip(f"Qt lacks a library of the system: {error}")
    return QApplication.instance() or QApplication([])


def model_viewer(correction: Correction) -> Any:
    from napari.components import ViewerModel

    viewer = ViewerModel()
    viewer.add_image(correction.volume, scale=SIZE.zyx, units="um")
    viewer.add_labels(correction.labels.copy(), scale=SIZE.zyx, units="um")
    return viewer


@needs_napari
def test_a_click_in_the_panel_goes_there_and_save_saves(data: Path, qt: Any) -> None:
    from nuclei3d.stages.correction_panel import CorrectionPanel

    correction = opened(data)
    viewer = model_viewer(correction)
    panel = CorrectionPanel(viewer, correction)
    assert [panel.table.item(0, column).text() for column in (1, 2, 4)] == ["4", "0.30", "low score (0.30)"]
    assert not panel.seen
    panel.table.setCurrentCell(0, 1)
    z, y, x = CENTRES[4]
    assert viewer.dims.current_step == (z, y, x)
    assert viewer.camera.center == pytest.approx((2.0 * z, y, x), abs=0.3)
    assert panel.layer.selected_label == 4
    assert panel.seen == {4}
    assert not panel.unsaved
    panel.layer.data = np.where(panel.layer.data == 4, 0, panel.layer.data)
    assert panel.unsaved
    panel.save_button.click()
    assert not panel.unsaved
    assert "0 added" in panel.words.text()
    assert panel.table.rowCount() == 3
    stored = read_labelled(find_embryos(data)[0].labelled[0], Params().data)
    assert not stored.labels.any()
    assert stored.unknown is not None
    assert not stored.unknown[balls() == 4].any()
    panel.only_seen.setChecked(False)
    panel.save_button.click()
    assert set(np.unique(read_labels(data / "e1/labels/t000.tif"))) == {0, 1, 2, 3}


@needs_napari
def test_a_missed_nucleus_is_gone_to_with_a_new_number_in_hand(data: Path, qt: Any) -> None:
    from nuclei3d.stages.correction_panel import CorrectionPanel

    # seen on a coarser grid; 3 has no mask, and around the others the model sees more than theirs
    where = balls(r1=7.0, r2=7.0, r4=7.0)[:, ::2, ::2] > 0
    seen = Foreground(where, VoxelSize(2.0, 2.0, 2.0), 12.0)
    without = np.where(balls() == 3, 0, balls())
    correction = replace(opened(data), labels=without, foreground=seen)
    panel = CorrectionPanel(model_viewer(correction), correction)
    assert [suspect.label for suspect in panel.suspects].count(0) == 1
    row = [suspect.label for suspect in panel.suspects].index(0)
    assert panel.table.item(row, 1).text() == "missed?"
    panel.table.setCurrentCell(row, 1)
    z, y, x = CENTRES[3]
    assert panel.viewer.camera.center == pytest.approx((2.0 * z, y, x), abs=2.0)
    assert panel.layer.selected_label == 5
    # looked at and left without a mask, it is known to be none
    panel.save_button.click()
    stored = read_labelled(find_embryos(data)[0].labelled[0], Params().data)
    assert stored.unknown is not None
    assert not stored.unknown[z, y - 4 : y + 5, x].any()
    assert not stored.labels.any()
    panel.layer.data = balls()
    panel.rank_button.click()
    assert all(suspect.label for suspect in panel.suspects)


@needs_napari
def test_what_cannot_be_saved_is_said_in_the_panel(data: Path, qt: Any) -> None:
    from nuclei3d.stages.correction_panel import CorrectionPanel

    correction = opened(data)
    panel = CorrectionPanel(model_viewer(correction), correction)
    panel.save_button.click()
    assert panel.words.text().startswith("Not saved: nothing was looked at yet")
    assert not (data / "e1/labels").exists()


@needs_napari
def test_the_panel_opened_from_naparis_menu_says_what_it_needs(qt: Any) -> None:
    from napari.components import ViewerModel

    from nuclei3d.stages.correction_panel import CorrectionPanel

    panel = CorrectionPanel(ViewerModel())
    assert "nuclei3d correct IMAGE --masks MASKS" in panel.words.text()
    assert not panel.isEnabled()


@needs_napari
def test_the_manifest_is_one_that_napari_reads() -> None:
    import npe2

    import nuclei3d
    from nuclei3d.stages.correction_panel import CorrectionPanel

    manifest = npe2.PluginManifest.from_file(Path(nuclei3d.__file__).with_name("napari.yaml"))
    (widget,) = manifest.contributions.widgets
    (command,) = [each for each in manifest.contributions.commands if each.id == widget.command]
    assert str(command.python_name) == f"{CorrectionPanel.__module__}:{CorrectionPanel.__name__}"
