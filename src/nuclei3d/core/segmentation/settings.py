"""How a volume is segmented."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nuclei3d.core.normalization import LOWER_PERCENTILE, NOISE_FLOOR, UPPER_PERCENTILE, IntensityRange
from nuclei3d.core.segmentation.dynamics import MaskSettings
from nuclei3d.core.segmentation.fusion import View
from nuclei3d.core.segmentation.plane_network import Engine
from nuclei3d.core.segmentation.views import VIEWS

ResolvedMode = Literal["ortho", "stitch", "cellpose", "full3d", "mixed"]


@dataclass(frozen=True)
class SegmentationSettings:
    """How a volume is segmented.

    Attributes
    ----------
    mode
        ``ortho``: the planes of `views`, fused in 3D; ``stitch``: xy planes, segmented one by one and linked;
        ``full3d``: a 3D network; ``mixed``: as ``ortho``, and a 3D network is fused with the views;
        ``cellpose``: stock Cellpose's do_3D with the same weights, for comparison.
    diameter_px
        Diameter of a nucleus in pixels at the network's scale.
    nucleus_diameter_um
        Diameter of a typical nucleus in the volume.
    fusion
        How views are fused (`nuclei3d.core.segmentation.fusion`).
    views
        Which views are used in modes ``ortho`` and ``mixed``.
    view_weights
        Relative trust in the views, in the order of `views`; None for equal trust.
    volume
        How the 3D network of mode ``mixed`` sees the volume: settings of mode ``full3d`` with its own scale
        and normalisation, for a network knows images only as it was trained on them; None in other modes.
        The diameter in um is the same: it is the volume's.
    volume_weight
        Relative trust in that network, where a view has 1 or what `view_weights` gives it.
    orthogonal_step
        Every how many planes of the orthogonal views one is computed.
    masks
        Thresholds and dynamics.
    flip_average
        Average the network over the four flips of each plane.
    lower_percentile, upper_percentile, noise_floor
        Normalisation (`nuclei3d.core.normalization`).
    intensity_range
        Given for a block of a larger volume: the range of the whole.
    skip_empty
        Leave out what can hold no nucleus (`nuclei3d.core.segmentation.foreground`).
    precision
        ``auto``, ``float32`` or ``bfloat16``.
    engine
        ``auto``, ``torch`` or ``openvino`` (`plane_network.PlaneNetwork`).
    stitch_min_iou, stitch_max_gap
        Linking of planes in mode ``stitch``.
    flow3d_smooth
        Stock Cellpose's option of that name, in mode ``cellpose`` only.
    """

    mode: ResolvedMode = "ortho"
    diameter_px: float = 30.0
    nucleus_diameter_um: float = 12.0
    fusion: Literal["mean", "consensus"] = "mean"
    views: tuple[View, ...] = VIEWS
    view_weights: tuple[float, ...] | None = None
    volume: SegmentationSettings | None = None
    volume_weight: float = 1.0
    orthogonal_step: int = 1
    masks: MaskSettings = field(default_factory=MaskSettings)
    flip_average: bool = False
    lower_percentile: float = LOWER_PERCENTILE
    upper_percentile: float = UPPER_PERCENTILE
    noise_floor: float = NOISE_FLOOR
    intensity_range: IntensityRange | None = None
    skip_empty: bool = True
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    engine: Engine = "auto"
    stitch_min_iou: float = 0.25
    stitch_max_gap: int = 1
    flow3d_smooth: float = 0.0

    @property
    def seen_views(self) -> tuple[View, ...]:
        """Views that the network is run over: in mode ``stitch`` only xy."""
        return ("xy",) if self.mode == "stitch" else self.views

    @property
    def network_voxel_um(self) -> float:
        """Edge of a voxel at the network's scale."""
        return self.nucleus_diameter_um / self.diameter_px

    @property
    def passes(self) -> tuple[SegmentationSettings, ...]:
        """Settings of each pass of a network over the volume: these, and those of the 3D network beside."""
        return (self,) if self.volume is None else (self, self.volume)
