"""Dynamics and masks in the memory of a GPU: what `dynamics` and `masks` do on the host, by torch's tensors.

Rules and settings are theirs; they call these functions for a field that is a `DeviceField`. Labels, int32
(z, y, x), come back to the host once. They are those of the host but for rounding (a trajectory that passes
between two sinks ends in either) and ties: of voxels equally near to the middle of a nucleus another may be
the source of its heat, which changes its score a little. All that is summed up or compared in an arbitrary
order are whole numbers, so the same field gives the same labels again. Tests run it on torch's CPU device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample, pad

from nuclei3d.flows import heat_rounds
from nuclei3d.grid import LabelBoxes, linear_taps, resize_nearest
from nuclei3d.segmentation.flow_field import FLOW_UNITS, LOGIT, LOGIT_UNITS, DeviceField
from nuclei3d.segmentation.paths import Paths

_AT_ONCE = 2**22
"""Trajectories, neighbours of bins, or voxels of nuclei that are handled at once."""

_ROUNDS_BETWEEN = 8
"""Steps after which trajectories that have ended are left out: looking for them makes the host wait."""


def _flat(places: Tensor, shape: tuple[int, ...]) -> Tensor:
    return (places[..., 0] * shape[1] + places[..., 1]) * shape[2] + places[..., 2]


def label_sinks(field: DeviceField, paths: Paths) -> Tensor:
    """Label every foreground voxel with the number of the sink that it flows to: int32 (z, y, x)."""
    voxels = field.packed.view(-1, 4)
    inside = (voxels[:, LOGIT] > min(paths.threshold, *paths.outline)).nonzero().squeeze(1)
    found = voxels[inside, LOGIT] > paths.threshold
    if min(paths.outline) < paths.threshold:
        squares = voxels[inside, :LOGIT].float().square()
        share = squares[:, 0] / squares.sum(1).clamp_(min=1)
        outline = paths.outline[1] + share * (paths.outline[0] - paths.outline[1])
        kept = found | (voxels[inside, LOGIT] > outline)
        inside, found = inside[kept], found[kept]
    labels = voxels.new_zeros(len(voxels), dtype=torch.int32)
    if len(inside):
        flow = field.packed[..., :LOGIT].permute(3, 0, 1, 2).float()[None]
        # bins lie in a grid with a margin, so that all that are within reach have a place in it
        parts = inside.split(_AT_ONCE)  # type: ignore[no-untyped-call]
        ends = torch.cat([_follow(flow, part, field, paths) for part in parts])
        labels[inside] = _group_sinks(ends, found, paths)
    return labels.view(field.shape)


def _follow(flow: Tensor, voxels: Tensor, field: DeviceField, paths: Paths) -> Tensor:
    """Follow voxels, given by flat indices, along a flow (1, 3, z, y, x); give the bins of their ends."""
    edges = torch.tensor(field.voxel_size.zyx, device=flow.device)
    last = torch.tensor(field.shape, device=flow.device) - 1
    per_voxel = 2 / last.clamp(min=1)
    place = torch.stack(torch.unravel_index(voxels, field.shape), 1).float()
    ends, moving = place.clone(), torch.arange(len(voxels), device=flow.device)
    step = torch.full_like(place[:, 0], paths.step_um)
    before = torch.zeros_like(place)
    for done in range(1, paths.rounds + 1):
        at = (place * per_voxel - 1).flip(1)[None, :, None, None]
        now = grid_sample(flow, at, padding_mode="border", align_corners=True)[0, :, :, 0, 0].T
        turned = (now * before).sum(1) < 0
        step = torch.where(turned, step / 2, step)
        length = now.square().sum(1).sqrt_()
        ended = (turned & (step < paths.smallest_step_um)) | (
            length * step < paths.smallest_step_um * paths.slow
        )
        # what has ended has a step of 0 from then on
        step = step.masked_fill_(ended, 0)
        place = place + now * (step / length.clamp_(min=paths.slow))[:, None] / edges
        place = place.clamp_(min=0).minimum(last)
        before = now
        if done % _ROUNDS_BETWEEN == 0 or done == paths.rounds:
            ends[moving] = place
            going = step.nonzero().squeeze(1)
            if not len(going):
                break
            moving, place, step, before = moving[going], place[going], step[going], before[going]
    most = torch.tensor(paths.bins, device=flow.device) - 1
    return _flat((ends * edges / paths.bin_um).long().minimum(most) + paths.margin, paths.grid)


def _around(values: Tensor, bins: Tensor, offsets: Tensor) -> Iterator[Tensor]:
    """Give what a grid holds at offsets (k, 3) around bins, (n, k), some bins at a time."""
    for part in bins.split(max(1, _AT_ONCE // len(offsets))):  # type: ignore[no-untyped-call]
        yield values[part[:, None] + offsets]


def _group_sinks(ends: Tensor, found: Tensor, paths: Paths) -> Tensor:
    """Give the number of the sink of every end; ends that are not `found` make no sinks."""
    bins, counts = ends[found].unique(return_counts=True)  # type: ignore[no-untyped-call]
    grid = ends.new_zeros(int(np.prod(paths.grid)), dtype=torch.int32)
    if not len(bins):
        return grid[ends]
    grid[bins] = counts.int()
    near = torch.cartesian_prod(*3 * [torch.arange(-1, 2, device=ends.device)])
    weights = (2 - near.abs()).prod(1)
    densities = torch.cat([(each * weights).sum(1) for each in _around(grid, bins, _flat(near, paths.grid))])
    # rank bins by density; of equally dense ones the first is the highest
    order = len(bins) - 1 - densities.flip(0).argsort(stable=True)
    grid[bins[order]] = torch.arange(1, len(bins) + 1, dtype=torch.int32, device=ends.device)
    offsets = _flat(torch.from_numpy(paths.offsets).to(ends.device), paths.grid)
    best = torch.cat([each.amax(1) for each in _around(grid, bins, offsets)])
    parents = order[best.long() - 1]
    roots = _roots(parents)
    numbers = (parents == torch.arange(len(bins), device=ends.device)).cumsum(0, dtype=torch.int32)
    grid[bins] = numbers[roots]
    return grid[ends]


def _roots(parents: Tensor) -> Tensor:
    """Follow every member of a forest to its root."""
    while not torch.equal(further := parents[parents], parents):
        parents = further
    return parents


class _Pieces(NamedTuple):
    """The 6-connected pieces of equal labels, background included, as runs of voxels along x.

    `run` (z, y, x) is the number of each voxel's run; by run, `label` and the flat index of the `first`
    voxel, `voxels`, and the first run of its `piece`.
    """

    run: Tensor
    label: Tensor
    first: Tensor
    voxels: Tensor
    piece: Tensor


def _find_pieces(labels: Tensor, *, connected: bool = True) -> _Pieces:
    """Cut labels into runs, and join these to pieces if they are to be `connected`."""
    starts = torch.ones_like(labels, dtype=torch.bool)
    starts[..., 1:] = labels[..., 1:] != labels[..., :-1]
    run = starts.view(-1).cumsum(0, dtype=torch.int32).sub_(1).view(labels.shape)
    first = starts.view(-1).nonzero().squeeze(1)
    voxels = first.diff(append=first.new_tensor([labels.numel()]))
    piece = torch.arange(len(first), device=labels.device)
    if connected:
        pairs = []
        for axis, length in enumerate(labels.shape[:2]):
            (low, high), (starts_low, starts_high), runs = (
                (each.narrow(axis, 0, length - 1), each.narrow(axis, 1, length - 1))
                for each in (labels, starts, run)
            )
            # where two runs lie side by side, it is enough to see it at the first voxel
            side = (low == high) & (starts_low | starts_high)
            pairs.append(torch.stack([each[side] for each in runs]))
        piece = _join(piece, *torch.cat(pairs, 1).long())
    return _Pieces(run, labels.reshape(-1)[first], first, voxels, piece)


def _join(roots: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Join trees whose members are paired: the higher root is hung on the lower one, until none is left."""
    while len(one):
        one, other = roots[one], roots[other]
        apart = one != other
        one, other = one[apart], other[apart]
        roots.scatter_reduce_(0, one.maximum(other), one.minimum(other), "amin")
        roots = _roots(roots)
    return roots


