"""One request to a served model: what may be asked, where the volume comes from, what it may cost.

What is read here comes from strangers: what a message repeats of it is cut short and printable.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import ConfigDict, Field, ValidationError

from nuclei3d.config.sections import PredictParams, SegmentationParams, ServeParams
from nuclei3d.console import printable
from nuclei3d.errors import InputError, TooLargeError, first_problem, hint_at
from nuclei3d.images.voxel_size import LARGEST_EDGE_UM, SMALLEST_EDGE_UM, VoxelSize

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nuclei3d.config import Params
    from nuclei3d.images.frames import Frame
    from nuclei3d.networks.folder import ModelInfo

VOLUME = "volume"
PATH = "path"
MAX_ROWS = 64
_FORMATS = ("dataframe_records", "dataframe_split")
# Brackets and commas of a body: a request has some dozens, and each may cost a kilobyte once it is parsed.
_MOST_VALUES = 200_000
_LONGEST_LIST = 16
_MOST_FILES = 100_000
_Edge = Annotated[float, Field(ge=SMALLEST_EDGE_UM, le=LARGEST_EDGE_UM)]


class RequestParams(SegmentationParams):
    """What a request may set; what it does not set is the service's default, or said by the file.

    `voxel_size_um` is (z, y, x) and wins over the file's; `anisotropy` (depth of a voxel over its width in x)
    replaces only the depth. Where and with how much memory it is computed is the business of the service.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    mode: Literal["auto", "ortho", "stitch", "cellpose", "full3d"] = "auto"
    diameter_um: Annotated[float, Field(ge=0.01, le=10_000)] | None = None
    voxel_size_um: tuple[_Edge, _Edge, _Edge] | None = None
    anisotropy: Annotated[float, Field(ge=0.01, le=1000)] | None = None
    channel: Annotated[str, Field(max_length=200)] | None = None

    def over(self, defaults: PredictParams) -> PredictParams:
        """Give the prediction parameters: the request's where it says something, else the defaults."""
        given = {
            name: getattr(self, name) for name in self.model_fields_set & set(PredictParams.model_fields)
        }
        try:
            return PredictParams.model_validate(defaults.model_dump() | given)
        except ValidationError as error:
            raise InputError(f"the parameters do not go together: {first_problem(error).reason}") from None


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
    """What a service accepts: files below `root` by name (None: no paths), volumes up to `max_voxels`.

    `max_network_voxels` is what the network may look at for one request.
    """

    root: Path | None = None
    max_voxels: int = ServeParams().max_voxels
    max_network_voxels: int = ServeParams().max_network_voxels

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> VolumeLimits:
        """Take the limits out of the configuration of a served model; what it leaves out has its default."""
        given = {name: int(config[name]) for name in ("max_voxels", "max_network_voxels") if config.get(name)}
        return cls(Path(config["root"]) if config.get("root") else None, **given)


class Admission(NamedTuple):
    """What decides on a request: limits, and what is known of the model, which foretells its cost."""

    limits: VolumeLimits
    info: ModelInfo
    defaults: PredictParams


def open_admission(folder: Path, params: Params) -> Admission:
    """Make the admission to the service of a model folder."""
    from nuclei3d.networks.folder import read_info
    from nuclei3d.segmentation import settings  # noqa: F401 - slow to import: now, not with the first request

    limits = VolumeLimits.of(params.serve.model_dump())
    return Admission(limits, read_info(folder / "model.json"), params.predict)


