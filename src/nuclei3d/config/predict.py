"""Parameters of prediction in 3D."""

from typing import Annotated, Literal

from pydantic import Field

from nuclei3d.config.data import PositiveFloat
from nuclei3d.config.section import Section


class PredictParams(Section):
    """How a volume is segmented; None means: the value stored with the model.

    `orthogonal_step` computes every n-th xz and yz plane only and interpolates between. `flip_average`
    averages over the four flips of each plane (four times the work). `precision` auto takes bfloat16 where
    the hardware computes it; `engine` auto takes OpenVINO where it is installed (CPU only). `flow3d_smooth`
    is stock Cellpose's option, for mode cellpose only. A volume that would need more than `memory_gb` is cut
    into blocks, which Dask runs: on `workers` processes of this machine, or on the cluster whose `scheduler`
    is named (tcp://host:port).
    """

    mode: Literal["ortho", "stitch", "cellpose", "full3d"] = "ortho"
    diameter_um: PositiveFloat | None = None
    fusion: Literal["mean", "consensus"] = "mean"
    orthogonal_step: Annotated[int, Field(ge=1)] = 1
    cellprob_threshold: float | None = None
    score_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    min_volume_um3: Annotated[float, Field(ge=0)] | None = None
    max_volume_um3: PositiveFloat | None = None
    flip_average: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    engine: Literal["auto", "torch", "openvino"] = "auto"
    flow3d_smooth: Annotated[float, Field(ge=0)] = 0.0
    memory_gb: PositiveFloat | None = None
    workers: Annotated[int, Field(ge=1)] = 1
    scheduler: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
