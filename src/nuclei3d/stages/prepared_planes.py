"""The data set of a 2D network: planes of three views with their flows, as Cellpose reads them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

from nuclei3d.config import Params
from nuclei3d.core.slicing import Plane, cut_planes, to_isotropic
from nuclei3d.core.targets.flow_targets import flows_2d
from nuclei3d.stages.prepared_frames import PreparedFrame, measure_frame
from nuclei3d.volumes.embryos import EmbryoFrame


@dataclass(frozen=True)
class PlaneRecord:
    """One row of manifest.csv: where a plane came from and what is on it."""

    part: str
    file: str
    embryo: str
    frame: str
    view: str
    index: int
    nuclei: int
    min_contrast: float
    norm_low: float
    norm_high: float
    height: int
    width: int
    md5: str


def slice_frame(task: tuple[str, EmbryoFrame], params: Params, folder: Path) -> PreparedFrame[PlaneRecord]:
    """Cut one frame and write its planes into ``folder/<part>``."""
    part, frame = task
    measured = measure_frame(frame, params)
    volume, wanted = measured.volume, params.prepare
    isotropic = to_isotropic(volume.image, volume.labels, volume.voxel_size, wanted.downsample_xy)
    records = []
    for plane in cut_planes(
        isotropic,
        {"xy": wanted.step_xy, "xz": wanted.step_xz, "yz": wanted.step_yz},
        min_nuclei=wanted.min_nuclei,
        min_area_px=wanted.min_area_px,
        sparse_share=wanted.sparse_share,
    ):
        stem = f"{frame.embryo}_{frame.frame}_{plane.view}_{plane.index:04d}"
        md5 = _write_plane(folder / part, stem, plane)
        height, width = plane.labels.shape
        records.append(
            PlaneRecord(
                part=part,
                file=f"{part}/{stem}_img.tif",
                embryo=frame.embryo,
                frame=frame.frame,
                view=plane.view,
                index=plane.index,
                nuclei=plane.nuclei,
                min_contrast=measured.faintest(plane.label_of[1:]),
                norm_low=measured.intensity.low,
                norm_high=measured.intensity.high,
                height=height,
                width=width,
                md5=md5,
            )
        )
    return PreparedFrame(tuple(records), isotropic.voxel_um, *measured.figures())


def _write_plane(folder: Path, stem: str, plane: Plane) -> str:
    """Write image, labels and flows where Cellpose looks for them; return the md5 of the three."""
    # half precision is more than the targets hold; the zeroed digits compress to almost nothing
    flow = flows_2d(plane.labels).astype(np.float16).astype(np.float32)
    foreground = (plane.labels > 0).astype(np.float32)
    targets = np.stack([plane.labels.astype(np.float32), foreground, flow[0], flow[1]])
    digest = hashlib.md5(usedforsecurity=False)
    for suffix, array in (("_img", plane.image), ("_lbl", plane.labels), ("_img_flows", targets)):
        encoded = _encode_tiff(array)
        digest.update(encoded)
        (folder / f"{stem}{suffix}.tif").write_bytes(encoded)
    return digest.hexdigest()


def _encode_tiff(array: NDArray[np.generic]) -> bytes:
    buffer = BytesIO()
    tifffile.imwrite(buffer, array, compression="zlib", photometric="minisblack", metadata=None)
    return buffer.getvalue()
