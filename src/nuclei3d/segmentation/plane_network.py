"""Running the 2D network over stacks of planes of any size.

Planes are padded to a multiple of 8 only (the network halves them three times), not to a tile of 224; only
planes beyond `MAX_TILE` are cut into tiles, equal in size, that overlap and are blended smoothly. A multiple
of 16 would make no pixel cheaper (measured on AVX2) and small volumes a sixth dearer.

Showing a network a part of a volume such that it says of it what it says of the whole.

A network that halves a plane three times pools pixels in squares of eight, counted from the corner of what it
is shown. Shown a part that starts two pixels off that lattice, it pools other pixels together: its logits
differ from those of the whole by .06 to .25 (root mean square, two networks), everywhere and however wide the
margin, against .003 to .03 for a part on the lattice, where the rest is Cellpose's style vector.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from cellpose.resnet_torch import CPnet
from numpy.typing import NDArray
from torch import Tensor, nn

from nuclei3d.errors import InputError
from nuclei3d.networks.cpnet import CHANNELS, FLOW_SCALE
from nuclei3d.segmentation.openvino_network import compiled_cpnet, has_openvino

POOLING = 8
"""Pixels along an axis that Cellpose's CNN pools into one."""

_NEAR = 0.15
"""Pixels off the lattice that do not matter."""

_LEAST_REACH = 4
"""Voxels before a part among which the nearest to the lattice is chosen, however large they are."""


def grow_to_lattice(
    part: slice, size: int, pixels: float | Sequence[float] = 1.0, pooling: int = POOLING
) -> slice:
    """Grow a part of an axis to one that starts on the network's lattice, and is sampled as the whole.

    Parameters
    ----------
    part
        First and last but one voxel.
    size
        Of the whole axis.
    pixels
        Pixels of the network per voxel, along this axis; of several networks, if several are to see it.
    pooling
        Pixels that the network pools into one.

    Returns
    -------
    slice
        Holds `part`. Its start lies within 0.15 pixels of the lattice, or as near as two squares allow; if
        its stop is not that of the axis, it is nearly a whole number of pixels long. For several networks
        the one that is worst off counts.
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


Engine = Literal["auto", "torch", "openvino"]

MAX_TILE = {"cpu": 512, "cuda": 1024}
TILE_OVERLAP = 64
_TILE_RIM = 16
"""Pixels at a cut side of a tile that are not used where another tile has them: they lack surroundings."""

_PIXELS_PER_BATCH = {"cpu": 2**17, "cuda": 2**22}
"""Pixels that go through the network at once. On a CPU small batches stay in the cache."""

_FLIPS = (((), (1.0, 1.0)), ((2,), (-1.0, 1.0)), ((3,), (1.0, -1.0)), ((2, 3), (-1.0, -1.0)))


class PlaneNetwork:
    """A network with all that it takes to apply it to planes; keeps count of the time spent in it.

    Parameters
    ----------
    network
        Takes (n, 2, height, width) and gives (n, 3, height, width): 5 x flow along the two axes of the plane,
        and the logit; or a tuple that starts with that, as CPnet does.
    device
        Where to compute.
    precision
        Type for convolutions (autocast); float32 for none.
    flip_average
        Average over the four flips of a plane: four times the work.
    engine
        ``torch``, ``openvino`` (`openvino_network`), or ``auto``: OpenVINO where it is installed, the device
        is the CPU and the network a CPnet.

    Attributes
    ----------
    seconds
        Time inside the network's forward pass so far.
    pixels
        Pixels, padding and overlap included, that went through it.
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
        self.precision = precision
        self.flip_average = flip_average
        self.seconds = 0.0
        self.pixels = 0
        self._compiled = _compile(network, device, precision, engine)
        self._network = network.eval()
        if self._compiled is None:
            self._network.to(device)
            # channels_last: 1.3 to 1.6 times faster on a CPU (measured), and what tensor cores want.
            self._network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def planes_per_batch(self, height: int, width: int) -> int:
        """How many planes of a size are best passed at once."""
        return max(1, _PIXELS_PER_BATCH[self.device.type] // (padded(height) * padded(width)))

    def __call__(self, planes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Predict flow and logit of planes.

        Parameters
        ----------
        planes
            Normalised (n, height, width).

        Returns
        -------
        float32 array (n, 3, height, width)
            Flow along the two axes of the plane, of length about 1, and the logit.
        """
        return np.asarray(self.run(torch.from_numpy(planes)).cpu().numpy(), np.float32)

    @torch.inference_mode()
    def run(self, planes: Tensor) -> Tensor:
        """Do the same with a tensor on any device; the result is on the network's."""
        _, height, width = planes.shape
        rows, columns = (tile_starts(size, MAX_TILE[self.device.type]) for size in (height, width))
        planes = _mirrored(planes.to(self.device))
        if len(rows.starts) == len(columns.starts) == 1:
            result = self._forward(planes)
        else:
            result = torch.zeros((planes.shape[0], 3, *planes.shape[1:]), device=self.device)
            for top in rows.starts:
                for left in columns.starts:
                    box = (slice(top, top + rows.size), slice(left, left + columns.size))
                    weight = torch.from_numpy(rows.weight(top)[:, None] * columns.weight(left))
                    part = self._forward(planes[:, box[0], box[1]].contiguous())
                    result[:, :, box[0], box[1]] += part.mul_(weight.to(self.device))
        result = result[:, :, :height, :width]
        result[:, :2] /= FLOW_SCALE
        return result

    def _forward(self, planes: Tensor) -> Tensor:
        """Give what the network says, 5 x flow and logit, of planes of a size that it takes."""
        started = time.perf_counter()
        stack = torch.zeros((planes.shape[0], 2, *planes.shape[1:]), device=self.device)
        stack[:, 0] = planes
        if self._compiled is None:
            stack = stack.contiguous(memory_format=torch.channels_last)
        total: Tensor | None = None
        for axes, signs in _FLIPS if self.flip_average else _FLIPS[:1]:
            output = self._run(torch.flip(stack, axes) if axes else stack)
            if axes:
                output = torch.flip(output, axes)
                output[:, 0] *= signs[0]
                output[:, 1] *= signs[1]
            total = output if total is None else total + output
        assert total is not None
        if self.flip_average:
            total /= len(_FLIPS)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - started
        self.pixels += planes.numel()
        return total

    def _run(self, stack: Tensor) -> Tensor:
        if self._compiled is not None:
            return torch.from_numpy(self._compiled(stack.numpy()))
        with torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision != torch.float32):
            output = self._network(stack)
        if isinstance(output, tuple):
            output = output[0]
        return torch.as_tensor(output).float()


def _mirrored(planes: Tensor) -> Tensor:
    """Pad planes (n, height, width) to what the network takes.

    Mirrored, so that a nucleus cut by the border does not end in an edge that is none.
    """
    for axis in (1, 2):
        size = planes.shape[axis]
        if padded(size) != size:
            mirror = np.pad(np.arange(size), (0, padded(size) - size), mode="symmetric")
            planes = planes.index_select(axis, torch.from_numpy(mirror).to(planes.device))
    return planes


def _compile(
    network: nn.Module, device: torch.device, precision: torch.dtype, engine: Engine
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]] | None:
    """Compile the network by OpenVINO if that is wished and possible.

    Raises
    ------
    InputError
        If it is wished and not possible.
    """
    if engine not in ("auto", "torch", "openvino"):
        raise InputError(f"engine '{engine}' is unknown; choose auto, torch or openvino")
    fits = device.type == "cpu" and isinstance(network, CPnet) and network.nbase[0] == CHANNELS[0]
    if engine == "torch" or (engine == "auto" and not (fits and has_openvino())):
        return None
    if not has_openvino():
        raise InputError("engine 'openvino' is not installed; install it with: pip install 'nuclei3d[fast]'")
    if not fits:
        raise InputError("engine 'openvino' runs Cellpose's CNN on the CPU only; use engine auto or torch")
    return compiled_cpnet(network, precision, torch.get_num_threads())


