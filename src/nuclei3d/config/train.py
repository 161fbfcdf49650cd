"""Parameters of the network, its training and the augmentation."""

from typing import Annotated, Literal

from pydantic import Field

from nuclei3d.config.data import PositiveFloat
from nuclei3d.config.section import Section

Share = Annotated[float, Field(ge=0, le=1)]


class AugmentParams(Section):
    """Random changes of a crop; 0 (or false) switches one off."""

    flips: bool = True
    rotation: Literal["none", "quarter", "free"] = "quarter"
    rescale_range: Annotated[float, Field(ge=0, lt=1)] = 0.5
    brightness_linear: Annotated[float, Field(ge=0, lt=1)] = 0.0
    brightness_gamma: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dim_share: Share = 0.0
    dim_min: Annotated[float, Field(gt=0, le=1)] = 0.1
    depth_attenuation: Annotated[float, Field(ge=0)] = 0.0
    blur_px: Annotated[float, Field(ge=0)] = 0.0
    noise: Annotated[float, Field(ge=0)] = 0.0
    low_resolution: Share = 0.0


class TrainParams(Section):
    """Training of the 2D network; the defaults are the recipe's."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = "nuclei_3d"
    start_from: str | None = None
    diameter_px: PositiveFloat = 30.0
    epochs: Annotated[int, Field(ge=1)] = 20
    batch_size: Annotated[int, Field(ge=1)] = 32
    crops_per_epoch: Annotated[int, Field(ge=1)] | None = None
    crop_px: Annotated[int, Field(ge=32, multiple_of=16)] = 224
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: PositiveFloat = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    schedule: Literal["constant", "warmup_cosine", "cellpose"] = "warmup_cosine"
    min_train_masks: Annotated[int, Field(ge=0)] = 3
    validate_volumes_every: Annotated[int, Field(ge=0)] = 0
    patience: Annotated[int, Field(ge=1)] | None = None
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gradient_clip: Annotated[float, Field(ge=0)] = 0.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    augment: AugmentParams = AugmentParams()
