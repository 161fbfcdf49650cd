"""What is trained, by the kind of network: the network to start from, and its examples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nuclei3d.config import Params
from nuclei3d.console import say
from nuclei3d.core.networks import network_from_state, new_network
from nuclei3d.core.training.examples import Examples, PlaneExamples
from nuclei3d.core.training.planes import PlaneSet
from nuclei3d.core.training.sampling import plane_weights, volume_weights
from nuclei3d.core.training.stored_images import ImageInfo
from nuclei3d.core.training.volume_examples import VolumeExamples
from nuclei3d.core.volume_network import (
    Targets,
    VolumeNetwork,
    VolumeSpec,
    count_parameters,
    describe,
    new_volume_network,
    same_architecture,
)
from nuclei3d.core.volume_planning import plan_architecture, plan_patch
from nuclei3d.errors import InputError
from nuclei3d.models.folder import load_model, read_state, require_model
from nuclei3d.stages.training_planes import Slices, load_planes
from nuclei3d.stages.training_volumes import load_volumes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn


@dataclass(frozen=True)
class Training:
    """A network to train and its examples.

    Attributes
    ----------
    network
        To start from.
    start_digest
        Digest of where its weights come from.
    spec
        Of a 3D network; None for a 2D one.
    examples
        What it is trained on.
    infos, weights
        The planes (volumes) that crops are drawn from, and how often.
    planes
        The same for a 2D network.
    plan
        What there is, in words.
    """

    network: nn.Module
    start_digest: str
    spec: VolumeSpec | None
    examples: Examples
    infos: Sequence[ImageInfo]
    weights: NDArray[np.float64]
    planes: PlaneSet | None
    plan: str


def open_training(params: Params, described: Slices) -> Training:
    """Open the data set and make the network.

    Raises
    ------
    InputError
        If the data set was prepared for the other kind of network, is unusable, or the weights to start from
        are.
    """
    wanted = params.train.network
    if described.network != wanted:
        raise InputError(
            f"{described.folder} was prepared for train.network '{described.network}', not '{wanted}'; run "
            f"'nuclei3d prepare --set train.network={wanted}', or train with "
            f"--set train.network={described.network}"
        )
    return _open_volumes(params, described) if wanted == "full3d" else _open_planes(params, described)


def _open_planes(params: Params, described: Slices) -> Training:
    settings = params.train
    network: nn.Module = new_network(settings.diameter_px, params.seed)
    digest = "scratch"
    if settings.start_from is not None:
        weights, digest = _start_weights(settings.start_from)
        started = network_from_state(read_state(weights), where=str(weights))
        with torch.no_grad():
            started.diam_mean.fill_(settings.diameter_px)
        network = started
    planes = load_planes(described, "train", settings.memory_limit_gb)
    validation = load_planes(described, "validation", settings.memory_limit_gb)
    if not len(planes):
        raise InputError(
            f"{described.folder} holds no training planes; make the slices again with 'nuclei3d prepare'"
        )
    sparse = sum(info.nuclei < settings.min_train_masks for info in planes.infos)
    if sparse:
        weight = settings.sampling.sparse
        say(
            f"{sparse} of {len(planes)} planes show fewer than {settings.min_train_masks} nuclei"
            + (f"; they are drawn with weight {weight:g}" if weight else "; they are left out")
            + " (train.sampling.sparse)"
        )
    return Training(
        network,
        digest,
        None,
        PlaneExamples(
            planes, validation, settings, planes_diameter_px=described.diameter_px, seed=params.seed
        ),
        planes.infos,
        plane_weights(planes.infos, settings.sampling, settings.min_train_masks),
        planes,
        f"{len(planes)} planes, {len(validation)} for validation",
    )


def _open_volumes(params: Params, described: Slices) -> Training:
    settings = params.train
    spec = volume_spec(params, described)
    network, digest = new_volume_network(spec, params.seed), "scratch"
    if settings.start_from is not None:
        _, digest = _start_weights(settings.start_from)
        network = _volume_start(Path(settings.start_from), spec)
    volumes, validation = (load_volumes(described, part) for part in ("train", "validation"))
    if not len(volumes):
        raise InputError(f"{described.folder} holds no training volumes; make them with 'nuclei3d prepare'")
    patch = " x ".join(map(str, spec.patch))
    return Training(
        network,
        digest,
        spec,
        VolumeExamples(
            volumes,
            validation,
            settings,
            spec=spec,
            nucleus_diameter_um=float(described.summary["nucleus_diameter_um"]),
            seed=params.seed,
        ),
        volumes.infos,
        volume_weights(volumes.infos, settings.sampling),
        None,
        f"{len(volumes)} volumes, {len(validation)} for validation, in patches of {patch} voxels; a 3D "
        f"network of {count_parameters(network) / 1e6:.2g} M parameters for anisotropy {spec.anisotropy:.3g} "
        f"({describe(spec.architecture)})",
    )


def volume_spec(params: Params, described: Slices) -> VolumeSpec:
    """Shape the 3D network after the voxel size of the data set and the size of its nuclei."""
    settings, wanted = params.train, params.train.full3d
    try:
        depth_um = float(described.summary["voxel_z_um"])
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{described.folder}/summary.json does not say the voxel size along z; make the data set again "
            "with 'nuclei3d prepare'"
        ) from None
    edge_um = float(described.summary["nucleus_diameter_um"]) / settings.diameter_px
    anisotropy = round(depth_um / edge_um, 4)
    architecture = plan_architecture(anisotropy, wanted.profile, wanted.pooling, wanted.style)
    multiple = architecture.multiple
    patch = wanted.patch or plan_patch(architecture, settings.diameter_px, anisotropy, wanted.patch_diameters)
    if any(size % factor for size, factor in zip(patch, multiple, strict=True)):
        raise InputError(
            f"train.full3d.patch {list(patch)} does not suit the network: (z, y, x) must be multiples of "
            f"{list(multiple)}"
        )
    targets: Targets = "tanh" if described.summary.get("targets") == "tanh" else "heat"
    return VolumeSpec(architecture, anisotropy, patch, targets)


def _start_weights(start_from: str) -> tuple[Path, str]:
    """Find the weights to start from, and digest them."""
    path = Path(start_from)
    require_model(path, "train.start_from")
    weights = load_model(path).path if path.is_dir() else path
    return weights, hashlib.md5(weights.read_bytes(), usedforsecurity=False).hexdigest()


def _volume_start(path: Path, spec: VolumeSpec) -> VolumeNetwork:
    network = load_model(path).network
    if not same_architecture(network, spec):
        raise InputError(
            f"train.start_from: {path} holds another network than this training shapes "
            f"({describe(spec.architecture)}, targets {spec.targets}); give a 3D model trained at about the "
            "same voxel size with the same train.full3d.profile, or null"
        )
    started = new_volume_network(spec, 0)
    started.load_state_dict(network.state_dict())
    return started