def _keep_largest_pieces(labels: Tensor) -> Tensor:
    """Set all but the largest piece of each label to 0 (the first of equal ones stays)."""
    pieces = _find_pieces(labels)
    voxels = torch.zeros_like(pieces.piece).scatter_add_(0, pieces.piece, pieces.voxels)
    name = pieces.label.long()
    largest = voxels.new_zeros(int(name.max()) + 1).scatter_reduce_(0, name, voxels, "amax")
    candidates = (voxels == largest[name]).nonzero().squeeze(1)
    first = torch.full_like(largest, len(voxels))
    first.scatter_reduce_(0, name[candidates], candidates, "amin")
    return torch.where(pieces.piece == first[name], pieces.label, 0)[pieces.run]


def _fill_holes(labels: Tensor) -> Tensor:
    """Fill the 6-connected pieces of background that touch one label and nothing else, nor the border."""
    # The border counts as a label.
    padded = pad(labels, (1,) * 6, value=-1)
    pieces = _find_pieces(padded)
    most = torch.zeros_like(pieces.label)
    least = torch.full_like(most, torch.iinfo(most.dtype).max)
    for axis, length in enumerate(padded.shape):
        (low, high), runs = (
            (each.narrow(axis, 0, length - 1), each.narrow(axis, 1, length - 1))
            for each in (padded, pieces.run)
        )
        for run, own, other in ((runs[0], low, high), (runs[1], high, low)):
            touching = (own == 0) & (other != 0)
            piece, name = pieces.piece[run[touching]], other[touching]
            least.scatter_reduce_(0, piece, name, "amin")
            most.scatter_reduce_(0, piece, name, "amax")
    hole = ((least == most) & (most > 0))[pieces.piece] & (pieces.label == 0)
    filled = torch.where(hole, most[pieces.piece], pieces.label)[pieces.run]
    return filled[1:-1, 1:-1, 1:-1].contiguous()


