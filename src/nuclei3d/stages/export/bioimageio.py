"""The network as a package of bioimage.io, which `bioimageio test` accepts."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nuclei3d import __version__
from nuclei3d.errors import InputError
from nuclei3d.models.folder import CARD_FILE, INFO_FILE, Model
from nuclei3d.stages.export.bioimageio_contents import Contents, SpaceAxis
from nuclei3d.stages.export.bioimageio_plane import plane_contents
from nuclei3d.stages.export.bioimageio_volume import volume_contents

_DOCUMENTATION = """# {name}

Trained by nuclei3d {version}. {text}
## Validation

{card}
"""


class _FirstOutput(nn.Module):
    """A network as it is traced: of Cellpose's several outputs the first alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, data: torch.Tensor) -> Any:
        output = self.network(data)
        return output[0] if isinstance(output, tuple) else output


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
    """Write ``<name>.zip``: weights as state dict and TorchScript, architecture, test tensors, the card.

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
    contents = plane_contents(info) if info.full3d is None else volume_contents(info, info.full3d)
    _write_tensors(model.network, contents, folder)
    (folder / "README.md").write_text(_documentation(model, contents), encoding="utf-8")
    attachments = []
    if (model.path.parent / INFO_FILE).is_file():
        (folder / INFO_FILE).write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")
        attachments.append(FileDescr(source=folder / INFO_FILE))
    return v0_5.ModelDescr(
        name=info.name,
        description=contents.description,
        authors=[Author(name="the users of nuclei3d who trained it")],
        cite=[CiteEntry(text=text, doi=Doi(doi)) for text, doi in contents.citations],
        license=LicenseId("BSD-3-Clause"),
        documentation=FileDescr(source=folder / "README.md"),
        attachments=attachments,
        tags=["nuclei", "segmentation", "embryo", "light-sheet", "cellpose", "3d", "pytorch"],
        inputs=[_input(contents, folder)],
        outputs=[_output(contents, folder)],
        weights=_weights(contents, folder),
    )


def _write_tensors(network: nn.Module, contents: Contents, folder: Path) -> None:
    """Write weights, TorchScript, and the example with what the network makes of it."""
    example = torch.from_numpy(contents.example)
    first = _FirstOutput(network).eval()
    with torch.no_grad():
        np.save(folder / "input.npy", contents.example)
        np.save(folder / "output.npy", first(example).numpy())
        torch.jit.trace(first, example).save(str(folder / "weights_torchscript.pt"))  # type: ignore[no-untyped-call]
    torch.save(network.state_dict(), folder / "weights.pt")


def _input(contents: Contents, folder: Path) -> Any:
    from bioimageio.spec.common import FileDescr
    from bioimageio.spec.model import v0_5

    names = [v0_5.Identifier(name) for name in contents.input_channels]
    space = [
        v0_5.SpaceInputAxis(
            id=v0_5.AxisId(axis.name),
            size=v0_5.ParameterizedSize(min=axis.least, step=axis.step),
            **_scale(axis),
        )
        for axis in contents.axes
    ]
    return v0_5.InputTensorDescr(
        id=v0_5.TensorId(contents.input_name),
        description=contents.input_description,
        axes=[v0_5.BatchAxis(), v0_5.ChannelAxis(channel_names=names), *space],
        test_tensor=FileDescr(source=folder / "input.npy"),
        data=v0_5.IntervalOrRatioDataDescr(type="float32"),
    )


def _output(contents: Contents, folder: Path) -> Any:
    from bioimageio.spec.common import FileDescr
    from bioimageio.spec.model import v0_5

    names = [v0_5.Identifier(name) for name in contents.output_channels]
    seen = v0_5.TensorId(contents.input_name)
    space = [
        v0_5.SpaceOutputAxis(
            id=v0_5.AxisId(axis.name),
            size=v0_5.SizeReference(tensor_id=seen, axis_id=v0_5.AxisId(axis.name)),
            **_scale(axis),
        )
        for axis in contents.axes
    ]
    return v0_5.OutputTensorDescr(
        id=v0_5.TensorId("flows"),
        description=contents.output_description,
        axes=[v0_5.BatchAxis(), v0_5.ChannelAxis(channel_names=names), *space],
        test_tensor=FileDescr(source=folder / "output.npy"),
        data=v0_5.IntervalOrRatioDataDescr(type="float32"),
    )


def _scale(axis: SpaceAxis) -> dict[str, Any]:
    return {} if axis.voxel_um is None else {"scale": axis.voxel_um, "unit": "micrometer"}


def _weights(contents: Contents, folder: Path) -> Any:
    from bioimageio.spec.common import FileDescr
    from bioimageio.spec.model import v0_5

    version = v0_5.Version(torch.__version__.partition("+")[0])
    packages = "".join(f"      - {name}\n" for name in (f"torch=={version}", *contents.packages))
    environment = folder / "environment.yaml"
    environment.write_text(
        "name: nuclei\nchannels: [conda-forge, nodefaults]\ndependencies:\n"
        f"  - python=3.11\n  - pip\n  - pip:\n{packages}"
    )
    architecture = v0_5.ArchitectureFromFileDescr(
        source=contents.source,
        callable=v0_5.Identifier(contents.make),
        kwargs=dict(contents.arguments),
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


def _documentation(model: Model, contents: Contents) -> str:
    card = model.path.parent / CARD_FILE
    return _DOCUMENTATION.format(
        name=model.info.name,
        version=__version__,
        text=contents.documentation,
        card=card.read_text(encoding="utf-8") if card.is_file() else "Not described by whoever exported it.",
    )
