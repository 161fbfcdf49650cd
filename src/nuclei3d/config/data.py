"""Parameters of the raw embryos: voxel size, channel and split."""

from typing import Annotated, Literal

from pydantic import Field

from nuclei3d.config.section import Section

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Triple = tuple[PositiveFloat, PositiveFloat, PositiveFloat]


class SplitParams(Section):
    """Which embryos train, validate and test.

    With ``by: embryo`` the three lists name embryos (folders of the data set). With ``by: time``, meant
    for a single embryo, its frames are cut into contiguous blocks of time with `gap` frames left out
    between them; the fractions say how long the blocks are.
    """

    by: Literal["embryo", "time"] = "embryo"
    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    validation_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.15
    test_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.15
    gap: Annotated[int, Field(ge=1)] = 2


class DataParams(Section):
    """Where voxel sizes and channels come from, and how embryos are split."""

    voxel_size_um: Triple | None = None
    channel: str | int | None = None
    split: SplitParams = SplitParams()
