"""The sections of params.yaml, one class each, and `Params`, which holds them all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """A section of params.yaml: unknown names are refused, values cannot change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True
    )


PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(ge=1)]
Triple = tuple[PositiveFloat, PositiveFloat, PositiveFloat]
_Way = Annotated[float, Field(ge=-20, le=20, allow_inf_nan=False)]
Shift = tuple[_Way, _Way, _Way]


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

    With ``by: space``, for a single labelled stack, every labelled frame is cut into three blocks along the
    longer of y and x, with a gap as wide as its widest nucleus. What is scored is the image trained on.
    """

    by: Literal["embryo", "time", "space"] = "embryo"
    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    validation_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.15
    test_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.15
    gap: PositiveInt = 2


class DataParams(Section):
    """Where voxel sizes and channels come from, and how embryos are split."""

    voxel_size_um: Triple | None = None
    """(z, y, x), wins over what the files say; null reads it from them."""
    channel: str | int | None = None
    """Name or number, from 0, of the nuclear channel; null where the files hold one."""
    label_shift_um: Shift | dict[str, Shift] | None = None
    """Moves labels that lie off the image by a constant, as they are read: (z, y, x) for all embryos, or for
    each by its name. ``nuclei3d check`` measures it."""
    unknown_label: int | None = -1
    """Number that marks, among the labels, what nobody looked at: no loss, no count there. null: no number; a
    mask ``labels/<frame>_known.tif``, 0 where nobody looked, says the same."""
    image: str | int | None = None
    """Name or number, from 0, of the image to read where a file holds several (series, scenes, positions)."""
    split: SplitParams = SplitParams()

    @field_validator("unknown_label")
    @classmethod
    def _not_background(cls, label: int | None) -> int | None:
        if label == 0:
            raise ValueError("0 is the background; give what nobody looked at another number, such as -1")
        return label

    def label_shift_of(self, embryo: str) -> Shift | None:
        """Give how far an embryo's labels are moved, (z, y, x) in um; None: not at all."""
        shift = self.label_shift_um
        return shift.get(embryo) if isinstance(shift, dict) else shift


FrameCount = Annotated[int, Field(ge=1, le=10_000)]
Share = Annotated[float, Field(ge=0, le=1)]
Spread = Annotated[float, Field(ge=0, le=1.5)]
Extent = Annotated[int, Field(ge=4, le=4096)]