def take_apart(admission: Admission, body: Path, folder: Path) -> tuple[list[Path], RequestParams]:
    """Split the body of a request into files and parameters, and check all of it before anything is computed.

    `body` is a file with the JSON that MLflow defines, ``dataframe_records`` or ``dataframe_split`` and
    ``params``; `folder` takes the volumes that were sent, one file each. InputError is raised if the request
    is bad, TooLargeError if it costs more than the limits allow.
    """
    content = body.read_bytes()
    if sum(map(content.count, (b"[", b"{", b","))) > _MOST_VALUES:
        raise TooLargeError(f"the body has more than {_MOST_VALUES} values; send volumes as base64 of a TIFF")
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        raise InputError("the body is not valid JSON") from None
    del content
    if not isinstance(tree, dict):
        raise InputError("the body must be a JSON object with 'dataframe_records' or 'dataframe_split'")
    unknown = sorted(set(tree) - {*_FORMATS, "params"})
    if unknown:
        raise InputError(f"unknown field '{printable(unknown[0])}'; known: {', '.join(_FORMATS)}, params")
    given = [name for name in _FORMATS if name in tree]
    if len(given) != 1:
        raise InputError("the body must have exactly one of 'dataframe_records' and 'dataframe_split'")
    params = tree.get("params") or {}
    if not isinstance(params, dict):
        raise InputError("'params' must be an object with names and values")
    asked = read_request_params(params)
    records = _records(tree) if given[0] == _FORMATS[0] else _split(tree.pop(_FORMATS[1]))
    tree.clear()
    check_rows(len(records))
    files = []
    seen = 0
    for number, record in enumerate(records):
        volume, path = check_row(record)
        if path is not None:
            file = path_below(admission.limits.root, path)
        else:
            file = folder / f"{number}.tif"
            file.write_bytes(decode_volume(volume))
        record.clear()
        seen += check_cost(file, asked, admission, seen)
        files.append(file)
    return files, asked


def check_rows(rows: int) -> None:
    """Refuse a request without rows, or with too many."""
    if not rows:
        raise InputError("the request has no rows")
    if rows > MAX_ROWS:
        raise TooLargeError(f"the request has {rows} rows; send at most {MAX_ROWS}")


def _records(tree: dict[str, Any]) -> list[dict[str, Any]]:
    records = tree.pop("dataframe_records")
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError("'dataframe_records' must be a list of objects with 'volume' or 'path'")
    return records


def _split(frame: Any) -> list[dict[str, Any]]:
    if not isinstance(frame, dict) or not {"columns", "data"} <= set(frame):
        raise InputError("'dataframe_split' must be an object with 'columns' and 'data'")
    unknown = sorted(set(frame) - {"columns", "data", "index"})
    if unknown:
        raise InputError(
            f"unknown field '{printable(unknown[0])}' in 'dataframe_split'; known: columns, data, index"
        )
    columns, data = frame["columns"], frame["data"]
    if not isinstance(columns, list) or not isinstance(data, list):
        raise InputError("'columns' and 'data' of 'dataframe_split' must be lists")
    if not all(isinstance(row, list) and len(row) == len(columns) for row in data):
        raise InputError("each row of 'data' must have as many values as there are 'columns'")
    return [dict(zip(map(str, columns), row, strict=True)) for row in data]


