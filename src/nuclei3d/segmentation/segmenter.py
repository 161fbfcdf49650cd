"""The door: a model, its settings and a device, which together segment volumes.

Imports at the top are light, so that ``from nuclei3d import Segmenter`` costs nothing; torch and the rest
come with the first `Segmenter`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from nuclei3d.errors import InputError
from nuclei3d.images.voxel_size import VoxelSize

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import nn

    from nuclei3d.config.sections import PredictParams
    from nuclei3d.networks.folder import Model
    from nuclei3d.segmentation.flow_field import DeviceField, FlowField
    from nuclei3d.segmentation.masks import Nucleus
    from nuclei3d.segmentation.network_pass import Networks
    from nuclei3d.segmentation.settings import MaskSettings, SegmentationSettings


@dataclass(frozen=True)
class Segmentation:
    """A segmented volume.

    Attributes
    ----------
    labels
        uint32 (z, y, x) on the image's grid, 0 for background, 1..n without gaps.
    scores
        float32 (n + 1,): 0..1 by label (`masks.score_labels`); nan from stock Cellpose, which has none.
    seconds
        Time by step: ``network`` (inside the forward pass), ``views`` (the rest of the network pass),
        ``masks``, ``total``.
    warnings
        In what the volume, or what was found in it, is unlike the training (`segmentation.likeness`).
    """

    labels: NDArray[np.uint32]
    scores: NDArray[np.float32]
    seconds: Mapping[str, float]
    _measure: Callable[[], list[Nucleus]] = field(repr=False)
    warnings: tuple[str, ...] = field(default=(), kw_only=True)

    @cached_property
    def nuclei(self) -> list[Nucleus]:
        """One entry per label, in order: centroid and volume in um, mean intensity, score; measured once."""
        return self._measure()


class Segmenter:
    """Segments nuclei in 3D.

    Parameters
    ----------
    model
        Folder or weights file of a model, a loaded one (`nuclei3d.networks.folder.Model`), or networks
        by themselves: a module, or `nuclei3d.segmentation.network_pass.Networks`.
    settings
        `PredictParams` or a mapping of their names (those of the section predict of params.yaml) to values;
        what they leave open is the model's, and the further models that they name are loaded. Or
        `SegmentationSettings`, with which nothing is left open; networks by themselves need these.
    device
        ``auto``, ``cpu``, ``cuda`` or a torch.device. By default what the parameters say, else ``auto``.

    Attributes
    ----------
    settings : SegmentationSettings
        As resolved.
    device : torch.device
    models : dict
        What was loaded, by the names that `Networks` gives; empty for networks by themselves.

    Raises
    ------
    InputError
        If a model cannot be loaded, or models and settings do not go together.

    Examples
    --------
    >>> from nuclei3d import Segmenter, read_volume
    >>> segmenter = Segmenter("models/nuclei_3d", {"diameter_um": 9.5})
    >>> image, voxel_size = read_volume("embryo.tif")
    >>> result = segmenter.segment(image, voxel_size)
    >>> result.labels.max(), result.nuclei[0].volume_um3

    Other thresholds need the network only once:

    >>> from dataclasses import replace
    >>> flows = segmenter.flows(image, voxel_size)
    >>> for threshold in (-1.0, 0.0, 1.0):
    ...     masks = replace(segmenter.settings.masks, cellprob_threshold=threshold)
    ...     labels, scores = segmenter.label(flows, image.shape, masks)
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Model | Networks | nn.Module,
        settings: PredictParams | Mapping[str, Any] | SegmentationSettings | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        import torch

        from nuclei3d.config.loading import validate_params
        from nuclei3d.config.sections import PredictParams
        from nuclei3d.networks.cpnet import choose_device
        from nuclei3d.networks.folder import Model, load_model
        from nuclei3d.segmentation.network_pass import Networks
        from nuclei3d.segmentation.settings import SegmentationSettings, segmentation_settings

        if isinstance(model, str | os.PathLike):
            model = load_model(model)
        self.models: dict[str, Model] = {}
        if isinstance(settings, SegmentationSettings):
            self.settings = settings
            self.models = {"main": model} if isinstance(model, Model) else {}
        elif not isinstance(model, Model):
            raise InputError("networks by themselves need SegmentationSettings; give these, or a model")
        else:
            if not isinstance(settings, PredictParams):
                settings = validate_params({"predict": dict(settings or {})}, "settings").predict
            self.models = load_models(model, settings)
            volume = self.models.get("volume")
            self.settings = segmentation_settings(
                model.info, settings, volume=volume.info if volume else None
            )
            device = device or settings.device
        if self.models:
            model = Networks(**{part: each.network for part, each in self.models.items()})  # type: ignore[arg-type]
        self._networks = model if isinstance(model, Networks) else Networks(model)  # type: ignore[arg-type]
        self.device = device if isinstance(device, torch.device) else choose_device(device or "auto")

    def segment(
        self,
        image: NDArray[Any],
        voxel_size_um: VoxelSize | Sequence[float],
        progress: Callable[[float], None] | None = None,
    ) -> Segmentation:
        """Segment the nuclei of a volume.

        Parameters
        ----------
        image
            (z, y, x), any real dtype. Fill that registration left around it, a constant or NaN, holds no
            nucleus (`nuclei3d.intensity`).
        voxel_size_um
            Edges (z, y, x) of a voxel in um.
        progress
            Called with the share done, 0 to 1.

        Raises
        ------
        InputError
            If image, voxel size and diameter do not fit together, or mode or engine are not for the networks.
        """
        import numpy as np

        from nuclei3d.grid import find_boxes
        from nuclei3d.segmentation.likeness import find_unlikeness
        from nuclei3d.segmentation.masks import measure_nuclei
        from nuclei3d.segmentation.network_pass import predict_flows
        from nuclei3d.segmentation.settings import check_scale, with_ranges

        started = time.perf_counter()
        voxel_size = VoxelSize.of(voxel_size_um)
        seconds: dict[str, float] = {}
        check_scale(image.shape, voxel_size, self.settings)
        settings = with_ranges(self.settings, image)
        if settings.mode == "cellpose":
            labels = segment_with_cellpose(image, voxel_size, self._networks.main, self.settings, self.device)
            scores = np.full(int(labels.max(initial=0)) + 1, np.nan, np.float32)
        else:
            flows, seconds = predict_flows(image, voxel_size, self._networks, settings, self.device, progress)
            labelling = time.perf_counter()
            labels, scores = self.label(flows, image.shape)
            seconds["masks"] = time.perf_counter() - labelling
        if progress is not None:
            progress(1.0)
        return Segmentation(
            labels,
            scores,
            {**seconds, "total": time.perf_counter() - started},
            partial(measure_nuclei, labels, image, voxel_size, scores),
            warnings=tuple(
                find_unlikeness(
                    find_boxes(labels).voxels[1:] * voxel_size.volume_um3,
                    voxel_size,
                    settings.nucleus_diameter_um,
                    self.models["main"].info.training if self.models else None,
                    settings.intensity_range,
                )
            ),
        )

    def with_settings(self, settings: SegmentationSettings) -> Segmenter:
        """Give the same networks with other settings; nothing is loaded anew."""
        other = copy.copy(self)
        other.settings = settings
        return other

    def flows(
        self,
        image: NDArray[Any],
        voxel_size_um: VoxelSize | Sequence[float],
        progress: Callable[[float], None] | None = None,
    ) -> FlowField:
        """Run the networks over a volume, for `label`; parameters and errors as `segment`."""
        from nuclei3d.segmentation.network_pass import predict_flows

        if self.settings.mode == "cellpose":
            raise InputError("mode 'cellpose' has no flows that others could follow; use another mode")
        voxel_size = VoxelSize.of(voxel_size_um)
        flows, _ = predict_flows(image, voxel_size, self._networks, self.settings, self.device, progress)
        return flows.fetch()

    def label(
        self, flows: FlowField | DeviceField, shape: tuple[int, ...], masks: MaskSettings | None = None
    ) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
        """Turn `flows` into labels 1..n on the image's grid (z, y, x), and their scores, float32 (n + 1,).

        `masks` are thresholds other than those of the settings.
        """
        from nuclei3d.segmentation.dynamics import label_flows

        settings = self.settings if masks is None else replace(self.settings, masks=masks)
        return label_flows(flows, shape, settings)


