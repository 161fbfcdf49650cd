"""The model that a training starts from: where it lies, and the parameters that follow from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nuclei3d.config import Params, load_params
from nuclei3d.config.loading import flat
from nuclei3d.config.sections import FineTuneParams, NormalizationParams
from nuclei3d.console import say
from nuclei3d.digests import digest_of
from nuclei3d.errors import InputError
from nuclei3d.images.embryos import find_embryos, read_labelled, split_embryos
from nuclei3d.networks.folder import INFO_FILE, Model, load_model, require_model
from nuclei3d.training.slicing import nucleus_volumes_um3, sphere_diameter_um

_MEASURED = 4
"""Labelled frames that are enough to know how wide a nucleus is."""
_fetched: dict[tuple[Path, str, str], Path] = {}
"""Start models out of a registry: an alias that moves meanwhile changes nothing of a training that began."""


def find_start_model(params: Params) -> Path | None:
    """Give the folder or weights file of `train.start_from`, a registered model downloaded if need be."""
    if params.train.start_from is None:
        return None
    from nuclei3d.experiment.registry import find_model

    asked = Path.cwd(), params.train.start_from, params.tracking.model_dump_json()
    if asked not in _fetched or not _fetched[asked].exists():
        _fetched[asked] = find_model(params.train.start_from, params)
    require_model(_fetched[asked], "train.start_from")
    return _fetched[asked]


def load_fine_tuning(
    file: Path | None, overrides: Sequence[str], *, asked: bool, trains: bool = True, data: Path | None = None
) -> Params:
    """Load parameters; those that follow from `train.start_from`, if it is given, come before the overrides.

    The kind and width of the network, the diameter in pixels and the normalisation are the start model's, and
    planes of `data`, if given, are cut at its scale. For a command that `trains`, learning rate, warm-up and
    epochs are those of `train.fine_tune`, or its defaults if the start model was `asked` for on the command
    line. Whatever changes what the file says is told in a line. InputError is raised if there is no such
    model, or it is a bare weights file and no diameter was given with it.
    """
    params = load_params(file, overrides)
    path = find_start_model(params)
    if path is None:
        return params
    names = [override.partition("=")[0].strip() for override in overrides]

    def is_set(name: str) -> bool:
        return any(f"{name}.".startswith(f"{each}.") for each in names)

    model = load_model(path)
    wanted = scale_of(model)
    if "train.diameter_px" not in wanted:
        if not is_set("train.diameter_px") and (asked or "diameter_px" not in params.train.model_fields_set):
            raise InputError(
                f"train.start_from: {path} is a bare weights file; say how wide its network sees a nucleus, "
                f"in pixels: --set train.diameter_px=D (it was saved with {model.info.diameter_px:g})"
            )
        wanted["train.diameter_px"] = params.train.diameter_px
    gentle = params.train.fine_tune or (FineTuneParams() if asked else None)
    if trains and gentle is not None:
        wanted |= {f"train.{name}": value for name, value in gentle.model_dump().items()}
    if data is not None and not is_set("prepare.downsample_xy"):
        diameter_px = params.train.diameter_px if is_set("train.diameter_px") else wanted["train.diameter_px"]
        wanted["prepare.downsample_xy"] = _downsampling(params, data, diameter_px)
    current = flat(params.model_dump(mode="json"))
    taken = {name: value for name, value in wanted.items() if not is_set(name) and value != current[name]}
    say(f"starting from {params.train.start_from}")
    for name, value in taken.items():
        say(f"  {name}={value}, for this start; {current[name]} otherwise (--set {name} overrides it)")
    return load_params(file, [*(f"{name}={value}" for name, value in taken.items()), *overrides])


def scale_of(model: Model) -> dict[str, Any]:
    """Give what a network's input was like in training, by parameter; of bare weights only kind and width."""
    info = model.info
    scale: dict[str, Any] = {"train.network": info.kind, "train.width": info.width}
    if info.full3d is not None:
        scale["prepare.targets"] = info.full3d.targets
    if (model.path.parent / INFO_FILE).is_file():
        scale["train.diameter_px"] = info.diameter_px
        scale |= {f"normalization.{name}": getattr(info, name) for name in NormalizationParams.model_fields}
    return scale


def _downsampling(params: Params, data: Path, diameter_px: float) -> float:
    """Say by how much x and y are downsampled so that the median nucleus is so wide; never upsampled."""
    frames = split_embryos(find_embryos(data), params.data.split).train
    widths = []
    for place in np.linspace(0, len(frames) - 1, min(len(frames), _MEASURED)).round().astype(int):
        volume = read_labelled(frames[place], params.data)
        sizes = nucleus_volumes_um3(volume.labels, volume.voxel_size)
        widths += [sphere_diameter_um(size) / volume.voxel_size.x for size in sizes.values()]
    return round(max(1.0, float(np.median(widths)) / diameter_px), 3) if widths else 1.0


def trace_start(params: Params) -> dict[str, str]:
    """Give what model.json says of the start model: where it lay, as it was given, and its weights' MD5."""
    path = find_start_model(params)
    if path is None:
        return {}
    given = str(params.train.start_from)
    name = Path(given).name if Path(given).is_absolute() else given
    return {"start_from": name, "start_md5": digest_of(load_model(path).path)}
