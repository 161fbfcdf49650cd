"""TIFF files with their voxel size.

They are read (plain, ImageJ, OME, BigTIFF) memory-mapped or plane by plane, and written as OME-TIFF that
opens at the right scale everywhere, with the same bytes each time.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError

import numpy as np
import tifffile
from defusedxml import DefusedXmlException, ElementTree
from numpy.typing import DTypeLike, NDArray

from nuclei3d.errors import InputError, TooLargeError, missing, reason_of
from nuclei3d.images.layout import ImageInFile, Layout, choose_image
from nuclei3d.images.voxel_size import VoxelSize, micrometres_per, seconds_per, voxel_size_or_reason
from nuclei3d.outputs import whole_file

# tifffile logs what it finds wrong in a file and goes on with the rest; we raise one clear line instead.
_LOGGER = logging.getLogger("tifffile")
_LOGGER.addHandler(logging.NullHandler())

# No compression shrinks even an empty volume further; a header that claims more is damaged.
_STRONGEST_COMPRESSION = 100_000
_RESOLUTION_UNITS = {2: "inch", 3: "cm"}
# Of the file of a request: more than any embryo has, few enough to be listed in a moment.
_MOST_PLANES = 20_000
_MOST_ELEMENTS = 500_000
_SIGNS_OF_A_CUT = ("invalid value offset", "invalid page offset")

# Offsets of a classic TIFF have 32 bits; 32 MiB are left for the metadata of many planes.
CLASSIC_TIFF_BYTES = 2**32 - 2**25

# What OME knows; the others are widened without loss, or, beyond 2**53, refused.
_OME_DTYPES = ("uint8", "uint16", "uint32", "int8", "int16", "int32", "float32", "float64")


class TiffArray:
    """An open TIFF file whose first image is read in parts.

    Uncompressed contiguous data are memory-mapped; all else is decoded plane by plane (of strips and tiles
    those that are wanted), so that no more than one plane is held besides what is asked for. A `stranger`'s
    file, that of a request, is never followed to other files, and may not make large what is read of its
    header. InputError is raised if the file is
    missing, empty, no TIFF, damaged, or leaves open which of several images is meant (`image`: number from 0,
    or name), TooLargeError of strange ones with many planes.
    """

    def __init__(self, path: Path, image: str | int | None = None, *, stranger: bool = False) -> None:
        self.path = path
        with _complaints() as complaints:
            self._file = _open_tiff(path, stranger)
        try:
            with _damage_explained(path), _complaints() as more:
                if stranger:
                    _check_strange_header(self._file)
                number, passed_over = _choose_series(self._file, path, image)
                self._series = self._file.series[number]
                self.layout = self._read_layout(number, passed_over)
                self._check_complete()
            if complaints or more:
                raise InputError(_say_truncated(path, "its metadata point behind the end of the file"))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TiffArray:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def read(self, index: tuple[int | slice, ...]) -> NDArray[Any]:
        """Read a part of the array, one integer or slice of step 1 per stored axis, as a native copy."""
        with _damage_explained(self.path):
            offset = None if self.layout.companions else self._series.dataoffset
            block = self._read_planes(index) if offset is None else self._read_mapped(offset, index)
        return np.ascontiguousarray(block, dtype=self.layout.dtype)

    def _read_layout(self, number: int, passed_over: tuple[str, ...]) -> Layout:
        series = self._series
        pixels = _ome_pixels(self._file, number)
        voxel_size, note = _read_scale(self._file, pixels)
        companions: frozenset[str] = frozenset()
        if series.is_multifile:
            pages = (page for page in series.pages if page is not None)
            companions = frozenset(page.parent.filehandle.name for page in pages)
        return Layout(
            axes=str(series.axes),
            shape=tuple(int(length) for length in series.shape),
            dtype=np.dtype(series.dtype).newbyteorder("="),
            voxel_size=voxel_size,
            scale_note=note,
            channels=_read_channel_names(self._file, pixels),
            companions=companions,
            time_step_s=_read_time_step(self._file, pixels),
            image=number,
            passed_over=passed_over,
            chunk=self._chunk(),
        )

    def _chunk(self) -> tuple[int, ...]:
        shape, page = self._series.shape, self._series.keyframe
        inner = page.chunks if len(page.chunks) == len(page.shape) else page.shape
        if self._series.dataoffset is not None and not self._series.is_multifile:
            inner = (1,) * (len(page.shape) - 1) + page.shape[-1:]
        inner = inner[-len(shape) :]
        return (1,) * (len(shape) - len(inner)) + tuple(int(length) for length in inner)

    def _check_complete(self) -> None:
        """Find a file that was cut off before anything is computed from it."""
        series = self._series
        size = self.path.stat().st_size
        claimed = series.size * self.layout.dtype.itemsize
        if claimed > _STRONGEST_COMPRESSION * size and not self.layout.companions:
            raise InputError(_say_truncated(self.path, f"its header claims {claimed} bytes of voxels"))
        if self._file.is_imagej and series.kind not in ("imagej", "ome"):
            raise InputError(
                _say_truncated(self.path, "its ImageJ header promises more planes than it holds")
            )
        if series.dataoffset is not None:
            expected = series.dataoffset + claimed
            if expected > size:
                raise InputError(_say_truncated(self.path, f"{size} of at least {expected} bytes"))
            return
        for number, page in enumerate(series.pages):
            if page is None:
                raise InputError(
                    f"{self.path}: plane {number} is not in this file; put the other files of this "
                    "multi-file OME-TIFF beside it, or save it as one file"
                )
            if page.parent is not self._file:
                continue
            ends = (at + n for at, n in zip(page.dataoffsets, page.databytecounts, strict=True))
            if max(ends, default=0) > size:
                raise InputError(_say_truncated(self.path, f"the data of plane {number} end after the file"))

    def _read_mapped(self, offset: int, index: tuple[int | slice, ...]) -> NDArray[Any]:
        stored = self.layout.dtype.newbyteorder(self._file.byteorder)
        mapped: NDArray[Any] = np.memmap(
            self.path, dtype=stored, mode="r", offset=offset, shape=self.layout.shape
        )
        return np.array(mapped[index])

    def _read_planes(self, index: tuple[int | slice, ...]) -> NDArray[Any]:
        page_shape = tuple(self._series.keyframe.shape)
        leading = len(self.layout.shape) - len(page_shape)
        if leading < 0 or self.layout.shape[leading:] != page_shape:
            # A page with axes of length 1 that the series dropped: rare, and one page only.
            whole = np.asarray(self._series.asarray())
            return np.asarray(whole[index])
        outer = [
            range(*part.indices(length)) if isinstance(part, slice) else [part]
            for part, length in zip(index[:leading], self.layout.shape, strict=False)
        ]
        inner = index[leading:]
        planes = []
        for position in itertools.product(*outer):
            number = int(np.ravel_multi_index(position, self.layout.shape[:leading])) if leading else 0
            page = self._series.pages[number]
            assert page is not None  # _check_complete has looked
            planes.append(_decode(page, inner))
        kept = [len(at) for at, part in zip(outer, index[:leading], strict=True) if isinstance(part, slice)]
        if not planes:
            empty = np.empty(page_shape, self.layout.dtype)[inner]
            return np.empty((*kept, *empty.shape), self.layout.dtype)
        return np.asarray(np.stack(planes).reshape(*kept, *planes[0].shape))


def _open_tiff(path: Path, stranger: bool) -> tifffile.TiffFile:
    if not path.exists():
        raise missing(path, f"{path} does not exist")
    if not path.is_file():
        raise InputError(f"{path} is no regular file; give .tif, .tiff or .zarr")
    with _damage_explained(path):
        try:
            if path.stat().st_size == 0:
                raise InputError(f"{path} is empty (0 bytes); copy or export it again")
            if stranger:
                # formats of several files, and one whose damaged header makes pages without end
                return tifffile.TiffFile(
                    path, _multifile=False, is_mmstack=False, is_ndtiff=False, is_scanimage=False
                )
            return tifffile.TiffFile(path)
        except tifffile.TiffFileError:
            raise InputError(f"{path} is not a TIFF file; give .tif, .tiff or .zarr") from None
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def _check_strange_header(file: tifffile.TiffFile) -> None:
    """Refuse a header that names other files, or makes tifffile build more than the file holds."""
    try:
        # the chain of pages may be a ring: it is not followed to its end
        file.pages[_MOST_PLANES]
    except IndexError:
        pass
    else:
        check_planes(_MOST_PLANES + 1)
    xml = file.ome_metadata if file.is_ome else None
    if xml is None:
        return
    if xml.count("<") > _MOST_ELEMENTS:
        raise TooLargeError(f"the OME metadata have more than {_MOST_ELEMENTS} elements")
    try:
        root = ElementTree.fromstring(xml, forbid_dtd=True)
    except ParseError:
        return  # tifffile does without what it cannot parse
    planes = 0
    # tags are compared as tifffile compares them: by their end
    for element in root.iter():
        tag, value = element.tag, element.attrib
        if tag.endswith("BinaryOnly") or (
            tag.endswith("UUID") and (element.text or "").strip() != root.get("UUID", "").strip()
        ):
            raise InputError("the volume is part of a multi-file OME-TIFF; save it as one file")
        if tag.endswith("Pixels"):
            check_planes(math.prod(max(1, int(value.get(f"Size{axis}", 1))) for axis in "ZCT"))
        elif tag.endswith("TiffData"):
            count = int(value.get("PlaneCount", value.get("NumPlanes", "IFD" in value)))
            planes += count if count > 0 else len(file.pages)
            check_planes(max(planes, int(value.get("IFD", 0))))
        elif tag[:-1].endswith("Along") and "Start" in value:
            span = float(value["End"]) - float(value["Start"])
            check_planes(abs(span / float(value.get("Step", 1))))


def check_planes(planes: float) -> None:
    """Raise TooLargeError if a stranger's file claims more planes than are read."""
    if not planes <= _MOST_PLANES:
        raise TooLargeError(f"the volume claims more than {_MOST_PLANES} planes")


