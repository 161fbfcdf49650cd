"""The 2D network: Cellpose's CPnet, made anew or from saved weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from cellpose.resnet_torch import CPnet
from torch import Tensor

from nuclei3d.errors import InputError

CHANNELS = (2, 32, 64, 128, 256)
"""Input channels (gray, empty) and the channels of the four levels, as in every Cellpose 3 CNN."""

FLOW_SCALE = 5.0
"""The network predicts flows times 5 (Stringer et al. 2021)."""

_OPTIONAL = ("diam_mean", "diam_labels")


def new_network(diameter_px: float, seed: int) -> CPnet:
    """Make an untrained network.

    Parameters
    ----------
    diameter_px
        Diameter of nuclei at the network's scale; kept in the weights, as Cellpose does.
    seed
        Seed of the initial weights; torch's global generator is left as it was.

    Returns
    -------
    CPnet
        The network that ``cellpose.models.CellposeModel`` builds by default: 2 input channels (gray and an
        empty one), outputs (5 x flow in y, 5 x flow in x, logit).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CPnet(list(CHANNELS), 3, sz=3, max_pool=True, diam_mean=float(diameter_px))


def network_from_state(state: Mapping[str, Tensor], where: str = "the weights") -> CPnet:
    """Make a network from the weights of a Cellpose 3 network.

    Parameters
    ----------
    state
        Names and tensors as saved by Cellpose or by this package.
    where
        What to call the weights in an error, such as their file.

    Raises
    ------
    InputError
        If a name or a shape is not that of a Cellpose 3 CNN with two input channels, or a value is not
        finite.
    """
    network = new_network(30.0, seed=0)
    wanted = network.state_dict()
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{where}: no weights of a network (a mapping of names to tensors was expected)")
    if "W2" in state or any(name.startswith("encoder.") for name in state):
        raise InputError(f"{where}: weights of Cellpose 4 or a transformer; a Cellpose 3 CNN was expected")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    unknown = sorted(set(state) - set(wanted))
    missing = sorted(
        set(wanted) - set(state) - set(_OPTIONAL) - {n for n in wanted if n.endswith("num_batches_tracked")}
    )
    if unknown or missing:
        found = f"unknown '{unknown[0]}'" if unknown else f"missing '{missing[0]}'"
        raise InputError(
            f"{where}: not a Cellpose 3 CNN: {found} ({len(unknown)} unknown, {len(missing)} missing)"
        )
    for name, value in state.items():
        if value.numel() != wanted[name].numel() or value.squeeze().shape != wanted[name].squeeze().shape:
            raise InputError(
                f"{where}: '{name}' has shape {tuple(value.shape)}, expected {tuple(wanted[name].shape)} "
                "(a Cellpose 3 CNN with 2 channels in and 3 out)"
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"{where}: '{name}' holds NaN or infinite values")
    network.load_state_dict({n: v.reshape(wanted[n].shape) for n, v in state.items()}, strict=False)
    return network.eval()


def choose_device(wish: str) -> torch.device:
    """Choose where to compute.

    Parameters
    ----------
    wish
        ``auto`` (CUDA where there is one, else the CPU), ``cpu`` or ``cuda``.

    Raises
    ------
    InputError
        If CUDA is wished and absent, or the wish is unknown.
    """
    if wish not in ("auto", "cpu", "cuda"):
        raise InputError(f"device '{wish}' is unknown; choose auto, cpu or cuda")
    available = torch.cuda.is_available()
    if wish == "cuda" and not available:
        raise InputError("device 'cuda' was asked for, but torch finds no CUDA device; use auto or cpu")
    return torch.device("cuda" if available and wish != "cpu" else "cpu")


def choose_precision(wish: str, device: torch.device) -> torch.dtype:
    """Choose the type in which convolutions are computed; everything else stays float32 (autocast).

    Parameters
    ----------
    wish
        ``float32``, ``bfloat16`` or ``auto``: bfloat16 where the hardware computes it. On CPUs that
        is AVX512-BF16 or AMX (measured: 2 to 3 times faster); without, it is emulated and half as fast.

    Raises
    ------
    InputError
        If the wish is unknown.
    """
    if wish not in ("auto", "float32", "bfloat16"):
        raise InputError(f"precision '{wish}' is unknown; choose auto, float32 or bfloat16")
    if wish == "auto":
        computes = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device.type == "cuda"
            else _cpu_computes_bfloat16()
        )
        return torch.bfloat16 if computes else torch.float32
    return torch.bfloat16 if wish == "bfloat16" else torch.float32


def _cpu_computes_bfloat16() -> bool:
    # torch offers these questions under private names only.
    for question in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        ask = getattr(torch.cpu, question, None)
        if ask is not None and ask():
            return True
    return False
