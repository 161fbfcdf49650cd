"""Parameters of the slice data set."""

from typing import Annotated, Literal

from pydantic import Field

from nuclei3d.config.data import PositiveFloat
from nuclei3d.config.section import Section


class PrepareParams(Section):
    """How embryos become training data; the defaults are the recipe's.

    Volumes are downsampled `downsample_xy` times in x and y, then upsampled in z to cubic voxels
    (linear; labels by nearest neighbour). Every `step_xy`-th, `step_xz`-th and `step_yz`-th plane is
    kept if it shows at least `min_nuclei` nuclei, counted after dropping slivers below `min_area_px`.
    Labels below `min_volume_um3` in 3D, the debris of hand labelling, become background before (0: none).
    `sparse_share` is the share of the planes with fewer nuclei that is kept all the same (0: the recipe).
    For a 3D network (train.network: full3d) each frame is kept as a volume instead: downsampled in x and y,
    with its own planes, and `targets` says which flows it gets: ``heat`` (unit vectors in um from heat
    diffusion) or ``tanh`` (of the distance to the centre over 5 voxels, as in Cellpose3D, for comparison).
    `workers` None takes every core.
    """

    downsample_xy: PositiveFloat = 2.0
    step_xy: Annotated[int, Field(ge=0)] = 1
    step_xz: Annotated[int, Field(ge=0)] = 12
    step_yz: Annotated[int, Field(ge=0)] = 12
    min_nuclei: Annotated[int, Field(ge=0)] = 3
    min_volume_um3: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    min_area_px: Annotated[int, Field(ge=0)] = 15
    sparse_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["heat", "tanh"] = "heat"
    workers: Annotated[int, Field(ge=1)] | None = None
