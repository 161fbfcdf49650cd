"""Parameters of the intensity normalisation, the same in training and prediction."""

from typing import Annotated

from pydantic import Field, model_validator

from nuclei3d.config.section import Section

Percentile = Annotated[float, Field(ge=0, le=100)]


class NormalizationParams(Section):
    """Percentiles of the whole volume that become 0 and 1.

    Their distance is never taken below `noise_floor` times the noise's standard deviation, so that the
    noise of a frame with hardly a nucleus is not blown up into objects.
    """

    lower_percentile: Percentile = 1.0
    upper_percentile: Percentile = 99.8
    noise_floor: Annotated[float, Field(ge=0)] = 10.0

    @model_validator(mode="after")
    def _in_order(self) -> "NormalizationParams":
        if self.lower_percentile >= self.upper_percentile:
            raise ValueError("lower_percentile must be below upper_percentile")
        return self
