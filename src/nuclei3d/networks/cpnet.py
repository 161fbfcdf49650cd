"""The 2D network, Cellpose's CPnet, and where and in what precision networks compute."""

from __future__ import annotations

import torch
from cellpose.resnet_torch import CPnet

from nuclei3d.errors import InputError

INPUT_CHANNELS = 2
"""Gray and an empty one, as in every Cellpose 3 CNN."""

LEVELS = 4

CELLPOSE_WIDTH = 32
"""Channels of the first level in Cellpose's own CNNs, the only ones that Cellpose loads."""

FLOW_SCALE = 5.0
"""The network predicts flows times 5 (Stringer et al. 2021)."""


def channels(width: int) -> list[int]:
    """Give the channels of the input and of the four levels, each twice as wide as the one above."""
    return [INPUT_CHANNELS, *(width << level for level in range(LEVELS))]


def new_network(diameter_px: float, seed: int, width: int = CELLPOSE_WIDTH) -> CPnet:
    """Make an untrained network; by default the one that ``cellpose.models.CellposeModel`` builds.

    It has 2 input channels (gray and an empty one), `width` channels in its first level, and gives 5 x flow
    in y, 5 x flow in x, logit. The diameter is kept in the weights, as Cellpose does; torch's global
    generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CPnet(channels(width), 3, sz=3, max_pool=True, diam_mean=float(diameter_px))


def choose_device(wish: str) -> torch.device:
    """Choose where to compute: ``auto`` (CUDA where there is one, else the CPU), ``cpu`` or ``cuda``."""
    if wish not in ("auto", "cpu", "cuda"):
        raise InputError(f"device '{wish}' is unknown; choose auto, cpu or cuda")
    available = torch.cuda.is_available()
    if wish == "cuda" and not available:
        raise InputError("device 'cuda' was asked for, but torch finds no CUDA device; use auto or cpu")
    return torch.device("cuda" if available and wish != "cpu" else "cpu")


def choose_precision(wish: str, device: torch.device) -> torch.dtype:
    """Choose the type in which convolutions are computed; everything else stays float32.

    ``auto`` is bfloat16 where the hardware computes it. On CPUs that is AVX512-BF16 or AMX (measured: 2 to 3
    times faster); without, it is emulated and half as fast.
    """
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
    if wish not in ("auto", *types):
        raise InputError(f"precision '{wish}' is unknown; choose auto, {', '.join(types)}")
    if wish == "auto":
        if device.type == "cuda":
            computes = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            # torch offers these questions under private names only
            questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
            computes = any(getattr(torch.cpu, question, bool)() for question in questions)
        wish = "bfloat16" if computes else "float32"
    return types[wish]