def _choose_series(
    file: tifffile.TiffFile, path: Path, wanted: str | int | None
) -> tuple[int, tuple[str, ...]]:
    if not file.series:
        raise InputError(_say_truncated(path, "it holds no image"))
    images = [
        ImageInFile(
            # a reduced page is a picture for browsers, whatever it is called
            "thumbnail" if series.keyframe.is_reduced and series is not file.series[0] else series.name,
            str(series.axes),
            tuple(series.shape),
        )
        for series in file.series
    ]
    return choose_image(images, str(path), wanted)


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """Collect what tifffile logs in this thread about offsets that lie behind the end of the file."""
    found: list[str] = []
    thread = threading.get_ident()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if record.thread == thread and any(sign in text for sign in _SIGNS_OF_A_CUT):
                found.append(text)

    listener = Listener()
    _LOGGER.addHandler(listener)
    try:
        yield found
    finally:
        _LOGGER.removeHandler(listener)


@contextmanager
def _damage_explained(path: Path) -> Iterator[None]:
    """Turn whatever a decoder says of a damaged file into one clear line."""
    try:
        yield
    except InputError:
        raise
    except MemoryError as error:
        # A damaged header may claim any size, so this is not the system's fault alone.
        raise InputError(f"{path} needs more memory than there is, or its header is damaged") from error
    except Exception as error:
        raise InputError(_say_truncated(path, reason_of(error))) from error


