"""Microscopes' own formats: through bioio and its readers (the extra ``formats``), Imaris through h5py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nuclei3d.errors import InputError, missing, reason_of
from nuclei3d.images.layout import ImageInFile, Layout, choose_image
from nuclei3d.images.voxel_size import VoxelSize, micrometres_per, voxel_size_or_reason

# What reads each format; that of .czi is GPL and so no part of the extra.
_READERS = {
    ".lif": "nuclei3d[formats]",
    ".nd2": "nuclei3d[formats]",
    ".ims": "nuclei3d[formats]",
    ".czi": "bioio bioio-czi",
}
FOREIGN_SUFFIXES = tuple(_READERS)


class NoReaderError(InputError):
    """The package that reads a format is not installed."""


class ForeignArray:
    """The array of one image of a file, read in parts.

    InputError is raised if the file is missing or damaged, its reader is not installed (NoReaderError), or it
    is open which of several images is meant (`image`: number from 0, or name).
    """

    def __init__(self, path: Path, image: str | int | None = None) -> None:
        self.path = path
        if not path.is_file():
            raise missing(path, f"{path} does not exist")
        try:
            opener = _open_imaris if path.suffix.lower() == ".ims" else _open_bioio
            self._file, self._arrays, self.layout = opener(path, image)
        except InputError:
            raise
        except ImportError:
            raise self._no_reader() from None
        except Exception as error:
            if type(error).__name__ == "UnsupportedFileFormatError" and not self._has_plugin():
                raise self._no_reader() from None
            raise self._unreadable(error) from error

    def __enter__(self) -> ForeignArray:
        return self

    def __exit__(self, *error: object) -> None:
        if hasattr(self._file, "close"):
            self._file.close()

    def read(self, index: tuple[int | slice, ...]) -> NDArray[Any]:
        """Read a part of the array (one integer or slice of step 1 per axis) as a copy."""
        try:
            if isinstance(self._arrays, list):
                # Imaris keeps an array (z, y, x) per time point and channel, padded to whole chunks
                inner = tuple(
                    slice(*part.indices(length)) if isinstance(part, slice) else part
                    for part, length in zip(index[2:], self.layout.shape[2:], strict=True)
                )
                block = self._arrays[int(index[0])][int(index[1])][inner]  # type: ignore[arg-type]
            else:
                block = self._arrays[index].compute(scheduler="synchronous")
        except MemoryError:
            raise
        except Exception as error:
            raise self._unreadable(error) from error
        return np.ascontiguousarray(block, dtype=self.layout.dtype)

    def _has_plugin(self) -> bool:
        from bioio.plugins import get_plugins

        return self.path.suffix.lower() in get_plugins(use_cache=True)

    def _no_reader(self) -> NoReaderError:
        package = _READERS[self.path.suffix.lower()]
        return NoReaderError(
            f"{self.path}: {self.path.suffix} files need a reader; install it with: "
            f"pip install '{package}', or export OME-TIFF"
        )

    def _unreadable(self, error: Exception) -> InputError:
        reason = reason_of(error, 200)
        return InputError(f"{self.path} cannot be read ({reason}); copy it again, or export OME-TIFF")


def _open_bioio(path: Path, wanted: str | int | None) -> tuple[Any, Any, Layout]:
    from bioio import BioImage

    file = BioImage(path)
    images = []
    for scene in range(len(file.scenes)):
        file.set_scene(scene)
        images.append(ImageInFile(str(file.current_scene), file.dims.order, tuple(file.shape)))
    number, passed_over = choose_image(images, str(path), wanted)
    file.set_scene(number)
    sizes = file.physical_pixel_sizes
    voxel_size, note = voxel_size_or_reason(sizes.Z, sizes.Y, sizes.X)
    step = getattr(file.time_interval, "total_seconds", lambda: None)()
    names = tuple(file.channel_names or ())
    layout = Layout(
        axes=images[number].axes,
        shape=images[number].shape,
        dtype=np.dtype(file.dtype).newbyteorder("="),
        voxel_size=voxel_size,
        scale_note=note,
        channels=tuple(map(str, names)) if len(names) > 1 else (),
        time_step_s=step if step and step > 0 else None,
        image=number,
        passed_over=passed_over,
        chunk=tuple(map(int, file.dask_data.chunksize)),
    )
    return file, file.dask_data, layout


def _open_imaris(path: Path, wanted: str | int | None) -> tuple[Any, Any, Layout]:
    import h5py

    file = h5py.File(path, "r")
    try:
        info = file["DataSetInfo"]
        level = file["DataSet/ResolutionLevel 0"]
        # both are numbered from 0, without gaps
        times = [level[f"TimePoint {time}"] for time in range(len(level))]
        arrays = [[time[f"Channel {c}"]["Data"] for c in range(len(time))] for time in times]
        image = info["Image"].attrs
        shape = tuple(int(_text(image[axis])) for axis in "ZYX")
        names = tuple(_text(info[f"Channel {c}"].attrs.get("Name", "")) for c in range(len(arrays[0])))
        voxel_size, note = _imaris_scale(image, shape)
        layout = Layout(
            axes="TCZYX",
            shape=(len(arrays), len(arrays[0]), *shape),
            dtype=np.dtype(arrays[0][0].dtype).newbyteorder("="),
            voxel_size=voxel_size,
            scale_note=note,
            channels=names if len(names) > 1 else (),
            time_step_s=_imaris_time_step(info.get("TimeInfo")),
            chunk=(1, 1, *(arrays[0][0].chunks or shape)),
        )
        choose_image([ImageInFile(path.stem, layout.axes, layout.shape)], str(path), wanted)
    except BaseException:
        file.close()
        raise
    return file, arrays, layout


def _text(attribute: Any) -> str:
    """Read an attribute of Imaris: an array of single characters."""
    return attribute if isinstance(attribute, str) else b"".join(np.ravel(attribute).tolist()).decode("utf-8")


def _imaris_scale(image: Any, shape: tuple[int, ...]) -> tuple[VoxelSize | None, str]:
    unit = micrometres_per(_text(image.get("Unit", "um")))
    if unit is None:
        return None, f"its unit is '{_text(image['Unit'])}', which is no length"
    edges: list[float | None] = []
    for place, length in zip((2, 1, 0), shape, strict=True):
        extent = float(_text(image[f"ExtMax{place}"])) - float(_text(image[f"ExtMin{place}"]))
        edges.append(extent / length * unit)
    return voxel_size_or_reason(*edges)


def _imaris_time_step(info: Any) -> float | None:
    if info is None or "TimePoint2" not in info.attrs:
        return None
    first, second = (
        np.datetime64(_text(info.attrs[f"TimePoint{number}"]).replace(" ", "T")) for number in (1, 2)
    )
    step = float((second - first) / np.timedelta64(1, "s"))
    return step if step > 0 else None
