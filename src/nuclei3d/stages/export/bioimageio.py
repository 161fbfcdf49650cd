"""A network as a package of bioimage.io, which `bioimageio test` accepts."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bioimageio.spec import save_bioimageio_package
from bioimageio.spec.common import FileDescr
from bioimageio.spec.generic.v0_3 import Author, CiteEntry, Doi, LicenseId
from bioimageio.spec.model import v0_5
from numpy.typing import NDArray
from torch import nn

from nuclei3d import __version__
from nuclei3d.networks import unet3d
from nuclei3d.networks.cpnet import channels
from nuclei3d.networks.folder import CARD_FILE, INFO_FILE, Model, ModelInfo
from nuclei3d.networks.planning import plan_patch
from nuclei3d.networks.unet3d import VolumeSpec
from nuclei3d.stages.export import plane_network

_CELLPOSE = (
    "Stringer, Wang, Michaelos, Pachitariu: Cellpose: a generalist algorithm for cellular segmentation. "
    "Nature Methods 18 (2021)",
    "10.1038/s41592-020-01018-x",
)
_NNUNET = (
    "Isensee, Jaeger, Kohl, Petersen, Maier-Hein: nnU-Net: a self-configuring method for deep learning-based "
    "biomedical image segmentation. Nature Methods 18 (2021)",
    "10.1038/s41592-020-01008-z",
)
_DOCUMENTATION = """# {name}

Trained by nuclei3d {version}. {text}
## Validation