def _decode(page: tifffile.TiffPage | tifffile.TiffFrame, inner: tuple[int | slice, ...]) -> NDArray[Any]:
    handle = page.parent.filehandle
    closed = handle.closed
    if closed:
        # tifffile closes the other files of a multi-file set.
        handle.open()
    try:
        if len(page.dataoffsets) == 1 or all(part == slice(None) for part in inner):
            return np.array(page.asarray()[inner])
        import zarr

        return np.asarray(zarr.open_array(page.aszarr(), mode="r")[inner])
    finally:
        if closed:
            handle.close()


def _say_truncated(path: Path, reason: str) -> str:
    return f"{path} is damaged or truncated ({reason}); copy or export it again"


def _read_scale(file: tifffile.TiffFile, pixels: Element | None) -> tuple[VoxelSize | None, str]:
    """Give the voxel size, or None and what is wrong or missing ("" where the file says nothing).

    OME metadata come first, then ImageJ's (or tifffile's) description with the resolution tags. A scale
    without a unit of length (pixels) counts as none: anisotropy is derived, never guessed.
    """
    if file.is_ome and file.ome_metadata:
        return (None, "its OME metadata cannot be read") if pixels is None else _ome_scale(pixels)
    if file.is_lsm and file.lsm_metadata:
        edges = (_number(file.lsm_metadata.get(f"VoxelSize{axis}", 0), 1e6) or None for axis in "ZYX")
        return voxel_size_or_reason(*edges)
    return _described_scale(file, _description(file))