class SimulateParams(Section):
    """Synthetic time-lapses with exact labels; one embryo per entry of `embryos`.

    The defaults make embryos in the likeness of light-sheet data after twofold downsampling in xy:
    voxels 2 x 0.348 x 0.348 um, anisotropy 5.75. Lengths are in um, light in photons per voxel.
    """

    embryos: Annotated[tuple[str, ...], Field(min_length=1)] = ("embryo_a", "embryo_b", "embryo_c")
    """Names, each a folder of the data set."""
    frames: tuple[FrameCount, ...] = (6, 3, 3)
    """Frames of each embryo: one number for all, or one per embryo."""
    shape: tuple[Extent, Extent, Extent] = (24, 128, 128)
    """Planes, rows and columns of a frame."""
    voxel_size_um: Triple = (2.0, 0.348, 0.348)
    """Edges of a voxel (z, y, x); anisotropy follows from these."""
    nuclei: Annotated[int, Field(ge=1, le=2000)] = 22
    """Mean number of nuclei in the first frame."""
    nucleus_diameter_um: PositiveFloat = 9.5
    """Their mean diameter."""
    size_variation: Spread = 0.08
    """Spread of the logarithm of the diameter."""
    shape_variation: Spread = 0.09
    """Strength of the smooth deformation of the ellipsoids."""
    minutes_per_frame: PositiveFloat = 40.0
    cell_cycle_minutes: PositiveFloat = 300.0
    """Time between divisions; over `minutes_per_frame` it says how fast the number grows."""
    closeness: Share = 0.95
    """1: every nucleus may touch its neighbours; 0: each keeps a coat of cytoplasm around it."""
    photons: PositiveFloat = 30.0
    """Light of the typical nucleus."""
    brightness_variation: Spread = 0.4
    """Spread of the logarithm of the light from nucleus to nucleus."""
    faint_share: Share = 0.15
    """Share of nuclei in the faint tail."""
    faintest_contrast: NonNegativeFloat = 2.5
    """No labelled nucleus is dimmer than this many sigmas of the background's noise."""
    texture: Spread = 0.4
    """Contrast of the chromatin inside a nucleus, as a share of its mean."""
    attenuation_um: PositiveFloat = 60.0
    """Depth in which the light falls to 1/e."""
    background_photons: NonNegativeFloat = 2.5
    """Light outside nuclei."""
    unevenness: Share = 0.4
    """How much the light outside nuclei differs across the field (share)."""
    haze: Share = 0.1
    """Light of the cytoplasm as a share of `photons`."""
    psf_um: Triple = (1.0, 0.3, 0.3)
    """Standard deviations of the point spread function (z, y, x)."""
    camera_gain: PositiveFloat = 4.0
    """Counts per photon."""
    camera_offset: NonNegativeFloat = 100.0
    """Counts without light."""
    camera_noise: NonNegativeFloat = 3.0
    """Read noise in counts."""
    camera_bits: Annotated[int, Field(ge=8, le=16)] = 12
    """Bit depth."""
    debris: NonNegativeFloat = 2.0
    """Mean number of polar bodies and fragments in an embryo: seen, not labelled."""

    @field_validator("frames", mode="before")
    @classmethod
    def _one_number_is_a_list_of_one(cls, frames: object) -> object:
        return (frames,) if isinstance(frames, int) else frames

    @field_validator("embryos")
    @classmethod
    def _names_are_folders(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
                raise ValueError(f"'{name}' is no folder name of letters, digits, '_', '-' and '.'")
        if len(set(names)) != len(names):
            raise ValueError("an embryo is named twice")
        return names

    @model_validator(mode="after")
    def _frames_fit_embryos(self) -> SimulateParams:
        if len(self.frames) not in (1, len(self.embryos)):
            raise ValueError(
                f"frames names {len(self.frames)} numbers for {len(self.embryos)} embryos; "
                "give one number for all, or one per embryo"
            )
        return self

    def frames_of(self, index: int) -> int:
        """Number of frames of the embryo at this position in `embryos`."""
        return self.frames[index] if len(self.frames) > 1 else self.frames[0]


Percentile = Annotated[float, Field(ge=0, le=100)]


class NormalizationParams(Section):
    """Percentiles of the whole volume that become 0 and 1."""

    lower_percentile: Percentile = 1.0
    upper_percentile: Percentile = 99.8
    noise_floor: Annotated[float, Field(ge=0)] = 10.0
    """Their distance is never taken below so many standard deviations of the noise, so that the noise of a
    frame with hardly a nucleus is not blown up into objects."""

    @model_validator(mode="after")
    def _in_order(self) -> NormalizationParams:
        if self.lower_percentile >= self.upper_percentile:
            raise ValueError("lower_percentile must be below upper_percentile")
        return self


class PrepareParams(Section):
    """How embryos become training data; the defaults are the recipe's.

    Volumes are downsampled in x and y, then upsampled in z to cubic voxels (linear; labels by nearest
    neighbour). Every `step_xy`-th, `step_xz`-th and `step_yz`-th plane is kept (0: none) if it shows enough
    nuclei. For a 3D network (train.network: full3d) each frame is kept as a volume instead: downsampled in x
    and y, with its own planes.
    """

    downsample_xy: PositiveFloat = 2.0
    """How many times x and y are downsampled."""
    step_xy: Annotated[int, Field(ge=0)] = 1
    step_xz: Annotated[int, Field(ge=0)] = 12
    step_yz: Annotated[int, Field(ge=0)] = 12
    min_nuclei: Annotated[int, Field(ge=0)] = 3
    """Least number of nuclei that a plane shows, slivers not counted."""
    min_volume_um3: NonNegativeFloat = 0.0
    """Labels below this in 3D, the debris of hand labelling, become background before (0: none)."""
    max_size_ratio: Annotated[float, Field(ge=1)] | None = 1.5
    """Training embryos whose nuclei differ by more than this factor in median diameter (ovules of a plant and
    of a mouse, say) are brought to the network's scale each by its own nuclei, the held-out ones too. Below,
    and with null always, all are brought there by one diameter, as a prediction without `predict.diameter_um`
    does; random scales (`train.augment.rescale_range`) cover a factor of 1.67."""
    min_area_px: Annotated[int, Field(ge=0)] = 15
    """Slivers of nuclei below this are dropped from a plane."""
    sparse_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the planes with fewer nuclei that is kept all the same (0: the recipe)."""
    targets: Literal["heat", "tanh"] = "heat"
    """Flows of a volume: ``heat`` (unit vectors in um from heat diffusion) or ``tanh`` (of the distance to
    the centre over 5 voxels, as in Cellpose3D, for comparison)."""
    cellpose_files: bool = False
    """Write the planes as TIFF pairs beside, for stock Cellpose's training; they are seldom needed and take
    longer to write than all else (export --format cellpose-training makes them later)."""
    workers: PositiveInt | None = None
    """Processes; null takes every core."""


Size = Annotated[int, Field(ge=4)]


class Full3dParams(Section):
    """The 3D network (train.network: full3d): its shape, its patches, its loss."""

    profile: Literal["default", "small"] = "default"
    """``default``: 4.5 to 6.3 M parameters; ``small``: 0.3 to 0.5 M, for two processor cores."""
    pooling: Literal["spacing", "isotropic"] = "spacing"
    """``spacing``: an axis is pooled and convolved along once its spacing is at most twice the finest;
    ``isotropic``: all axes alike, whatever the voxel size."""
    style: bool = False
    """Feed the mean of the deepest features to the way up, as Cellpose does."""
    patch: tuple[Size, Size, Size] | None = None
    """Shape (z, y, x) of the patches in voxels of the network's grid; null: `patch_diameters` of a nucleus.
    """
    patch_diameters: PositiveFloat = 4.0
    """Edge of the patches in diameters of a nucleus."""
    nucleus_centred: Share = 0.6
    """Share of the patches that are drawn around a nucleus."""
    faint_centred: Share = 0.2
    """Share of those around one of the faintest fifth; the others lie anywhere."""
    flow_weight: NonNegativeFloat = 5.0
    """Weight in the loss of the mean squared error of the flows inside nuclei."""
    probability_weight: NonNegativeFloat = 1.0
    """Weight of the foreground's cross-entropy."""
    dice_weight: NonNegativeFloat = 1.0
    """Weight of its Dice loss."""
    balance_axes: bool = True
    """Divide each axis' error by the variance of its target, so that z, which has less, is learned as well.
    """


Rotation = Literal["none", "quarter", "free"]


class AugmentParams(Section):
    """Random changes of a crop; 0 (or false, or ``none``) switches one off.

    Each has random numbers of its own, so switching one on or off leaves the draws of the others as they
    were. Intensities are those after normalisation: 0 is background, about 1 the brightest nuclei.
    """

    flips: bool = True
    """Mirror both axes of a plane, each with probability 1/2."""
    flip_z: bool = True
    """Whether z is mirrored too. False lets the network learn what differs between up and down (light that
    fades with depth, labels that lag behind the image); xz and yz planes then cannot be rotated."""
    rotation: Rotation = "quarter"
    """Of xy planes: ``none``, ``quarter`` (multiples of 90 degrees) or ``free`` (any angle, as stock Cellpose
    does in all views)."""
    side_rotation: Rotation = "quarter"
    """The same of xz and yz planes."""
    rescale_range: Annotated[float, Field(ge=0, lt=2)] = 0.5
    """Width of the range of random scales around 1, as in Cellpose: 0.5 is 0.75 to 1.25."""
    brightness_linear: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Half-width b of the gain (1 - b to 1 + b) and a tenth of b for the offset."""
    brightness_gamma: NonNegativeFloat = 0.0
    """Exponents are exp(-g) to exp(g)."""
    dim_share: Share = 0.0
    """Share of nuclei that are dimmed."""
    dim_min: Annotated[float, Field(gt=0, le=1)] = 0.1
    """The least factor that dims (log-uniform up to 1)."""
    dim_noise: NonNegativeFloat = 1.0
    """How much of the shot noise that dimming removes is put back (1: all)."""
    psf_px: NonNegativeFloat = 1.0
    """Width of the blur of a dimmed nucleus' edge: Gaussian sigma in pixels at the network's scale."""
    depth_attenuation: NonNegativeFloat = 0.0
    """Greatest optical depth of a plane: light falls by exp(-a), along z in xz and yz, as a whole in xy."""
    blur_px: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Greatest sigma of a Gaussian blur in xy."""
    blur_anisotropy: PositiveFloat = 2.0
    """How many times wider the blur is along z."""
    noise: NonNegativeFloat = 0.0
    """Greatest standard deviation of added noise at intensity 1: half of it as read noise, all as shot noise.
    """
    low_resolution: Share = 0.0
    """Share of crops that are averaged over up to `low_resolution_factor` pixels (along z in xz and yz, along
    both axes in xy) and interpolated back."""
    low_resolution_factor: Annotated[float, Field(ge=1, le=16)] = 4.0

    @model_validator(mode="after")
    def _keep_z_upright(self) -> Self:
        if self.flips and not self.flip_z and self.side_rotation != "none":
            raise ValueError("flip_z: false needs side_rotation: none, for a rotation turns z over as well")
        return self


class SamplingParams(Section):
    """How often planes are drawn; the defaults draw all alike, as the recipe does.

    The weights multiply; 0 leaves planes out. `xy`, `xz` and `yz` are those of the planes of a view.
    """

    xy: NonNegativeFloat = 1.0
    xz: NonNegativeFloat = 1.0
    yz: NonNegativeFloat = 1.0
    nuclei_power: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Weight (number of nuclei)**power; planes without nuclei count as one."""
    sparse: NonNegativeFloat = 1.0
    """Weight of planes with fewer than `train.min_train_masks` nuclei. prepare writes such planes only where
    prepare.sparse_share asks for them; 0 is stock Cellpose's rule, which never draws them."""
    contrast_power: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Weight (contrast of the faintest nucleus / median over planes)**-power, held within 1/4 to 4."""
    balance: Literal["none", "embryos", "frames"] = "none"
    """``embryos``: every embryo, or ``frames``: every frame (stage), is drawn alike often whatever its number
    of planes."""
    nucleus_centred: Share = 0.0
    """Share of the crops that are placed around a pixel of a nucleus instead of anywhere."""


class LossParams(Section):
    """Weights of nuclei in the loss; the background always has weight 1."""

    weight_by: Literal["none", "contrast", "size"] = "none"
    """``contrast``: (contrast / median)**-power; ``size``: (area / median)**-power; ``none``: 1."""
    power: Annotated[float, Field(ge=0, le=2)] = 0.5
    max_weight: Annotated[float, Field(ge=1)] = 4.0
    """Weights are held within 1/max_weight and max_weight."""


class FineTuneParams(Section):
    """What replaces the parameters of these names in `train` where a training starts from a model."""

    learning_rate: PositiveFloat = 5e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    epochs: PositiveInt = 10


class TrainParams(Section):
    """Training of the network; the defaults are the recipe's."""

    network: Literal["views2d", "full3d"] = "views2d"
    """``views2d``: Cellpose's 2D CNN on planes of three views; ``full3d``: a 3D network on patches. prepare
    makes what it needs, so a change asks for a new data set."""
    width: Annotated[int, Field(ge=8, le=64, multiple_of=8)] = 32
    """Channels of the first level of the 2D network. 24 and 16 have about half and a quarter of the work of
    32, which is Cellpose's own and the only one that Cellpose loads."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = "nuclei_3d"
    """Of the model: the weights file, and what Cellpose shows."""
    start_from: str | None = None
    """A model folder, weights file or models:/name@alias to start from; null: from scratch. The commands take
    its kind of network, width, diameter and normalisation, and cut planes at its scale, whatever stands in
    the file; --set overrides that. The model as it is counts as epoch 0."""
    fine_tune: FineTuneParams | None = None
    """Used with start_from; null: nothing is replaced, with --from by the defaults (learning_rate 5e-4,
    warmup_steps 20, epochs 10)."""
    diameter_px: Annotated[float, Field(ge=1, le=1000)] = 30.0
    """Diameter of a typical nucleus at the network's scale."""
    epochs: PositiveInt = 20
    batch_size: PositiveInt = 32
    crops_per_epoch: PositiveInt | None = None
    """Crops (full3d: patches) of an epoch; null: one per plane drawn (full3d: one per nucleus)."""
    crop_px: Annotated[int, Field(ge=32, multiple_of=16)] = 224
    """Edge of the crops."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: PositiveFloat = 5e-3
    """The default is that of Cellpose's own trainer; of 1e-3, 2e-3 and 5e-3 it gave the lowest validation
    loss after 240 steps of 8 and 120 steps of 32 crops."""
    weight_decay: NonNegativeFloat = 1e-4
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD's."""
    schedule: Literal["constant", "warmup_cosine", "cellpose"] = "warmup_cosine"
    """``constant`` and ``warmup_cosine`` rise linearly over warmup_steps; the cosine falls to a hundredth at
    the end; ``cellpose`` is stock's schedule by epochs. Only ``constant`` does not depend on the number of
    epochs, so that a training can be prolonged."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    min_train_masks: Annotated[int, Field(ge=0)] = 3
    """Planes with fewer nuclei count as sparse and are drawn with the weight sampling.sparse (0: never)."""
    validation_crops: Annotated[int, Field(ge=0)] = 64
    """Number of fixed crops on which the validation loss is computed."""
    validate_volumes_every: Annotated[int, Field(ge=0)] = 0
    """Every how many epochs the average precision is computed in 3D (0: never)."""
    validation_volumes: PositiveInt = 3
    """Number of volumes on which it is computed."""
    patience: PositiveInt | None = None
    """Stop after so many epochs without a better validation loss."""
    select: Literal["best", "last"] = "best"
    """Whether the ``best`` or the ``last`` epoch becomes the model."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of an exponential mean of the weights, which is then what is validated and kept (0: off)."""
    gradient_clip: NonNegativeFloat = 0.0
    """Greatest norm of the gradient (0: off)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """``auto``: bfloat16 where the processor computes with it (CUDA from Ampere on, CPUs with AVX512-BF16 or
    AMX), else float32. Weights, loss and optimiser are always float32."""
    cuda_graph: bool = True
    """On a GPU, record a step once and replay it: the same numbers, faster for small batches."""
    workers: PositiveInt | None = None
    """Threads that cut crops; null: one on a CPU, up to eight beside a GPU."""
    memory_limit_gb: PositiveFloat = 2.0
    """Planes that take more than this are read from disk as they are needed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    sampling: SamplingParams = SamplingParams()
    loss: LossParams = LossParams()
    augment: AugmentParams = AugmentParams()
    full3d: Full3dParams = Full3dParams()

    @model_validator(mode="after")
    def _check_width(self) -> Self:
        if self.network == "full3d" and self.width != 32:
            raise ValueError("width is of network views2d; full3d.profile sets the channels of a 3D network")
        return self


Iou = Annotated[float, Field(ge=0.5, lt=1)]


class CalibrateParams(Section):
    """How thresholds are chosen on validation embryos after a training."""

    volumes: Annotated[int, Field(ge=0)] | None = 6
    """Validation frames that are segmented, spread evenly; 0 leaves the thresholds at their defaults, null
    takes all."""
    cellprob: Annotated[tuple[float, ...], Field(min_length=1)] = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0)
    """Thresholds of the logit, at which nuclei are found, that are tried."""
    outline: Annotated[tuple[float, ...], Field(min_length=1)] = (-1.5, -1.0, -0.5, 0.0, 0.5)
    """Thresholds of the logit, at which they end, that are tried, in the plane and along z; their overlap
    with the true nuclei decides (SEG)."""
    iou: Annotated[tuple[Iou, ...], Field(min_length=1)] = (0.5, 0.6, 0.7, 0.8)
    """The average precision is the mean over these overlaps. High ones favour masks of the right size, 0.5
    alone counts nuclei."""
    volume_fractions: Annotated[tuple[float, ...], Field(min_length=1)] = (0.0, 0.02, 0.05, 0.1)
    """Least volumes that are tried, as fractions of a typical nucleus."""


