"""The report: one HTML file with everything in it, that needs no network."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nuclei3d.report.charts import OUTLINES, charts_of
from nuclei3d.scoring.bootstrap import FEW_UNITS, FEWEST_NUCLEI, side_of_zero
from nuclei3d.scoring.comparison import list_metrics

if TYPE_CHECKING:
    import pandas as pd
    from jinja2 import Environment

_NOT_LISTED = ["embryo", "frame", "contrast_bin", "partner", "surface_um"]
# Found nuclei are listed too, as long as they do not make the page heavy.
_MOST_FOUND = 5000

_LOW_IS_GOOD = frozenset({"surface_distance_um", "centre_distance_um", "splits", "merges"})
_NEUTRAL = frozenset({"n_true", "n_pred"})


def page_environment() -> Environment:
    """Give the templates of this room."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("nuclei3d", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def page_part(name: str) -> str:
    """Read a style sheet or script of this room, to lie inside a page."""
    return resources.files("nuclei3d.report").joinpath(name).read_text(encoding="utf-8")


def json_in_page(tree: Any) -> str:
    """Write JSON that may stand inside a script element."""
    # There only "</" and "<!--" have a meaning; JSON may write < as an escape.
    return json.dumps(tree, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def build_page(
    metrics: Mapping[str, Any],
    nuclei: pd.DataFrame,
    volumes: Sequence[Mapping[str, Any]],
    *,
    method: str,
    unit: Literal["um", "voxels"] = "um",
    history: Path | None = None,
    about: Mapping[str, str] | None = None,
) -> str:
    """Put the report together from the content of metrics.json and nuclei.csv.

    `volumes` are what `pack_volumes` gave (there may be none), `method` is what the predictions are called,
    `unit` that of lengths (``voxels`` where no file states a voxel size), `history` the history.csv of the
    training, and `about` says by name what was evaluated, from what and when.
    """
    pages = page_environment()
    pages.filters |= {"number": _number, "score": _look_up, "interval": _interval, "best": _best}
    methods = {method: metrics, **metrics["baselines"]}
    symbol = "µm" if unit == "um" else unit
    return pages.get_template("report.html").render(
        metrics=metrics,
        methods=methods,
        method=method,
        about=about or {},
        bad_news=_bad_news(metrics, method),
        embryos={volume["embryo"] for volume in metrics["volumes"].values()},
        shown=len(volumes),
        averages={name: _averages(scores) for name, scores in methods.items()},
        charts=charts_of(methods, symbol, history),
        few_units=FEW_UNITS,
        fewest_nuclei=FEWEST_NUCLEI,
        side_of_zero=side_of_zero,
        css=page_part("report.css"),
        js=page_part("report.js"),
        data=_embedded(nuclei, volumes, symbol),
    )


def _bad_news(metrics: Mapping[str, Any], method: str) -> list[str]:
    """Say what must be known before the scores: warnings, and where a baseline surely beats the model."""
    news = list(metrics.get("warnings", ()))
    for name, rival in metrics["baselines"].items():
        lead = rival.get("behind_model") or {}
        lost = [key for key, pair in lead.get("metrics", {}).items() if side_of_zero(*pair["interval"]) < 0]
        if lost:
            news.append(f"{name} surely beats {method} in {list_metrics(lost)}")
        elif (own := metrics["ap"].get("0.50")) is not None and (rival["ap"].get("0.50") or 0) > own:
            news.append(f"{name} has a higher AP at .5 than {method}, though not surely")
    return news


def _embedded(nuclei: pd.DataFrame, volumes: Sequence[Mapping[str, Any]], symbol: str) -> str:
    """Give what the viewer needs as JSON: volumes, and nuclei with the errors first."""
    listed: dict[str, Any] = {"columns": [], "data": []}
    if volumes:
        found = nuclei["outcome"] == "found"
        kept = nuclei[~found | (found.cumsum() <= _MOST_FOUND)].drop(columns=_NOT_LISTED)
        kept = kept.sort_values("outcome", key=lambda outcome: outcome == "found", kind="stable")
        listed = json.loads(kept.round(3).to_json(orient="split", index=False))
    tree = {
        "volumes": volumes,
        "fields": listed["columns"],
        "nuclei": listed["data"],
        "colors": OUTLINES,
        "unit": symbol,
    }
    return json_in_page(tree)


def _best(values: Iterable[float | None], key: str) -> float | None:
    """Give the best of the methods' values of a score; None where there is no choice."""
    known = [value for value in values if value is not None]
    if not known or key in _NEUTRAL:
        return None
    return min(known) if key in _LOW_IS_GOOD else max(known)


def _averages(scores: Mapping[str, Any]) -> dict[str, Any]:
    means = scores["volume_mean"]
    counts = {name: scores[name] for name in ("n_true", "n_pred")}
    return {**means, **counts, "ap": {iou: means.get(f"ap_{iou}") for iou in ("0.50", "0.75")}}


def _look_up(scores: Mapping[str, Any], key: str) -> float | int | None:
    """Give a score by its key, such as ``seg`` or ``ap/0.50``; None where it is missing or undefined."""
    node: Any = scores
    for part in key.split("/"):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node if isinstance(node, int | float) else None


def _number(value: float | int | None) -> str:
    """Write a score: counts whole, shares with three decimals, a dash where undefined."""
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def _interval(scores: Mapping[str, Any], key: str) -> Sequence[float] | None:
    """Give the interval of a score by its key; see `_look_up`."""
    bins = scores.get("recall_by_contrast") or []
    if key in ("recall_faint", "recall_bright") and bins:
        found = bins[0 if key == "recall_faint" else -1]["interval"]
    elif key.startswith("recall_at_precision/"):
        _, precision, name = key.split("/")
        found = (scores["recall_at_precision"].get(precision) or {}).get(f"{name}_interval")
    else:
        found = scores["intervals"].get(key.replace("/", "_"))
    return found if isinstance(found, list) else None
