"""Stitching: 2D masks of successive planes linked into 3D nuclei.

1. Masks of neighbouring planes are linked one to one so that the sum of the IoUs of all links is the highest
   possible (optimal assignment on the sparse table of overlaps).
2. A chain of masks with a neck, much thinner than what lies on both sides, is two nuclei, one above the
   other, and is cut there.
3. The tapering ends of nuclei, too small for an IoU, are put back: a chain that only shrinks away from the
   end of another one, on which it rests, is part of it.
4. Ends that face each other across a missing plane are joined if the masks are alike and neither tapers; the
   missing plane is filled by the shape halfway between the two, so no label lies on separate pieces.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.scoring.matching import assign_in_parts

NECK = 0.6
"""A chain is cut where its area is below this fraction of the largest areas both before and after."""

MIN_REST = 0.6
"""A tapering end belongs to the chain on which at least this fraction of its area rests."""

MIN_IOU_ACROSS_GAP = 0.5
"""Least IoU of two masks with a missing plane between them, if `min_iou` asks for less."""

MIN_AREA_AT_GAP = 0.5
"""Least area of a mask next to a missing plane, as a fraction of the largest mask of its nucleus."""

Chain = list[int]


_Pairs = np.recarray[Any, np.dtype[Any]]
"""Overlapping masks of two planes: their numbers (`lower`, `upper`), the pixels `shared`, and the `iou`."""


def stitch_planes(
    planes: NDArray[np.integer[Any]], min_iou: float = 0.25, max_gap: int = 1
) -> NDArray[np.uint32]:
    """Link the masks of successive planes into 3D labels 1..n, uint32 (Z, Y, X), each one 6-connected piece.

    Equal numbers in different planes mean nothing, and a 2D label on several pieces counts as several masks.
    Masks of neighbouring planes are linked if their IoU is at least `min_iou`; a nucleus may be missing in
    `max_gap` successive planes.
    """
    masks = _number_masks(planes)
    areas = np.bincount(masks.ravel())
    areas[0] = 0
    pairs = [_overlaps(masks[z], masks[z + 1], areas) for z in range(len(masks) - 1)]
    chains = _link_neighbours(pairs, areas, min_iou)
    chains = _attach_ends(chains, pairs, areas)
    for gap in range(1, max_gap + 1):
        chains = _join_across(chains, masks, areas, gap, max(min_iou, MIN_IOU_ACROSS_GAP))
    names = np.zeros(len(areas), np.uint32)
    for number, chain in enumerate(sorted(chains), start=1):
        names[chain] = number
    return np.asarray(names[masks])


def _number_masks(planes: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Number the 4-connected pieces of all labels of all planes 1..n, plane after plane."""
    from skimage.measure import label as label_pieces

    masks = np.zeros(planes.shape, np.int64)
    last = 0
    for z, plane in enumerate(planes):
        pieces, count = label_pieces(np.maximum(plane, 0), background=0, connectivity=1, return_num=True)  # type: ignore[no-untyped-call]
        masks[z] = np.where(pieces > 0, pieces + last, 0)
        last += int(count)
    return masks


def _overlaps(lower: NDArray[np.int64], upper: NDArray[np.int64], areas: NDArray[np.int64]) -> _Pairs:
    """List the pairs of masks of two planes that overlap, from one pass over the pixels."""
    both = (lower > 0) & (upper > 0)
    keys, shared = np.unique(lower[both] * len(areas) + upper[both], return_counts=True)
    low, up = np.divmod(keys, len(areas))
    iou = shared / (areas[low] + areas[up] - shared)
    kinds = [("lower", np.int64), ("upper", np.int64), ("shared", np.int64), ("iou", np.float64)]
    return np.rec.fromarrays([low, up, shared, iou], dtype=kinds)


def _assign(pairs: _Pairs) -> list[tuple[int, int]]:
    """Choose pairs, each mask at most once, with the highest sum of IoUs."""
    if len(pairs.iou) == 0:
        return []
    lower, a = np.unique(pairs.lower, return_inverse=True)
    upper, b = np.unique(pairs.upper, return_inverse=True)
    parts = assign_in_parts(a, b, pairs.iou, (len(lower), len(upper)), lambda iou: iou)
    chosen: list[tuple[int, int]] = []
    for rows, columns, _ in parts:
        chosen += zip(lower[rows].tolist(), upper[columns].tolist(), strict=True)
    return chosen


def _link_neighbours(pairs: list[_Pairs], areas: NDArray[np.int64], min_iou: float) -> list[Chain]:
    """Link masks of neighbouring planes into chains, from bottom to top, and cut the chains at necks."""
    above: dict[int, int] = {}
    for table in pairs:
        above.update(_assign(table[table.iou >= min_iou]))
    continued = set(above.values())
    chains: list[Chain] = []
    for start in range(1, len(areas)):
        if start in continued:
            continue
        chain = [start]
        while chain[-1] in above:
            chain.append(above[chain[-1]])
        chains.extend(_cut_at_necks(chain, areas))
    return chains


def _cut_at_necks(chain: Chain, areas: NDArray[np.int64]) -> list[Chain]:
    """Cut a chain at its narrowest neck, towards the thinner neighbour, and go on with both parts."""
    area = areas[chain]
    ratios = _neck_ratios(area)
    if ratios.min(initial=1.0) >= NECK:
        return [chain]
    neck = int(np.argmin(ratios)) + 1
    cut = neck if area[neck - 1] < area[neck + 1] else neck + 1
    return _cut_at_necks(chain[:cut], areas) + _cut_at_necks(chain[cut:], areas)


