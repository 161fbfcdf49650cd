"""The 2D network compiled by OpenVINO for the CPU: the same function, about 1.4 times faster than torch's.

An optional extra (``pip install 'nuclei3d[fast]'``). The graph is built here from the weights of a CPnet,
operation by operation, so no exporter or converter is involved.
"""

from __future__ import annotations

import hashlib
import importlib.util
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nuclei3d.networks.cpnet import CHANNELS

_EPSILON = 1e-5  # of CPnet's batch normalisation
_LEVELS = len(CHANNELS) - 1

_MOST_COMPILED = 4
_COMPILED: dict[tuple[object, ...], Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {}

Node = Any
Weights = Mapping[str, NDArray[np.float32]]


def has_openvino() -> bool:
    """Tell whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


def compiled_cpnet(
    network: nn.Module, precision: torch.dtype, threads: int
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Compile a network, or take it from the few that were compiled before with the same weights.

    Parameters and result are those of `compile_cpnet`.
    """
    digest = hashlib.blake2b(digest_size=16)
    state = network.state_dict()
    for value in state.values():
        digest.update(value.detach().cpu().contiguous().numpy().data)
    key = (digest.digest(), str(precision), threads, threading.get_ident())
    if key not in _COMPILED:
        while len(_COMPILED) >= _MOST_COMPILED:
            _COMPILED.pop(next(iter(_COMPILED)))
        _COMPILED[key] = compile_cpnet(state, precision, threads)
    return _COMPILED[key]


def compile_cpnet(
    state: Mapping[str, torch.Tensor], precision: torch.dtype, threads: int
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Compile a CPnet.

    Parameters
    ----------
    state
        Its weights.
    precision
        ``torch.float32`` or ``torch.bfloat16``.
    threads
        Threads of an inference.

    Returns
    -------
    callable
        From float32 (n, 2, height, width), sides multiples of 8, to float32 (n, 3, height, width). Not to be
        called from two threads at once.
    """
    import openvino as ov  # type: ignore[import-not-found,unused-ignore]

    weights = {name: value.detach().cpu().float().numpy() for name, value in state.items()}
    hint = "bf16" if precision == torch.bfloat16 else "f32"
    compiled = ov.Core().compile_model(
        _build(weights),
        "CPU",
        {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1},
    )
    request = compiled.create_infer_request()

    def run(stack: NDArray[np.float32]) -> NDArray[np.float32]:
        request.infer([np.ascontiguousarray(stack)], share_inputs=True)
        return np.array(request.get_output_tensor(0).data, dtype=np.float32)

    return run


def _build(weights: Weights) -> Any:
    """Build the graph of CPnet's forward pass in evaluation mode."""
    import openvino as ov  # type: ignore[import-not-found,unused-ignore]
    from openvino import opset13 as ops

    stack = ops.parameter([-1, CHANNELS[0], -1, -1], np.float32, name="stack")
    levels: list[Node] = []
    below: Node = stack
    for level in range(_LEVELS):
        if level > 0:
            below = ops.max_pool(levels[-1], [2, 2], [1, 1], [0, 0], [0, 0], [2, 2]).output(0)
        levels.append(_down(below, weights, f"downsample.down.res_down_{level}"))
    mean = ops.reduce_mean(levels[-1], np.array([2, 3]), keep_dims=False)
    style = ops.divide(
        mean, ops.sqrt(ops.reduce_sum(ops.multiply(mean, mean), np.array([1]), keep_dims=True))
    )
    result = levels[-1]
    for level in reversed(range(_LEVELS)):
        if level < _LEVELS - 1:
            scales = np.array([2.0, 2.0], np.float32)
            result = ops.interpolate(
                result, scales, "nearest", "scales", axes=np.array([2, 3]), nearest_mode="floor",
                coordinate_transformation_mode="asymmetric",
            )  # fmt: skip
        result = _up(result, levels[level], style, weights, f"upsample.up.res_up_{level}")
    return ov.Model(
        [_convolve(_activate(result, weights, "output.0"), weights, "output.2")], [stack], "cpnet"
    )


def _normalise(node: Node, weights: Weights, name: str) -> Node:
    from openvino import opset13 as ops

    scale = weights[f"{name}.weight"] / np.sqrt(weights[f"{name}.running_var"] + _EPSILON)
    shift = weights[f"{name}.bias"] - weights[f"{name}.running_mean"] * scale
    return ops.add(ops.multiply(node, scale[None, :, None, None]), shift[None, :, None, None])


def _activate(node: Node, weights: Weights, name: str) -> Node:
    from openvino import opset13 as ops

    return ops.relu(_normalise(node, weights, name))


def _convolve(node: Node, weights: Weights, name: str) -> Node:
    from openvino import opset13 as ops

    kernel = weights[f"{name}.weight"]
    pads = [kernel.shape[2] // 2] * 2
    convolved = ops.convolution(node, kernel, [1, 1], pads, pads, [1, 1])
    return ops.add(convolved, weights[f"{name}.bias"][None, :, None, None])


def _down(node: Node, weights: Weights, name: str) -> Node:
    from openvino import opset13 as ops

    def step(value: Node, number: int) -> Node:
        at = f"{name}.conv.conv_{number}"
        return _convolve(_activate(value, weights, f"{at}.0"), weights, f"{at}.2")

    direct = _convolve(_normalise(node, weights, f"{name}.proj.0"), weights, f"{name}.proj.1")
    half = ops.add(direct, step(step(node, 0), 1))
    return ops.add(half, step(step(half, 2), 3))


def _up(node: Node, skipped: Node, style: Node, weights: Weights, name: str) -> Node:
    from openvino import opset13 as ops

    def styled(value: Node, number: int) -> Node:
        at = f"{name}.conv.conv_{number}"
        feature = ops.add(
            ops.matmul(style, weights[f"{at}.full.weight"], False, True), weights[f"{at}.full.bias"][None]
        )
        value = ops.add(value, ops.unsqueeze(feature, np.array([2, 3])))
        return _convolve(_activate(value, weights, f"{at}.conv.0"), weights, f"{at}.conv.2")

    direct = _convolve(_normalise(node, weights, f"{name}.proj.0"), weights, f"{name}.proj.1")
    at = f"{name}.conv.conv_0"
    first = _convolve(_activate(node, weights, f"{at}.0"), weights, f"{at}.2")
    half = ops.add(direct, styled(ops.add(first, skipped), 1))
    return ops.add(half, styled(styled(half, 2), 3))
