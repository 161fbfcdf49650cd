"""Cellpose's 2D CNN by OpenVINO, an optional extra (``pip install 'nuclei3d[fast]'``), on the CPU."""

from __future__ import annotations

import hashlib
import importlib.util
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from cellpose.resnet_torch import CPnet
from numpy.typing import NDArray
from torch import nn

from nuclei3d.config.sections import Engine
from nuclei3d.errors import InputError
from nuclei3d.networks.cpnet import INPUT_CHANNELS, LEVELS

Compiled = Callable[[NDArray[np.float32]], NDArray[np.float32]]
Node = Any


def has_openvino() -> bool:
    """Tell whether OpenVINO is installed."""
    return importlib.util.find_spec("openvino") is not None


MOST_COMPILED = 4
"""Networks that are kept compiled, of which a process needs one or two."""

_COMPILED: dict[tuple[object, ...], Compiled] = {}


def compile_if_wanted(
    network: nn.Module, device: torch.device, precision: torch.dtype, engine: Engine
) -> Compiled | None:
    """Compile the network if that is wanted and possible, or take one of the last few of the same weights."""
    if engine not in ("auto", "torch", "openvino"):
        raise InputError(f"engine '{engine}' is unknown; choose auto, torch or openvino")
    fits = device.type == "cpu" and isinstance(network, CPnet) and network.nbase[0] == INPUT_CHANNELS
    if precision == torch.int8:
        if engine == "torch":
            raise InputError("precision int8 is computed by OpenVINO only; use engine auto")
        engine = "openvino"
    if engine == "torch" or (engine == "auto" and not (fits and has_openvino())):
        return None
    if not fits:
        raise InputError("engine 'openvino' runs Cellpose's 2D CNN on the CPU only; use engine auto or torch")
    if not has_openvino():
        raise InputError("engine 'openvino' is not installed; install it with: pip install 'nuclei3d[fast]'")
    digest = hashlib.blake2b(digest_size=16)
    state, threads = network.state_dict(), torch.get_num_threads()
    for value in state.values():
        digest.update(value.detach().cpu().contiguous().numpy().data)
    key = (digest.digest(), str(precision), threads, threading.get_ident())
    if key not in _COMPILED:
        while len(_COMPILED) >= MOST_COMPILED:
            _COMPILED.pop(next(iter(_COMPILED)))
        _COMPILED[key] = compile_cpnet(state, precision, threads)
    return _COMPILED[key]


def compile_cpnet(state: Mapping[str, torch.Tensor], precision: torch.dtype, threads: int) -> Compiled:
    """Compile a CPnet by OpenVINO for the CPU: the same function, about 1.5 times faster than torch's.

    For float32, bfloat16 or int8 (rounded; 3 times faster again with AVX512-VNNI) and so many threads of an
    inference. The callable turns float32 (n, 2, height, width), sides multiples of 8, into float32 (n, 3,
    height, width), in one thread at a time. The graph is built from the weights: OpenVINO's own conversion
    takes ten times as long.
    """
    import openvino as ov  # type: ignore[import-not-found,unused-ignore]

    weights = {name: value.detach().cpu().float().numpy() for name, value in state.items()}
    graph = _Graph(weights, rounded=precision == torch.int8)
    hint = "bf16" if precision == torch.bfloat16 else "f32"
    compiled = ov.Core().compile_model(
        graph.build(),
        "CPU",
        {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1},
    )
    request = compiled.create_infer_request()

    def run(stack: NDArray[np.float32]) -> NDArray[np.float32]:
        request.infer([np.ascontiguousarray(stack)], share_inputs=True)
        return np.array(request.get_output_tensor(0).data, dtype=np.float32)

    return run


_INT8_SIGMAS = 16
"""Spread of a batch normalisation's output that 8 bits span. On real planes the largest values lie 8 to 26
off the mean; at 16 the error is that of ranges measured on such planes, at 8 six times as large."""

_KERNEL_ROOM = 2
"""Range of a kernel's 8 bits over its largest weight. With 7 bits in use the error is the same, and without
VNNI the sum of two products of 8 bits would not fit into 16."""


