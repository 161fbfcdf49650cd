"""Parameters of the network, its training and the augmentation."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nuclei3d.config.data import PositiveFloat
from nuclei3d.config.full3d import Full3dParams
from nuclei3d.config.section import Section

Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rotation = Literal["none", "quarter", "free"]


class AugmentParams(Section):
    """Random changes of a crop; 0 (or false, or none) switches one off.

    Each has random numbers of its own, so switching one on or off leaves the draws of the others as they
    were. Intensities are those after normalisation: 0 is background, about 1 the brightest nuclei.

    Attributes
    ----------
    flips
        Mirror both axes of a plane, each with probability 1/2.
    flip_z
        Whether z is mirrored too. False lets the network learn what differs between up and down (light that
        fades with depth, labels that lag behind the image); xz and yz planes then cannot be rotated.
    rotation, side_rotation
        Rotation of xy planes, and of xz and yz planes: ``none``, ``quarter`` (multiples of 90 degrees) or
        ``free`` (any angle, as stock Cellpose does in all views).
    rescale_range
        Width of the range of random scales around 1, as in Cellpose: 0.5 is 0.75 to 1.25.
    brightness_linear
        Half-width b of the gain (1 - b to 1 + b) and a tenth of b for the offset.
    brightness_gamma
        Exponents are exp(-g) to exp(g).
    dim_share, dim_min, dim_noise, psf_px
        Share of nuclei that are dimmed, the least factor (log-uniform up to 1), how much of the shot noise
        that dimming removes is put back (1: all), and the width (Gaussian sigma, pixels at the network's
        scale) of the blur of a nucleus' edge.
    depth_attenuation
        Greatest optical depth of a plane: light falls by exp(-a), along z in xz and yz, as a whole in xy.
    blur_px, blur_anisotropy
        Greatest sigma of a Gaussian blur in xy, and how many times wider it is along z.
    noise
        Greatest standard deviation of added noise at intensity 1: half of it as read noise, all as shot
        noise.
    low_resolution
        Share of crops that are averaged over up to `low_resolution_factor` pixels (along z in xz and yz,
        along both axes in xy) and interpolated back.
    """

    flips: bool = True
    flip_z: bool = True
    rotation: Rotation = "quarter"
    side_rotation: Rotation = "quarter"
    rescale_range: Annotated[float, Field(ge=0, lt=2)] = 0.5
    brightness_linear: Annotated[float, Field(ge=0, lt=1)] = 0.0
    brightness_gamma: NonNegative = 0.0
    dim_share: Share = 0.0
    dim_min: Annotated[float, Field(gt=0, le=1)] = 0.1
    dim_noise: NonNegative = 1.0
    psf_px: NonNegative = 1.0
    depth_attenuation: NonNegative = 0.0
    blur_px: Annotated[float, Field(ge=0, le=10)] = 0.0
    blur_anisotropy: PositiveFloat = 2.0
    noise: NonNegative = 0.0
    low_resolution: Share = 0.0
    low_resolution_factor: Annotated[float, Field(ge=1, le=16)] = 4.0

    @model_validator(mode="after")
    def _keep_z_upright(self) -> Self:
        if self.flips and not self.flip_z and self.side_rotation != "none":
            raise ValueError("flip_z: false needs side_rotation: none, for a rotation turns z over as well")
        return self


class SamplingParams(Section):
    """How often planes are drawn; the defaults draw all alike, as the recipe does.

    The weights multiply. A weight of 0 leaves planes out.

    Attributes
    ----------
    xy, xz, yz
        Weight of the planes of a view.
    nuclei_power
        Weight (number of nuclei)**power; planes without nuclei count as one.
    sparse
        Weight of planes with fewer than `train.min_train_masks` nuclei. prepare writes such planes only where
        prepare.sparse_share asks for them; 0 is stock Cellpose's rule, which never draws them.
    contrast_power
        Weight (contrast of the faintest nucleus / median over planes)**-power, held within 1/4 to 4.
    balance
        ``embryos``: every embryo, or ``frames``: every frame (stage), is drawn alike often whatever its
        number of planes.
    nucleus_centred
        Share of the crops that are placed around a pixel of a nucleus instead of anywhere.
    """

    xy: NonNegative = 1.0
    xz: NonNegative = 1.0
    yz: NonNegative = 1.0
    nuclei_power: Annotated[float, Field(ge=-2, le=2)] = 0.0
    sparse: NonNegative = 1.0
    contrast_power: Annotated[float, Field(ge=-2, le=2)] = 0.0
    balance: Literal["none", "embryos", "frames"] = "none"
    nucleus_centred: Share = 0.0


class LossParams(Section):
    """Weights of nuclei in the loss; the background always has weight 1.

    Attributes
    ----------
    weight_by
        ``contrast``: (contrast / median)**-power; ``size``: (area / median)**-power; ``none``: 1.
    power
        See above.
    max_weight
        Weights are held within 1/max_weight and max_weight.
    """

    weight_by: Literal["none", "contrast", "size"] = "none"
    power: Annotated[float, Field(ge=0, le=2)] = 0.5
    max_weight: Annotated[float, Field(ge=1)] = 4.0


class TrainParams(Section):
    """Training of the network; the defaults are the recipe's.

    Attributes
    ----------
    network
        ``views2d``: Cellpose's 2D CNN on planes of three views; ``full3d``: a 3D network on patches. prepare
        makes what it needs, so a change asks for a new data set.
    name
        Of the model: the weights file, and what Cellpose shows.
    start_from
        A model folder or weights file to start from; None: from scratch.
    diameter_px
        Diameter of a typical nucleus at the network's scale.
    epochs, batch_size, crops_per_epoch, crop_px
        Length of the training, in crops of crop_px x crop_px pixels (full3d: in patches); crops_per_epoch
        None: one per plane drawn (full3d: one per nucleus).
    optimizer, learning_rate, weight_decay, momentum
        momentum is SGD's. The default rate is that of Cellpose's own trainer; of 1e-3, 2e-3 and 5e-3 it gave
        the lowest validation loss after 240 steps of 8 and 120 steps of 32 crops.
    schedule, warmup_steps
        ``constant`` and ``warmup_cosine`` rise linearly over warmup_steps; the cosine falls to a hundredth at
        the end; ``cellpose`` is stock's schedule by epochs. Only ``constant`` does not depend on the number
        of epochs, so that a training can be prolonged.
    min_train_masks
        Planes with fewer nuclei count as sparse and are drawn with the weight sampling.sparse (0: never).
    validation_crops
        Number of fixed crops on which the validation loss is computed.
    validate_volumes_every, validation_volumes
        Every how many epochs the average precision is computed in 3D (0: never), and on how many volumes.
    patience
        Stop after so many epochs without a better validation loss.
    select
        Whether the ``best`` or the ``last`` epoch becomes the model.
    ema
        Decay of an exponential mean of the weights, which is then what is validated and kept (0: off).
    gradient_clip
        Greatest norm of the gradient (0: off).
    precision
        ``auto``: bfloat16 where the processor computes with it (CUDA from Ampere on, CPUs with AVX512-BF16 or
        AMX), else float32. Weights, loss and optimiser are always float32.
    cuda_graph
        On a GPU, record a step once and replay it: the same numbers, faster for small batches.
    workers
        Threads that cut crops; None: one on a CPU, up to eight beside a GPU.
    memory_limit_gb
        Planes that take more than this are read from disk as they are needed.
    """

    network: Literal["views2d", "full3d"] = "views2d"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = "nuclei_3d"
    start_from: str | None = None
    diameter_px: PositiveFloat = 30.0
    epochs: Annotated[int, Field(ge=1)] = 20
    batch_size: Annotated[int, Field(ge=1)] = 32
    crops_per_epoch: Annotated[int, Field(ge=1)] | None = None
    crop_px: Annotated[int, Field(ge=32, multiple_of=16)] = 224
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: PositiveFloat = 5e-3
    weight_decay: NonNegative = 1e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    schedule: Literal["constant", "warmup_cosine", "cellpose"] = "warmup_cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    min_train_masks: Annotated[int, Field(ge=0)] = 3
    validation_crops: Annotated[int, Field(ge=0)] = 64
    validate_volumes_every: Annotated[int, Field(ge=0)] = 0
    validation_volumes: Annotated[int, Field(ge=1)] = 3
    patience: Annotated[int, Field(ge=1)] | None = None
    select: Literal["best", "last"] = "best"
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gradient_clip: NonNegative = 0.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    channels_last: bool = True
    cuda_graph: bool = True
    workers: Annotated[int, Field(ge=1)] | None = None
    memory_limit_gb: PositiveFloat = 2.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    sampling: SamplingParams = SamplingParams()
    loss: LossParams = LossParams()
    augment: AugmentParams = AugmentParams()
    full3d: Full3dParams = Full3dParams()
