"""A model, masks and training planes as Cellpose 3 reads them, and masks as regions of ImageJ."""

from __future__ import annotations

import os
from collections.abc import Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray

from nuclei3d.console import progress_bar, say, warn
from nuclei3d.errors import InputError
from nuclei3d.grid import compact_labels, trace_outlines
from nuclei3d.images.embryos import PARTS
from nuclei3d.images.frames import check_image
from nuclei3d.images.tiff import write_image
from nuclei3d.images.voxel_size import VoxelSize
from nuclei3d.networks.folder import Model
from nuclei3d.stages.training_data import load_samples, plane_flows, read_slices
from nuclei3d.training.samples import SampleSet


def write_rois(path: Path, labels: NDArray[np.integer[Any]]) -> Path:
    """Write labels (Z, Y, X) as a zip for ImageJ's ROI manager: one polygon per nucleus, plane and piece.

    A region is called ``<label>-<plane>``, planes counted from 1 as ImageJ does, and lies in its plane of the
    stack. Holes are filled: a polygon has none.
    """
    from roifile import ImagejRoi, roiwrite

    rois = []
    for z, plane in enumerate(labels):
        pieces: dict[int, int] = {}
        for label, polygon in trace_outlines(plane):
            pieces[label] = pieces.get(label, 0) + 1
            piece = f"-{pieces[label]}" if pieces[label] > 1 else ""
            name = f"{label:04d}-{z + 1:04d}{piece}"
            # counted from 0 here, from 1 in the file
            rois.append(ImagejRoi.frompoints(polygon, name=name, position=z))
    roiwrite(path, rois)
    return path


_HOW_TO = """# {name} in Cellpose 3

    python -m cellpose --add_model {name}
    python -m cellpose --dir IMAGES --pretrained_model {name} --do_3D \\
        --diameter PIXELS --anisotropy RATIO --save_tif

The first line, given in this folder, makes the model known to Cellpose's command line and GUI (menu
*Models*). PIXELS is the diameter of your nuclei in pixels of your images{diameter}; RATIO is the depth of a
voxel over its width.

Cellpose normalises and fuses the views in its own way, so its masks are not those of `nuclei3d predict`.
"""


def write_weights(model: Model, folder: Path) -> Path:
    """Write the weights under the model's name, as Cellpose's command line and GUI add them, and how to."""
    info = model.info
    path = folder / info.name
    torch.save(model.network.state_dict(), path)
    known = info.nucleus_diameter_um
    diameter = f" (those of the training: {known:.3g} um)" if known is not None else ""
    how_to = _HOW_TO.format(name=info.name, diameter=diameter)
    (folder / "HOW_TO.md").write_text(how_to, encoding="utf-8")
    return path


def write_seg(
    folder: Path, name: str, image: NDArray[Any], labels: NDArray[np.uint32], voxel_size: VoxelSize
) -> Path:
    """Write an image as ``<name>.tif`` and its labels, both (Z, Y, X), beside it as ``<name>_seg.npy``.

    Cellpose's GUI opens the image and finds the labels by their name; the folder may be moved. The ``.npy``
    is a pickle, because that is Cellpose's format; nuclei3d never reads one.
    """
    from cellpose.utils import masks_to_outlines
    from skimage.segmentation import relabel_sequential

    file = folder / f"{name}.tif"
    check_image(image, name)
    write_image(file, image, voxel_size)
    shape, shortest = image.shape, int(np.argmin(image.shape))
    if shortest and shape[shortest] < max(shape) / 3:
        warn(
            f"Cellpose's GUI takes the shortest axis for z; {name} is {shape[0]} x {shape[1]} x {shape[2]}, "
            "so it will show image and masks turned against each other"
        )
    # the GUI renumbers labels with gaps, and then loses their outlines
    masks: NDArray[Any] = relabel_sequential(compact_labels(labels))[0]  # type: ignore[no-untyped-call]
    masks = masks.astype(np.uint16 if masks.max(initial=0) < 2**16 - 1 else np.uint32)
    outlines = masks * masks_to_outlines(masks).astype(masks.dtype)
    count = int(masks.max(initial=0))
    content = {
        "outlines": outlines,
        "masks": masks,
        "chan_choose": [0, 0],
        "ismanual": np.zeros(count, dtype=bool),
        "filename": file.name,
        "est_diam": _median_diameter_px(masks, voxel_size),
    }
    path = folder / f"{name}_seg.npy"
    np.save(path, np.array(content, dtype=object), allow_pickle=True)
    return path


def _median_diameter_px(masks: NDArray[Any], voxel_size: VoxelSize) -> float:
    """Give the diameter, along x, of the sphere of the median volume; Cellpose's 30 without nuclei."""
    voxels = np.bincount(masks.ravel())[1:]
    if not len(voxels):
        return 30.0
    volume_um3 = float(np.median(voxels)) * voxel_size.z * voxel_size.y * voxel_size.x
    return float(np.cbrt(6 * volume_um3 / np.pi)) / voxel_size.x


def write_training_files(stem: Path, image: NDArray[Any], labels: NDArray[np.unsignedinteger[Any]]) -> Path:
    """Write a plane (Y, X) as Cellpose's training reads it, with flows, so that it starts at once.

    The files are ``<stem>_img.tif``, which is given back, ``<stem>_lbl.tif`` and ``<stem>_img_flows.tif``.
    """
    labels = labels.astype(np.uint16, copy=False)
    targets = np.stack([labels, labels > 0, *plane_flows(labels)]).astype(np.float32)
    for suffix, array in (("_img", image), ("_lbl", labels), ("_img_flows", targets)):
        path = stem.with_name(f"{stem.name}{suffix}.tif")
        tifffile.imwrite(path, array, compression="zlib", photometric="minisblack", metadata=None)
    return stem.with_name(f"{stem.name}_img.tif")


def write_training_set(slices: Path, folder: Path) -> list[Path]:
    """Write the planes of a prepared data set as `write_training_files` does, into a folder for each part.

    Intensities that are no integers of up to 16 bits come back to 1/65535 of a plane's range, as they are
    stored, and the user is told.
    """
    described = read_slices(slices)
    if described.summary.network != "views2d":
        raise InputError(f"{slices} holds volumes for a 3D network; Cellpose's training takes planes only")
    written: list[Path] = []
    for part in PARTS:
        (folder / part).mkdir()
        samples = load_samples(described, part, memory_limit_gb=0)
        # a frame has one type, which a constant plane alone does not tell
        rounded = {
            (info.embryo, info.frame)
            for info, step, offset in zip(samples.infos, samples.step, samples.offset, strict=True)
            if (step, offset) != (1, 0)
        }

        def write(index: int, samples: SampleSet = samples, rounded: Set[tuple[str, str]] = rounded) -> Path:
            info, (pixels, labels, _) = samples.infos[index], samples.read(index)
            image: NDArray[Any] = pixels[0]
            if (info.embryo, info.frame) in rounded:
                image = (image * samples.step[index] + samples.offset[index]).astype(np.float32)
            return write_training_files(folder / info.file, image, labels[0])

        # zlib and the flows leave the interpreter lock
        with ThreadPoolExecutor(os.cpu_count()) as pool, progress_bar("export", total=len(samples)) as bar:
            for path in pool.map(write, range(len(samples))):
                written.append(path)
                bar.advance(1)
        if rounded:
            say(
                f"{part}: images of {len(rounded)} frames are no 16-bit integers and come rounded to 1/65535 "
                "of each plane's range; nuclei3d prepare --set prepare.cellpose_files=true does not round"
            )
    return written
