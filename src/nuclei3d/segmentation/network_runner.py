"""Running a network, 2D or 3D, over images of any size, and cutting what is too large into tiles.

A network that halves a plane three times pools pixels in squares of eight, counted from the corner of what it
is shown. Shown a part that starts two pixels off that lattice, it pools other pixels together: its logits
differ from those of the whole by .06 to .25 (root mean square, two networks), everywhere and however wide the
margin, against .003 to .03 for a part on the lattice, where the rest is Cellpose's style vector. Tiles and
boxes therefore start on the lattice.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from types import EllipsisType
from typing import Any

import numpy as np
import torch
from cellpose.resnet_torch import CPnet
from numpy.typing import NDArray
from torch import Tensor, nn

from nuclei3d.config.sections import Engine
from nuclei3d.errors import InputError
from nuclei3d.networks.cpnet import FLOW_SCALE, INPUT_CHANNELS, LEVELS
from nuclei3d.networks.unet3d import VolumeNetwork

Compiled = Callable[[NDArray[np.float32]], NDArray[np.float32]]
Node = Any

POOLING = 8
"""Pixels along an axis that Cellpose's CNN pools into one. A multiple of 16 would make no pixel cheaper
(measured on AVX2) and small volumes a sixth dearer."""

MAX_TILE = {"cpu": 512, "cuda": 1024}
"""Pixels along an axis of a plane that go through the network at once."""
TILE_OVERLAP = 64
_TILE_RIM = 16
"""Pixels at a cut side of a tile that are not used where another tile has them: they lack surroundings."""

PIXELS_PER_BATCH = {"cpu": 2**17, "cuda": 2**22}
"""Pixels of planes that go through the network at once. On a CPU small batches stay in the cache."""

MAX_VOXELS = {"cpu": 2**19, "cuda": 2**23}
"""Voxels that go through a 3D network at once; patches are as large as this and the volume allow."""

_SIGMAS = 8.0
"""A patch is this many sigmas of its Gaussian weight wide (nnU-Net)."""

_NEAR = 0.15
"""Pixels off the lattice that do not matter."""

_LEAST_REACH = 4
"""Voxels before a part among which the nearest to the lattice is chosen, however large they are."""


class NetworkRunner:
    """A network with all that it takes to apply it; keeps count of the time spent in it.

    The network is a `VolumeNetwork`, or one that takes (n, 2, height, width) and gives (n, 3, height, width),
    5 x flow along the two axes of the plane and the logit, or a tuple that starts with that, as CPnet does.
    Convolutions are of the type `precision` (autocast); int8 is OpenVINO's. `flip_average` is over the flips
    of an image along all its axes: 4 times the work in 2D, 8 times in 3D. The `engine` is ``torch``,
    ``openvino`` (`compile_cpnet`), or ``auto``: OpenVINO where it is installed, the device is the CPU and the
    network a CPnet. `pixels` are those, padding and overlap included, that went through the network so far.
    """

    def __init__(
        self,
        network: nn.Module,
        device: torch.device,
        *,
        precision: torch.dtype = torch.float32,
        flip_average: bool = False,
        engine: Engine = "auto",
    ) -> None:
        self.device = device
        self.pixels = 0
        self._passes: list[tuple[Any, Any]] = []
        self._precision = precision
        self._multiple: Sequence[int] = (POOLING, POOLING)
        if isinstance(network, VolumeNetwork):
            self._multiple = network.spec.architecture.multiple
        self._solid = len(self._multiple) == 3
        axes = range(2, 2 + len(self._multiple))
        self._flips = [
            flipped
            for count in range(1 + (len(axes) if flip_average else 0))
            for flipped in itertools.combinations(axes, count)
        ]
        # channels_last: 1.3 to 1.6 times faster on a CPU (measured), and what tensor cores want.
        self._format = torch.channels_last_3d if self._solid else torch.channels_last
        self._compiled = _compile(network, device, precision, engine)
        self._network = network.eval()
        if self._compiled is None:
            self._network.to(device)
            self._network.to(memory_format=self._format)  # type: ignore[call-overload]

    @property
    def seconds(self) -> float:
        """Time inside the network's forward pass so far; a GPU, whose own time it is, is waited for."""
        total = 0.0
        for began, ended in self._passes:
            if isinstance(began, torch.cuda.Event):
                ended.synchronize()
                total += began.elapsed_time(ended) / 1e3
            else:
                total += ended - began
        return total

    def _mark(self) -> Any:
        """Note the time; of a GPU, that at which it will have done what it was asked: nobody waits for it."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def planes_per_batch(self, pixels: int) -> int:
        """How many planes of so many pixels, padding included, are best passed at once."""
        return max(1, PIXELS_PER_BATCH[self.device.type] // pixels)

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Predict flow, of length about 1, and logit of normalised images, float32.

        (n, height, width) becomes (n, 3, height, width), and for a 3D network (n, z, y, x) becomes (n, 4, z,
        y, x).
        """
        return np.asarray(self.run(torch.from_numpy(images)).cpu().numpy(), np.float32)

    @torch.inference_mode()
    def run(self, images: Tensor) -> Tensor:
        """Do the same with a tensor on any device; the result is on the network's."""
        shape = images.shape[1:]
        images = self._pad(images.to(self.device))
        result = self._forward(images) if self._solid else self._forward_tiles(images)
        result = result[_corner(shape)]
        result[:, :-1] /= FLOW_SCALE
        return result

    def _pad(self, images: Tensor) -> Tensor:
        """Pad each axis to a multiple of what the network pools."""
        shape = images.shape[1:]
        whole = [padded(size, multiple) for size, multiple in zip(shape, self._multiple, strict=True)]
        if self._solid:
            # zeros beyond the volume's end, as in the patches of the training
            result = images.new_zeros((len(images), *whole))
            result[_corner(shape)] = images
            return result
        # mirrored, so that a nucleus cut by the border does not end in an edge that is none
        for axis, (size, wanted) in enumerate(zip(shape, whole, strict=True), start=1):
            if wanted != size:
                mirror = np.pad(np.arange(size), (0, wanted - size), mode="symmetric")
                images = images.index_select(axis, torch.from_numpy(mirror).to(images.device))
        return images

    def _forward_tiles(self, planes: Tensor) -> Tensor:
        """Run padded planes; those that are too large in tiles, blended smoothly."""
        tiling = tile_plane(planes.shape[1:], MAX_TILE[self.device.type])
        if len(tiling.boxes) == 1:
            return self._forward(planes)
        result = torch.zeros((len(planes), 3, *planes.shape[1:]), device=self.device)
        for box in tiling.boxes:
            weight = torch.from_numpy(tiling.weight(box)).to(self.device)
            rows, columns = box
            result[:, :, rows, columns] += self._forward(planes[:, rows, columns]).mul_(weight)
        return result

    def _forward(self, images: Tensor) -> Tensor:
        """Give what the network says, 5 x flow and logit, of images of a size that it takes."""
        began = self._mark()
        channels = 1 if self._solid else INPUT_CHANNELS
        stack = torch.zeros((len(images), channels, *images.shape[1:]), device=self.device)
        stack[:, 0] = images
        total: Tensor | None = None
        for axes in self._flips:
            output = self._run(torch.flip(stack, axes) if axes else stack)
            if axes:
                output = torch.flip(output, axes)
                output[:, [axis - 2 for axis in axes]] *= -1
            total = output if total is None else total + output
        assert total is not None
        if len(self._flips) > 1:
            total /= len(self._flips)
        self._passes.append((began, self._mark()))
        self.pixels += images.numel()
        return total

    def _run(self, stack: Tensor) -> Tensor:
        if self._compiled is not None:
            return torch.from_numpy(self._compiled(stack.numpy()))
        count, mixed = len(stack), self._precision != torch.float32
        alone = self._solid and count == 1 and self.device.type == "cpu" and torch.get_num_threads() == 1
        if alone and not mixed:
            # torch takes its slow convolution for a single volume on a single thread (50 times slower)
            stack = stack.repeat(2, 1, 1, 1, 1)
        with torch.autocast(self.device.type, dtype=self._precision, enabled=mixed):
            output = self._network(stack.contiguous(memory_format=self._format))
        if isinstance(output, tuple):
            output = output[0]
        return torch.as_tensor(output)[:count].float()


