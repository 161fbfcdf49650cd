"""A model as a folder: the weights, model.json (all that is needed to use them) and README.md (the card)."""

from __future__ import annotations

import datetime
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from nuclei3d.console import say
from nuclei3d.errors import InputError, missing
from nuclei3d.networks.cpnet import new_network
from nuclei3d.networks.unet3d import VolumeSpec, new_volume_network
from nuclei3d.outputs import whole_folder

INFO_FILE = "model.json"
CARD_FILE = "README.md"

_OPTIONAL = ("diam_mean", "diam_labels", "num_batches_tracked")
"""Ends of names that saved weights may lack."""

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Percentile = Annotated[float, Field(ge=0, le=100)]


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
    lower_percentile, upper_percentile, noise_floor
        Normalisation (`nuclei3d.intensity`).
    full3d
        Shape of the 3D network and of what it sees; None for kind ``views2d``.
    cellprob_threshold, score_threshold, min_volume_um3
        Thresholds chosen on the validation embryos.
    versions, lineage
        Packages of the training; Git commit, md5 of data and slices, run id and the like.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    kind: Literal["views2d", "full3d"] = "views2d"
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] = "nuclei_3d"
    diameter_px: PositiveFloat
    nucleus_diameter_um: PositiveFloat | None = None
    voxel_size_um: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    lower_percentile: Percentile = 1.0
    upper_percentile: Percentile = 99.8
    noise_floor: Annotated[float, Field(ge=0)] = 10.0
    full3d: VolumeSpec | None = None
    cellprob_threshold: float = 0.0
    score_threshold: Annotated[float, Field(ge=0, le=1)] = 0.0
    min_volume_um3: Annotated[float, Field(ge=0)] = 0.0
    versions: dict[str, str] = Field(default_factory=dict)
    lineage: dict[str, str] = Field(default_factory=dict)
    created: str = Field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )

    @model_validator(mode="after")
    def _check_kind(self) -> ModelInfo:
        if (self.kind == "full3d") != (self.full3d is not None):
            raise ValueError("'full3d' (the network's shape) belongs to kind 'full3d', and only to it")
        return self


def read_info(path: Path) -> ModelInfo:
    """Read a model.json; an InputError names file and field."""
    try:
        return ModelInfo.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; a model folder holds a model.json") from None
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise InputError(f"{path} is not a valid model.json: {field}: {problem['msg']}") from None


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

    Parameters
    ----------
    network
        A 3D network, or a Cellpose 3 CNN, whose weights ``cellpose.models.CellposeModel`` loads.
    info
        Becomes model.json; ``info.name`` is the name of the weights file.
    card
        Text of README.md.
    compact
        Whether the kernels of the convolutions are stored in float16, which halves the file. They are loaded
        into float32 again, here as in Cellpose; biases, batch statistics and diameters stay as they are.
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
    package's defaults; the reader is told.

    Raises
    ------
    InputError
        If there is no such file, it holds no weights of a Cellpose 3 CNN, or model.json is not valid.
    """
    path = Path(path)
    require_model(path)
    if path.name in (INFO_FILE, CARD_FILE):
        raise InputError(
            f"{path} is not the weights; give the folder {path.parent} or the weights file in it"
        )
    info: ModelInfo | None = None
    weights, described = path, path.parent / INFO_FILE
    if path.is_dir():
        info = read_info(path / INFO_FILE)
        weights = path / info.name
    elif described.is_file() and (found := read_info(described)).name == path.name:
        info = found
    spec = None if info is None else info.full3d
    network = network_from_state(read_state(weights), str(weights), spec)
    if info is None:
        diameter = float(network.get_parameter("diam_mean").item())
        name = re.sub("[^A-Za-z0-9_.-]", "_", weights.name)
        info = ModelInfo(name=name, diameter_px=diameter)
        say(
            f"{weights}: bare Cellpose weights without {INFO_FILE}; using their diameter of {diameter:g} px "
            "and default normalisation and thresholds"
        )
    return Model(network=network, info=info, path=weights)


def read_state(weights: Path) -> Mapping[str, Tensor]:
    """Read a weights file without running any code from it."""
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"cannot read the weights {weights}: {error.strerror or error}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, AttributeError):
        raise InputError(
            f"{weights} is not a weights file: expected a state dict saved by torch (a Cellpose 3 CNN)"
        ) from None
    return state  # type: ignore[no-any-return]


def network_from_state(
    state: Mapping[str, Tensor], where: str = "the weights", spec: VolumeSpec | None = None
) -> nn.Module:
    """Make a network from weights saved by this package or by Cellpose 3, in evaluation mode.

    `where` is what to call the weights in an error, such as their file; without the `spec` of a 3D network
    they are those of a Cellpose 3 CNN with two input channels.

    Raises
    ------
    InputError
        If a name or a shape is not that of the network, or a value is not finite.
    """
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{where}: no weights of a network (a mapping of names to tensors was expected)")
    network: nn.Module
    if spec is not None:
        network, kind = new_volume_network(spec, seed=0), "the 3D network that model.json describes"
    else:
        if "W2" in state or any(name.startswith("encoder.") for name in state):
            raise InputError(
                f"{where}: weights of Cellpose 4 or a transformer; a Cellpose 3 CNN was expected"
            )
        network, kind = new_network(30.0, seed=0), "a Cellpose 3 CNN with 2 channels in and 3 out"
        state = {name.removeprefix("module."): value for name, value in state.items()}
    wanted = network.state_dict()
    unknown = sorted(set(state) - set(wanted))
    missing = sorted(name for name in set(wanted) - set(state) if not name.endswith(_OPTIONAL))
    if unknown or missing:
        found = f"unknown '{unknown[0]}'" if unknown else f"missing '{missing[0]}'"
        raise InputError(f"{where}: not {kind}: {found} ({len(unknown)} unknown, {len(missing)} missing)")
    for name, value in state.items():
        shape, expected = value.shape, wanted[name].shape
        # Cellpose has saved its diameters with an axis and without.
        if shape != expected and not value.numel() == wanted[name].numel() == 1:
            raise InputError(
                f"{where}: '{name}' has shape {tuple(shape)}, expected {tuple(expected)} ({kind})"
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"{where}: '{name}' holds NaN or infinite values")
    network.load_state_dict({n: v.reshape(wanted[n].shape) for n, v in state.items()}, strict=False)
    return network.eval()


def _half(kernel: Tensor) -> Tensor:
    """Round to float16; a value beyond its range, which no trained kernel has, keeps the tensor as it is."""
    rounded = kernel.half()
    return rounded if bool(torch.isfinite(rounded).all()) else kernel
