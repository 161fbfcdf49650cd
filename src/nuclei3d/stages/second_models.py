"""Models that stand beside the one of --model: for the orthogonal views, and a 3D one for mode mixed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nuclei3d.config.predict import PredictParams
from nuclei3d.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from nuclei3d.models.folder import Model
    from nuclei3d.models.info import ModelInfo


@dataclass(frozen=True)
class SecondModels:
    """What stands beside a model; None for what does not.

    Attributes
    ----------
    orthogonal
        Another 2D model, for the xz and yz planes.
    volume
        A 3D model, whose flows are fused with those of the views.
    """

    orthogonal: Model | None = None
    volume: Model | None = None

    @property
    def models(self) -> list[Model]:
        """Those that there are."""
        return [each for each in (self.orthogonal, self.volume) if each is not None]

    @property
    def orthogonal_network(self) -> nn.Module | None:
        """Network for the xz and yz planes."""
        return self.orthogonal.network if self.orthogonal else None

    @property
    def volume_network(self) -> nn.Module | None:
        """The 3D network."""
        return self.volume.network if self.volume else None

    @property
    def volume_info(self) -> ModelInfo | None:
        """Scale and normalisation of the 3D model."""
        return self.volume.info if self.volume else None


def load_second_models(predict: PredictParams, model: Model) -> SecondModels:
    """Load the models that the wishes name, and check that they go with a model.

    Raises
    ------
    InputError
        If one is missing, of the wrong kind, or of another scale where one image serves two networks.
    """
    from nuclei3d.models.folder import load_model, require_model

    orthogonal = volume = None
    if predict.orthogonal_model is not None:
        require_model(predict.orthogonal_model, "predict.orthogonal_model")
        orthogonal = load_model(predict.orthogonal_model)
        _check_orthogonal(model, orthogonal)
    if predict.volume_model is not None:
        require_model(predict.volume_model, "predict.volume_model")
        volume = load_model(predict.volume_model)
        _check_volume(volume)
    return SecondModels(orthogonal, volume)


def _check_orthogonal(model: Model, orthogonal: Model) -> None:
    """Check that one image scale suits both networks."""
    for each in (model, orthogonal):
        if each.info.kind != "views2d":
            raise InputError(
                f"predict.orthogonal_model is for 2D models; '{each.info.name}' is of kind '{each.info.kind}'"
            )
    sizes = [each.info.diameter_px for each in (model, orthogonal)]
    if abs(sizes[0] - sizes[1]) > 0.01 * max(sizes):
        raise InputError(
            f"the network of '{orthogonal.info.name}' sees nuclei of {sizes[1]:g} pixels, that of "
            f"'{model.info.name}' {sizes[0]:g}; an orthogonal model must have the same diameter_px"
        )


def _check_volume(volume: Model) -> None:
    if volume.info.kind != "full3d":
        raise InputError(
            f"predict.volume_model takes a 3D model; '{volume.info.name}' in {volume.path.parent} is of kind "
            f"'{volume.info.kind}': give one that was trained with train.network=full3d"
        )
