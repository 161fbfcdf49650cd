"""napari's panel for corrections: nuclei, most suspicious first; a click goes there; save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from qtpy.QtCore import Qt
from qtpy.QtWidgets import (
    QAbstractItemView,
    QCheckBox,
    QLabel,
    QPushButton,
    QTableWidget,
    QTableWidgetItem,
    QVBoxLayout,
    QWidget,
)

from nuclei3d.config import load_params
from nuclei3d.errors import InputError
from nuclei3d.scoring.suspicion import Suspect
from nuclei3d.stages.correction import Correction, open_correction

_COLUMNS = ("seen", "nucleus", "score", "um3", "why")
#: Pixels of the screen that a nucleus takes at least when one goes there.
_NUCLEUS_PX = 120.0


class CorrectionPanel(QWidget):  # type: ignore[misc]
    """A list of the nuclei beside the canvas of a viewer with an image and, topmost, the labels to correct.

    What is corrected, if not given, is found by the files that the layers were opened from, with params.yaml
    of the working directory. `layer` is napari's layer of the labels; `seen` are the numbers of the nuclei,
    and `places_um` the places where nuclei are missed, that were looked at.
    """

    def __init__(self, napari_viewer: Any, correction: Correction | None = None) -> None:
        super().__init__()
        self.viewer = napari_viewer
        self.seen: set[int] = set()
        self.places_um: set[tuple[float, float, float]] = set()
        self.suspects: list[Suspect] = []
        self.table = QTableWidget(0, len(_COLUMNS))
        self.table.setHorizontalHeaderLabels(_COLUMNS)
        self.table.setSelectionBehavior(QAbstractItemView.SelectRows)
        self.table.setEditTriggers(QAbstractItemView.NoEditTriggers)
        self.table.verticalHeader().hide()
        self.table.horizontalHeader().setStretchLastSection(True)
        self.setMinimumWidth(380)
        self.only_seen = QCheckBox("Only what I looked at counts as labelled")
        self.only_seen.setChecked(True)
        self.save_button, self.rank_button = QPushButton("Save"), QPushButton("List anew")
        self.words = QLabel()
        self.words.setWordWrap(True)
        layout = QVBoxLayout(self)
        for widget in (self.table, self.rank_button, self.only_seen, self.save_button, self.words):
            layout.addWidget(widget)
        try:
            self.correction = correction or _correction_of(napari_viewer)
        except InputError as error:
            self.words.setText(str(error))
            self.setEnabled(False)
            return
        self.layer = next(layer for layer in reversed(napari_viewer.layers) if _is_labels(layer))
        self._saved = self.layer.data.copy()
        self.rank()
        self.table.currentCellChanged.connect(lambda row, *_: self.go_to(row))
        self.rank_button.clicked.connect(self.rank)
        self.save_button.clicked.connect(self.save)
        self.words.setText(f"Saves to {self.correction.folder / 'labels'}")

    @property
    def unsaved(self) -> bool:
        """Whether labels were changed since they were opened or saved."""
        return not np.array_equal(self.layer.data, self._saved)

    def rank(self) -> None:
        """List the nuclei as the labels are now."""
        self.suspects = self.correction.rank(self.layer.data)
        self.table.blockSignals(True)
        self.table.setRowCount(len(self.suspects))
        for row, suspect in enumerate(self.suspects):
            score = "" if suspect.score is None else f"{suspect.score:.2f}"
            seen = "✓" if {suspect.label, suspect.centre_um} & (self.seen | self.places_um) else ""
            cells = (
                seen,
                suspect.label or "missed?",
                score,
                f"{suspect.volume_um3:.0f}",
                ", ".join(suspect.reasons),
            )
            for column, text in enumerate(cells):
                item = QTableWidgetItem(str(text))
                item.setToolTip(str(text))
                if column < len(cells) - 1:
                    item.setTextAlignment(Qt.AlignCenter)
                self.table.setItem(row, column, item)
        self.table.resizeColumnsToContents()
        self.table.resizeRowsToContents()
        self.table.setCurrentCell(-1, -1)
        self.table.blockSignals(False)

    def go_to(self, row: int) -> None:
        """Show the nucleus of a row, choose its label (a new one if missed), note that it was seen."""
        if not 0 <= row < len(self.suspects):
            return
        suspect = self.suspects[row]
        self.viewer.dims.set_point((0, 1, 2), suspect.centre_um)
        self.viewer.camera.center = suspect.centre_um
        diameter_um = (6 / np.pi * suspect.volume_um3) ** (1 / 3)
        self.viewer.camera.zoom = max(self.viewer.camera.zoom, _NUCLEUS_PX / diameter_um)
        self.layer.selected_label = suspect.label or int(self.layer.data.max()) + 1
        if suspect.label:
            self.seen.add(suspect.label)
        else:
            self.places_um.add(suspect.centre_um)
        self.table.item(row, 0).setText("✓")

    def save(self) -> None:
        """Store the labels in the data set, whole or not at all, and say what changed."""
        labels = self.layer.data.copy()
        try:
            result = self.correction.save(
                labels, self.seen, self.places_um, only_seen=self.only_seen.isChecked()
            )
        except InputError as error:
            self.words.setText(f"Not saved: {error}")
            return
        self._saved = labels
        (frame,) = result.frames
        changed = (
            f"{frame.changes.added} added, {frame.changes.removed} removed, {frame.changes.changed} changed"
        )
        lines = [
            f"Saved {frame.labels}: {frame.nuclei} nuclei count ({changed}), {frame.known_share:.1%} known",
            *(f"warning: {warning}" for warning in result.warnings),
        ]
        self.words.setText("\n".join(lines))
        self.rank()


def _is_labels(layer: Any) -> bool:
    return type(layer).__name__ == "Labels"


def _correction_of(viewer: Any) -> Correction:
    """Find by its layers' files what is corrected."""
    labels = next((layer for layer in reversed(viewer.layers) if _is_labels(layer)), None)
    image = next((layer for layer in viewer.layers if type(layer).__name__ == "Image"), None)
    if labels is None or image is None or not labels.source.path or not image.source.path:
        raise InputError(
            "open an image file and its masks (as labels) first, then this panel; or start with: nuclei3d "
            "correct IMAGE --masks MASKS"
        )
    params = load_params(Path("params.yaml") if Path("params.yaml").is_file() else None, ())
    return open_correction(params, Path(image.source.path), Path(labels.source.path))
