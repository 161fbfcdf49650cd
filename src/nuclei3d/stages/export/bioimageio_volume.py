"""The 3D network in a bioimage.io package: volumes in, flows in space out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nuclei3d.core import volume_network
from nuclei3d.core.volume_network import VolumeSpec
from nuclei3d.core.volume_planning import plan_patch
from nuclei3d.models.info import ModelInfo
from nuclei3d.stages.export.bioimageio_contents import CELLPOSE, Contents, SpaceAxis

_EXAMPLE_DIAMETERS = 3.0
_NNUNET = (
    "Isensee, Jaeger, Kohl, Petersen, Maier-Hein: nnU-Net: a self-configuring method for deep learning-based "
    "biomedical image segmentation. Nature Methods 18 (2021)",
    "10.1038/s41592-020-01008-z",
)
_DOCUMENTATION = """A residual 3D U-Net in the manner of Cellpose's CNN, trained on 3D embryos; pooling and
kernels follow the voxel size. The package gives flows and logits, not masks: nuclei3d runs it over
overlapping patches of a volume, blends them, and follows the flows to nuclei.

## Input

A volume on a grid on which nuclei are {diameter_px:.3g} voxels across in y and x, and voxels lie
{anisotropy:.4g} times as far apart in z as in x{voxels}. Resample to that.
The volume's percentile {lower:g} is 0 and its percentile {upper:g} is 1, both taken over the whole volume,
never per patch; their distance is at least {noise:g} standard deviations of the noise.

Sizes are multiples of {multiple} (z, y, x); fill up with zeros. It was trained on patches of {patch}; smaller
ones are worse at nuclei, which are then cut. Blend patches that overlap by a nucleus.

## Output

5 x the flow in z, y and x ({flows}), and the logit of being inside a nucleus. Logits above {logit:g} count as
inside.
"""
_FLOWS = {
    "heat": "unit vectors in um, not in voxels, to the centre of the nucleus",
    "tanh": "along each axis tanh of the distance to the centre of the nucleus over 5 voxels",
}


def volume_contents(info: ModelInfo, spec: VolumeSpec) -> Contents:
    """Describe the package of a 3D network."""
    known = info.nucleus_diameter_um
    edge_um = None if known is None else known / info.diameter_px
    deep_um = None if edge_um is None else spec.anisotropy * edge_um
    voxels = ""
    if edge_um is not None and deep_um is not None:
        voxels = f" (in the training {deep_um:.3g} x {edge_um:.3g} x {edge_um:.3g} um, nuclei {known:.3g} um)"
    multiple = spec.architecture.multiple
    return Contents(
        description="Flows and logits of nuclei in volumes of embryos: a 3D network trained by nuclei3d.",
        citations=[CELLPOSE, _NNUNET],
        documentation=_DOCUMENTATION.format(
            diameter_px=info.diameter_px,
            anisotropy=spec.anisotropy,
            voxels=voxels,
            lower=info.lower_percentile,
            upper=info.upper_percentile,
            noise=info.noise_floor,
            multiple=" x ".join(map(str, multiple)),
            patch=" x ".join(map(str, spec.patch)),
            flows=_FLOWS[spec.targets],
            logit=info.cellprob_threshold,
        ),
        input_name="volume",
        input_description="a volume, resampled and normalised as the documentation says",
        input_channels=["nuclei"],
        output_description="5 x flow in z, 5 x flow in y, 5 x flow in x, logit",
        output_channels=["flow_z", "flow_y", "flow_x", "logit"],
        axes=[
            SpaceAxis(name, step, step, edge)
            for name, step, edge in zip("zyx", multiple, (deep_um, edge_um, edge_um), strict=True)
        ],
        example=_example(info, spec),
        source=Path(volume_network.__file__),
        make=volume_network.described_network.__name__,
        arguments=json.loads(json.dumps(asdict(spec))),
    )


def _example(info: ModelInfo, spec: VolumeSpec) -> NDArray[np.float32]:
    """Give a volume (1, 1, z, y, x) with four bright balls in noise, of the size that the network expects."""
    shape = plan_patch(spec.architecture, info.diameter_px, spec.anisotropy, _EXAMPLE_DIAMETERS)
    z, y, x = np.mgrid[: shape[0], : shape[1], : shape[2]]
    image = np.random.default_rng(0).normal(0.1, 0.03, shape)
    for place in ((0.3, 0.25, 0.3), (0.4, 0.3, 0.75), (0.6, 0.72, 0.25), (0.7, 0.7, 0.7)):
        away = [
            edge * (grid - share * size)
            for edge, grid, share, size in zip((spec.anisotropy, 1, 1), (z, y, x), place, shape, strict=True)
        ]
        image += 0.8 * (np.sqrt(sum(np.square(axis) for axis in away)) < 0.45 * info.diameter_px)
    return image[None, None].astype(np.float32)