def make_whole(labels: Tensor) -> None:
    """Make labels whole, in place: one 6-connected piece each, the largest, with its holes filled."""
    labels.copy_(_fill_holes(_keep_largest_pieces(labels)))


def find_boxes(labels: Tensor) -> LabelBoxes:
    """Find the box and the size of every label, as `nuclei3d.grid.find_boxes` does."""
    pieces = _find_pieces(labels, connected=False)
    name = pieces.label.long()
    count = int(name.max()) + 1
    z, y, x = torch.unravel_index(pieces.first, labels.shape)
    columns = []
    for least, most in ((z, z), (y, y), (x, x + pieces.voxels - 1)):
        columns.append(name.new_full((count,), 2**31 - 1).scatter_reduce_(0, name, least, "amin"))
        columns.append(name.new_full((count,), -1).scatter_reduce_(0, name, most, "amax"))
    voxels = name.new_zeros(count).scatter_add_(0, name, pieces.voxels)
    voxels[0] = 0
    return LabelBoxes(torch.stack(columns, 1).int().cpu().numpy(), voxels.cpu().numpy())


def renumber_labels(labels: Tensor, table: NDArray[np.uint32]) -> None:
    """Replace every label but 0, in place, by its entry in a table."""
    numbers = torch.from_numpy(table.astype(np.int32)).to(labels.device)
    numbers[0] = 0
    labels.copy_(numbers[labels])


def numbers_within(labels: Tensor, inside: Tensor, numbers: Tensor) -> NDArray[np.uint32]:
    """Give, for each label, the number that it has where `inside` is true (0: nowhere)."""
    table = labels.new_zeros(int(labels.max()) + 1)
    table.scatter_reduce_(0, labels[inside].long(), numbers, "amax")
    return table.cpu().numpy().astype(np.uint32)


