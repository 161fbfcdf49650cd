"""What a bioimage.io package says of a network, whatever its kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class SpaceAxis:
    """An axis in space of a network's input; its outputs have the same.

    Attributes
    ----------
    name
        ``z``, ``y`` or ``x``.
    least, step
        Sizes are ``least`` and any number of ``step`` more.
    voxel_um
        Edge of a voxel; None if the training's is unknown.
    """

    name: str
    least: int
    step: int
    voxel_um: float | None


@dataclass(frozen=True)
class Contents:
    """A network as a package describes it.

    Attributes
    ----------
    description
        One sentence.
    citations
        Text and DOI of each.
    documentation
        Markdown, without the model's card.
    input_name, input_description, input_channels
        Of the one input.
    output_description, output_channels
        Of the one output.
    axes
        In the order of the arrays.
    example
        Input (1, channel, *axes), float32, on which the package is tested.
    source, make, arguments
        Python file with the architecture, its function or class, and plain values that it is called with.
    packages
        What that file needs beside torch, as pip names it.
    """

    description: str
    citations: Sequence[tuple[str, str]]
    documentation: str
    input_name: str
    input_description: str
    input_channels: Sequence[str]
    output_description: str
    output_channels: Sequence[str]
    axes: Sequence[SpaceAxis]
    example: NDArray[np.float32]
    source: Path
    make: str
    arguments: Mapping[str, Any]
    packages: Sequence[str] = ()


CELLPOSE = (
    "Stringer, Wang, Michaelos, Pachitariu: Cellpose: a generalist algorithm for cellular segmentation. "
    "Nature Methods 18 (2021)",
    "10.1038/s41592-020-01018-x",
)
