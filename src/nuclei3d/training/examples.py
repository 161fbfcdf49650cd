"""What a network is trained on and judged by: batches of augmented crops of planes or of volumes, and loss.

Crops are cut ahead of the network in threads that hold no interpreter lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nuclei3d.config.sections import AugmentParams, TrainParams
from nuclei3d.training.arithmetic import Arithmetic
from nuclei3d.training.augmentation import change_crop
from nuclei3d.training.crops import CropGrid, Stream, crop_generator, cut_crop, draw_crop
from nuclei3d.training.losses import (
    CELLPOSE_TERMS,
    FlowFigures,
    Loss,
    LossTerms,
    losses_of_crops,
    network_loss,
)
from nuclei3d.training.samples import SampleSet, epoch_order, nucleus_weights, plane_contrasts, sample_weights

_QUINTILES = ("found_faintest", "found_faint", "found_middle", "found_bright", "found_brightest")
_SMALLEST_PX = 12
NO_AUGMENTATION = AugmentParams(flips=False, rotation="none", side_rotation="none", rescale_range=0.0)

_VALIDATION_EPOCH = 2**62
"""Stands for the epoch in the generators of the validation crops, which are the same for every seed."""


@dataclass(frozen=True)
class Batch:
    """Crops and targets, in 2D (B, ..., Y, X) or in 3D (B, ..., Z, Y, X).

    `images` are float32, normalised: in 2D two channels, of which the second is empty, as Cellpose's networks
    want it, stored channels last; in 3D one channel. `foreground` (bool), `labels` (int32, 0 is background)
    and `weights` (float32, of the loss, 0 where nobody looked; None: all 1) have no channels, `flows`
    (float32) are (dy, dx) or (dz, dy, dx). `samples`, int64 (B,), are those that the crops were cut from.
    """

    images: Tensor
    foreground: Tensor
    flows: Tensor
    weights: Tensor | None
    labels: NDArray[np.int32]
    samples: NDArray[np.int64]

    @property
    def tensors(self) -> list[Tensor]:
        """What the network and the loss read."""
        return [each for each in (self.images, self.foreground, self.flows, self.weights) if each is not None]

    def to(self, device: torch.device) -> Batch:
        """Copy to a device; from pinned memory, to a GPU, without waiting."""
        return self if device.type == "cpu" else self.copied(lambda each: each.to(device, non_blocking=True))

    def copied(self, copy: Callable[[Tensor], Tensor]) -> Batch:
        """Give the batch with a copy of each of its tensors."""
        return replace(
            self,
            images=copy(self.images),
            foreground=copy(self.foreground),
            flows=copy(self.flows),
            weights=None if self.weights is None else copy(self.weights),
        )


@dataclass(frozen=True)
class CropMaker:
    """Cuts and augments crops; every crop depends on (seed, epoch, index, sample) and on nothing else.

    `nucleus_weights` has the loss weight per label of each sample (`nuclei3d.training.samples`), or is None.
    """

    samples: SampleSet
    augment: AugmentParams
    grid: CropGrid
    seed: int
    nucleus_weights: Sequence[NDArray[np.float32]] | None = None

    @cached_property
    def _partial(self) -> bool:
        """Whether some sample is labelled in part: then all batches have weights, as CUDA graphs need."""
        return any(info.unknown for info in self.samples.infos)

    def make_batch(self, samples: NDArray[np.int64], epoch: int, first: int) -> Batch:
        """Make a batch from these samples; its crops have the numbers `first`, `first` + 1, ..."""
        crops = (len(samples), *self.grid.shape)
        images = np.empty(crops, np.float32)
        labels = np.empty(crops, np.int32)
        flows = np.empty((len(samples), self.grid.axes, *self.grid.shape), np.float32)
        weights = np.ones(crops, np.float32) if self.nucleus_weights or self._partial else None
        for i, sample in enumerate(samples):
            unknown = self._make_crop(int(sample), epoch, first + i, images[i], labels[i], flows[i])
            if weights is not None and self.nucleus_weights is not None:
                np.take(self.nucleus_weights[sample], labels[i], out=weights[i])
            if weights is not None and unknown is not None:
                weights[i][unknown] = 0.0
        if self.grid.axes == 2:
            channels = np.zeros((*images[:, 0].shape, 2), np.float32)
            channels[..., 0] = images[:, 0]
            shown = torch.from_numpy(channels).permute(0, 3, 1, 2)
            labels, flows = labels[:, 0], flows[:, :, 0]
            weights = None if weights is None else weights[:, 0]
        else:
            shown = torch.from_numpy(images)[:, None]
        return Batch(
            images=shown,
            foreground=torch.from_numpy(labels > 0),
            flows=torch.from_numpy(flows),
            weights=None if weights is None else torch.from_numpy(weights),
            labels=labels,
            samples=samples,
        )

    def _make_crop(
        self,
        sample: int,
        epoch: int,
        index: int,
        image: NDArray[np.float32],
        labels: NDArray[np.int32],
        flows: NDArray[np.float32],
    ) -> NDArray[np.bool_] | None:
        """Fill in a crop; say where it shows what nobody looked at (None: nowhere)."""
        generator_of = partial(crop_generator, self.seed, epoch, index)
        plan = draw_crop(self.samples, sample, generator_of(Stream.GEOMETRY), self.augment, self.grid)
        gain, bias = self.samples.gains[sample]
        arrays = self.samples.read(sample)
        cut_crop(*arrays, float(gain), float(bias), plan, self.grid.unit_flows, image, labels, flows)
        unknown = None
        if self.samples.infos[sample].unknown:
            unknown = labels < 0
            labels[unknown] = 0
        change_crop(
            image,
            labels,
            self.augment,
            generator_of,
            plan=plan,
            info=self.samples.infos[sample],
            grid=self.grid,
            # of a plane, whose nuclei are not listed, those in the crop
            largest_label=len(self.samples.nuclei[sample].centres) or int(labels.max()),
        )
        return unknown


def validation_batches(samples: SampleSet, count: int, grid: CropGrid, batch_size: int) -> list[Batch]:
    """Cut fixed, unaugmented crops from samples spread evenly over a set; all fit in memory.

    Every view has its share of the crops.
    """
    if not len(samples) or not count:
        return []
    # ordered by view: an even spacing through views in turns could miss one
    by_view = np.argsort([info.view for info in samples.infos], kind="stable").astype(np.int64)
    chosen = by_view[((np.arange(count) + 0.5) * len(samples) / count).astype(np.int64)]
    maker = CropMaker(samples, NO_AUGMENTATION, grid, seed=0)
    return [
        maker.make_batch(chosen[first : first + batch_size], _VALIDATION_EPOCH, first)
        for first in range(0, count, batch_size)
    ]


def stream_batches(
    maker: CropMaker,
    order_of: Callable[[int], NDArray[np.int64]],
    epochs: range,
    batch_size: int,
    workers: int,
    *,
    pinned: bool = False,
) -> Generator[Batch]:
    """Give the batches of epoch after epoch, cut ahead by threads, also while the network is validated.

    `order_of` gives the sample of each crop of an epoch (`nuclei3d.training.samples.epoch_order`); the last
    batch of each may be smaller. The number of threads (`workers`) does not change the crops; they end when
    the generator is closed. `pinned` batches are put in page-locked memory, from which a GPU fetches them.
    """

    def make(samples: NDArray[np.int64], epoch: int, first: int) -> Batch:
        batch = maker.make_batch(samples, epoch, first)
        return batch.copied(Tensor.pin_memory) if pinned else batch

    jobs = (
        (order[first : first + batch_size], epoch, first)
        for epoch in epochs
        for order in (order_of(epoch),)
        for first in range(0, len(order), batch_size)
    )
    pool = ThreadPoolExecutor(workers, thread_name_prefix="crops")
    waiting: deque[Future[Batch]] = deque()
    try:
        while True:
            more = islice(jobs, 2 * workers + 1 - len(waiting))
            waiting.extend([pool.submit(make, *job) for job in more])
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Examples:
    """Training and validation samples (planes, or volumes), cut into crops on the network's grid.

    `seed` is that of all draws; `weights`, float64 (samples,), say how often each is drawn, `crops` is the
    number of crops an epoch.
    """

    def __init__(
        self, samples: SampleSet, validation: SampleSet, params: TrainParams, grid: CropGrid, *, seed: int
    ) -> None:
        self.grid = grid
        self.weights = sample_weights(samples.infos, params.sampling, params.min_train_masks)
        planes = grid.axes == 2
        of_all = (
            np.count_nonzero(self.weights) if planes else sum(max(info.nuclei, 1) for info in samples.infos)
        )
        self.crops = params.crops_per_epoch or int(of_all)
        self._params = params
        self._maker = CropMaker(samples, params.augment, grid, seed, nucleus_weights(samples, params.loss))
        self._validation = validation
        self._terms = (
            CELLPOSE_TERMS if planes else LossTerms.of_volumes(params.full3d, samples.flow_variances)
        )
        self._seen = FlowFigures()

    def batches(self, epochs: range, workers: int, *, pinned: bool = False) -> Generator[Batch]:
        """Stream the batches of these epochs as `stream_batches` does."""
        order_of = partial(epoch_order, self.weights, self.crops, self._maker.seed)
        return stream_batches(self._maker, order_of, epochs, self._params.batch_size, workers, pinned=pinned)

    def loss(self, output: Tensor, batch: Batch) -> Loss:
        """Compute the loss of the network's output on a batch; on a GPU, without waiting for it."""
        return network_loss(output, batch.flows, batch.foreground, batch.weights, self._terms)

    def observe(self, output: Tensor, batch: Batch) -> None:
        """Take note of the network's output on a batch, for `validate`; of planes the loss tells all."""
        if self.grid.axes == 3:
            self._seen.add(output, batch.flows, batch.foreground, batch.weights)

    @torch.no_grad()
    def validate(self, network: nn.Module, arithmetic: Arithmetic) -> dict[str, float]:
        """Judge a network on fixed crops of the validation samples; it is left in training mode if it was.

        Gives names as in `nuclei3d.training.loop.METRICS`: losses (of planes also by view), shares found by
        quintile of contrast, and of a 3D network the figures of each axis, in training as in validation.
        """
        figures = {f"train_{name}": value for name, value in self._seen.figures().items()}
        self._seen = FlowFigures()
        if not self._fixed:
            return figures
        was_training = network.training
        network.eval()
        seen = FlowFigures()
        said: list[tuple[Tensor, Tensor]] = []
        for fixed in self._fixed:
            batch = fixed.batch.to(arithmetic.device)
            output = arithmetic.run(network, batch.images).float()
            inside = output[:, self.grid.axes] > 0
            said.append((self._losses(output, batch), fixed.count_inside(inside)))
            if self.grid.axes == 3:
                seen.add(output, batch.flows, batch.foreground, batch.weights)
        network.train(was_training)
        # only now is a GPU waited for
        losses: list[_CropLoss] = []
        found: list[tuple[float, float]] = []
        for fixed, (parts, hits) in zip(self._fixed, said, strict=True):
            losses += self._by_crop(parts, fixed.batch)
            found += fixed.found_shares(hits)
        crops = sum(loss.crops for loss in losses)
        flow = sum(loss.flow * loss.crops for loss in losses) / crops
        probability = sum(loss.probability * loss.crops for loss in losses) / crops
        figures |= {
            "validation_loss": flow + probability,
            "validation_flow_loss": flow,
            "validation_probability_loss": probability,
        }
        if self.grid.axes == 2:
            for view in {loss.view for loss in losses}:
                of_view = [loss.flow + loss.probability for loss in losses if loss.view == view]
                figures[f"validation_loss_{view}"] = sum(of_view) / len(of_view)
        figures |= {f"validation_{name}": value for name, value in seen.figures().items()}
        return figures | found_by_quintile(found)

    def _losses(self, output: Tensor, batch: Batch) -> Tensor:
        """Compute the parts of the losses (n, 2), without weights of nuclei; of volumes, of all as one."""
        if self.grid.axes == 3:
            loss = network_loss(output, batch.flows, batch.foreground, batch.weights, self._terms)
            return torch.stack([loss.flow, loss.probability])[None]
        return losses_of_crops(output, batch.flows, batch.foreground, batch.weights)

    def _by_crop(self, parts: Tensor, batch: Batch) -> list[_CropLoss]:
        fetched = parts.cpu().tolist()
        if self.grid.axes == 3:
            ((flow, probability),) = fetched
            return [_CropLoss("volume", flow, probability, len(batch.samples))]
        views = (self._validation.infos[sample].view for sample in batch.samples)
        return [_CropLoss(view, *part) for view, part in zip(views, fetched, strict=True)]

    @cached_property
    def _fixed(self) -> list[_FixedBatch]:
        """The validation crops; cut when they are first needed."""
        # crops of planes without nuclei occur here as they occur in the planes
        grid = replace(self.grid, nucleus_centred=0.0) if self.grid.axes == 2 else self.grid
        params = self._params
        batches = validation_batches(self._validation, params.validation_crops, grid, params.batch_size)
        return [_FixedBatch.of(batch, self._contrasts(batch)) for batch in batches]

    def _contrasts(self, batch: Batch) -> list[NDArray[np.float64]]:
        if self.grid.axes == 3:
            tables = (self._validation.nuclei[sample].contrasts for sample in batch.samples)
            return [np.append(np.nan, table).astype(np.float64) for table in tables]
        return [
            plane_contrasts(image[0].numpy(), labels)
            for image, labels in zip(batch.images, batch.labels, strict=True)
        ]