{card}
"""
_OF_PLANES = """Cellpose's CNN, retrained on planes of 3D embryos. The package holds the network of
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
_OF_VOLUMES = """A residual 3D U-Net in the manner of Cellpose's CNN, trained on 3D embryos; pooling
and kernels follow the voxel size. The package gives flows and logits, not masks: nuclei3d runs it over
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
_EXAMPLE_PX = 64
_EXAMPLE_DIAMETERS = 3.0


class SpaceAxis(NamedTuple):
    """An axis in space: sizes are ``least`` and any number of ``step`` more; None for an unknown voxel."""

    name: str
    least: int
    step: int
    voxel_um: float | None


@dataclass(frozen=True)
class Contents:
    """A network as a package describes it: one input, one output, axes in the order of the arrays.

    `documentation` is Markdown, without the model's card; `example` an input (1, channel, *axes) on which the
    package is tested. `source` is a Python file with the architecture, `make` its function or class,
    `arguments` plain values that it is called with, `packages` what it needs beside torch, as pip names it.
    """

    description: str
    citations: Sequence[tuple[str, str]]
    documentation: str
    input_name: str
    input_description: str
    input_channels: Sequence[str]
    axes: Sequence[SpaceAxis]
    example: NDArray[np.float32]
    source: Path
    make: str
    arguments: Mapping[str, Any]
    packages: Sequence[str] = ()


def plane_contents(info: ModelInfo) -> Contents:
    """Describe the package of a 2D network: planes in, flows in the plane out."""
    known = info.nucleus_diameter_um
    pixel_um = None if known is None else known / info.diameter_px
    # four bright discs in noise
    y, x = np.mgrid[:_EXAMPLE_PX, :_EXAMPLE_PX]
    image = np.random.default_rng(0).normal(0.1, 0.03, y.shape)
    for centre in ((16, 16), (18, 46), (44, 20), (46, 48)):
        image += 0.8 * (np.hypot(y - centre[0], x - centre[1]) < 7)
    return Contents(
        description="Flows and logits of nuclei in planes of embryos: Cellpose's CNN retrained by nuclei3d.",
        citations=[_CELLPOSE],
        documentation=_OF_PLANES.format(
            diameter_px=info.diameter_px,
            diameter_um=f" ({known:.3g} um in the training)" if known is not None else "",
            **_normalisation(info),
        ),
        input_name="plane",
        input_description="a plane, normalised as the documentation says, and an empty channel",
        input_channels=["nuclei", "empty"],
        # three poolings by two
        axes=[SpaceAxis("y", 16, 8, pixel_um), SpaceAxis("x", 16, 8, pixel_um)],
        example=np.stack([image, 0 * image])[None].astype(np.float32),
        source=Path(plane_network.__file__),
        make=plane_network.PlaneNetwork.__name__,
        arguments=dict(nbase=channels(info.width), nout=3, sz=3, max_pool=True, diam_mean=info.diameter_px),
        packages=[f"cellpose=={metadata.version('cellpose')}"],
    )


def volume_contents(info: ModelInfo, spec: VolumeSpec) -> Contents:
    """Describe the package of a 3D network: volumes in, flows in space out."""
    known = info.nucleus_diameter_um
    edge_um = None if known is None else known / info.diameter_px
    deep_um = None if edge_um is None else spec.anisotropy * edge_um
    voxels = ""
    if edge_um is not None and deep_um is not None:
        voxels = f" (in the training {deep_um:.3g} x {edge_um:.3g} x {edge_um:.3g} um, nuclei {known:.3g} um)"
    multiple = spec.architecture.multiple
    return Contents(
        description="Flows and logits of nuclei in volumes of embryos: a 3D network trained by nuclei3d.",
        citations=[_CELLPOSE, _NNUNET],
        documentation=_OF_VOLUMES.format(
            diameter_px=info.diameter_px,
            anisotropy=spec.anisotropy,
            voxels=voxels,
            multiple=" x ".join(map(str, multiple)),
            patch=" x ".join(map(str, spec.patch)),
            flows=_FLOWS[spec.targets],
            **_normalisation(info),
        ),
        input_name="volume",
        input_description="a volume, resampled and normalised as the documentation says",
        input_channels=["nuclei"],
        axes=[
            SpaceAxis(name, step, step, edge)
            for name, step, edge in zip("zyx", multiple, (deep_um, edge_um, edge_um), strict=True)
        ],
        example=_example_volume(info, spec),
        source=Path(unet3d.__file__),
        make=unet3d.described_network.__name__,
        arguments=json.loads(json.dumps(asdict(spec))),
    )


def _normalisation(info: ModelInfo) -> dict[str, float]:
    return {
        "lower": info.lower_percentile,
        "upper": info.upper_percentile,
        "noise": info.noise_floor,
        "logit": info.cellprob_threshold,
    }


def _example_volume(info: ModelInfo, spec: VolumeSpec) -> NDArray[np.float32]:
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


def write_package(model: Model, out: Path) -> Path:
    """Write ``<name>.zip``: weights as state dict and TorchScript, architecture, test tensors, the card."""
    path = out / f"{model.info.name}.zip"
    with tempfile.TemporaryDirectory(prefix="nuclei3d-") as scratch:
        save_bioimageio_package(_describe(model, Path(scratch)), output_path=path)
    return path


def _describe(model: Model, folder: Path) -> v0_5.ModelDescr:
    info = model.info
    contents = plane_contents(info) if info.full3d is None else volume_contents(info, info.full3d)
    _write_tensors(model.network, contents, folder)
    card = model.path.parent / CARD_FILE
    documentation = _DOCUMENTATION.format(
        name=info.name,
        version=__version__,
        text=contents.documentation,
        card=card.read_text(encoding="utf-8") if card.is_file() else "Not described by whoever exported it.",
    )
    (folder / "README.md").write_text(documentation, encoding="utf-8")
    attachments = []
    if (model.path.parent / INFO_FILE).is_file():
        (folder / INFO_FILE).write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")
        attachments.append(FileDescr(source=folder / INFO_FILE))
    given, made = _tensors(contents, folder)
    return v0_5.ModelDescr(
        # five letters is the least that the specification takes
        name=info.name if len(info.name) >= 5 else f"nuclei3d {info.name}",
        description=contents.description,
        authors=[Author(name="the users of nuclei3d who trained it")],
        cite=[CiteEntry(text=text, doi=Doi(doi)) for text, doi in contents.citations],
        license=LicenseId("BSD-3-Clause"),
        documentation=FileDescr(source=folder / "README.md"),
        attachments=attachments,
        tags=["nuclei", "segmentation", "embryo", "light-sheet", "cellpose", "3d", "pytorch"],
        inputs=[given],
        outputs=[made],
        weights=_weights(contents, folder),
    )


class _FirstOutput(nn.Module):
    """A network as it is traced: of Cellpose's several outputs the first alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, data: torch.Tensor) -> Any:
        output = self.network(data)
        return output[0] if isinstance(output, tuple) else output


