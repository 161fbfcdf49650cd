"""The 2D network in a bioimage.io package: planes in, flows in the plane out."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nuclei3d.core.networks import CHANNELS
from nuclei3d.models.info import ModelInfo
from nuclei3d.stages.export import plane_network
from nuclei3d.stages.export.bioimageio_contents import CELLPOSE, Contents, SpaceAxis

_EDGE_PX = 64
_DOCUMENTATION = """Cellpose's CNN, retrained on planes of 3D embryos. The package holds the network of
one plane: it gives flows and logits, not masks. nuclei3d runs it over the planes of three views of a volume,
fuses the flows in 3D and follows them to nuclei.

## Input

Channel 0: a plane in which nuclei are {diameter_px:.3g} px across{diameter_um}. The volume's percentile
{lower:g} is 0 and its percentile {upper:g} is 1, both taken over the whole volume, never per plane; their
distance is at least {noise:g} standard deviations of the noise. Channel 1: zeros.

## Output

5 x the flow in y, 5 x the flow in x (unit vectors to the centre of the nucleus), and the logit of being
inside one. Logits above {logit:g} count as inside.
"""


def plane_contents(info: ModelInfo) -> Contents:
    """Describe the package of a 2D network."""
    known = info.nucleus_diameter_um
    pixel_um = None if known is None else known / info.diameter_px
    return Contents(
        description="Flows and logits of nuclei in planes of embryos: Cellpose's CNN retrained by nuclei3d.",
        citations=[CELLPOSE],
        documentation=_DOCUMENTATION.format(
            diameter_px=info.diameter_px,
            diameter_um=f" ({known:.3g} um in the training)" if known is not None else "",
            lower=info.lower_percentile,
            upper=info.upper_percentile,
            noise=info.noise_floor,
            logit=info.cellprob_threshold,
        ),
        input_name="plane",
        input_description="a plane, normalised as the documentation says, and an empty channel",
        input_channels=["nuclei", "empty"],
        output_description="5 x flow in y, 5 x flow in x, logit",
        output_channels=["flow_y", "flow_x", "logit"],
        # three poolings by two
        axes=[SpaceAxis("y", 16, 8, pixel_um), SpaceAxis("x", 16, 8, pixel_um)],
        example=_example(),
        source=Path(plane_network.__file__),
        make=plane_network.PlaneNetwork.__name__,
        arguments={
            "nbase": list(CHANNELS),
            "nout": 3,
            "sz": 3,
            "max_pool": True,
            "diam_mean": info.diameter_px,
        },
        packages=[f"cellpose=={metadata.version('cellpose')}"],
    )


def _example() -> NDArray[np.float32]:
    """Give a plane (1, 2, y, x) with four bright discs in noise."""
    y, x = np.mgrid[:_EDGE_PX, :_EDGE_PX]
    image = np.random.default_rng(0).normal(0.1, 0.03, y.shape)
    for centre in ((16, 16), (18, 46), (44, 20), (46, 48)):
        image += 0.8 * (np.hypot(y - centre[0], x - centre[1]) < 7)
    plane: NDArray[np.float32] = np.stack([image, 0 * image])[None].astype(np.float32)
    return plane
