"""Voxel size and channel names from the metadata of a TIFF file (OME, ImageJ, resolution tags)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

import tifffile

from nuclei3d.volumes.units import micrometres_per, voxel_size_or_reason
from nuclei3d.volumes.voxel_size import VoxelSize

_RESOLUTION_UNITS = {2: "inch", 3: "cm"}


def read_scale(file: tifffile.TiffFile) -> tuple[VoxelSize | None, str]:
    """Read the voxel size that a TIFF file states.

    OME metadata come first, then ImageJ's (or tifffile's) description with the resolution tags. A scale
    without a unit of length (pixels) counts as none: anisotropy is derived, never guessed.

    Returns
    -------
    voxel_size, note
        The voxel size, or None and what is wrong or missing ("" where the file says nothing).
    """
    if file.is_ome and file.ome_metadata:
        return _ome_scale(file.ome_metadata)
    if file.is_imagej and file.imagej_metadata:
        return _described_scale(file, file.imagej_metadata)
    if file.is_shaped and file.shaped_metadata:
        return _described_scale(file, file.shaped_metadata[0])
    return _described_scale(file, {})


def read_channel_names(file: tifffile.TiffFile) -> tuple[str, ...]:
    """Read the channel names of an OME-TIFF; empty where the file has none."""
    if not (file.is_ome and file.ome_metadata):
        return ()
    pixels = _ome_pixels(file.ome_metadata)
    if pixels is None:
        return ()
    names = tuple(channel.get("Name", "") for channel in pixels.iterfind("{*}Channel"))
    return names if any(names) else ()


def _ome_pixels(xml: str) -> ElementTree.Element | None:
    try:
        # tifffile has parsed the same text already; this is the microscope's own file, no web input.
        return ElementTree.fromstring(xml).find("{*}Image/{*}Pixels")
    except ElementTree.ParseError:
        return None


def _ome_scale(xml: str) -> tuple[VoxelSize | None, str]:
    pixels = _ome_pixels(xml)
    if pixels is None:
        return None, "its OME metadata cannot be read"
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
