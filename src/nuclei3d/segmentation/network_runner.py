"""Running a network, 2D or 3D, over images of any size."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nuclei3d.config.sections import Engine
from nuclei3d.networks.cpnet import FLOW_SCALE, INPUT_CHANNELS
from nuclei3d.networks.unet3d import VolumeNetwork
from nuclei3d.segmentation.openvino_engine import compile_if_wanted
from nuclei3d.segmentation.tiling import POOLING, padded, tile_plane

MAX_TILE = {"cpu": 512, "cuda": 1024}
"""Pixels along an axis of a plane that go through the network at once."""

PIXELS_PER_BATCH = {"cpu": 2**17, "cuda": 2**22}
"""Pixels of planes that go through the network at once. On a CPU small batches stay in the cache."""

MAX_VOXELS = {"cpu": 2**19, "cuda": 2**23}
"""Voxels that go through a 3D network at once; patches are as large as this and the volume allow."""


class NetworkRunner:
    """A network with all that it takes to apply it; keeps count of the time spent in it.

    The network is a `VolumeNetwork`, or one that takes (n, 2, height, width) and gives (n, 3, height, width),
    5 x flow along the two axes of the plane and the logit, or a tuple that starts with that, as CPnet does.
    Convolutions are of the type `precision` (autocast); int8 is OpenVINO's. `flip_average` is over the flips
    of an image along y and x: 4 times the work, twice for a plane of which one axis is z. It is never along
    z: a network may know up from down (`train.augment.flip_z`), and that it does not care brings nothing
    (docs/results.md). The `engine` is ``torch``, ``openvino`` (`openvino_engine`), or ``auto``: OpenVINO
    where it is installed, the device is the CPU and the network a CPnet. `pixels` are those, padding and
    overlap included, that went through the network so far.
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
        axes = range(len(self._multiple), 2 + len(self._multiple)) if flip_average else ()
        self._flips = [
            flipped for count in range(len(axes) + 1) for flipped in itertools.combinations(axes, count)
        ]
        # channels_last: 1.3 to 1.6 times faster on a CPU (measured), and what tensor cores want.
        self._format = torch.channels_last_3d if self._solid else torch.channels_last
        self._compiled = compile_if_wanted(network, device, precision, engine)
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
    def run(self, images: Tensor, *, upright: bool = False) -> Tensor:
        """Do the same with a tensor on any device; the result is on the network's.

        `upright`: rows of the planes are z.
        """
        shape = images.shape[1:]
        images = self._pad(images.to(self.device))
        flips = [axes for axes in self._flips if not (upright and 2 in axes)]
        result = self._forward(images, flips) if self._solid else self._forward_tiles(images, flips)
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

    def _forward_tiles(self, planes: Tensor, flips: Sequence[tuple[int, ...]]) -> Tensor:
        """Run padded planes; those that are too large in tiles, blended smoothly."""
        tiling = tile_plane(planes.shape[1:], MAX_TILE[self.device.type])
        if len(tiling.boxes) == 1:
            return self._forward(planes, flips)
        result = torch.zeros((len(planes), 3, *planes.shape[1:]), device=self.device)
        for box in tiling.boxes:
            weight = torch.from_numpy(tiling.weight(box)).to(self.device)
            rows, columns = box
            result[:, :, rows, columns] += self._forward(planes[:, rows, columns], flips).mul_(weight)
        return result

    def _forward(self, images: Tensor, flips: Sequence[tuple[int, ...]]) -> Tensor:
        """Give what the network says, 5 x flow and logit, of images of a size that it takes, over flips."""
        began = self._mark()
        channels = 1 if self._solid else INPUT_CHANNELS
        stack = torch.zeros((len(images), channels, *images.shape[1:]), device=self.device)
        stack[:, 0] = images
        total: Tensor | None = None
        for axes in flips:
            output = self._run(torch.flip(stack, axes) if axes else stack)
            if axes:
                output = torch.flip(output, axes)
                output[:, [axis - 2 for axis in axes]] *= -1
            total = output if total is None else total + output
        assert total is not None
        if len(flips) > 1:
            total /= len(flips)
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


def _corner(shape: Sequence[int]) -> tuple[EllipsisType | slice, ...]:
    return (..., *(slice(size) for size in shape))