def _description(file: tifffile.TiffFile) -> Mapping[str, Any]:
    if file.is_imagej and file.imagej_metadata:
        return file.imagej_metadata
    if file.is_shaped and file.shaped_metadata:
        return file.shaped_metadata[0]
    return {}


def _read_channel_names(file: tifffile.TiffFile, pixels: Element | None) -> tuple[str, ...]:
    names: tuple[str, ...] = ()
    if pixels is not None:
        names = tuple(channel.get("Name", "") for channel in pixels.iterfind("{*}Channel"))
    elif file.is_lsm and file.lsm_metadata:
        names = tuple(file.lsm_metadata.get("ChannelColors", {}).get("ColorNames", ()))
    return names if any(names) else ()


def _read_time_step(file: tifffile.TiffFile, pixels: Element | None) -> float | None:
    if pixels is not None:
        scale = seconds_per(pixels.get("TimeIncrementUnit", "s"))
        step = None if scale is None else _number(pixels.get("TimeIncrement", 0), scale)
    elif file.is_lsm and file.lsm_metadata:
        step = _number(file.lsm_metadata.get("TimeIntervall", 0), 1.0)
    else:
        step = _number(_description(file).get("finterval", 0), 1.0)
    return step if step is not None and 0 < step < float("inf") else None


def _ome_pixels(file: tifffile.TiffFile, number: int) -> Element | None:
    """Find what the OME metadata say of an image; tifffile leaves out those that have no data."""
    if not (file.is_ome and file.ome_metadata):
        return None
    try:
        images = ElementTree.fromstring(file.ome_metadata).findall("{*}Image")
    except (ParseError, DefusedXmlException):
        return None
    if len(images) <= 1:
        return images[0].find("{*}Pixels") if images else None
    following = iter(images)
    found: Element | None = None
    for series in file.series[: number + 1]:
        matching = (pixels for image in following if (pixels := _pixels_of(image, series)) is not None)
        found = next(matching, None)
    return found


def _pixels_of(image: Element, series: tifffile.TiffPageSeries) -> Element | None:
    pixels = image.find("{*}Pixels")
    if pixels is None or (image.get("Name") or "") != (series.name or ""):
        return None
    lengths = dict(zip(series.axes, series.shape, strict=True))
    same = all(int(pixels.get(f"Size{axis}", 0)) == lengths.get(axis, 1) for axis in "TZYX")
    return pixels if same else None


