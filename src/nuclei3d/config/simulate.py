"""Parameters of the synthetic embryos."""

from typing import Annotated

from pydantic import Field

from nuclei3d.config.data import PositiveFloat, Triple
from nuclei3d.config.section import Section


class SimulateParams(Section):
    """Synthetic time-lapses with exact labels; one embryo per entry of `embryos`."""

    embryos: tuple[str, ...] = ("train", "validation", "test")
    frames: Annotated[int, Field(ge=1)] = 4
    shape: tuple[int, int, int] = (24, 128, 128)
    voxel_size_um: Triple = (2.0, 0.348, 0.348)
