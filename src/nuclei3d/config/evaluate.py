"""Parameters of the evaluation."""

from typing import Annotated

from pydantic import Field

from nuclei3d.config.section import Section


class EvaluateParams(Section):
    """Thresholds, contrast bins and bootstrap of the evaluation."""

    thresholds: tuple[float, ...] = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
    contrast_bins: Annotated[int, Field(ge=2)] = 5
    bootstrap: Annotated[int, Field(ge=0)] = 1000
