"""Colours and marks that the colour-blind can tell apart (Okabe and Ito 2008), and in greyscale by shape."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MethodStyle:
    """How one method is drawn in every chart: colour, dash pattern of lines, shape of points."""

    color: str
    dash: str
    marker: str


#: The model first, then the baselines in the order in which they are given.
METHOD_STYLES = (
    MethodStyle("#0072B2", "", "circle"),
    MethodStyle("#E69F00", "7 4", "square"),
    MethodStyle("#009E73", "2 3", "triangle"),
    MethodStyle("#CC79A7", "9 3 2 3", "diamond"),
    MethodStyle("#56B4E9", "4 2", "cross"),
    MethodStyle("#000000", "1 2", "circle"),
)

#: Outlines: found truth, prediction, missed truth, false prediction.
OUTLINES = {"true": "#56B4E9", "pred": "#F0E442", "missed": "#FF6A13", "false": "#E58BBF"}


def style_of(position: int) -> MethodStyle:
    """Give the style of the method at a position; they repeat after the last."""
    return METHOD_STYLES[position % len(METHOD_STYLES)]