def load_models(model: Model, predict: PredictParams) -> dict[str, Model]:
    """Load the further models that a prediction names, and check that they go with a model."""
    from nuclei3d.networks.folder import load_model, require_model

    models = {"main": model}
    if predict.orthogonal_model is not None:
        require_model(predict.orthogonal_model, "predict.orthogonal_model")
        orthogonal = load_model(predict.orthogonal_model)
        for info in (model.info, orthogonal.info):
            if info.kind != "views2d":
                raise InputError(
                    f"predict.orthogonal_model is for 2D models; '{info.name}' is of kind '{info.kind}'"
                )
        # one image scale is to suit both networks
        sizes = [each.info.diameter_px for each in (model, orthogonal)]
        if abs(sizes[0] - sizes[1]) > 0.01 * max(sizes):
            raise InputError(
                f"the network of '{orthogonal.info.name}' sees nuclei of {sizes[1]:g} pixels, that of "
                f"'{model.info.name}' {sizes[0]:g}; an orthogonal model must have the same diameter_px"
            )
        models["orthogonal"] = orthogonal
    if predict.volume_model is not None:
        require_model(predict.volume_model, "predict.volume_model")
        volume = load_model(predict.volume_model)
        if volume.info.kind != "full3d":
            raise InputError(
                f"predict.volume_model takes a 3D model; '{volume.info.name}' in {volume.path.parent} is of "
                f"kind '{volume.info.kind}': give one that was trained with train.network=full3d"
            )
        models["volume"] = volume
    return models


