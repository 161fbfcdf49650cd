"""The 2D network, Cellpose's CPnet, and where and in what precision networks compute."""

from __future__ import annotations

import torch
from cellpose.resnet_torch import CPnet

from nuclei3d.errors import InputError

CHANNELS = (2, 32, 64, 128, 256)
"""Input channels (gray, empty) and the channels of the four levels, as in every Cellpose 3 CNN."""

FLOW_SCALE = 5.0
"""The network predicts flows times 5 (Stringer et al. 2021)."""


def new_network(diameter_px: float, seed: int) -> CPnet:
    """Make an untrained network, the one that ``cellpose.models.CellposeModel`` builds by default.

    It has 2 input channels (gray and an empty one) and gives 5 x flow in y, 5 x flow in x, logit. The
    diameter is kept in the weights, as Cellpose does; torch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CPnet(list(CHANNELS), 3, sz=3, max_pool=True, diam_mean=float(diameter_px))


def choose_device(wish: str) -> torch.device:
    """Choose where to compute: ``auto`` (CUDA where there is one, else the CPU), ``cpu`` or ``cuda``."""
    if wish not in ("auto", "cpu", "cuda"):
        raise InputError(f"device '{wish}' is unknown; choose auto, cpu or cuda")
    available = torch.cuda.is_available()
    if wish == "cuda" and not available:
        raise InputError("device 'cuda' was asked for, but torch finds no CUDA device; use auto or cpu")
    return torch.device("cuda" if available and wish != "cpu" else "cpu")


def choose_precision(wish: str, device: torch.device) -> torch.dtype:
    """Choose the type in which convolutions are computed; everything else stays float32 (autocast).

    ``auto`` is bfloat16 where the hardware computes it. On CPUs that is AVX512-BF16 or AMX (measured: 2 to 3
    times faster); without, it is emulated and half as fast.
    """
    if wish not in ("auto", "float32", "bfloat16"):
        raise InputError(f"precision '{wish}' is unknown; choose auto, float32 or bfloat16")
    if wish == "auto":
        if device.type == "cuda":
            computes = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            # torch offers these questions under private names only
            questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
            computes = any(getattr(torch.cpu, question, bool)() for question in questions)
        return torch.bfloat16 if computes else torch.float32
    return torch.bfloat16 if wish == "bfloat16" else torch.float32
