"""One request to a served model: what may be asked, where the volume comes from, what is answered."""

from __future__ import annotations

import base64
import binascii
import difflib
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, ValidationError

from nuclei3d.config.sections import PositiveFloat, PredictParams, SegmentationParams, Triple
from nuclei3d.errors import InputError
from nuclei3d.images.voxel_size import VoxelSize

if TYPE_CHECKING:
    from nuclei3d.images.frames import Frame

VOLUME = "volume"
PATH = "path"
MAX_VOXELS = 100_000_000


class RequestParams(SegmentationParams):
    """What a request may set; what it does not set is the service's default, or said by the file.

    `voxel_size_um` is (z, y, x) and wins over the file's; `anisotropy` (depth of a voxel over its width in x)
    replaces only the depth. Where and with how much memory it is computed is the business of the service.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    mode: Literal["auto", "ortho", "stitch", "cellpose", "full3d"] = "auto"
    diameter_um: PositiveFloat | None = None
    voxel_size_um: Triple | None = None
    anisotropy: PositiveFloat | None = None
    channel: str | None = None

    def over(self, defaults: PredictParams) -> PredictParams:
        """Give the prediction parameters: the request's where it says something, else the defaults."""
        given = {
            name: getattr(self, name) for name in self.model_fields_set & set(PredictParams.model_fields)
        }
        try:
            return PredictParams.model_validate(defaults.model_dump() | given)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise InputError(f"the parameters do not go together: {reason}") from None


def refuse_second_model(predict: PredictParams) -> None:
    """Refuse a second model, and a diameter still to be estimated, where one model answers requests."""
    if predict.diameter_um == "auto":
        raise InputError(
            "predict.diameter_um=auto is for 'nuclei3d predict'; registered models and services take a number"
        )
    for name in ("orthogonal_model", "volume_model"):
        if getattr(predict, name) is not None:
            raise InputError(
                f"predict.{name} is for 'nuclei3d predict' with a model on this machine; registered "
                "models and services have one network: leave it out"
            )


@dataclass(frozen=True)
class VolumeLimits:
    """What a service accepts: files below `root` by name (None: no paths), and volumes up to `max_voxels`."""

    root: Path | None = None
    max_voxels: int = MAX_VOXELS


def read_request_params(values: Mapping[str, Any] | None) -> RequestParams:
    """Validate the ``params`` of a request.

    Empty texts and lists mean "not given": that is how MLflow's signature can say it.
    """
    given = {name: value for name, value in (values or {}).items() if not _is_empty(value)}
    known = sorted(RequestParams.model_fields)
    for name in given:
        if name not in RequestParams.model_fields:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
            raise InputError(f"unknown parameter '{name}'; {hint}")
    try:
        return RequestParams.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"])
        raise InputError(f"parameter '{name}' is {problem['input']!r}: {problem['msg']}") from None