def has_openvino() -> bool:
    """Tell whether OpenVINO, an optional extra (``pip install 'nuclei3d[fast]'``), is installed."""
    return importlib.util.find_spec("openvino") is not None


_MOST_COMPILED = 4
_COMPILED: dict[tuple[object, ...], Compiled] = {}


def _compile(
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
        while len(_COMPILED) >= _MOST_COMPILED:
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


def _corner(shape: Sequence[int]) -> tuple[EllipsisType | slice, ...]:
    return (..., *(slice(size) for size in shape))


class Tiling:
    """Equal tiles that cover a box, start on the network's lattice, and are blended by weights.

    Tiles have the `size`, neighbours overlap by `overlap` at least, but half a tile at most; the network
    pools `multiple` pixels along each axis into one. `profile` gives the weight of a tile along an axis, of
    any scale, from its size and from whether another tile lies before and behind it. `boxes` are those of all
    tiles, cut at the end of the box.
    """

    def __init__(
        self,
        box: Sequence[slice],
        size: Sequence[int],
        overlap: Sequence[float],
        multiple: Sequence[int],
        profile: Callable[[int, bool, bool], NDArray[np.floating[Any]]],
    ) -> None:
        self.size = tuple(size)
        self._weights: list[dict[int, NDArray[np.float32]]] = []
        parts = []
        for whole, width, over, factor in zip(box, size, overlap, multiple, strict=True):
            starts = _spread(whole.stop - whole.start, width, min(over, width / 2), factor)
            profiles = [profile(width, start > 0, start < starts[-1]) for start in starts]
            total = np.zeros(starts[-1] + width, profiles[0].dtype)
            for start, each in zip(starts, profiles, strict=True):
                total[start : start + width] += each
            self._weights.append(
                {
                    whole.start + start: (each / total[start : start + width]).astype(np.float32)
                    for start, each in zip(starts, profiles, strict=True)
                }
            )
            parts.append([slice(start, min(start + width, whole.stop)) for start in self._weights[-1]])
        self.boxes = list(itertools.product(*parts))

    def weight(self, box: Sequence[slice]) -> NDArray[np.float32]:
        """Share of a tile in each of its pixels; over all tiles the shares of a pixel add up to 1."""
        along = [
            weights[part.start][: part.stop - part.start]
            for weights, part in zip(self._weights, box, strict=True)
        ]
        return np.asarray(reduce(np.multiply.outer, along))


def _spread(length: int, size: int, overlap: float, multiple: int) -> list[int]:
    """Place tiles over an axis; all overlap by about the same, and the last may reach beyond the end."""
    if length <= size:
        return [0]
    last = padded(length - size, multiple)
    count = 1 + math.ceil(last / max(multiple, (size - overlap) // multiple * multiple))
    starts = (np.linspace(0, last, count) / multiple).round().astype(int) * multiple
    return [int(start) for start in starts]


def tile_plane(shape: Sequence[int], largest: int) -> Tiling:
    """Cover a padded plane by as few equal tiles as possible, overlapping by at least `TILE_OVERLAP`."""
    overlap = TILE_OVERLAP + POOLING
    sizes = []
    for length in shape:
        count = max(1, -(-(length - overlap) // (largest - overlap)))
        sizes.append(min(length, largest, padded(-(-(length + (count - 1) * overlap) // count))))
    box = [slice(0, length) for length in shape]
    return Tiling(box, sizes, (overlap, overlap), (POOLING, POOLING), _ramp)


def _ramp(size: int, cut_before: bool, cut_behind: bool) -> NDArray[np.float32]:
    inside = np.maximum(np.arange(size, dtype=np.float32) + 1 - _TILE_RIM, 0)
    ramp = np.full(size, float(TILE_OVERLAP - 2 * _TILE_RIM), np.float32)
    if cut_before:
        ramp = np.minimum(ramp, inside)
    if cut_behind:
        ramp = np.minimum(ramp, inside[::-1])
    return ramp


def tile_volume(
    box: Sequence[slice],
    multiple: Sequence[int],
    trained: Sequence[int],
    overlap: Sequence[float],
    max_voxels: int,
) -> Tiling:
    """Cover a box of a volume by patches of at most `max_voxels`.

    They are no smaller than the patches that the network was `trained` on, where the box is as large;
    `multiple` and `overlap` as in `Tiling`.
    """
    sizes = [padded(part.stop - part.start, factor) for part, factor in zip(box, multiple, strict=True)]
    while math.prod(sizes) > max_voxels:
        # the axis that is longest against the patches of the training is cut first
        spare = [size / least if size > least else 0.0 for size, least in zip(sizes, trained, strict=True)]
        longest = int(np.argmax(spare))
        if not spare[longest]:
            break
        half = padded(math.ceil((sizes[longest] + overlap[longest]) / 2), multiple[longest])
        smaller = max(half, trained[longest])
        sizes[longest] = smaller if smaller < sizes[longest] else trained[longest]
    return Tiling(box, sizes, overlap, multiple, _bell)


def _bell(size: int, cut_before: bool, cut_behind: bool) -> NDArray[np.float64]:
    place = (np.arange(size) + 0.5) / size - 0.5
    return np.asarray(np.exp(-0.5 * (_SIGMAS * place) ** 2))


def padded(size: int, multiple: int = POOLING) -> int:
    """Round up to the next multiple."""
    return -(-size // multiple) * multiple


def grow_to_lattice(
    part: slice, size: int, pixels: float | Sequence[float] = 1.0, pooling: int = POOLING
) -> slice:
    """Grow a part of an axis to one that starts on the network's lattice, and is sampled as the whole.

    The start lies within 0.15 pixels of the lattice, or as near as two squares allow; if the stop is not that
    of the axis, the part is nearly a whole number of pixels long. The whole axis has the `size`; `pixels` are
    those of the network per voxel along it, of several networks, if several are to see it: the one that is
    worst off counts; so many as `pooling` says are pooled into one.
    """
    start, stop = int(part.start), int(part.stop)
    scales = np.atleast_1d(np.asarray(pixels, np.float64))
    if start > 0:
        reach = max(int(np.ceil(2 * pooling / scales.min())), _LEAST_REACH)
        starts = np.arange(start, max(start - reach, 0) - 1, -1)
        start = _first_near(starts, np.outer(scales, starts) / pooling, _NEAR / pooling)
    if stop < size:
        stops = np.arange(stop, min(stop + POOLING, size) + 1)
        stop = _first_near(stops, np.outer(scales, stops - start), _NEAR)
    return slice(start, stop)


def _first_near(candidates: NDArray[np.int_], values: NDArray[np.float64], tolerance: float) -> int:
    """Give the first candidate whose values (a row per network) are nearly whole, or else the nearest."""
    off = np.abs(values - np.rint(values)).max(axis=0)
    near = np.flatnonzero(off <= tolerance)
    return int(candidates[near[0] if len(near) else int(np.argmin(off))])
