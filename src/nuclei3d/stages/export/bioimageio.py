"""The network as a package of bioimage.io, which `bioimageio test` accepts."""

from __future__ import annotations

import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nuclei3d import __version__
from nuclei3d.core.networks import CHANNELS
from nuclei3d.errors import InputError
from nuclei3d.models.folder import CARD_FILE, INFO_FILE, Model
from nuclei3d.models.info import ModelInfo
from nuclei3d.stages.export import plane_network

_TEST_EDGE_PX = 64
_CITE = (
    "Stringer, Wang, Michaelos, Pachitariu: Cellpose: a generalist algorithm for cellular segmentation. "
    "Nature Methods 18 (2021)",
    "10.1038/s41592-020-01018-x",
)
_DOCUMENTATION = """# {name}

Cellpose's CNN, retrained by nuclei3d {version} on planes of 3D embryos. The package holds the network of
one plane: it gives flows and logits, not masks. nuclei3d runs it over the planes of three views of a volume,
fuses the flows in 3D and follows them to nuclei.

## Input

Channel 0: a plane in which nuclei are {diameter_px:.3g} px across{diameter_um}. The volume's percentile
{lower:g} is 0 and its percentile {upper:g} is 1, both taken over the whole volume, never per plane; their
distance is at least {noise:g} standard deviations of the noise. Channel 1: zeros.

## Output

5 x the flow in y, 5 x the flow in x (unit vectors to the centre of the nucleus), and the logit of being
inside one. Logits above {logit:g} count as inside.

## Validation

{card}
"""


