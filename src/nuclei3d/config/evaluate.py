"""Parameters of the evaluation."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from nuclei3d.config.data import PositiveFloat
from nuclei3d.config.section import Section


class EvaluateParams(Section):
    """Thresholds, contrast bins, bootstrap and report of the evaluation.

    `resample` says what the bootstrap draws: whole embryos, blocks of time within embryos, or (auto)
    embryos where there are at least four. `viewer_megabytes` bounds the volumes shown in the report; larger
    data are shown in part and at a lower resolution. True labels below `min_true_volume_um3`, the debris of
    hand labelling, become background; predictions are all counted.

    `baselines` are put beside the model on the same volumes: ``otsu`` (Otsu's threshold with a
    distance-transform watershed, where there are images) and, where held-out frames are predicted (assess,
    run), ``stock_fusion`` (the same network with Cellpose's own do_3D; on a CPU it takes several times as
    long as the model, and many times the memory of a volume) and ``champion`` (the registered one, if there
    is one and it is another model).
    """

    thresholds: tuple[float, ...] = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
    contrast_bins: Annotated[int, Field(ge=2)] = 5
    bootstrap: Annotated[int, Field(ge=0)] = 1000
    resample: Literal["auto", "embryo", "time"] = "auto"
    baselines: tuple[Literal["otsu", "champion", "stock_fusion"], ...] = (
        "otsu",
        "stock_fusion",
        "champion",
    )
    min_true_volume_um3: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    surface_distances: bool = True
    report: bool = True
    viewer_megabytes: PositiveFloat = 8.0

    @field_validator("thresholds")
    @classmethod
    def _usable_thresholds(cls, thresholds: tuple[float, ...]) -> tuple[float, ...]:
        if not thresholds or any(not 0 < threshold <= 1 for threshold in thresholds):
            raise ValueError("IoU thresholds must lie above 0 and at most at 1, and there must be one")
        if list(thresholds) != sorted(set(thresholds)):
            raise ValueError("IoU thresholds must ascend without repeats, such as [0.5, 0.75, 0.9]")
        if len({f"{threshold:.2f}" for threshold in thresholds}) < len(thresholds):
            raise ValueError("IoU thresholds must differ in their first two decimals")
        return thresholds
