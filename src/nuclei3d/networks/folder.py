"""A model as a folder: the weights, model.json (all that is needed to use them) and README.md (the card)."""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from nuclei3d.console import say
from nuclei3d.errors import InputError, first_problem, missing
from nuclei3d.images.voxel_size import LARGEST_EDGE_UM, SMALLEST_EDGE_UM
from nuclei3d.networks.cpnet import CELLPOSE_WIDTH, INPUT_CHANNELS, new_network
from nuclei3d.networks.unet3d import VolumeNetwork, VolumeSpec, new_volume_network
from nuclei3d.outputs import whole_folder

INFO_FILE = "model.json"
CARD_FILE = "README.md"

_OPTIONAL = ("diam_mean", "diam_labels", "num_batches_tracked")
"""Ends of names that saved weights may lack."""

# Bounds that no real model comes near; beyond them masks would be empty in silence, or memory run out. The
# comparisons refuse NaN, too.
Pixels = Annotated[float, Field(ge=1, le=1000)]
Micrometres = Annotated[float, Field(ge=SMALLEST_EDGE_UM, le=LARGEST_EDGE_UM)]
Percentile = Annotated[float, Field(ge=0, le=100)]
_MOST_CHANNELS, _MOST_CONVOLUTIONS, _MOST_LEVELS, _LONGEST_PATCH = 4096, 64, 10, 4096


_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bounds = tuple[_Positive, _Positive]


class TrainingRange(BaseModel):
    """Smallest and largest of what the training frames were like; nuclei by their 5th and 95th percentile.

    `range_over_noise` is the range of intensities that the network sees over the noise; `voxel_x_um` and
    `anisotropy` are of the files, before any resampling.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    diameter_um: Bounds
    voxel_x_um: Bounds
    anisotropy: Bounds
    range_over_noise: Bounds

    def after(self, start: TrainingRange | None) -> TrainingRange:
        """Widen the range by that of the start model; None: it does not tell it."""
        if start is None:
            return self
        ends = {
            name: (min(low, getattr(start, name)[0]), max(high, getattr(start, name)[1]))
            for name, (low, high) in self
        }
        return TrainingRange(**ends)


class TrainingFrames(BaseModel):
    """Digests (`nuclei3d.digests.digest_of_frame`) of the frames that a model has seen, by embryo and frame.

    Weights were fitted to `train`; epoch and thresholds chosen on `validation`. Those of a start model are
    among them; `complete` is false if that does not tell its own.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    train: dict[str, str]
    validation: dict[str, str] = Field(default_factory=dict)
    complete: bool = True

    def after(self, start: TrainingFrames | None) -> TrainingFrames:
        """Add the frames of the start model; None: it does not tell them."""
        if start is None:
            return self.model_copy(update={"complete": False})
        return TrainingFrames(
            train=_join(self.train, start.train),
            validation=_join(self.validation, start.validation),
            complete=start.complete and self.complete,
        )

    def mark_seen(self, volumes: Mapping[str, dict[str, Any]]) -> None:
        """Mark volumes of a metrics.json that are among these frames as ``seen``: their part."""
        for volume in volumes.values():
            part = self.part_of(volume.get("frame_digest", ""))
            if part is not None and volume.get("seen") != "train":
                volume["seen"] = part

    def part_of(self, digest: str) -> Literal["train", "validation"] | None:
        """Tell in which part a frame was, by its image or its labels; None: in neither."""
        if any(_same_frame(digest, known) for known in self.train.values()):
            return "train"
        return "validation" if any(_same_frame(digest, known) for known in self.validation.values()) else None


def _join(own: dict[str, str], other: dict[str, str]) -> dict[str, str]:
    """Join frames; another one of the same name gets a name of its own."""
    joined = dict(own)
    for name, digest in other.items():
        while joined.get(name, digest) != digest:
            name += "'"
        joined[name] = digest
    return joined


def _same_frame(one: str, other: str) -> bool:
    return any(
        first == second != "0" for first, second in zip(one.split("-"), other.split("-"), strict=False)
    )