class _Graph:
    """CPnet's forward pass in evaluation mode; blocks are named as its weights are.

    `rounded` marks what goes into convolutions, their kernels too, as numbers of 8 bits, which OpenVINO then
    computes with. Their ranges follow from the batch normalisation before each (Nagel et al. 2019), so that
    no images are needed; the first level's two input channels and the output stay as they are.
    """

    def __init__(self, weights: Mapping[str, NDArray[np.float32]], *, rounded: bool = False) -> None:
        from openvino import opset13

        self._weights = weights
        self._rounded = rounded
        self._ops: Any = opset13

    def build(self) -> Any:
        import openvino as ov  # type: ignore[import-not-found,unused-ignore]

        ops = self._ops
        stack = ops.parameter([-1, INPUT_CHANNELS, -1, -1], np.float32, name="stack")
        levels: list[Node] = []
        for level in range(LEVELS):
            below = stack
            if level > 0:
                below = ops.max_pool(levels[-1], [2, 2], [1, 1], [0, 0], [0, 0], [2, 2]).output(0)
            levels.append(self._down(below, f"downsample.down.res_down_{level}"))
        mean = ops.reduce_mean(levels[-1], np.array([2, 3]), keep_dims=False)
        length = ops.sqrt(ops.reduce_sum(ops.multiply(mean, mean), np.array([1]), keep_dims=True))
        style = ops.divide(mean, length)
        result = levels[-1]
        for level in reversed(range(LEVELS)):
            if level < LEVELS - 1:
                scales = np.array([2.0, 2.0], np.float32)
                result = ops.interpolate(
                    result, scales, "nearest", "scales", axes=np.array([2, 3]), nearest_mode="floor",
                    coordinate_transformation_mode="asymmetric",
                )  # fmt: skip
            result = self._up(result, levels[level], style, f"upsample.up.res_up_{level}")
        return ov.Model([self._step(result, "output")], [stack], "cpnet")

    def _normalise(self, node: Node, name: str) -> Node:
        of = {part: self._weights[f"{name}.{part}"] for part in ("weight", "bias", "running_mean")}
        scale = of["weight"] / np.sqrt(self._weights[f"{name}.running_var"] + 1e-5)
        shift = of["bias"] - of["running_mean"] * scale
        return self._ops.add(self._ops.multiply(node, scale[None, :, None, None]), shift[None, :, None, None])

    def _convolve(self, node: Node, name: str) -> Node:
        kernel: Node = self._weights[f"{name}.weight"]
        pads = [kernel.shape[2] // 2] * 2
        if self._rounded and kernel.shape[1] > INPUT_CHANNELS and not name.startswith("output"):
            node, kernel = self._round(node, kernel, name)
        convolved = self._ops.convolution(node, kernel, [1, 1], pads, pads, [1, 1])
        return self._ops.add(convolved, self._weights[f"{name}.bias"][None, :, None, None])

    def _round(self, node: Node, kernel: NDArray[np.float32], name: str) -> tuple[Node, Node]:
        """Round the input, behind a batch normalisation, and the kernel of a convolution."""
        before = name.rpartition(".")[0] + ".0"
        spread = _INT8_SIGMAS * np.abs(self._weights[f"{before}.weight"])
        mean = self._weights[f"{before}.bias"]
        most = max(1e-6, (mean + spread).max())
        # no ReLU comes before a projection
        least = 0.0
        if ".proj." in name:
            most = max(most, (spread - mean).max())
            least = -most * 128 / 127
        ends = [np.float32(least), np.float32(most)]
        room = _KERNEL_ROOM * np.maximum(np.abs(kernel).max(axis=(1, 2, 3), keepdims=True), np.float32(1e-8))
        # OpenVINO takes 255 and 256 values for int8, other numbers for mere rounding
        kernel = self._ops.fake_quantize(kernel, -room, room, -room, room, 255)
        return self._ops.fake_quantize(node, *ends, *ends, 256), kernel

    def _step(self, node: Node, name: str) -> Node:
        """Batch normalisation, ReLU, convolution."""
        return self._convolve(self._ops.relu(self._normalise(node, f"{name}.0")), f"{name}.2")

    def _project(self, node: Node, name: str) -> Node:
        return self._convolve(self._normalise(node, f"{name}.proj.0"), f"{name}.proj.1")

    def _down(self, node: Node, name: str) -> Node:
        half = self._ops.add(self._project(node, name), self._steps(node, name, 0))
        return self._ops.add(half, self._steps(half, name, 2))

    def _steps(self, node: Node, name: str, first: int) -> Node:
        return self._step(self._step(node, f"{name}.conv.conv_{first}"), f"{name}.conv.conv_{first + 1}")

    def _up(self, node: Node, skipped: Node, style: Node, name: str) -> Node:
        first = self._step(node, f"{name}.conv.conv_0")
        styled = self._styled(self._ops.add(first, skipped), style, f"{name}.conv.conv_1")
        half = self._ops.add(self._project(node, name), styled)
        deep = self._styled(half, style, f"{name}.conv.conv_2")
        return self._ops.add(half, self._styled(deep, style, f"{name}.conv.conv_3"))

    def _styled(self, node: Node, style: Node, name: str) -> Node:
        full = self._ops.matmul(style, self._weights[f"{name}.full.weight"], False, True)
        feature = self._ops.add(full, self._weights[f"{name}.full.bias"][None])
        node = self._ops.add(node, self._ops.unsqueeze(feature, np.array([2, 3])))
        return self._step(node, f"{name}.conv")
