"""How well tracks agree with the true ones: TRA, DET, LNK and divisions, computed by traccuracy.

Ours is only the matching of nuclei, frame by frame, from the table of overlaps that all scores are read off,
so that no film has to lie in memory. It is that of the Cell Tracking Challenge: a nucleus that covers more
than half of a true one stands for it (Matula et al., PLoS ONE 10:e0144959).
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.scoring.matching import overlap_table
from nuclei3d.tracks.nuclei import Tracks


@dataclass(frozen=True)
class TrackScores:
    """Scores of tracks; nan where they are not defined, as those of divisions are where none is true.

    `tra`, `det` and `lnk` are those of the Cell Tracking Challenge. A division counts where mother and both
    daughters are the true ones; ``division_f1`` wants the very frame, ``division_f1_tolerant`` takes one
    frame before or after.
    """

    tra: float
    det: float
    lnk: float
    division_f1: float
    division_precision: float
    division_recall: float
    division_f1_tolerant: float
    n_divisions: int
    n_divisions_pred: int
    n_true: int
    n_pred: int


Match = tuple[int, int, float]


def match_frame(truth: NDArray[np.integer[Any]], prediction: NDArray[np.integer[Any]]) -> list[Match]:
    """Give (true label, predicted label, IoU) of true nuclei of which a prediction covers more than half."""
    table = overlap_table(truth, prediction)
    most = table.true_cover > 0.5
    true, pred = table.true_labels[table.rows[most]], table.pred_labels[table.columns[most]]
    return list(zip(true.tolist(), pred.tolist(), table.ious[most].tolist(), strict=True))


def score_tracks(true: Tracks, predicted: Tracks, matches: Iterable[Sequence[Match]]) -> TrackScores:
    """Score tracks.

    Parameters
    ----------
    true, predicted
        Tracks of the same frames.
    matches
        For each frame what `match_frame` gives.
    """
    from traccuracy import TrackingGraph
    from traccuracy.matchers import Matched
    from traccuracy.metrics import CTCMetrics, DivisionMetrics

    found = [
        ((frame, one), (frame, other), iou)
        for frame, pairs in enumerate(matches)
        for one, other, iou in pairs
    ]
    # where one prediction stands for several true nuclei, divisions leave it to the most similar
    lone = {other: one for one, other, _ in sorted(found, key=lambda pair: pair[2])}
    quiet = logging.getLogger("traccuracy")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        # traccuracy draws bars of its own
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")

            def matched(pairs: list[tuple[Any, Any]], kind: str) -> Any:
                graphs = (TrackingGraph(_graph(tracks), location_keys=()) for tracks in (true, predicted))
                return Matched(*graphs, pairs, {"name": "majority", "matching type": kind})

            ctc = CTCMetrics().compute(matched([pair[:2] for pair in found], "many-to-one")).results
            pairs = [(one, other) for other, one in lone.items()]
            divisions = DivisionMetrics(max_frame_buffer=1).compute(matched(pairs, "one-to-one")).results
    finally:
        quiet.setLevel(level)
    exact, tolerant = (divisions[f"Frame Buffer {buffer}"] for buffer in (0, 1))
    for found_divisions in (exact, tolerant):
        # traccuracy says nan where there are divisions and none is right
        if np.isnan(found_divisions["Division F1"]) and len(true.divisions) + len(predicted.divisions):
            found_divisions["Division F1"] = 0.0
    return TrackScores(
        tra=float(ctc["TRA"]),
        det=float(ctc["DET"]),
        lnk=float(ctc["LNK"]),
        division_f1=float(exact["Division F1"]),
        division_precision=float(exact["Division Precision"]),
        division_recall=float(exact["Division Recall"]),
        division_f1_tolerant=float(tolerant["Division F1"]),
        n_divisions=len(true.divisions),
        n_divisions_pred=len(predicted.divisions),
        n_true=len(true.nuclei),
        n_pred=len(predicted.nuclei),
    )


def _graph(tracks: Tracks) -> Any:
    import networkx as nx

    graph = nx.DiGraph()
    nodes = list(zip(tracks.nuclei.frame.tolist(), tracks.nuclei.label.tolist(), strict=True))
    graph.add_nodes_from((node, {"t": node[0], "segmentation_id": node[1]}) for node in nodes)
    graph.add_edges_from((nodes[one], nodes[other]) for one, other in tracks.edges.tolist())
    return graph
