"""How well tracks agree with the true ones: TRA, DET, LNK and divisions, computed by traccuracy.

Ours is only the matching of nuclei, frame by frame, from the table of overlaps that all scores are read off,
so that no film has to lie in memory. For TRA, DET and LNK it is that of the Cell Tracking Challenge (Matula
et al., PLoS ONE 10:e0144959). Divisions are events, not outlines, and newborn nuclei are a few planes thick:
for them it is enough that nuclei overlap.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterable
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.scoring.matching import match, overlap_table
from nuclei3d.tracks.nuclei import Tracks


@dataclass(frozen=True)
class TrackScores:
    """Scores of tracks; nan where they are not defined, as those of divisions are where none is true.

    `tra`, `det` and `lnk` are those of the Cell Tracking Challenge. A division counts where mother and both
    daughters are the true ones; ``division_f1`` wants the very frame, ``division_f1_tolerant`` takes one
    frame before or after, and ``division_f1_majority`` wants masks that the Challenge would count as well.
    """

    tra: float
    det: float
    lnk: float
    division_f1: float
    division_precision: float
    division_recall: float
    division_f1_tolerant: float
    division_f1_majority: float
    n_divisions: int
    n_divisions_pred: int
    n_true: int
    n_pred: int


Pair = tuple[int, int]
# Neighbours hardly overlap: this says which nucleus is meant, not how well it is outlined.
_SAME_NUCLEUS_IOU = 0.1


@dataclass(frozen=True)
class FrameMatch:
    """Pairs (true label, predicted label) of one frame.

    `majority`: the prediction covers more than half of the true nucleus, as the Challenge has it; one may
    stand for several. `single`: one to one, as many as possible of those that overlap by a tenth (IoU).
    """

    majority: list[Pair]
    single: list[Pair]


def match_frame(truth: NDArray[np.integer[Any]], prediction: NDArray[np.integer[Any]]) -> FrameMatch:
    """Match the nuclei of one frame."""
    table = overlap_table(truth, prediction)
    most = table.true_cover > 0.5
    single = match(table, _SAME_NUCLEUS_IOU)

    def pairs(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> list[Pair]:
        return list(zip(table.true_labels[rows].tolist(), table.pred_labels[columns].tolist(), strict=True))

    return FrameMatch(
        pairs(table.rows[most], table.columns[most]), pairs(single.true_index, single.pred_index)
    )


def score_tracks(true: Tracks, predicted: Tracks, matches: Iterable[FrameMatch]) -> TrackScores:
    """Score tracks of the same frames, by what `match_frame` gives for each."""
    from traccuracy import NodeFlag, TrackingGraph
    from traccuracy.matchers import Matched
    from traccuracy.metrics import CTCMetrics, DivisionMetrics

    class Graph(TrackingGraph):  # type: ignore[misc]
        def remove_flag_from_node(self, node: Any, flag: NodeFlag) -> None:
            # a true division may lie a frame after one false one and a frame before another: traccuracy 0.3
            # takes the flag of a miss away twice and fails; it counts true divisions, so each counts once
            with suppress(KeyError):
                super().remove_flag_from_node(node, flag)

    majority: list[tuple[Pair, Pair]] = []
    single: list[tuple[Pair, Pair]] = []
    for frame, found in enumerate(matches):
        majority += (((frame, one), (frame, other)) for one, other in found.majority)
        single += (((frame, one), (frame, other)) for one, other in found.single)
    quiet = logging.getLogger("traccuracy")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        # traccuracy draws bars of its own
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")

            def matched(pairs: list[tuple[Pair, Pair]], kind: str) -> Any:
                graphs = (Graph(_graph(tracks), location_keys=()) for tracks in (true, predicted))
                return Matched(*graphs, pairs, {"name": "majority", "matching type": kind})

            ctc = CTCMetrics().compute(matched(majority, "many-to-one")).results
            metric = DivisionMetrics(max_frame_buffer=1)
            divisions = metric.compute(matched(single, "one-to-one")).results
            both = sorted(set(single) & set(majority))
            strict = metric.compute(matched(both, "one-to-one")).results["Frame Buffer 0"]
    finally:
        quiet.setLevel(level)
    exact, tolerant = (divisions[f"Frame Buffer {buffer}"] for buffer in (0, 1))
    for found_divisions in (exact, tolerant, strict):
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
        division_f1_majority=float(strict["Division F1"]),
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