Mode = Literal["auto", "ortho", "stitch", "cellpose", "full3d", "mixed"]
View = Literal["xy", "xz", "yz"]
Fusion = Literal["mean", "consensus"]
Precision = Literal["auto", "float32", "bfloat16", "int8"]
Weight = Annotated[float, Field(ge=1e-6, le=1e6)]
Logit = Annotated[float, Field(ge=-1000, le=1000)]
Engine = Literal["auto", "torch", "openvino"]


def _read_diameter(value: object) -> object:
    """Say all that a diameter can be, where the errors of a union would say it in two."""
    try:
        if value is None or value == "auto" or (not isinstance(value, bool) and 0 < float(str(value)) < inf):
            return value
    except ValueError:
        pass
    raise ValueError("give the diameter in um, above 0, or auto, which estimates it from the image")


class SegmentationParams(Section):
    """How a volume is segmented; what a request may set. null: the value stored with the model."""

    mode: Mode = "auto"
    """auto is ortho for a 2D network, full3d for a 3D one, and mixed with a `volume_model`."""
    diameter_um: Annotated[
        Annotated[float, Field(ge=0.01, le=10_000)] | Literal["auto"] | None, BeforeValidator(_read_diameter)
    ] = None
    """Of a typical nucleus of the volume; the model's least volume is scaled with its cube. auto (predict
    only) estimates it from the image, frame by frame and smoothed over time."""
    views: Annotated[tuple[View, ...], Field(min_length=1, max_length=3)] = ("xy", "xz", "yz")
    """The planes that modes ortho and mixed look at."""
    view_weights: Annotated[tuple[Weight, ...], Field(max_length=3)] | None = None
    """The trust in each view (null: equal)."""
    fusion: Fusion = "mean"
    """consensus trusts, place by place, the view whose flow varies least; mean trusts all alike."""
    orthogonal_step: Annotated[int, Field(ge=1, le=1000)] = 1
    """Compute every n-th xz and yz plane only and interpolate between."""
    cellprob_threshold: Logit | None = None
    """Nuclei are found where the logit is above it."""
    outline_threshold: Logit | None = None
    """What was found reaches as far as the logit is above this, if it is lower than cellprob_threshold."""
    outline_threshold_z: Logit | None = None
    """The same along z; a model without one of its own takes outline_threshold."""
    score_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    min_volume_um3: Annotated[float, Field(ge=0, le=1e12)] | None = None
    max_volume_um3: Annotated[float, Field(gt=0, le=1e12)] | None = None
    flip_average: bool = False
    """Average over flips along y and x, never z: four times the work for xy planes and a 3D network, twice
    for xz and yz planes."""
    precision: Precision = "auto"
    """auto takes bfloat16 where the hardware computes it. int8 is for a 2D network by OpenVINO on a CPU: with
    AVX512-VNNI three times as fast, masks nearly the same (docs/results.md)."""
    stitch_min_iou: Annotated[float, Field(gt=0, le=1)] = 0.25
    """The least overlap at which mode stitch links masks of neighbouring planes."""
    stitch_max_gap: Annotated[int, Field(ge=0, le=100)] = 1
    """Number of planes in which mode stitch lets a nucleus be missing."""
    flow3d_smooth: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Stock Cellpose's option, for mode cellpose only."""