def score_labels(
    labels: Tensor, where: LabelBoxes, field: DeviceField, edges: NDArray[np.float64], tolerance: float
) -> NDArray[np.float32]:
    """Score every label as `masks.score_labels` does.

    `edges` are a voxel's, against the shortest of them; `tolerance` is that of the heat.
    """
    scores = np.zeros(len(where.voxels), np.float32)
    sizes = where.boxes[:, 1::2] - where.boxes[:, ::2] + 3
    chosen = np.flatnonzero(where.voxels)
    radii, rounds = np.zeros(len(scores)), np.zeros(len(scores), np.int64)
    for label in chosen:
        radii[label], rounds[label] = heat_rounds(sizes[label], edges, int(where.voxels[label]), tolerance)
    # those that take the most rounds first: the others end before them
    chosen = chosen[np.argsort(-rounds[chosen], kind="stable")]
    for batch in np.split(chosen, np.flatnonzero(np.diff(where.voxels[chosen].cumsum() // _AT_ONCE)) + 1):
        if len(batch):
            table = np.zeros(len(scores), np.uint32)
            table[batch] = np.arange(1, len(batch) + 1)
            numbers = labels.clone()
            renumber_labels(numbers, table)
            nuclei = _Nuclei.of(numbers, where.voxels[batch], edges)
            expected = _heat_flows(nuclei, radii[batch], rounds[batch], edges)
            scores[batch] = _score(nuclei, field, expected).cpu().numpy()
    return scores


class _Nuclei(NamedTuple):
    """The voxels of some nuclei, nucleus by nucleus.

    `stops` are their numbers up to and with each nucleus, `centre` is each one's voxel nearest to its middle.
    By voxel, `name` is the place of its nucleus among them, `at` its flat index in the volume, and `beside`
    (6, n) who its neighbours are, before and behind along z, y and x; n where that is none of the nucleus.
    """

    stops: NDArray[np.int64]
    name: Tensor
    at: Tensor
    beside: Tensor
    centre: Tensor

    @classmethod
    def of(cls, numbers: Tensor, voxels: NDArray[np.int64], edges: NDArray[np.float64]) -> _Nuclei:
        """Find the voxels of nuclei, numbered from 1 on in a volume, each of so many voxels."""
        padded = pad(numbers, (1,) * 6)
        flat, total = padded.view(-1), int(voxels.sum())
        place = flat.nonzero().squeeze(1)
        place = place[flat[place].argsort(stable=True)]
        name = flat[place].long() - 1
        index = torch.full_like(flat, total)
        index[place] = torch.arange(total, dtype=torch.int32, device=flat.device)
        beside = []
        for stride in padded.stride():
            for other in (place - stride, place + stride):
                beside.append(torch.where(flat[other] == flat[place], index[other], total))
        axes = [axis - 1 for axis in torch.unravel_index(place, padded.shape)]
        distance = torch.zeros(total, dtype=torch.float64, device=flat.device)
        counts = torch.from_numpy(voxels).to(flat.device)
        for axis, edge in zip(axes, edges, strict=True):
            middle = torch.zeros_like(counts).index_add_(0, name, axis) / counts.double()
            distance += ((axis - middle[name]) * float(edge)) ** 2
        least = torch.full_like(counts, torch.inf, dtype=torch.float64)
        least.scatter_reduce_(0, name, distance, "amin")
        nearest = (distance < least[name] + 1e-9).nonzero().squeeze(1)
        centre = torch.full_like(counts, total).scatter_reduce_(0, name[nearest], nearest, "amin")
        at = _flat(torch.stack(axes, 1), tuple(numbers.shape))
        return cls(voxels.cumsum(), name, at, torch.stack(beside).long(), centre)


def _heat_flows(
    nuclei: _Nuclei, radii: NDArray[np.float64], rounds: NDArray[np.int64], edges: NDArray[np.float64]
) -> Tensor:
    """Give the flow (n, 3) of the voxels of nuclei as `nuclei3d.flows` does, of all at once.

    `radii` and `rounds` are by nucleus, as `nuclei3d.flows.heat_rounds` gives them, the most rounds first.
    """
    device = nuclei.name.device
    relaxation = np.ones((rounds[0], len(rounds)))
    for step in range(1, len(relaxation)):
        relaxation[step] = 1 / (1 - radii**2 * relaxation[step - 1] / (2 if step == 1 else 4))
    weights = torch.from_numpy(relaxation).to(device)
    coupling = 1 / edges**2
    coupling /= 2 * coupling.sum()
    shares = torch.from_numpy(coupling.repeat(2)).to(device)[:, None]
    stop = len(nuclei.name)
    # the last is who is not there
    old, new, heat = (torch.zeros(stop + 1, dtype=torch.float64, device=device) for _ in range(3))
    for step, weight in enumerate(weights):
        going = int(np.count_nonzero(rounds > step))
        ended, stop = stop, int(nuclei.stops[going - 1])
        heat[stop:ended] = old[stop:ended]
        mean = (old[nuclei.beside[:, :stop]] * shares).sum(0)
        new[:stop] += weight[nuclei.name[:stop]] * (mean - new[:stop])
        new[nuclei.centre[:going]] += weight[:going]
        old, new = new, old
    heat[:stop] = old[:stop]
    flows = torch.stack(
        [
            (heat[behind] - heat[before]) / float(edge)
            for before, behind, edge in zip(nuclei.beside[::2], nuclei.beside[1::2], edges, strict=True)
        ],
        1,
    )
    return flows / flows.square().sum(1, keepdim=True).sqrt_().clamp_(min=1e-300)


def _score(nuclei: _Nuclei, field: DeviceField, expected: Tensor) -> Tensor:
    """Score nuclei by what the network said of their voxels and the flow that their shape would have."""
    count = len(nuclei.stops)

    def mean_of(values: Tensor) -> Tensor:
        # Whole numbers have the same sum in any order.
        sums = nuclei.at.new_zeros(count).index_add_(0, nuclei.name, (values * 2.0**32).round_().long())
        return sums / (2.0**32 * nuclei.name.bincount(minlength=count))

    said = field.packed.view(-1, 4)[nuclei.at].double()
    flow = said[:, :LOGIT] / FLOW_UNITS
    seen = torch.zeros((count, LOGIT), dtype=torch.long, device=flow.device)
    seen = seen.index_add_(0, nuclei.name, (flow != 0).long()) > 0
    # a component that nobody shows is left out on both sides
    expected = expected * seen[nuclei.name]
    expected /= expected.square().sum(1, keepdim=True).sqrt_().clamp_(min=1e-300)
    error = mean_of((expected - flow).square().sum(1)).masked_fill_(~seen.any(1), 1)
    return mean_of((said[:, LOGIT] / LOGIT_UNITS).sigmoid()) * (1 - error).clamp_(min=0)


def resize_labels(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Resample labels as `nuclei3d.grid.resize_labels` does, to the same labels."""
    taps = []
    for old, new in zip(labels.shape, shape, strict=True):
        both = (resize_nearest(each[:2], (2, new)) for each in linear_taps(old, max(old, new)))
        taps.append([torch.from_numpy(each).to(labels.device) for each in both])
    (z, share_z), (y, share_y), (x, share_x) = taps
    result = labels.new_zeros(tuple(shape))
    slab = max(1, _AT_ONCE // (8 * shape[1] * shape[2]))
    for start in range(0, shape[0], slab):
        part = slice(start, start + slab)
        corners = [
            (
                labels[z[i, part]][:, y[j]][..., x[k]],
                share_z[i, part, None, None] * share_y[j, :, None] * share_x[k],
            )
            for i, j, k in itertools.product((0, 1), repeat=3)
        ]
        most = torch.zeros_like(corners[0][1])
        for name, _ in corners:
            votes = torch.zeros_like(most)
            for other, share in corners:
                votes += share * (other == name)
            result[part] = torch.where(votes > most, name, result[part])
            most = most.maximum(votes)
    return result
