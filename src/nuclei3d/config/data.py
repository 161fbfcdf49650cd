"""Parameters of the raw embryos: voxel size, channel and split."""

from typing import Annotated, Literal

from pydantic import Field

from nuclei3d.config.section import Section

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Triple = tuple[PositiveFloat, PositiveFloat, PositiveFloat]


class SplitParams(Section):
    """Which embryos train, validate and test.

    With ``by: embryo`` the three lists name embryos (folders of the data set). `train` left empty takes the
    embryos that the others do not name. With all lists empty and at least three labelled embryos, the last
    in natural order tests, the second last validates and the others train. `test` may stay empty where the
    others are named; where `train` alone is named, every embryo of it trains and nothing is held out: for a
    last training after epochs and thresholds were chosen on held-out embryos.

    With ``by: time``, meant for a single embryo, the labelled frames of every embryo are cut into contiguous
    blocks of time, first training, then validation, then test, with `gap` frames left out between them; the
    fractions say how long the blocks are. The lists stay empty.
    """

    by: Literal["embryo", "time"] = "embryo"
    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    validation_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.15
    test_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.15
    gap: Annotated[int, Field(ge=1)] = 2


class DataParams(Section):
    """Where voxel sizes and channels come from, and how embryos are split.

    `voxel_size_um` (z, y, x) wins over what the files say; None reads it from them. `channel` is the name or
    the number, from 0, of the nuclear channel; None where the files hold one.
    """

    voxel_size_um: Triple | None = None
    channel: str | int | None = None
    split: SplitParams = SplitParams()
