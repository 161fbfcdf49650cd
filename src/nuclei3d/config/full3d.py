"""Parameters of the fully 3D network and its training."""

from typing import Annotated, Literal

from pydantic import Field

from nuclei3d.config.data import PositiveFloat
from nuclei3d.config.section import Section

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Size = Annotated[int, Field(ge=4)]


class Full3dParams(Section):
    """The 3D network (train.network: full3d): its shape, its patches, its loss.

    Attributes
    ----------
    profile
        ``default``: about 6 M parameters; ``small``: about 0.5 M, for two processor cores.
    pooling
        ``spacing``: an axis is pooled and convolved along once its spacing is at most twice the finest;
        ``isotropic``: all axes alike, whatever the voxel size.
    style
        Feed the mean of the deepest features to the way up, as Cellpose does.
    patch
        Shape (z, y, x) of the patches in voxels of the network's grid; None: `patch_diameters` of a nucleus.
    patch_diameters
        Edge of the patches in diameters of a nucleus.
    nucleus_centred, faint_centred
        Shares of the patches that are drawn around a nucleus, and around one of the faintest fifth; the
        others lie anywhere.
    flow_weight, probability_weight, dice_weight
        Weights in the loss: of the mean squared error of the flows inside nuclei, of the foreground's
        cross-entropy, and of its Dice loss.
    balance_axes
        Divide each axis' error by the variance of its target, so that z, which has less, is learned as well.
    """

    profile: Literal["default", "small"] = "default"
    pooling: Literal["spacing", "isotropic"] = "spacing"
    style: bool = False
    patch: tuple[Size, Size, Size] | None = None
    patch_diameters: PositiveFloat = 4.0
    nucleus_centred: Share = 0.6
    faint_centred: Share = 0.2
    flow_weight: Weight = 5.0
    probability_weight: Weight = 1.0
    dice_weight: Weight = 1.0
    balance_axes: bool = True
