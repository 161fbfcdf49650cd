"""Parameters of prediction in 3D."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nuclei3d.config.data import PositiveFloat
from nuclei3d.config.section import Section

Mode = Literal["auto", "ortho", "stitch", "cellpose", "full3d", "mixed"]


class PredictParams(Section):
    """How a volume is segmented; None means: the value stored with the model.

    `mode` auto is ortho for a 2D network, full3d for a 3D one, and mixed with a `volume_model`.
    `views` are the planes that modes ortho and mixed look at, `view_weights` the trust in each (None: equal),
    and `orthogonal_model` another 2D model for xz and yz, of the same `diameter_px`. `volume_model` is a 3D
    model beside a 2D one: mode mixed fuses its flows with those of the views; `volume_weight` is the trust in
    it, where a view has 1 unless `view_weights` says otherwise. Both are for predictions on this machine (the
    commands predict, calibrate and assess); a training or a search looks at its network alone.
    `fusion` consensus trusts, place by place, the look whose flow varies least; mean trusts all alike.
    `stitch_min_iou` is the least overlap at which mode stitch links masks of neighbouring planes;
    `stitch_max_gap` is the number of planes in which a nucleus may be missing.
    `orthogonal_step` computes every n-th xz and yz plane only and interpolates between. `flip_average`
    averages over the four flips of each plane (four times the work). `precision` auto takes bfloat16 where
    the hardware computes it; `engine` auto takes OpenVINO where it is installed (CPU only). `flow3d_smooth`
    is stock Cellpose's option, for mode cellpose only. A volume that would need more than `memory_gb` is cut
    into blocks, which Dask runs: on `workers` processes of this machine, or on the cluster whose `scheduler`
    is named (tcp://host:port).
    """

    mode: Mode = "auto"
    diameter_um: PositiveFloat | None = None
    views: Annotated[tuple[Literal["xy", "xz", "yz"], ...], Field(min_length=1)] = ("xy", "xz", "yz")
    view_weights: tuple[PositiveFloat, ...] | None = None
    orthogonal_model: Path | None = None
    volume_model: Path | None = None
    volume_weight: PositiveFloat = 1.0
    fusion: Literal["mean", "consensus"] = "mean"
    orthogonal_step: Annotated[int, Field(ge=1)] = 1
    cellprob_threshold: float | None = None
    score_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    min_volume_um3: Annotated[float, Field(ge=0)] | None = None
    max_volume_um3: PositiveFloat | None = None
    flip_average: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    engine: Literal["auto", "torch", "openvino"] = "auto"
    stitch_min_iou: Annotated[float, Field(gt=0, le=1)] = 0.25
    stitch_max_gap: Annotated[int, Field(ge=0)] = 1
    flow3d_smooth: Annotated[float, Field(ge=0)] = 0.0
    memory_gb: PositiveFloat | None = None
    workers: Annotated[int, Field(ge=1)] = 1
    scheduler: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _check_views(self) -> Self:
        if len(set(self.views)) != len(self.views):
            raise ValueError(f"views names a view twice: {', '.join(self.views)}")
        if self.view_weights is not None and len(self.view_weights) != len(self.views):
            raise ValueError(
                f"view_weights has {len(self.view_weights)} numbers for {len(self.views)} views; "
                "give one each"
            )
        return self

    @model_validator(mode="after")
    def _check_volume_model(self) -> Self:
        if self.mode == "mixed" and self.volume_model is None:
            raise ValueError(
                "mode mixed needs a 3D model beside the 2D one; give predict.volume_model=PATH, or use ortho"
            )
        if self.volume_model is not None and self.mode not in ("auto", "mixed"):
            raise ValueError(
                f"volume_model is for mode mixed, not {self.mode}; use mixed or auto, or leave it out"
            )
        return self

    def of_one_network(self) -> Self:
        """Give these wishes for a network by itself, without models beside it."""
        mode = "auto" if self.mode == "mixed" else self.mode
        return self.model_copy(update={"mode": mode, "orthogonal_model": None, "volume_model": None})