def _write_tensors(network: nn.Module, contents: Contents, folder: Path) -> None:
    example = torch.from_numpy(contents.example)
    first = _FirstOutput(network).eval()
    with torch.no_grad():
        np.save(folder / "input.npy", contents.example)
        np.save(folder / "output.npy", first(example).numpy())
        torch.jit.trace(first, example).save(str(folder / "weights_torchscript.pt"))  # type: ignore[no-untyped-call]
    torch.save(network.state_dict(), folder / "weights.pt")


def _tensors(contents: Contents, folder: Path) -> tuple[Any, Any]:
    """Describe the input and the output, which lie on one grid."""

    def parts(name: str, description: str, channels: Sequence[str], space: list[Any]) -> dict[str, Any]:
        names = [v0_5.Identifier(channel) for channel in channels]
        return {
            "description": description,
            "axes": [v0_5.BatchAxis(), v0_5.ChannelAxis(channel_names=names), *space],
            "test_tensor": FileDescr(source=folder / f"{name}.npy"),
            "data": v0_5.IntervalOrRatioDataDescr(type="float32"),
        }

    seen = v0_5.TensorId(contents.input_name)
    inside, outside = [], []
    for axis in contents.axes:
        name = v0_5.AxisId(axis.name)
        scale: Any = {} if axis.voxel_um is None else {"scale": axis.voxel_um, "unit": "micrometer"}
        size = v0_5.ParameterizedSize(min=axis.least, step=axis.step)
        inside.append(v0_5.SpaceInputAxis(id=name, size=size, **scale))
        same = v0_5.SizeReference(tensor_id=seen, axis_id=name)
        outside.append(v0_5.SpaceOutputAxis(id=name, size=same, **scale))
    described = contents.input_description, contents.input_channels
    given = v0_5.InputTensorDescr(id=seen, **parts("input", *described, inside))
    names = [axis.name for axis in contents.axes]
    described = (
        ", ".join([*(f"5 x flow in {name}" for name in names), "logit"]),
        [*(f"flow_{name}" for name in names), "logit"],
    )
    made = v0_5.OutputTensorDescr(id=v0_5.TensorId("flows"), **parts("output", *described, outside))
    return given, made


def _weights(contents: Contents, folder: Path) -> Any:
    version = v0_5.Version(torch.__version__.partition("+")[0])
    packages = "".join(f"      - {name}\n" for name in (f"torch=={version}", *contents.packages))
    environment = folder / "environment.yaml"
    environment.write_text(
        "name: nuclei\nchannels: [conda-forge, nodefaults]\ndependencies:\n"
        f"  - python=3.11\n  - pip\n  - pip:\n{packages}"
    )
    architecture = v0_5.ArchitectureFromFileDescr(
        source=contents.source, callable=v0_5.Identifier(contents.make), kwargs=dict(contents.arguments)
    )
    return v0_5.WeightsDescr(
        pytorch_state_dict=v0_5.PytorchStateDictWeightsDescr(
            source=folder / "weights.pt",
            architecture=architecture,
            pytorch_version=version,
            dependencies=FileDescr(source=environment),
        ),
        torchscript=v0_5.TorchscriptWeightsDescr(
            source=folder / "weights_torchscript.pt", pytorch_version=version, parent="pytorch_state_dict"
        ),
    )
