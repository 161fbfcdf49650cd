"""The summary says in words what the numbers say, also where numbers are missing."""

import html
import re
from typing import Any

import numpy as np
import pandas as pd

from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.report.page import build_page
from nuclei3d.scoring.assessment import assess_volume, summarise


def metrics_of(found: int, missed: int, false: int, **more: Any) -> dict[str, Any]:
    """Score boxes in a row: some found, some missed, some invented."""
    truth = np.zeros((3, 3, 3 * (found + missed + false + 1)), dtype=np.uint16)
    pred = truth.copy()
    for label in range(1, found + missed + false + 1):
        box = (slice(0, 2), slice(0, 2), slice(3 * label, 3 * label + 2))
        if label <= found + missed:
            truth[box] = label
        if label <= found or label > found + missed:
            pred[box] = label
    volume = assess_volume(truth, pred, VoxelSize(1, 1, 1))
    summary = summarise([volume], ["E"], rng=np.random.default_rng(0))
    return {
        **summary,
        "nuclei3d": "1",
        "by_embryo": {},
        "by_stage": {},
        "volumes": {"E/t": {**summary, "embryo": "E", "frame": "t", "counts": {"tp_half": found}}},
        "baselines": {},
        "unpaired": {"truth": [], "prediction": []},
        "contrast_edges": None,
        **more,
    }


def page_of(metrics: dict[str, Any], method: str = "m") -> str:
    return build_page(metrics, pd.DataFrame(), [], method=method)


def summary_sentences(metrics: dict[str, Any], method: str) -> list[str]:
    lines = re.findall("<li>(.*?)</li>", page_of(metrics, method), re.DOTALL)
    return [" ".join(html.unescape(line).split()) for line in lines]


def test_found_and_false_nuclei_are_told_as_shares() -> None:
    sentences = summary_sentences(metrics_of(6, 2, 2), "the model")
    assert sentences[0].startswith("In 1 volume of 1 embryo with 8 nuclei, the model finds 75 % of them;")
    assert "of its 8 predictions, 25 % are false" in sentences[0]
    assert any("no interval" in sentence for sentence in sentences)


def test_nothing_predicted_and_nothing_true_are_told() -> None:
    assert "predicts nothing at all" in summary_sentences(metrics_of(0, 3, 0), "m")[0]
    (only,) = summary_sentences(metrics_of(0, 0, 2), "m")
    assert "no true nuclei" in only
    assert "2 nuclei, all of them false" in only


def test_a_baseline_is_called_better_only_if_the_paired_interval_says_so() -> None:
    def told(low: float, high: float) -> str:
        rival = metrics_of(6, 2, 2, behind_model={"ap_0.50": 0.1, "interval": [low, high]})
        rival["ap"] = {"0.50": 0.5}
        metrics = metrics_of(6, 2, 2, baselines={"Otsu": rival})
        return next(s for s in summary_sentences(metrics, "m") if "Otsu" in s)

    assert "Otsu 0.500 (really below)" in told(0.05, 0.2)
    assert "Otsu 0.500 (not really different)" in told(-0.05, 0.2)
    assert "Otsu 0.500 (really above)" in told(-0.3, -0.1)


def test_bad_news_come_first() -> None:
    lost = {"seg": {"difference": -0.2, "interval": [-0.3, -0.1]}, "pq": {"interval": [-0.1, 0.1]}}
    lead = {"ap_0.50": 0.1, "interval": [0.05, 0.2], "metrics": lost}
    rival = metrics_of(6, 2, 2, behind_model=lead)
    text = page_of(metrics_of(6, 2, 2, baselines={"Otsu": rival}, warnings=["mind the gap"]), "m")
    assert (
        text.index("mind the gap.")
        < text.index("Otsu surely beats m in SEG.")
        < text.index('<div class="overview">')
    )
    assert "Before you trust" not in page_of(metrics_of(6, 2, 2))


def test_model_run_data_and_date_are_named() -> None:
    about = {"Model": "nuclei_3d", "MLflow run": "4711", "Data": "<data>", "Evaluated": "2026-11-26"}
    text = build_page(metrics_of(1, 1, 1), pd.DataFrame(), [], method="m", about=about)
    for name, value in about.items():
        assert f"<dt>{name}</dt><dd>{html.escape(value)}</dd>" in text
    assert "<dt>Volumes</dt><dd>1 of E</dd>" in text


def test_notes_name_what_was_left_out_and_where_the_bins_come_from() -> None:
    text = page_of(metrics_of(1, 1, 1, unpaired={"truth": ["a", "b"], "prediction": ["c"]}))
    assert "2 true volumes without prediction" in text
    assert "1 prediction without truth" in text
    assert "Contrast was not measured" in text
    text = page_of(metrics_of(1, 1, 1, contrast_edges=[1.0], contrast_edges_from="training labels"))
    assert "quintiles of the training labels" in text


def test_recall_at_a_precision_is_given_with_its_interval() -> None:
    at = {"recall_faint": 0.5, "recall_faint_interval": [0.25, 0.75], "recall": 0.8, "score": 0.4}
    page = page_of(metrics_of(6, 2, 2, recall_at_precision={"0.90": at, "0.95": None}))
    assert '<td>0.500 <span class="range">0.250 to 0.750</span></td>' in page