class Tiling:
    """Equal tiles over one axis, and the weights with which they are blended.

    Attributes
    ----------
    starts
        First pixel of each tile.
    size
        Pixels of a tile.
    """

    def __init__(self, length: int, starts: list[int], size: int) -> None:
        self.length = length
        self.starts = starts
        self.size = size
        ramps = {start: self._ramp(start) for start in starts}
        total = np.zeros(length, np.float32)
        for start, ramp in ramps.items():
            total[start : start + size] += ramp
        self._weights = {start: ramp / total[start : start + size] for start, ramp in ramps.items()}

    def weight(self, start: int) -> NDArray[np.float32]:
        """Weight of a tile at each of its pixels; over all tiles the weights of a pixel add up to 1."""
        return self._weights[start]

    def _ramp(self, start: int) -> NDArray[np.float32]:
        inside = np.maximum(np.arange(self.size, dtype=np.float32) + 1 - _TILE_RIM, 0)
        ramp = np.full(self.size, float(TILE_OVERLAP - 2 * _TILE_RIM), np.float32)
        if start > 0:
            ramp = np.minimum(ramp, inside)
        if start + self.size < self.length:
            ramp = np.minimum(ramp, inside[::-1])
        return ramp


def tile_starts(length: int, largest: int) -> Tiling:
    """Cover an axis, padded, by as few equal tiles as possible, overlapping by at least `TILE_OVERLAP`.

    All start on the network's lattice (`nuclei3d.segmentation.plane_network`).
    """
    if length <= largest:
        return Tiling(length, [0], length)
    length = padded(length)
    overlap = TILE_OVERLAP + POOLING
    count = -(-(length - overlap) // (largest - overlap))
    size = min(largest, padded(-(-(length + (count - 1) * overlap) // count)))
    starts = (np.linspace(0, length - size, count) / POOLING).round().astype(int) * POOLING
    return Tiling(length, [int(start) for start in starts], size)


def padded(size: int) -> int:
    """Round up to the next multiple that the network takes."""
    return -(-size // POOLING) * POOLING