def decode_volume(value: object) -> bytes:
    """Give the bytes of a TIFF from a cell of the column ``volume``: bytes, or their base64 text."""
    if isinstance(value, bytes | bytearray | memoryview):
        content = bytes(value)
    elif isinstance(value, str):
        try:
            content = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise InputError(
                "column 'volume' is not valid base64; send the bytes of a TIFF in base64"
            ) from None
    else:
        raise InputError(
            f"column 'volume' holds a {type(value).__name__}; send the bytes of a TIFF in base64"
        )
    if content[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        raise InputError("column 'volume' is not a TIFF; send the bytes of a TIFF or OME-TIFF in base64")
    return content


def check_row(row: Mapping[Any, object]) -> tuple[object | None, object | None]:
    """Give ``volume`` and ``path`` of a row, one of them None."""
    unknown = sorted(str(name) for name in set(row) - {VOLUME, PATH})
    if unknown:
        raise InputError(f"unknown column '{unknown[0]}'; a row has 'volume' (base64 TIFF) or 'path'")
    volume, path = (None if _is_missing(row.get(name)) else row[name] for name in (VOLUME, PATH))
    if (volume is None) == (path is None):
        raise InputError("a row must have either 'volume' (a TIFF in base64) or 'path'")
    return volume, path


@contextmanager
def volume_on_disk(row: Mapping[Any, object], limits: VolumeLimits) -> Iterator[Path]:
    """Give the file of a row of a request: sent (written to a temporary file) or named below the root."""
    volume, path = check_row(row)
    if path is not None:
        yield path_below(limits.root, path)
        return
    content = decode_volume(volume)
    with tempfile.TemporaryDirectory(prefix="nuclei3d-") as folder:
        file = Path(folder) / "volume.ome.tif"
        file.write_bytes(content)
        del content
        yield file


def path_below(root: Path | None, path: object) -> Path:
    """Resolve a path of a request and make sure that it stays below the root, links included.

    Raises
    ------
    InputError
        If no root is configured, or the path is an address, leaves the root or does not exist. The message
        is the same in the last two cases: a request learns nothing about files outside.
    """
    if root is None:
        raise InputError("this service takes no paths (no root is configured); send the volume itself")
    if not isinstance(path, str) or not path or "\0" in path or "://" in path:
        raise InputError("'path' must be the name of a file below the root of the service")
    top = root.resolve()
    try:
        resolved = (top / path).resolve()
        inside = resolved.is_relative_to(top) and resolved.exists()
    except (OSError, RuntimeError):
        inside = False
    if not inside:
        raise InputError(f"no file '{path}' below the root of the service")
    if resolved.is_dir() and any(item.is_symlink() for item in resolved.rglob("*")):
        raise InputError(f"'{path}' holds links; the service does not follow them")
    return resolved


def open_frame(file: Path, params: RequestParams, max_voxels: int) -> tuple[Frame, VoxelSize]:
    """Open the one volume of a file, check its declared size, and settle its voxel size. Nothing is read.

    Raises
    ------
    InputError
        If it is no single volume, too large, or has no voxel size and the request gives none.
    """
    from nuclei3d.images.frames import find_frames

    given = VoxelSize.of(params.voxel_size_um) if params.voxel_size_um is not None else None
    if file.is_file():
        check_header(file, max_voxels)
    try:
        frames = find_frames(file, channel=params.channel, voxel_size=given)
    except InputError as error:
        # The name of our temporary file says nothing to the sender.
        raise InputError(str(error).replace(str(file), "the volume")) from None
    if len(frames) != 1:
        raise InputError(f"the volume has {len(frames)} time points; send one time point per row")
    frame = frames[0]
    _check_size(frame.shape, max_voxels)
    voxel_size = given or frame.voxel_size
    if voxel_size is None:
        raise InputError("the volume has no voxel size; give the parameter voxel_size_um as [z, y, x] in um")
    if params.anisotropy is not None:
        if given is not None and abs(given.anisotropy - params.anisotropy) > 0.01 * params.anisotropy:
            raise InputError(
                f"the parameters contradict each other: voxel_size_um {list(given.zyx)} has an anisotropy of "
                f"{given.anisotropy:.3g}, anisotropy says {params.anisotropy:g}; give one of them"
            )
        voxel_size = VoxelSize(params.anisotropy * voxel_size.x, voxel_size.y, voxel_size.x)
    return frame, voxel_size


def check_header(file: Path, max_voxels: int) -> None:
    """Look at what a TIFF declares before a reader believes it.

    Raises
    ------
    InputError
        If it is no TIFF, declares more than `max_voxels`, or is a part of a multi-file OME-TIFF: its header
        names other files, which a sender must not be able to have read.
    """
    import tifffile

    try:
        with tifffile.TiffFile(file, _multifile=False) as tiff:
            description = tiff.pages.first.description if tiff.is_ome else ""
            if not _names_only_itself(description):
                raise InputError("the volume is part of a multi-file OME-TIFF; save it as one file")
            shapes = [tuple(series.shape) for series in tiff.series]
    except InputError:
        raise
    except Exception as error:
        # A damaged header can make tifffile raise nearly anything.
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"the volume is no TIFF that can be read ({reason})") from None
    for shape in shapes:
        _check_size(shape, max_voxels)


def _names_only_itself(ome: str) -> bool:
    """Tell whether OME metadata refer to no other file."""
    if "<!DOCTYPE" in ome or "<!ENTITY" in ome or "BinaryOnly" in ome:
        return False
    named = {text.strip() for text in re.findall(r"<(?:\w+:)?UUID\b[^>]*>([^<]*)<", ome)}
    own = {text.strip() for text in re.findall(r"<(?:\w+:)?OME\b[^>]*?\bUUID\s*=\s*[\"']([^\"']*)", ome)}
    return named <= own


def _check_size(shape: tuple[int, ...], max_voxels: int) -> None:
    voxels = math.prod(int(edge) for edge in shape)
    if voxels > max_voxels:
        edges = " x ".join(str(edge) for edge in shape)
        raise InputError(
            f"the volume declares {edges} = {voxels:.3g} voxels; this service takes {max_voxels:.3g}"
        )


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str | list | tuple) and len(value) == 0)


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or value in ("", b"")
