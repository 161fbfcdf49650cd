"""An animated PNG of a time-lapse with the outlines of its nuclei, for slides and mails."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nuclei3d.report.projections import Polygon

if TYPE_CHECKING:
    from PIL import Image

_LONG_SIDE_PX = 600
_MS_PER_FRAME = 150
# Half of the palette is grey, half are hues far apart for numbers that follow each other.
_GREYS = 128
_GOLDEN = 0.381966


@dataclass
class Animation:
    """Frames of an animated PNG: `add` them, then `save`; each takes up to 0.4 MB until then."""

    frames: list[Image.Image] = field(default_factory=list)

    def add(
        self, picture: NDArray[np.uint8], outlines: Sequence[Sequence[Polygon]], numbers: Sequence[int]
    ) -> None:
        """Add a picture and the outlines of nuclei in it, coloured by their numbers (labels or tracks).

        Frames are cut or filled to the size of the first.
        """
        from PIL import Image, ImageDraw

        scale = min(1.0, _LONG_SIDE_PX / max(picture.shape))
        size = [max(1, round(scale * length)) for length in picture.shape[::-1]]
        grey = np.asarray(Image.fromarray(picture).resize((size[0], size[1]), Image.Resampling.BOX))
        frame = Image.new("P", self.frames[0].size if self.frames else (size[0], size[1]))
        frame.putpalette(_palette())
        frame.paste(Image.fromarray(grey // 2).convert("L"))
        pen = ImageDraw.Draw(frame)
        for number, polygons in zip(numbers, outlines, strict=True):
            for polygon in polygons:
                if len(polygon):
                    points = [tuple(point) for point in (scale * polygon).tolist()]
                    pen.line([*points, points[0]], fill=_GREYS + number % _GREYS)
        self.frames.append(frame)

    def save(self, path: Path) -> None:
        """Write the PNG; it repeats for ever."""
        first, *others = self.frames
        first.save(path, format="PNG", save_all=True, append_images=others, duration=_MS_PER_FRAME, loop=0)


def _palette() -> list[int]:
    greys = [level * 255 // (_GREYS - 1) for level in range(_GREYS) for _ in range(3)]
    hues = [colorsys.hls_to_rgb(number * _GOLDEN % 1, 0.6, 0.9) for number in range(_GREYS)]
    return greys + [round(255 * value) for hue in hues for value in hue]