class PredictParams(SegmentationParams):
    """What is said of a segmentation, further models, and the machine that computes it.

    The further models are for predictions on this machine (the commands predict, calibrate and assess); a
    training or a search looks at its network alone.
    """

    orthogonal_model: Path | None = None
    """Another 2D model for xz and yz, of the same `diameter_px`."""
    volume_model: Path | None = None
    """A 3D model beside a 2D one: mode mixed fuses its flows with those of the views."""
    volume_weight: PositiveFloat = 1.0
    """The trust in it, where a view has 1 unless `view_weights` says otherwise."""
    engine: Engine = "auto"
    """auto takes OpenVINO where it is installed (CPU only)."""
    memory_gb: PositiveFloat | None = None
    """A volume that would need more is cut into blocks, which Dask runs."""
    into_input: bool = False
    """Masks also go into the OME-Zarr that was read, as `nuclei3d` in its group of labels."""
    workers: PositiveInt = 1
    """Processes of this machine that run the blocks."""
    scheduler: str | None = None
    """The cluster that runs them instead (tcp://host:port)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    report: bool = True
    """After the frames prediction.html is written: all of them with outlines, and what changes over time."""
    animation: bool = False
    """With it goes prediction.png, an animated PNG for slides."""

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
        """Give these parameters for a network by itself, without further models, on labelled nuclei."""
        mode = "auto" if self.mode == "mixed" else self.mode
        diameter_um = None if self.diameter_um == "auto" else self.diameter_um
        others = {"orthogonal_model": None, "volume_model": None}
        return self.model_copy(update={"mode": mode, "diameter_um": diameter_um, **others})


class EvaluateParams(Section):
    """Thresholds, contrast bins, bootstrap and report of the evaluation."""

    thresholds: tuple[float, ...] = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
    contrast_bins: Annotated[int, Field(ge=2)] = 5
    bootstrap: Annotated[int, Field(ge=0)] = 1000
    resample: Literal["auto", "embryo", "time"] = "auto"
    """What the bootstrap draws: whole embryos, blocks of time within embryos, or (auto) embryos where there
    are at least four."""
    primary_metric: Literal[
        "ap_mean", "ap_0.50", "f1_0.50", "pq", "seg", "det", "mucov", "recall", "recall_faint"
    ] = "ap_mean"
    """What decides whether a model is better than another (compare, register): ``ap_mean``, the mean AP over
    the thresholds from .5 to .9, or another score."""
    baselines: tuple[Literal["otsu", "champion", "stock_fusion", "start_model"], ...] = (
        "otsu",
        "stock_fusion",
        "champion",
        "start_model",
    )
    """Put beside the model on the same volumes: ``otsu`` (Otsu's threshold with a distance-transform
    watershed, where there are images) and, where held-out frames are predicted (assess, run),
    ``stock_fusion`` (the same network with Cellpose's own do_3D; on a CPU it takes several times as long as
    the model, and many times the memory of a volume), ``champion`` (the registered one, if there is one and
    it is another model) and ``start_model`` (what the training started from, if it did from a model)."""
    min_true_volume_um3: NonNegativeFloat = 0.0
    """True labels below this, the debris of hand labelling, become background; predictions are all counted.
    """
    pair_by: Literal["embryo", "frame"] = "embryo"
    """How predictions find their truth: by the names of embryo and frame, or of the frame alone, whatever the
    folders are called."""
    surface_distances: bool = True
    report: bool = True
    viewer_megabytes: PositiveFloat = 8.0
    """Bounds the volumes shown in the report; larger data are shown in part and at a lower resolution."""

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


Finite = Annotated[float, Field(allow_inf_nan=False)]


class Range(Section):
    """The values that are tried for one parameter: a few `choices`, or all from `low` to `high`.

    With `log` each factor of ten is as likely as the next. For a parameter that is a whole number only
    whole numbers are tried.
    """

    low: Finite | None = None
    high: Finite | None = None
    log: bool = False
    choices: Annotated[tuple[bool | int | float | str | None, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Range:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log:
                raise ValueError("give choices, or low and high, not both")
            return self
        if self.low is None or self.high is None:
            raise ValueError("give both low and high, or choices")
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range starts above 0, low is {self.low:g}")
        return self


_RECIPE_RANGES = {
    "epochs": Range(low=5, high=60, log=True),
    "batch_size": Range(choices=(8, 16, 32, 64)),
    "learning_rate": Range(low=1e-4, high=1e-2, log=True),
    "weight_decay": Range(low=1e-6, high=1e-1, log=True),
}


class SearchParams(Section):
    """What is searched, for what, and when a trial is given up.

    `epochs`, `batch_size`, `learning_rate` and `weight_decay` are ranges of these parameters of the section
    train; null leaves one as it is.
    """

    study: Annotated[str, Field(min_length=1)] | None = None
    """Name of the search in its storage; null: that of the folder it writes."""
    objective: Literal["ap", "faint_recall"] = "ap"
    """What is maximised on the validation volumes in 3D: ``ap``, the average precision at IoU 0.5, or
    ``faint_recall``, the recall of the faintest fifth of the nuclei where the precision is `precision`."""
    precision: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """The precision at which ``faint_recall`` is read off; a model that reaches it nowhere scores below 0."""
    volumes: PositiveInt | None = None
    """Number of validation volumes that are segmented, spread evenly over them; null: all."""
    epochs: Range | None = _RECIPE_RANGES["epochs"]
    batch_size: Range | None = _RECIPE_RANGES["batch_size"]
    learning_rate: Range | None = _RECIPE_RANGES["learning_rate"]
    weight_decay: Range | None = _RECIPE_RANGES["weight_decay"]
    more: Mapping[str, Range] = Field(default_factory=dict)
    """Ranges of further parameters by their dotted name, such as ``train.augment.dim_share``."""
    prune: bool = True
    """Give unpromising trials up on the way, by asynchronous successive halving (ASHA)."""
    prune_on: Literal["loss", "ap"] = "loss"
    """What is compared on the way, after every epoch that has it: the validation ``loss``, or the ``ap`` in
    3D (then `train.validate_volumes_every` says after which epochs it is computed)."""
    first_rung: Annotated[float, Field(gt=0, lt=1)] = 0.125
    """Trials are compared when this share of their own epochs is done."""
    reduction: Annotated[int, Field(ge=2)] = 2
    """They are compared again each time that share has grown so many times; about one in so many goes on."""
    startup_trials: PositiveInt | None = None
    """Trials drawn at random before the sampler (TPE) starts to learn; null: a third of all, at most ten."""
    confirm_top: PositiveInt = 3
    """So many best trials and the starting values are trained again after the search; the best mean wins."""
    confirm_seeds: Annotated[int, Field(ge=0)] = 0
    """With how many other seeds. 0: no confirmation."""
    keep_models: PositiveInt = 3
    """Model folders of so many best trials stay on disk."""
    max_retries: Annotated[int, Field(ge=0)] = 5
    """How often a trial whose process died is run again."""
    max_failures: PositiveInt = 3
    """After so many trials that failed with an error the search stops."""
    heartbeat_s: PositiveInt = 30
    """With PostgreSQL: seconds between two signs of life of a worker."""
    grace_s: Annotated[int, Field(ge=2)] = 120
    """The silence after which it counts as dead."""

    @model_validator(mode="before")
    @classmethod
    def _complete_ranges(cls, given: Any) -> Any:
        """Take what a range leaves out, as in ``epochs: {high: 30}``, from the default."""
        if not isinstance(given, Mapping):
            return given
        completed = dict(given)
        for name, default in _RECIPE_RANGES.items():
            value = given.get(name)
            if isinstance(value, Mapping) and default.choices is None and "choices" not in value:
                completed[name] = default.model_dump(exclude={"choices"}) | dict(value)
        return completed

    @model_validator(mode="after")
    def _grace_outlasts_heartbeat(self) -> SearchParams:
        if self.grace_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"grace_s ({self.grace_s}) must be at least twice heartbeat_s ({self.heartbeat_s})"
            )
        return self

    def ranges(self) -> dict[str, Range]:
        """Give every searched parameter's range by its dotted name."""
        recipe = {f"train.{name}": getattr(self, name) for name in _RECIPE_RANGES}
        return {name: found for name, found in recipe.items() if found is not None} | dict(self.more)