def segment_with_cellpose(
    image: NDArray[Any],
    voxel_size: VoxelSize,
    network: nn.Module,
    settings: SegmentationSettings,
    device: torch.device,
) -> NDArray[np.uint32]:
    """Segment a volume with stock ``CellposeModel.eval(do_3D=True)``: uint32 labels (z, y, x), 1..n.

    Diameter, anisotropy, percentiles and the threshold on the logit are those of the settings (Cellpose sums
    three logits where this package takes their mean, so that threshold is multiplied by three); all else
    is Cellpose's default.
    """
    import numpy as np

    from nuclei3d.networks.cpnet import new_network

    with contextlib.redirect_stdout(io.StringIO()):  # it prints a banner
        from cellpose.models import CellposeModel

    state = network.state_dict()
    diameter = float(state["diam_mean"].item())
    model = CellposeModel(
        gpu=device.type == "cuda", pretrained_model=False, device=device, diam_mean=diameter
    )
    # its own has Cellpose's width; the last batch normalisation has as many channels as the first level
    model.net = new_network(diameter, 0, len(state["output.0.weight"])).to(device)
    model.net.mkldnn = model.mkldnn
    model.net.load_state_dict(state)
    model.net.eval()
    # Cellpose sets this only where it loads a file.
    model.net_ortho = None
    masks, _, _ = model.eval(
        image,
        channels=[0, 0],
        z_axis=0,
        do_3D=True,
        diameter=settings.nucleus_diameter_um / voxel_size.x * model.diam_mean / settings.diameter_px,
        anisotropy=voxel_size.anisotropy,
        normalize={"percentile": [settings.lower_percentile, settings.upper_percentile]},
        cellprob_threshold=3 * settings.masks.cellprob_threshold,
        flow3D_smooth=settings.flow3d_smooth,
    )
    return np.asarray(np.asarray(masks).reshape(image.shape), dtype=np.uint32)
