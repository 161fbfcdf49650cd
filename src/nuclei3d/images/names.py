"""What the names of files that lie together say: the embryo, and the frame of its film."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

_BETWEEN = "_-. "
#: A number after a word for time: t001, t=451, T 3, tp_07, frame 451, time.12, t000h.
_MARKED = re.compile(
    r"(?<![^\W\d_])(?:t|tp|time|timepoint|frame|fr)[\s=_.#-]*\d+(?:\.\d+)?(?:h|hpf|min|s)?(?![^\W_])",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"\d+")


def split_names(names: Sequence[str]) -> list[tuple[str, str]]:
    """Part the names of frames that lie together into the embryo's and the frame's.

    The frame is told by the last number after a word for time; else by the number at the name's end; else,
    among names that differ in numbers alone, by the last of these that differs. The embryo's name is what is
    left of it, which may be nothing; a name that tells no frame is that of an embryo with a single one.

    Examples
    --------
    >>> split_names(["Emb11_t001", "mouse 7 t=451 (488nm)", "control"])
    [('Emb11', 't001'), ('mouse 7 (488nm)', 't=451'), ('control', 'control')]
    >>> split_names(["fish 01 GFP", "fish 02 GFP"])
    [('fish GFP', '01'), ('fish GFP', '02')]
    """
    numbers = [[match.span() for match in _NUMBER.finditer(name)] for name in names]
    alike: defaultdict[str, list[int]] = defaultdict(list)
    for at, name in enumerate(names):
        alike[_NUMBER.sub("0", name)].append(at)
    found = []
    for name, spans in zip(names, numbers, strict=True):
        span = _marked(name)
        if span is None and spans and spans[-1][1] == len(name):
            span = spans[-1]
        if span is None:
            group = [(names[other], numbers[other]) for other in alike[_NUMBER.sub("0", name)]]
            differs = [
                place
                for place in range(len(spans))
                if len({other[slice(*places[place])] for other, places in group}) > 1
            ]
            span = spans[differs[-1]] if differs else None
        found.append((name, name) if span is None else _split(name, *span))
    return found


def _marked(name: str) -> tuple[int, int] | None:
    found = list(_MARKED.finditer(name))
    return found[-1].span() if found else None


def _split(name: str, start: int, stop: int) -> tuple[str, str]:
    return (name[:start].rstrip(_BETWEEN) + name[stop:]).strip(_BETWEEN), name[start:stop]