class TracksParams(Section):
    """Nuclei linked over time. (Runs and models are in the section tracking.)

    Lengths are in diameters of the typical nucleus, so they hold for any embryo and microscope.
    """

    remove_motion: bool = True
    """Take away the drift and rotation of the whole embryo between frames before nuclei are compared."""
    max_step: PositiveFloat = 0.9
    """Furthest that a nucleus goes between two frames."""
    volume_weight: NonNegativeFloat = 0.05
    """What a change of the volume by a factor of e costs against a step of one diameter."""
    intensity_weight: NonNegativeFloat = 0.02
    """What a change of the intensity by its spread within a frame costs against a step of one diameter."""
    max_gap: Annotated[int, Field(ge=0)] = 2
    """Number of frames in which a nucleus may be missing."""
    division_distance: PositiveFloat = 1.2
    """Furthest that a daughter lies from where its mother was."""
    division_limit: PositiveFloat = 0.2
    """What a division may cost; higher finds more, true and false. This and the two weights below were fitted
    to simulated embryos with perturbed and with predicted masks."""
    division_volume_weight: NonNegativeFloat = 0.15
    """Cost of daughters of unlike volume, or together larger than the mother, against daughters whose middle
    lies one diameter off the mother."""
    division_intensity_weight: NonNegativeFloat = 0.05
    """Cost of a division in which nothing grew brighter, against the same."""
    daughter_frames: PositiveInt = 2
    """A second daughter that is seen in fewer frames is taken for a piece of a nucleus, not a daughter."""
    weakest_score: Annotated[float, Field(ge=0, le=1)] = 0.0
    """``predict --track`` keeps nuclei from this score on, however small, whose lineage holds one of at least
    the score and volume that count otherwise; 1: none of them."""


