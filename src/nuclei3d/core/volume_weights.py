"""Saved weights of a 3D network, checked against the shape that they should have."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nuclei3d.core.volume_network import VolumeNetwork, VolumeSpec, new_volume_network
from nuclei3d.errors import InputError


def volume_network_from_state(
    spec: VolumeSpec, state: Mapping[str, Tensor], where: str = "the weights"
) -> VolumeNetwork:
    """Make a network from saved weights, in evaluation mode.

    Raises
    ------
    InputError
        If a name or a shape is not that of the architecture, or a value is not finite.
    """
    network = new_volume_network(spec, seed=0)
    wanted = network.state_dict()
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{where}: no weights of a network (a mapping of names to tensors was expected)")
    unknown, missing = sorted(set(state) - set(wanted)), sorted(set(wanted) - set(state))
    if unknown or missing:
        found = f"unknown '{unknown[0]}'" if unknown else f"missing '{missing[0]}'"
        raise InputError(
            f"{where}: not the 3D network that model.json describes: {found} ({len(unknown)} unknown, "
            f"{len(missing)} missing)"
        )
    for name, value in state.items():
        if value.shape != wanted[name].shape:
            raise InputError(
                f"{where}: '{name}' has shape {tuple(value.shape)}, model.json describes "
                f"{tuple(wanted[name].shape)}"
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"{where}: '{name}' holds NaN or infinite values")
    network.load_state_dict(dict(state))
    return network.eval()