class _CropLoss(NamedTuple):
    view: str
    flow: float
    probability: float
    crops: int = 1


class _FixedBatch(NamedTuple):
    """A batch of validation crops.

    The labels of all crops are numbered one after the other, backgrounds included, the first of each crop as
    `firsts` (shaped to be added to the labels) says; `contrasts` and `areas` are by these numbers.
    """

    batch: Batch
    firsts: NDArray[np.int64]
    contrasts: NDArray[np.float64]
    areas: NDArray[np.int64]

    @classmethod
    def of(cls, batch: Batch, contrasts: Sequence[NDArray[np.float64]]) -> _FixedBatch:
        """Number the nuclei of a batch; contrasts are by label, nan for the background, for each crop."""
        firsts = np.cumsum([0, *map(len, contrasts)])
        shaped = firsts[:-1].reshape(-1, *[1] * (batch.labels.ndim - 1))
        areas = np.bincount((batch.labels + shaped).ravel(), minlength=firsts[-1])
        return cls(batch, shaped, np.concatenate(contrasts), areas)

    def count_inside(self, inside: Tensor) -> Tensor:
        """Count, where `inside` is, the pixels of each nucleus that are inside."""
        labels, firsts = (
            torch.from_numpy(each).to(inside.device) for each in (self.batch.labels, self.firsts)
        )
        hits = firsts.new_zeros(len(self.areas))
        return hits.index_add_(0, (labels + firsts).flatten(), inside.flatten().long())

    def found_shares(self, hits: Tensor) -> list[tuple[float, float]]:
        """Give contrast and share of the pixels that were hit of each nucleus that is no sliver."""
        # slivers at the edge of a crop say nothing
        counted = (self.areas >= _SMALLEST_PX) & np.isfinite(self.contrasts)
        shares = hits.cpu().numpy()[counted] / self.areas[counted]
        return list(zip(self.contrasts[counted].tolist(), shares.tolist(), strict=True))


def found_by_quintile(found: list[tuple[float, float]]) -> dict[str, float]:
    """Average the shares over five equally full bins of contrast; none with fewer than five nuclei."""
    if len(found) < len(_QUINTILES):
        return {}
    shares = np.array([share for _, share in sorted(found)])
    return {
        name: float(np.mean(part))
        for name, part in zip(_QUINTILES, np.array_split(shares, len(_QUINTILES)), strict=True)
    }