class TrackingParams(Section):
    """Where runs and models go."""

    enabled: bool = True
    """False: nothing is recorded."""
    uri: str | None = None
    """null means the environment variable MLFLOW_TRACKING_URI, else mlflow.db in the project directory."""
    experiment: Annotated[str, Field(min_length=1)] = "nuclei3d"
    """What runs are grouped in."""
    registered_name: Annotated[str, Field(pattern=r"^[^/:.%\"']+$")] = "nuclei_3d"
    """The name under which models are registered."""


class ServeParams(Section):
    """Limits of the service around a model."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 5050
    insecure: bool = False
    """Take requests from other machines without a token."""
    root: str | None = None
    """Folder below which requests may name files by path; null refuses paths."""
    queue: Annotated[int, Field(ge=0)] = 16
    """Requests that may wait while one is computed; the next is answered 503."""
    max_body_mb: PositiveInt = 512
    """Largest body of a request."""
    max_voxels: PositiveInt = 100_000_000
    """Largest volume, by what its header declares, before anything is read."""
    max_network_voxels: PositiveInt = 2_000_000_000
    """Most voxels that the network may look at for a request, at its own scale, over all views and rows."""
    memory_gb: PositiveFloat | None = None
    """Most resident memory of a process that works; what needs more is answered 413. null: 0.8 of what is
    free at the start."""
    body_s: PositiveFloat = 300.0
    """Longest time until the body of a request is there."""
    timeout_s: PositiveFloat = 1800.0
    """Longest time from a request's arrival to its answer."""
    shutdown_s: PositiveFloat = 60.0
    """How long a stopping service lets the request that is being computed finish."""


class Params(Section):
    """Everything in params.yaml; each field is one section."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    data: DataParams = DataParams()
    simulate: SimulateParams = SimulateParams()
    normalization: NormalizationParams = NormalizationParams()
    prepare: PrepareParams = PrepareParams()
    train: TrainParams = TrainParams()
    calibrate: CalibrateParams = CalibrateParams()
    predict: PredictParams = PredictParams()
    evaluate: EvaluateParams = EvaluateParams()
    search: SearchParams = SearchParams()
    tracks: TracksParams = TracksParams()
    tracking: TrackingParams = TrackingParams()
    serve: ServeParams = ServeParams()