class _FirstOutput(nn.Module):
    """The network as it is traced."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, data: torch.Tensor) -> Any:
        return self.network(data)[0]


def check_installed() -> None:
    """Refuse in one line where the package bioimageio.core is missing.

    Raises
    ------
    InputError
        With the command that installs it.
    """
    if find_spec("bioimageio") is None or find_spec("bioimageio.spec") is None:
        raise InputError("the format bioimageio needs bioimageio.core: pip install 'nuclei3d[export]'")


def write_package(model: Model, folder: Path) -> Path:
    """Write ``<name>.zip``: weights as a Cellpose state dict and as TorchScript, test tensors, the card.

    Raises
    ------
    InputError
        If bioimageio.core is not installed.
    """
    check_installed()
    from bioimageio.spec import save_bioimageio_package

    path = folder / f"{model.info.name}.zip"
    with tempfile.TemporaryDirectory(prefix="nuclei3d-") as scratch:
        save_bioimageio_package(_describe(model, Path(scratch)), output_path=path)
    return path


def _describe(model: Model, folder: Path) -> Any:
    """Write the parts into a folder and describe the model that they make."""
    from bioimageio.spec.common import FileDescr
    from bioimageio.spec.generic.v0_3 import Author, CiteEntry, Doi, LicenseId
    from bioimageio.spec.model import v0_5

    info = model.info
    _write_tensors(model.network, folder)
    (folder / "README.md").write_text(_documentation(model), encoding="utf-8")
    attachments = []
    if (model.path.parent / INFO_FILE).is_file():
        (folder / INFO_FILE).write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")
        attachments.append(FileDescr(source=folder / INFO_FILE))
    text, doi = _CITE
    return v0_5.ModelDescr(
        name=info.name,
        description="Flows and logits of nuclei in planes of embryos: Cellpose's CNN retrained by nuclei3d.",
        authors=[Author(name="the users of nuclei3d who trained it")],
        cite=[CiteEntry(text=text, doi=Doi(doi))],
        license=LicenseId("BSD-3-Clause"),
        documentation=FileDescr(source=folder / "README.md"),
        attachments=attachments,
        tags=["nuclei", "segmentation", "embryo", "light-sheet", "cellpose", "3d", "pytorch"],
        inputs=[_input(folder)],
        outputs=[_output(folder)],
        weights=_weights(info, folder),
    )


def _write_tensors(network: nn.Module, folder: Path) -> None:
    """Write weights, TorchScript, and a plane with what the network makes of it."""
    plane = torch.from_numpy(_example_plane())
    first = _FirstOutput(network).eval()
    with torch.no_grad():
        np.save(folder / "input.npy", plane.numpy())
        np.save(folder / "output.npy", first(plane).numpy())
        torch.jit.trace(first, plane).save(str(folder / "weights_torchscript.pt"))  # type: ignore[no-untyped-call]
    torch.save(network.state_dict(), folder / "weights.pt")


def _example_plane() -> np.ndarray[Any, np.dtype[np.float32]]:
    """Give a plane (1, 2, y, x) with four bright discs in noise."""
    y, x = np.mgrid[:_TEST_EDGE_PX, :_TEST_EDGE_PX]
    image = np.random.default_rng(0).normal(0.1, 0.03, y.shape)
    for centre in ((16, 16), (18, 46), (44, 20), (46, 48)):
        image += 0.8 * (np.hypot(y - centre[0], x - centre[1]) < 7)
    plane: np.ndarray[Any, np.dtype[np.float32]] = np.stack([image, 0 * image])[None].astype(np.float32)
    return plane


def _input(folder: Path) -> Any:
    from bioimageio.spec.common import FileDescr
    from bioimageio.spec.model import v0_5

    # three poolings by two
    size = v0_5.ParameterizedSize(min=16, step=8)
    return v0_5.InputTensorDescr(
        id=v0_5.TensorId("plane"),
        description="a plane, normalised as the documentation says, and an empty channel",
        axes=[
            v0_5.BatchAxis(),
            v0_5.ChannelAxis(channel_names=[v0_5.Identifier("nuclei"), v0_5.Identifier("empty")]),
            v0_5.SpaceInputAxis(id=v0_5.AxisId("y"), size=size),
            v0_5.SpaceInputAxis(id=v0_5.AxisId("x"), size=size),
        ],
        test_tensor=FileDescr(source=folder / "input.npy"),
        data=v0_5.IntervalOrRatioDataDescr(type="float32"),
    )


def _output(folder: Path) -> Any:
    from bioimageio.spec.common import FileDescr
    from bioimageio.spec.model import v0_5

    names = [v0_5.Identifier(name) for name in ("flow_y", "flow_x", "logit")]
    space = [
        v0_5.SpaceOutputAxis(
            id=v0_5.AxisId(axis),
            size=v0_5.SizeReference(tensor_id=v0_5.TensorId("plane"), axis_id=v0_5.AxisId(axis)),
        )
        for axis in ("y", "x")
    ]
    return v0_5.OutputTensorDescr(
        id=v0_5.TensorId("flows"),
        description="5 x flow in y, 5 x flow in x, logit",
        axes=[v0_5.BatchAxis(), v0_5.ChannelAxis(channel_names=names), *space],
        test_tensor=FileDescr(source=folder / "output.npy"),
        data=v0_5.IntervalOrRatioDataDescr(type="float32"),
    )


def _weights(info: ModelInfo, folder: Path) -> Any:
    from bioimageio.spec.common import FileDescr
    from bioimageio.spec.model import v0_5

    version = v0_5.Version(torch.__version__.partition("+")[0])
    cellpose = metadata.version("cellpose")
    environment = folder / "environment.yaml"
    environment.write_text(
        "name: nuclei\nchannels: [conda-forge, nodefaults]\ndependencies:\n"
        f"  - python=3.11\n  - pip\n  - pip:\n      - torch=={version}\n      - cellpose=={cellpose}\n"
    )
    architecture = v0_5.ArchitectureFromFileDescr(
        source=Path(plane_network.__file__),
        callable=v0_5.Identifier(plane_network.PlaneNetwork.__name__),
        kwargs={"nbase": list(CHANNELS), "nout": 3, "sz": 3, "max_pool": True, "diam_mean": info.diameter_px},
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


def _documentation(model: Model) -> str:
    info = model.info
    card = model.path.parent / CARD_FILE
    known = info.nucleus_diameter_um
    return _DOCUMENTATION.format(
        name=info.name,
        version=__version__,
        diameter_px=info.diameter_px,
        diameter_um=f" ({known:.3g} um in the training)" if known is not None else "",
        lower=info.lower_percentile,
        upper=info.upper_percentile,
        noise=info.noise_floor,
        logit=info.cellprob_threshold,
        card=card.read_text(encoding="utf-8") if card.is_file() else "Not described by whoever exported it.",
    )
