"""Parameters of the choice of thresholds on the validation embryos."""

from typing import Annotated

from pydantic import Field

from nuclei3d.config.section import Section

Iou = Annotated[float, Field(ge=0.5, lt=1)]


class CalibrateParams(Section):
    """How thresholds are chosen on validation embryos after a training.

    Attributes
    ----------
    volumes
        Validation frames that are segmented, spread evenly; 0 leaves the thresholds at their defaults, null
        takes all.
    cellprob
        Thresholds of the logit that are tried.
    iou
        The average precision is the mean over these overlaps. High ones favour masks of the right size, 0.5
        alone counts nuclei.
    volume_fractions
        Least volumes that are tried, as fractions of a typical nucleus.
    """

    volumes: Annotated[int, Field(ge=0)] | None = 6
    cellprob: Annotated[tuple[float, ...], Field(min_length=1)] = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0)
    iou: Annotated[tuple[Iou, ...], Field(min_length=1)] = (0.5, 0.6, 0.7, 0.8)
    volume_fractions: Annotated[tuple[float, ...], Field(min_length=1)] = (0.0, 0.02, 0.05, 0.1)
