"""What model.json holds: everything that is needed to use the weights as they were trained."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nuclei3d.core.volume_network import VolumeSpec
from nuclei3d.errors import InputError

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Percentile = Annotated[float, Field(ge=0, le=100)]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class ModelInfo(BaseModel):
    """A model's kind, scale, normalisation, thresholds and origin.

    Attributes
    ----------
    kind
        ``views2d``: Cellpose's 2D CNN run over planes; ``full3d``: a 3D network.
    name
        Name of the weights file in the folder, the name that Cellpose shows.
    diameter_px
        Diameter of a typical nucleus in pixels at the network's scale.
    nucleus_diameter_um
        Diameter of a typical nucleus of the training embryos; None if unknown (bare Cellpose weights).
    voxel_size_um
        Voxel size (z, y, x) of the training embryos.
    lower_percentile, upper_percentile, noise_floor
        Normalisation (`nuclei3d.core.normalization`).
    full3d
        Shape of the 3D network and of what it sees; None for kind ``views2d``.
    cellprob_threshold, score_threshold, min_volume_um3
        Thresholds chosen on the validation embryos.
    versions
        Package names and versions of the training.
    lineage
        Git commit, md5 of data and slices, run id and the like.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    kind: Literal["views2d", "full3d"] = "views2d"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = "nuclei_3d"
    diameter_px: PositiveFloat
    nucleus_diameter_um: PositiveFloat | None = None
    voxel_size_um: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    lower_percentile: Percentile = 1.0
    upper_percentile: Percentile = 99.8
    noise_floor: Annotated[float, Field(ge=0)] = 10.0
    full3d: VolumeSpec | None = None
    cellprob_threshold: float = 0.0
    score_threshold: Annotated[float, Field(ge=0, le=1)] = 0.0
    min_volume_um3: Annotated[float, Field(ge=0)] = 0.0
    versions: dict[str, str] = Field(default_factory=dict)
    lineage: dict[str, str] = Field(default_factory=dict)
    created: str = Field(default_factory=_now)

    @model_validator(mode="after")
    def _check_kind(self) -> ModelInfo:
        if (self.kind == "full3d") != (self.full3d is not None):
            raise ValueError("'full3d' (the network's shape) belongs to kind 'full3d', and only to it")
        return self


def read_info(path: Path) -> ModelInfo:
    """Read a model.json.

    Raises
    ------
    InputError
        If it is missing, unreadable or not valid; the message names file and field.
    """
    try:
        return ModelInfo.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; a model folder holds a model.json") from None
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise InputError(f"{path} is not a valid model.json: {field}: {problem['msg']}") from None
