"""Parameters of prediction in 3D."""

from typing import Annotated, Literal

from pydantic import Field

from nuclei3d.config.data import PositiveFloat
from nuclei3d.config.section import Section


class PredictParams(Section):
    """How a volume is segmented; None means: the value stored with the model."""

    mode: Literal["ortho", "stitch", "cellpose", "full3d"] = "ortho"
    diameter_um: PositiveFloat | None = None
    fusion: Literal["mean", "consensus"] = "mean"
    orthogonal_step: Annotated[int, Field(ge=1)] = 1
    cellprob_threshold: float | None = None
    score_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    min_volume_um3: Annotated[float, Field(ge=0)] | None = None
    max_volume_um3: PositiveFloat | None = None
    flip_average: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