def _ome_scale(pixels: Element) -> tuple[VoxelSize | None, str]:
    edges: list[float | None] = []
    for axis in "ZYX":
        text = pixels.get(f"PhysicalSize{axis}")
        scale = micrometres_per(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        edges.append(None if text is None or scale is None else _number(text, scale))
    return voxel_size_or_reason(*edges)


def _described_scale(file: tifffile.TiffFile, description: Mapping[str, Any]) -> tuple[VoxelSize | None, str]:
    tags = file.pages.first.tags
    unit = str(description.get("unit", "")).strip()
    if not unit:
        unit = _RESOLUTION_UNITS.get(int(tags.valueof("ResolutionUnit", default=1)), "")
    scale_x = micrometres_per(unit)
    # ImageJ writes yunit and zunit where an axis has a unit of its own.
    scale_y = micrometres_per(str(description.get("yunit", unit)))
    scale_z = micrometres_per(str(description.get("zunit", unit)))
    if scale_x is None and unit and "spacing" in description:
        return None, f"its unit is '{unit}', which is no length"
    spacing = description.get("spacing")
    voxel_size, reason = voxel_size_or_reason(
        None if spacing is None or scale_z is None else _number(spacing, scale_z),
        _pixel_edge(tags.valueof("YResolution"), scale_y),
        _pixel_edge(tags.valueof("XResolution"), scale_x),
    )
    if reason and spacing is None and file.is_imagej:
        # Other programs that write this format leave the spacing out for want of knowing it.
        reason += " (ImageJ itself leaves out a spacing of exactly 1)"
    return voxel_size, reason


def _pixel_edge(resolution: tuple[int, int] | None, scale: float | None) -> float | None:
    """Turn pixels per unit, a ratio of two integers, into um per pixel."""
    if resolution is None or scale is None:
        return None
    pixels, units = resolution
    return units / pixels * scale if pixels and units else None


def _number(text: object, scale: float) -> float:
    try:
        return float(str(text)) * scale
    except ValueError:
        return float("nan")


def write_image(path: Path, image: NDArray[Any], voxel_size: VoxelSize) -> None:
    """Write an image (Z, Y, X) as OME-TIFF, whole or not at all.

    `path` is best called ``<name>.ome.tif`` or ``<name>.tif``. bool becomes uint8 and float16 float32. The
    voxel size goes into the OME metadata, into ImageJ's and into the resolution tags. Raises ValueError if
    the array is not 3D or of a type that TIFF readers do not know.
    """
    if image.ndim != 3:
        raise ValueError(f"expected an image (Z, Y, X), got shape {image.shape}")
    image = storable(image)
    if image.dtype.name not in _OME_DTYPES:
        raise ValueError(f"OME-TIFF holds no {image.dtype}; convert the image first")
    _write_ome_tiff(path, image, voxel_size)


def storable(image: NDArray[Any]) -> NDArray[Any]:
    """Give an image in a wider type where TIFF readers do not know its own: bool and float16."""
    wider = {"bool": np.uint8, "float16": np.float32}
    return image.astype(wider.get(image.dtype.name, image.dtype), copy=False)


def write_labels(path: Path, labels: NDArray[Any], voxel_size: VoxelSize) -> None:
    """Write labels as `write_image` does an image; uint16 where the numbers fit, else uint32."""
    if labels.ndim != 3 or labels.dtype.kind not in "bui":
        raise ValueError(f"expected integer labels (Z, Y, X), got {labels.dtype} of shape {labels.shape}")
    highest = int(labels.max(initial=0))
    if highest > np.iinfo(np.uint32).max or int(labels.min(initial=0)) < 0:
        raise ValueError("labels must lie between 0 and 2**32 - 1")
    dtype = np.uint16 if highest <= np.iinfo(np.uint16).max else np.uint32
    _write_ome_tiff(path, labels.astype(dtype, copy=False), voxel_size)


def write_label_series(
    path: Path,
    read_planes: Callable[[], Iterator[NDArray[Any]]],
    shape: tuple[int, int, int, int],
    dtype: DTypeLike,
    voxel_size: VoxelSize,
    time_step_s: float | None,
) -> None:
    """Write labels over time (T, Z, Y, X), plane by plane, as `write_labels` does those of one frame.

    `read_planes` is called twice and gives all planes (Y, X) in their order.
    """
    digest = _content_uuid(read_planes(), (shape, np.dtype(dtype).str, voxel_size.zyx, time_step_s))
    planes = (plane.astype(dtype, copy=False) for plane in read_planes())
    _write_planes(path, planes, shape, np.dtype(dtype), voxel_size, digest, time_step_s)


def _write_ome_tiff(path: Path, volume: NDArray[Any], voxel_size: VoxelSize) -> None:
    digest = _content_uuid(volume, (volume.shape, volume.dtype.str, voxel_size.zyx))
    _write_planes(path, volume, volume.shape, volume.dtype, voxel_size, digest)


def _write_planes(
    path: Path,
    planes: NDArray[Any] | Iterator[NDArray[Any]],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    voxel_size: VoxelSize,
    digest: str,
    time_step_s: float | None = None,
) -> None:
    """Write planes compressed by zlib, without a predictor, as ImageJ misreads predicted 16-bit planes.

    The first page carries two descriptions, as tifffile's own files do: OME-XML, which Bio-Formats and
    tifffile read, and after it ImageJ's, as ImageJ's own TIFF reader (File > Open in Fiji) knows no OME-XML
    and would show planes 1 um apart. Readers that expect one description take the first.
    """
    axes = "TZYX"[-len(shape) :]
    options: dict[str, Any] = {
        "shape": shape,
        "dtype": dtype,
        "photometric": "minisblack",
        "compression": "zlib",
        # ImageJ counts pixels per unit of its description, whatever the tag ResolutionUnit says.
        "resolution": (1 / voxel_size.x, 1 / voxel_size.y),
        "resolutionunit": "NONE",
        "software": "nuclei3d",
        "description": _ome_xml(shape, dtype, voxel_size, digest, time_step_s).encode("utf-8"),
        # Makes room for the second description.
        "metadata": {"axes": axes},
    }
    times = ""
    if len(shape) == 4:
        interval = "" if time_step_s is None else f"finterval={time_step_s!r}\n"
        times = f"frames={shape[0]}\nhyperstack=true\n{interval}"
    big = math.prod(shape) * dtype.itemsize > CLASSIC_TIFF_BYTES
    with whole_file(path) as partial, tifffile.TiffWriter(partial, bigtiff=big, shaped=True) as writer:
        writer.write(planes, **options)
        # The version is that of the format, as tifffile writes it too.
        writer.overwrite_description(
            f"ImageJ=1.11a\nimages={math.prod(shape[:-2])}\nslices={shape[-3]}\n{times}unit=micron\n"
            f"spacing={voxel_size.z!r}\nloop=false\n"
        )


def _ome_xml(
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    voxel_size: VoxelSize,
    digest: str,
    time_step_s: float | None,
) -> str:
    sizes: dict[str, Any] = {}
    for axis, edge in zip("ZYX", voxel_size.zyx, strict=True):
        sizes[f"PhysicalSize{axis}"] = edge
        sizes[f"PhysicalSize{axis}Unit"] = "µm"
    if time_step_s is not None:
        sizes |= {"TimeIncrement": time_step_s, "TimeIncrementUnit": "s"}
    # tifffile would invent a new UUID at each run, and with it new bytes and a new md5.
    document = tifffile.OmeXml(UUID=digest, Creator="nuclei3d")
    stored = (math.prod(shape[:-2]), 1, 1, shape[-2], shape[-1], 1)
    document.addimage(dtype, shape, stored, axes="TZYX"[-len(shape) :], **sizes)
    return document.tostring(declaration=True)


def _content_uuid(planes: Iterable[NDArray[Any]], header: tuple[object, ...]) -> str:
    """Name the content: OME readers tell files apart by this number, so it may not be one for all."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(header).encode())
    for plane in planes:
        digest.update(np.ascontiguousarray(plane).data)
    return str(uuid.UUID(bytes=digest.digest(), version=4))