def _neck_ratios(area: NDArray[np.int64]) -> NDArray[np.float64]:
    """Divide each inner area of a chain by the smaller of the largest areas before and after it."""
    before = np.maximum.accumulate(area)[:-2]
    after = np.maximum.accumulate(area[::-1])[::-1][2:]
    return np.asarray(area[1:-1] / np.minimum(before, after), np.float64)


def _attach_ends(chains: list[Chain], pairs: list[_Pairs], areas: NDArray[np.int64]) -> list[Chain]:
    """Put tapering ends back: chains that rest on the end of another one and only shrink away from it."""
    chain_of = np.zeros(len(areas), np.int64)
    for number, chain in enumerate(chains):
        chain_of[chain] = number
    offers: list[tuple[float, int, int]] = []
    for table in pairs:
        for low, up, shared in zip(table.lower, table.upper, table.shared, strict=True):
            under, over = int(chain_of[low]), int(chain_of[up])
            if chains[under][-1] != low or chains[over][0] != up:
                continue
            if _shrinks(areas[[low, *chains[over]]]):
                offers.append((shared / areas[up], under, over))
            if _shrinks(areas[[*chains[under], up]][::-1]):
                offers.append((shared / areas[low], under, over))
    joined = {number: list(chain) for number, chain in enumerate(chains)}
    place = list(range(len(chains)))
    has_top = [False] * len(chains)
    has_bottom = [False] * len(chains)
    # The surest first; each end takes one, and each loose end goes to one.
    for rest, under, over in sorted(offers, key=lambda offer: (-offer[0], offer[1:])):
        if rest < MIN_REST or has_top[under] or has_bottom[over]:
            continue
        whole = joined[place[under]] + joined[place[over]]
        if _neck_ratios(areas[whole]).min(initial=1.0) < NECK:
            continue
        has_top[under] = has_bottom[over] = True
        kept, gone = place[under], place[over]
        joined[kept] = whole
        del joined[gone]
        place = [kept if at == gone else at for at in place]
    return list(joined.values())


def _shrinks(areas: NDArray[np.int64]) -> bool:
    return bool((np.diff(areas) <= 0).all())


def _join_across(
    chains: list[Chain], masks: NDArray[np.int64], areas: NDArray[np.int64], gap: int, min_iou: float
) -> list[Chain]:
    """Join chains that end to chains that start after `gap` planes; fill the planes between in `masks`."""
    top = {chain[-1]: number for number, chain in enumerate(chains) if _is_blunt(chain, -1, areas)}
    bottom = {chain[0]: number for number, chain in enumerate(chains) if _is_blunt(chain, 0, areas)}
    continues: dict[int, int] = {}
    for before in range(masks.shape[0] - gap - 1):
        after = before + gap + 1
        tops = [mask for mask in np.unique(masks[before]).tolist() if mask in top]
        bottoms = [mask for mask in np.unique(masks[after]).tolist() if mask in bottom]
        if not tops or not bottoms:
            continue
        table = _overlaps(
            np.where(np.isin(masks[before], tops), masks[before], 0),
            np.where(np.isin(masks[after], bottoms), masks[after], 0),
            areas,
        )
        for low, up in _assign(table[table.iou >= min_iou]):
            if _bridge(masks, low, up, before, after):
                continues[top[low]] = bottom[up]
    followers = set(continues.values())
    result: list[Chain] = []
    for number in range(len(chains)):
        if number in followers:
            continue
        chain = list(chains[number])
        while number in continues:
            number = continues[number]
            chain += chains[number]
        result.append(chain)
    return result


def _is_blunt(chain: Chain, end: int, areas: NDArray[np.int64]) -> bool:
    return bool(areas[chain[end]] >= MIN_AREA_AT_GAP * areas[chain].max())


def _bridge(masks: NDArray[np.int64], lower: int, upper: int, before: int, after: int) -> bool:
    """Fill the planes between two masks of one nucleus; False, and nothing filled, if others are in the way.

    Each plane gets the shape whose signed distance is the mean of those of the two masks, weighted by
    nearness, where it is free. Some pixels of both masks must be free in all these planes: through them the
    pieces are connected, and what does not hang together with them is left out.
    """
    from scipy.ndimage import distance_transform_edt
    from skimage.measure import label as label_pieces

    old = masks[before] == lower
    new = masks[after] == upper
    rows, columns = np.nonzero(old | new)
    box = (
        slice(max(rows.min() - 1, 0), rows.max() + 2),
        slice(max(columns.min() - 1, 0), columns.max() + 2),
    )
    old, new = old[box], new[box]
    through = old & new & (masks[before + 1 : after][(slice(None), *box)] == 0).all(0)
    if not through.any():
        return False
    # One connected column of common pixels is enough, and only one is sure to hang together.
    columns_of = label_pieces(through, background=0, connectivity=1)  # type: ignore[no-untyped-call]
    through = columns_of == 1 + np.argmax(np.bincount(columns_of[columns_of > 0])[1:])
    depths = [
        distance_transform_edt(np.pad(m, 1))[1:-1, 1:-1] - distance_transform_edt(~m) for m in (old, new)
    ]
    for z in range(before + 1, after):
        nearness = (z - before) / (after - before)
        free = masks[z][box] == 0
        shape = ((1 - nearness) * depths[0] + nearness * depths[1] > 0) & free | through
        pieces = label_pieces(shape, background=0, connectivity=1)  # type: ignore[no-untyped-call]
        shape &= np.isin(pieces, np.unique(pieces[through]))
        masks[z][box][shape] = lower
    return True