class ModelInfo(BaseModel):
    """A model's kind, scale, normalisation, thresholds and origin.

    Attributes
    ----------
    kind
        ``views2d``: Cellpose's 2D CNN run over planes; ``full3d``: a 3D network.
    name
        Of the weights file in the folder; Cellpose shows it.
    diameter_px
        Diameter of a typical nucleus in pixels at the network's scale.
    nucleus_diameter_um, voxel_size_um
        Diameter of a typical nucleus and voxel size (z, y, x) of the training embryos; None if unknown (bare
        Cellpose weights).
    embryo_diameters_um
        Smallest and largest median diameter of the training embryos, if each was brought to the network's
        scale by its own nuclei: `nucleus_diameter_um` is then in between, and a volume needs a diameter of
        its own. None if all were brought there by `nucleus_diameter_um`.
    lower_percentile, upper_percentile, noise_floor
        Normalisation (`nuclei3d.intensity`).
    training
        What the training frames were like; None: unknown.
    width
        Channels of the first level of the 2D network; models of before have Cellpose's 32.
    full3d
        Shape of the 3D network and of what it sees; None for kind ``views2d``.
    cellprob_threshold, score_threshold, min_volume_um3, outline_threshold, outline_threshold_z
        Thresholds chosen on the validation embryos; outlines of models of before end at cellprob_threshold.
    versions, lineage
        Packages of the training; Git commit, md5 of data and slices, run id and the like.
    frames
        The frames that it has seen; None: unknown.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    kind: Literal["views2d", "full3d"] = "views2d"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = "nuclei_3d"
    diameter_px: Pixels
    nucleus_diameter_um: Micrometres | None = None
    voxel_size_um: tuple[Micrometres, Micrometres, Micrometres] | None = None
    embryo_diameters_um: Bounds | None = None
    lower_percentile: Percentile = 1.0
    upper_percentile: Percentile = 99.8
    noise_floor: Annotated[float, Field(ge=0, le=1e4)] = 10.0
    training: TrainingRange | None = None
    width: Annotated[int, Field(ge=8, le=64, multiple_of=8)] = CELLPOSE_WIDTH
    full3d: VolumeSpec | None = None
    cellprob_threshold: Annotated[float, Field(ge=-1000, le=1000)] = 0.0
    outline_threshold: Annotated[float, Field(ge=-1000, le=1000)] | None = None
    outline_threshold_z: Annotated[float, Field(ge=-1000, le=1000)] | None = None
    score_threshold: Annotated[float, Field(ge=0, le=1)] = 0.0
    min_volume_um3: Annotated[float, Field(ge=0, le=LARGEST_EDGE_UM**3)] = 0.0
    versions: dict[str, str] = Field(default_factory=dict)
    lineage: dict[str, str] = Field(default_factory=dict)
    created: str = Field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )
    frames: TrainingFrames | None = None

    @property
    def for_cellpose(self) -> bool:
        """Whether Cellpose 3 loads the weights; it knows 2D networks of one width only."""
        return self.kind == "views2d" and self.width == CELLPOSE_WIDTH

    @model_validator(mode="after")
    def _check_kind(self) -> ModelInfo:
        if (self.kind == "full3d") != (self.full3d is not None):
            raise ValueError("'full3d' (the network's shape) belongs to kind 'full3d', and only to it")
        return self

    @model_validator(mode="after")
    def _check_numbers(self) -> ModelInfo:
        if self.lower_percentile >= self.upper_percentile:
            raise ValueError("lower_percentile must be below upper_percentile")
        if self.full3d is not None:
            shape, patch = self.full3d.architecture, self.full3d.patch
            if max(shape.channels) > _MOST_CHANNELS:
                raise ValueError(f"full3d.architecture.channels: at most {_MOST_CHANNELS} are possible")
            if shape.convolutions > _MOST_CONVOLUTIONS or len(shape.channels) > _MOST_LEVELS:
                raise ValueError("full3d.architecture has too many levels or convolutions")
            if not 1e-3 <= self.full3d.anisotropy <= 1e3:
                raise ValueError("full3d.anisotropy must be between 0.001 and 1000")
            if any(
                not 0 < size <= _LONGEST_PATCH or size % factor
                for size, factor in zip(patch, shape.multiple, strict=True)
            ):
                raise ValueError(
                    f"full3d.patch: sizes must be multiples of {list(shape.multiple)} up to {_LONGEST_PATCH}"
                )
        return self


def read_info(path: Path) -> ModelInfo:
    """Read a model.json; an InputError names file and field."""
    try:
        return ModelInfo.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; a model folder holds a model.json") from None
    except ValidationError as error:
        raise _refused(path, "model.json", error) from None


def _refused(path: Path, kind: str, error: ValidationError) -> InputError:
    field, value, reason = first_problem(error)
    found = f" (found {value!r:.60})" if field else ""
    return InputError(f"{path} is not a valid {kind}: {field or 'the file'}: {reason}{found}")


@dataclass(frozen=True)
class Model:
    """A loaded model: the network, in evaluation mode on the CPU, and the path of the weights file."""

    network: nn.Module
    info: ModelInfo
    path: Path


def save_model(
    folder: Path, network: nn.Module, info: ModelInfo, card: str, *, compact: bool = False
) -> None:
    """Write a model folder, such as ``models/nuclei_3d``, whole or not at all; an existing one is replaced.

    The network is a 3D network, or a Cellpose 3 CNN, whose weights ``cellpose.models.CellposeModel`` loads.
    `info` becomes model.json and has the name of the weights file, `card` is the text of README.md. With
    `compact` the kernels of the convolutions are stored in float16, which halves the file; they are loaded
    into float32 again, here as in Cellpose, and biases, batch statistics and diameters stay as they are.
    """
    if info.name in (INFO_FILE, CARD_FILE):
        raise InputError(f"a model cannot be called '{info.name}'; choose another name (train.name)")
    state = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    if compact:
        state = {name: _half(value) if value.ndim > 1 else value for name, value in state.items()}
    with whole_folder(folder) as partial:
        torch.save(state, partial / info.name)
        (partial / INFO_FILE).write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (partial / CARD_FILE).write_text(card.rstrip() + "\n", encoding="utf-8")


def require_model(path: Path, given_as: str = "--model") -> None:
    """Raise InputError if there is nothing at a path."""
    if not path.exists():
        raise missing(
            path, f"no model at {path} ({given_as}); give a model folder (with {INFO_FILE}) or a weights file"
        )


def load_model(path: str | PathLike[str]) -> Model:
    """Load a model from its folder or its weights file.

    A bare weights file of Cellpose 3, with no model.json beside it, loads with its own ``diam_mean`` and this
    package's defaults; the reader is told. InputError is raised if there is no such file, it holds no weights
    of a Cellpose 3 CNN, or model.json is not valid.
    """
    path = Path(path)
    require_model(path)
    if path.name in (INFO_FILE, CARD_FILE):
        raise InputError(
            f"{path} is not the weights; give the folder {path.parent} or the weights file in it"
        )
    info = info_beside(path)
    weights = path / info.name if info is not None and path.is_dir() else path
    spec, width = (None, CELLPOSE_WIDTH) if info is None else (info.full3d, info.width)
    network = network_from_state(read_state(weights), str(weights), spec, width)
    if info is None:
        diameter = float(network.get_parameter("diam_mean").item())
        name = re.sub("[^A-Za-z0-9_.-]", "_", weights.name)
        try:
            info = ModelInfo(name=name, diameter_px=diameter)
        except ValidationError as error:
            raise _refused(weights, "weights file", error) from None
        say(
            f"{weights}: bare Cellpose weights without {INFO_FILE}; using their diameter of {diameter:g} px "
            "and default normalisation and thresholds"
        )
    return Model(network=network, info=info, path=weights)


def info_beside(path: Path) -> ModelInfo | None:
    """Read the model.json of a model folder, or that beside its weights file; None: bare weights."""
    if path.is_dir():
        return read_info(path / INFO_FILE)
    described = path.parent / INFO_FILE
    info = read_info(described) if described.is_file() else None
    return info if info is not None and info.name == path.name else None


def digest_of_weights(path: Path) -> str:
    """Give the SHA-256 of a weights file, or of that in a model folder: what tells a model from another."""
    require_model(path)
    weights = path / read_info(path / INFO_FILE).name if path.is_dir() else path
    try:
        return hashlib.sha256(weights.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"cannot read the weights {weights}: {error.strerror}") from None


_THRESHOLDS = ("cellprob_threshold", "outline_threshold", "outline_threshold_z", "score_threshold")


def thresholds_of(model: object) -> dict[str, float | None]:
    """Give the thresholds of a model, or of settings that it predicts with, by their names in model.json."""
    return {name: getattr(model, name) for name in (*_THRESHOLDS, "min_volume_um3")}


def scored_model(info: ModelInfo, weights_sha256: str) -> dict[str, Any]:
    """Give what metrics.json says of the model that was scored: enough to know it again, thresholds too."""
    named = info.model_dump(include={"name", "kind", "created"})
    return {**named, "weights_sha256": weights_sha256, "thresholds": thresholds_of(info)}


def check_output(model: Model) -> None:
    """Raise InputError where the network, shown noise, gives anything but finite numbers."""
    network = model.network
    shape: tuple[int, ...] = (1, INPUT_CHANNELS, 32, 32)
    if isinstance(network, VolumeNetwork):
        shape = (1, 1, *network.spec.architecture.multiple)
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = network(image)
    if not bool(torch.isfinite(found if isinstance(found, Tensor) else found[0]).all()):
        raise InputError(f"{model.path}: the network gives NaN or infinite values; train it again")


def read_state(weights: Path) -> Mapping[str, Tensor]:
    """Read a weights file without running any code from it."""
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read the weights {weights}: {error.strerror or error}") from None
    except Exception:
        # what is no such file, or damaged, can make torch raise nearly anything
        raise InputError(
            f"{weights} is not a weights file: expected a state dict saved by torch (a Cellpose 3 CNN)"
        ) from None
    return state  # type: ignore[no-any-return]


def network_from_state(
    state: Mapping[str, Tensor],
    where: str = "the weights",
    spec: VolumeSpec | None = None,
    width: int = CELLPOSE_WIDTH,
) -> nn.Module:
    """Make a network from weights saved by this package or by Cellpose 3, in evaluation mode.

    `where` is what to call the weights in an error, such as their file; without the `spec` of a 3D network
    they are those of a Cellpose 3 CNN with two input channels and `width` channels in its first level.
    InputError is raised if a name or a shape is not that of the network, or a tensor is none of dense, real,
    finite numbers in the network's precision.
    """
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise InputError(f"{where}: no weights of a network (a mapping of names to tensors was expected)")
    # on torch's meta device, without memory: what model.json asks for is made when the weights have its shape
    with torch.device("meta"):
        if spec is not None:
            network, kind = new_volume_network(spec, seed=0), "the 3D network that model.json describes"
        else:
            network = new_network(30.0, 0, width)
            kind = f"a Cellpose 3 CNN with 2 channels in and 3 out, of width {width}"
    if spec is None:
        if "W2" in state or any(name.startswith("encoder.") for name in state):
            raise InputError(
                f"{where}: weights of Cellpose 4 or a transformer; a Cellpose 3 CNN was expected"
            )
        state = {name.removeprefix("module."): value for name, value in state.items()}
    wanted = network.state_dict()
    unknown = sorted(set(state) - set(wanted))
    missing = sorted(name for name in set(wanted) - set(state) if not name.endswith(_OPTIONAL))
    if unknown or missing:
        found = f"unknown '{unknown[0]}'" if unknown else f"missing '{missing[0]}'"
        raise InputError(f"{where}: not {kind}: {found} ({len(unknown)} unknown, {len(missing)} missing)")
    for name, value in state.items():
        if reason := _unusable(value, wanted[name], name):
            raise InputError(f"{where}: '{name}' {reason} ({kind})")
    network = new_network(30.0, 0, width) if spec is None else new_volume_network(spec, seed=0)
    network.load_state_dict({n: v.reshape(wanted[n].shape) for n, v in state.items()}, strict=False)
    return network.eval()


def _unusable(value: Tensor, wanted: Tensor, name: str) -> str:
    """Say why a tensor cannot take the place of another one; "" where it can."""
    if value.is_nested or value.layout != torch.strided or value.is_quantized or value.is_meta:
        return "is sparse, nested, quantised or empty of data; expected a plain dense tensor"
    if value.is_floating_point() != wanted.is_floating_point() or value.is_complex():
        return f"has type {str(value.dtype).removeprefix('torch.')}, expected {str(wanted.dtype)[6:]}"
    # Cellpose has saved its diameters with an axis and without.
    if value.shape != wanted.shape and not value.numel() == wanted.numel() == 1:
        return f"has shape {tuple(value.shape)}, expected {tuple(wanted.shape)}"
    value = value.to(wanted.dtype)
    if not bool(torch.isfinite(value).all()):
        return "holds NaN or infinite values"
    if name.endswith("running_var") and bool((value < 0).any()):
        return "holds negative variances"
    return ""


def _half(kernel: Tensor) -> Tensor:
    """Round to float16; a value beyond its range, which no trained kernel has, keeps the tensor as it is."""
    rounded = kernel.half()
    return rounded if bool(torch.isfinite(rounded).all()) else kernel
