"""The parameters of linking, chosen on films whose true tracks are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nuclei3d.config.sections import TracksParams
from nuclei3d.tracks.accuracy import FrameMatch
from nuclei3d.tracks.linking import link_nuclei
from nuclei3d.tracks.nuclei import Integers, Nuclei, Tracks

_LINKING = ("max_step", "volume_weight", "intensity_weight")
_DIVISIONS = ("division_limit", "division_volume_weight", "division_intensity_weight", "division_distance")
_FACTORS = (0.5, 0.7, 1.4, 2.0)
_ROUNDS = 2


@dataclass(frozen=True)
class KnownFilm:
    """Nuclei as they were found, the true tracks, and for each true nucleus the row of the one found (-1)."""

    nuclei: Nuclei
    true: Tracks
    partner: Integers

    @classmethod
    def of(cls, nuclei: Nuclei, true: Tracks, matches: Sequence[FrameMatch]) -> KnownFilm:
        """Pair what was found with the truth, one to one; `matches` as `match_frame` gives them."""
        rows, own = (
            {key: row for row, key in enumerate(zip(t.frame.tolist(), t.label.tolist(), strict=True))}
            for t in (true.nuclei, nuclei)
        )
        partner = np.full(len(rows), -1, np.int64)
        for frame, found in enumerate(matches):
            for one, other in found.single:
                partner[rows[frame, one]] = own[frame, other]
        return cls(nuclei, true, partner)

    def count(self, params: TracksParams) -> Counts:
        """Link the nuclei and count what is right."""
        found = link_nuclei(self.nuclei, params)
        links = self.partner[self.true.edges]
        right = (links >= 0).all(axis=1) & (found.predecessor[links[:, 1]] == links[:, 0])
        families, known = _families(found), _families(self.true)
        told = sum(
            families.get(int(self.partner[mother])) == {int(row) for row in self.partner[sorted(daughters)]}
            for mother, daughters in known.items()
        )
        return Counts(int(right.sum()), len(links) + len(found.edges), told, len(known) + len(families))


@dataclass(frozen=True)
class Counts:
    """Right links and divisions, and the sums of true and found ones."""

    links: int
    all_links: int
    divisions: int
    all_divisions: int

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def link_f1(self) -> float:
        """F1 of links."""
        return 2 * self.links / max(self.all_links, 1)

    @property
    def division_f1(self) -> float:
        """F1 of divisions in the very frame: that of `score_tracks`."""
        return 2 * self.divisions / max(self.all_divisions, 1)


def _families(tracks: Tracks) -> dict[int, set[int]]:
    """Rows of the daughters by that of the mother."""
    families: dict[int, set[int]] = {int(mother): set() for mother in tracks.divisions}
    for origin, row in tracks.edges.tolist():
        if origin in families:
            families[origin].add(row)
    return families


def learn_tracks(
    films: Sequence[KnownFilm], params: TracksParams, advance: Callable[[], None] = lambda: None
) -> tuple[TracksParams, Counts]:
    """Choose the parameters with which most is right.

    One parameter after the other is tried at half to twice its value, twice over: those of links for the F1
    of links, which decides TRA and LNK, then those of divisions for the F1 of divisions. Among equals the
    value that was given stays.
    """

    def count(tried: TracksParams) -> Counts:
        advance()
        first, *others = (film.count(tried) for film in films)
        return sum(others, first)

    best = count(params)
    for names, f1 in ((_LINKING, "link_f1"), (_DIVISIONS, "division_f1")):
        for name in names * _ROUNDS:
            value = getattr(params, name)
            for factor in _FACTORS:
                tried = params.model_copy(update={name: round(factor * value, 4)})
                if getattr(found := count(tried), f1) > getattr(best, f1):
                    params, best = tried, found
    return params, best


#: How often `learn_tracks` calls `advance`.
TRIALS = 1 + _ROUNDS * len(_FACTORS) * len(_LINKING + _DIVISIONS)