def read_request_params(values: Mapping[str, Any] | None) -> RequestParams:
    """Validate the ``params`` of a request.

    Empty texts and lists mean "not given": that is how MLflow's signature can say it.
    """
    given = {name: value for name, value in (values or {}).items() if not _is_empty(value)}
    known = sorted(RequestParams.model_fields)
    for name in given:
        if name not in RequestParams.model_fields:
            raise InputError(f"unknown parameter '{printable(name)}'; {hint_at(name, known)}")
        if isinstance(given[name], list | tuple) and len(given[name]) > _LONGEST_LIST:
            raise InputError(f"parameter '{name}' has {len(given[name])} values, more than any takes")
    try:
        return RequestParams.model_validate(given)
    except ValidationError as error:
        name, value, reason = first_problem(error)
        raise InputError(f"parameter '{name}' is {printable(repr(value))}: {printable(reason)}") from None


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
        raise InputError(
            f"unknown column '{printable(unknown[0])}'; a row has 'volume' (base64 TIFF) or 'path'"
        )
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

    InputError is raised if no root is configured, or the path is an address, leaves the root or does not
    exist, in the last two cases with the same words: a request learns nothing about files outside.
    """
    if root is None:
        raise InputError("this service takes no paths (no root is configured); send the volume itself")
    if not isinstance(path, str) or not path or "\0" in path or "://" in path:
        raise InputError("'path' must be the name of a file below the root of the service")
    top = root.resolve()
    try:
        resolved = (top / path).resolve()
        inside = resolved.is_relative_to(top) and resolved.exists()
    except (OSError, RuntimeError, ValueError):  # the last of half a surrogate pair, which JSON can hold
        inside = False
    if not inside:
        raise InputError(f"no file '{printable(path)}' below the root of the service")
    if resolved.is_dir():
        for number, item in enumerate(resolved.rglob("*")):
            if number >= _MOST_FILES:
                raise TooLargeError(f"'{printable(path)}' holds more than {_MOST_FILES} files")
            if item.is_symlink() or not (item.is_file() or item.is_dir()):
                raise InputError(f"'{printable(path)}' holds links; the service does not follow them")
    elif not resolved.is_file():
        raise InputError(f"'{printable(path)}' is no regular file")
    return resolved


@contextmanager
def about_the_volume(file: Path) -> Iterator[None]:
    """Make error messages fit to be sent: without the name of the file, in harmless words."""
    try:
        yield
    except InputError as error:
        raise type(error)(printable(str(error).replace(str(file), "the volume"), 600)) from None


def open_frame(file: Path, params: RequestParams, max_voxels: int) -> tuple[Frame, VoxelSize]:
    """Open the one volume of a file, check its declared size, and settle its voxel size. Nothing is read.

    InputError is raised if it is no single volume of one file, or has no voxel size and the request gives
    none, TooLargeError if it declares more than `max_voxels`.
    """
    from nuclei3d.images.frames import find_frames
    from nuclei3d.images.ome_zarr import is_zarr

    given = VoxelSize.given(params.voxel_size_um)
    with about_the_volume(file):
        if file.is_dir() and not is_zarr(file):
            raise InputError(f"{file} is a folder; name one file in it")
        frames = find_frames(file, channel=params.channel, stranger=True)
    if len(frames) != 1:
        raise InputError(f"the volume has {len(frames)} time points; send one time point per row")
    frame = frames[0]
    voxels = math.prod(frame.shape)
    if voxels > max_voxels:
        edges = " x ".join(map(str, frame.shape))
        raise TooLargeError(
            f"the volume declares {edges} = {voxels:.3g} voxels; this service takes {max_voxels:.3g}"
        )
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


def read_volume(frame: Frame) -> NDArray[Any]:
    """Read the volume (z, y, x) of a request; InputError is raised if it is damaged, or no volume."""
    from nuclei3d.images.frames import check_image

    with about_the_volume(frame.path):
        image = frame.read()
    check_image(image, "the volume")
    return image


def check_cost(file: Path, asked: RequestParams, admission: Admission, before: int = 0) -> int:
    """Foretell how many voxels the network will look at; `before` were those of other rows.

    InputError is raised if volume, parameters and model do not go together, TooLargeError if the voxels are
    too many; it names the parameter without which they would be the fewest.
    """
    from nuclei3d.segmentation.settings import check_scale, network_voxels, segmentation_settings

    limits, info, defaults = admission

    def cost(asked: RequestParams, *, check: bool = False) -> int:
        frame, voxel_size = open_frame(file, asked, limits.max_voxels)
        settings = segmentation_settings(info, asked.over(defaults), voxel_size)
        seen = network_voxels(frame.shape, voxel_size, settings)
        if check and before + seen <= limits.max_network_voxels:
            check_scale(frame.shape, voxel_size, settings)
        return seen

    seen = cost(asked, check=True)
    if before + seen <= limits.max_network_voxels:
        return seen
    without: dict[str, int] = {}
    for name in asked.model_fields_set:
        rest = asked.model_dump(exclude_unset=True, exclude={name})
        with suppress(InputError):
            without[name] = cost(RequestParams.model_validate(rest))
    name = min(without, key=lambda name: without[name], default="")
    cause = "; send fewer or smaller volumes"
    if name and without[name] < seen / 2:
        cause = (
            f"; it is the parameter '{name}' ({printable(repr(getattr(asked, name)))}) that makes it large"
        )
    raise TooLargeError(
        f"the network would look at {before + seen:.3g} voxels, this service takes "
        f"{limits.max_network_voxels:.3g}{cause}"
    )


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str | list | tuple) and len(value) == 0)


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or value in ("", b"")
