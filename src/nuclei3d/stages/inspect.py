"""inspect: what is in images, how large their nuclei are, what to set; only blocks and planes are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from nuclei3d.config import Params
from nuclei3d.config.sections import DataParams
from nuclei3d.console import progress_bar, say
from nuclei3d.grid import resize_linear
from nuclei3d.images.frames import Frame, find_frames, read_layout, volume_paths
from nuclei3d.images.ome_zarr import is_zarr
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.outputs import whole_file
from nuclei3d.stages.diameters import look_at, time_lapse_of

if TYPE_CHECKING:
    from nuclei3d.networks.folder import ModelInfo

_LOOKED_AT = 3
"""Frames of a time-lapse that are looked at: the first, the middle and the last."""
_DIFFERENT = 1.25
"""Ratio of diameters beyond which nuclei are called of another size."""
_PICTURE_PX = 480


@dataclass(frozen=True)
class InspectedFrame:
    """Intensities and nuclei of one frame; None where nothing was found.

    `fill` is the share of voxels that registration or fusion left around the image; `low` and `high` become 0
    and 1 for a network; `noise` is a standard deviation; `debris` and `uneven_background` are evened out.
    """

    name: str
    low: float
    high: float
    noise: float
    fill: float
    debris: bool
    uneven_background: bool
    diameter_um: float | None
    diameter_error_um: float | None
    nuclei_seen: int


@dataclass(frozen=True)
class InspectedImage:
    """A file or time-lapse: its axes, scale and channels, some of its frames, and what to set."""

    path: Path
    axes: str
    dtype: str
    frames: int
    channels: tuple[str, ...]
    channel: str
    voxel_size_um: tuple[float, float, float] | None
    voxel_size_from: str
    looked_at: tuple[InspectedFrame, ...]
    advice: tuple[str, ...]


@dataclass(frozen=True)
class _Plane:
    """A plane (y, x) to show, normalised, and the radius of a nucleus in its pixels."""

    name: str
    pixels: NDArray[np.float32]
    radius: float | None


@dataclass(frozen=True)
class InspectResult:
    """All images; what the model expects (None without one); the picture, if one was asked for."""

    images: tuple[InspectedImage, ...]
    model: dict[str, Any] | None
    picture: Path | None


def inspect_images(
    params: Params, inputs: Sequence[Path], model: Path | None = None, picture: Path | None = None
) -> InspectResult:
    """Look at images, print what they are and what to set for them, and give it.

    The section ``data`` of the parameters counts. Inputs are TIFF files, folders of them, OME-Zarr; of a
    time-lapse three frames are looked at. With the nuclei of `model`, a folder or weights file, theirs are
    compared. `picture` is a PNG to write: a plane of each image with a circle of the diameter.
    """
    info = None
    if model is not None:
        from nuclei3d.networks.folder import load_model

        info = load_model(model).info
    movies = [
        (channels, list(group))
        for source in inputs
        for channels, frames in [_frames_of(source, params.data)]
        for _, group in groupby(frames, key=time_lapse_of)
    ]
    images: list[InspectedImage] = []
    shown: list[_Plane] = []
    with progress_bar("inspect", total=len(movies)) as bar:
        for channels, frames in movies:
            image, plane = _inspect(channels, frames, params.data, info)
            images.append(image)
            shown.append(plane)
            bar.advance()
    told = ("nucleus_diameter_um", "diameter_px", "voxel_size_um", "min_volume_um3")
    expected = None if info is None else {name: getattr(info, name) for name in told}
    for image in images:
        say("\n".join(_describe(image)))
    if expected is not None:
        say(f"{model} expects " + ", ".join(f"{name} {value}" for name, value in expected.items()))
    if picture is not None:
        _draw(shown, picture)
        say(f"picture: {picture}")
    return InspectResult(tuple(images), expected, picture)


def _frames_of(source: Path, data: DataParams) -> tuple[tuple[str, ...], list[Frame]]:
    """Find the frames of an input and its channels; of several the first, if none was chosen."""
    layout = read_layout(volume_paths(source)[0], data.image)
    lengths = dict(zip(layout.axes.upper(), layout.shape, strict=True))
    count = max(lengths.get("C", 1), lengths.get("S", 1))
    names = tuple(layout.channels[k] if k < len(layout.channels) else str(k) for k in range(count))
    channel = 0 if data.channel is None and count > 1 else data.channel
    given = VoxelSize.given(data.voxel_size_um)
    return names, find_frames(source, channel=channel, image=data.image, voxel_size=given)


def _inspect(
    channels: tuple[str, ...], frames: Sequence[Frame], data: DataParams, info: ModelInfo | None
) -> tuple[InspectedImage, _Plane]:
    """Look at a time-lapse; give also a plane to show, of the frame in which most nuclei were seen."""
    places = sorted({round(at) for at in np.linspace(0, len(frames) - 1, _LOOKED_AT)})
    looked_at, planes = zip(*(_look_at(frames[at]) for at in places), strict=True)
    first = frames[0]
    chosen = data.channel if data.channel is not None else channels[0]
    image = InspectedImage(
        path=time_lapse_of(first) if len(frames) > 1 else first.path,
        axes=read_layout(first.path, data.image).describe(),
        dtype=str(first.dtype),
        frames=len(frames),
        channels=channels,
        channel=str(chosen),
        voxel_size_um=None if first.voxel_size is None else first.voxel_size.zyx,
        voxel_size_from=_scale_source(first, data),
        looked_at=looked_at,
        advice=tuple(_advise(first, channels, looked_at, data, info)),
    )
    best = int(np.argmax([frame.nuclei_seen for frame in looked_at]))
    name = f"{image.path.name} {planes[best].name}" if len(frames) > 1 else planes[best].name
    return image, replace(planes[best], name=name)


def _look_at(frame: Frame) -> tuple[InspectedFrame, _Plane]:
    look = look_at(frame)
    intensity, found = look.intensity, look.diameter
    inspected = InspectedFrame(
        name=frame.name,
        low=intensity.low,
        high=intensity.high,
        noise=intensity.noise,
        fill=look.fill,
        debris=intensity.ceiling is not None,
        uneven_background=intensity.background is not None,
        diameter_um=None if found is None else round(found.diameter_um, 2),
        diameter_error_um=None if found is None else round(found.error_um, 2),
        nuclei_seen=0 if found is None else found.nuclei,
    )
    # the plane with most signal
    brightness = [np.percentile(plane[::4, ::4], 95) for plane in look.picture]
    shown = intensity.apply(look.picture[int(np.argmax(brightness))])
    factor = min(1.0, _PICTURE_PX / max(shown.shape))
    pixels = resize_linear(shown, [max(1, round(side * factor)) for side in shown.shape])
    radius = None
    if found is not None and frame.voxel_size is not None:
        radius = found.diameter_um / 2 / frame.voxel_size.x * pixels.shape[1] / shown.shape[1]
    return inspected, _Plane(frame.name, pixels, radius)


def _scale_source(frame: Frame, data: DataParams) -> str:
    if data.voxel_size_um is not None:
        return "data.voxel_size_um"
    if frame.voxel_size is None:
        return f"not stated{f': {frame.scale_note}' if frame.scale_note else ''}"
    if is_zarr(frame.path):
        return "OME-Zarr metadata"
    try:
        with tifffile.TiffFile(frame.path, _multifile=False) as file:
            kinds = {"OME": file.is_ome, "ImageJ": file.is_imagej, "LSM": file.is_lsm}
            kind = next((name for name, holds in kinds.items() if holds), None)
    except tifffile.TiffFileError:
        return f"{frame.path.suffix} metadata"
    return f"{kind} metadata" if kind else "TIFF tags and description"


def _advise(
    frame: Frame,
    channels: tuple[str, ...],
    looked_at: Sequence[InspectedFrame],
    data: DataParams,
    info: ModelInfo | None,
) -> list[str]:
    advice = []
    if len(channels) > 1 and data.channel is None:
        listing = ", ".join(f"{number} ({name})" for number, name in enumerate(channels))
        advice.append(f"choose the channel of the nuclei, {listing}: --set data.channel=NUMBER")
    if frame.voxel_size is None:
        advice.append("give the voxel size in um, in the order z, y, x: --set data.voxel_size_um=[Z,Y,X]")
        return advice
    for each in looked_at:
        if each.noise == 0:
            advice.append(f"{each.name}: no noise at all; is it an image, or are these labels?")
        if each.high - each.low <= 1.01 * 10 * each.noise:
            advice.append(f"{each.name}: hardly anything rises above the noise; is it the right channel?")
    sizes = [each for each in looked_at if each.diameter_um is not None]
    if not sizes:
        advice.append("nothing like nuclei was found; look at the image, its channel and its voxel size")
        return advice
    first, last = sizes[0], sizes[-1]
    assert first.diameter_um is not None
    assert last.diameter_um is not None
    middle_um = float(np.median([each.diameter_um for each in sizes if each.diameter_um is not None]))
    if _differ(first.diameter_um, last.diameter_um):
        advice.append(
            f"nuclei change from {first.diameter_um:.3g} to {last.diameter_um:.3g} um: predict --diameter "
            "auto follows them"
        )
    if info is None:
        across = middle_um / frame.voxel_size.x
        advice.append(f"a nucleus is about {across:.3g} pixels across; for a model of your own see prepare")
    elif info.nucleus_diameter_um is None:
        advice.append(f"the model does not say how large its nuclei are: predict --diameter {middle_um:.3g}")
    elif info.embryo_diameters_um is not None:
        low, high = info.embryo_diameters_um
        advice.append(
            f"the model knows nuclei of {low:.3g} to {high:.3g} um, each at its own scale: check the "
            f"estimate, then predict --diameter {middle_um:.3g}"
        )
    elif _differ(middle_um, info.nucleus_diameter_um):
        advice.append(
            f"nuclei are of {middle_um:.3g} um, the model's of {info.nucleus_diameter_um:.3g}: check the "
            f"voxel size, then predict --diameter {middle_um:.3g}"
        )
    else:
        advice.append("the model's diameter fits: nothing to set")
    return advice


def _differ(a: float, b: float) -> bool:
    return abs(math.log(a / b)) > math.log(_DIFFERENT)


def _describe(image: InspectedImage) -> list[str]:
    voxel = "unknown" if image.voxel_size_um is None else str(VoxelSize.of(image.voxel_size_um))
    lines = [
        f"{image.path}: {image.axes}, {image.dtype}, {image.frames} frame{'s' if image.frames > 1 else ''}",
        f"  voxel size  {voxel} ({image.voxel_size_from})",
    ]
    if len(image.channels) > 1:
        lines.append(f"  channels    {', '.join(image.channels)}; this is {image.channel}")
    for each in image.looked_at:
        notes = [f"fill {each.fill:.1%}" if each.fill else "no fill"]
        notes += ["debris"] if each.debris else []
        notes += ["uneven background"] if each.uneven_background else []
        lines.append(
            f"  {each.name}: intensities {each.low:.5g} to {each.high:.5g}, noise {each.noise:.3g}, "
            + ", ".join(notes)
        )
        size = "unknown"
        if each.diameter_um is not None:
            size = f"{each.diameter_um:.3g} +- {each.diameter_error_um:.2g} um ({each.nuclei_seen} seen)"
        lines.append(f"    diameter of the nuclei {size}")
    return [*lines, *(f"  -> {line}" for line in image.advice)]


def _draw(shown: Sequence[_Plane], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    figure = Figure(figsize=(3.2 * len(shown), 3.4), layout="constrained")
    for axis, plane in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        axis.imshow(plane.pixels, cmap="gray", vmin=0, vmax=1)
        axis.set_axis_off()
        axis.set_title(plane.name, fontsize=8)
        if plane.radius is not None:
            middle = (plane.radius + 4, plane.radius + 4)
            axis.add_patch(Circle(middle, plane.radius, fill=False, color="#e69f00"))
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=110, format="png", metadata={"Software": None})
