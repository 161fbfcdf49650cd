"""What held-out frames are predicted with beside the model: Cellpose's own fusion, and the champion."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from nuclei3d.config import Params
from nuclei3d.console import say
from nuclei3d.volumes.listing import frame_stem

STOCK_FUSION = "stock fusion of the same network"


class Baseline(NamedTuple):
    """A baseline that is a prediction: its name in the report, its folder, its model and mode."""

    name: str
    folder: str
    model: str
    mode: str


def predict_baselines(
    params: Params, frames: Mapping[str, Sequence[Path]], model: str, out: Path
) -> dict[str, Path]:
    """Predict held-out frames with the baselines that `evaluate.baselines` names.

    Frames that were done before with the same network and settings are kept; baselines of earlier calls
    that are no longer wanted are removed.

    Parameters
    ----------
    params
        The sections evaluate, predict, data and tracking are used.
    frames
        Images by embryo.
    model
        The model that is evaluated: a folder, weights file, or URI.
    out
        The folder to write: ``<baseline>/<embryo>/<stem>_masks.ome.tif``.

    Returns
    -------
    dict[str, Path]
        The folder of each baseline by the name that the report gives it.
    """
    from nuclei3d.stages.predict import predict

    out.mkdir(parents=True, exist_ok=True)
    made: dict[str, Path] = {}
    for baseline in _wanted(params, model):
        say(f"baseline: {baseline.name}")
        # a 3D model beside the 2D one is part of what is evaluated, not of what stands beside it
        predicting = params.predict.model_copy(update={"mode": baseline.mode, "volume_model": None})
        for embryo, images in frames.items():
            predict(
                params.model_copy(update={"predict": predicting}),
                images,
                baseline.model,
                out / baseline.folder / embryo,
            )
        keep_only(frames, out / baseline.folder)
        made[baseline.name] = out / baseline.folder
    for folder in out.iterdir():
        if folder not in made.values():
            shutil.rmtree(folder)
    return made


def keep_only(frames: Mapping[str, Sequence[Path]], predictions: Path) -> None:
    """Remove masks of frames that are not among these: an evaluation of the folder would take them in."""
    for masks in predictions.glob("*/*_masks.ome.tif"):
        wanted = {frame_stem(path) for path in frames.get(masks.parent.name, [])}
        stem = masks.name.removesuffix("_masks.ome.tif")
        if stem not in wanted:
            masks.unlink()
            masks.with_name(f"{stem}_nuclei.csv").unlink(missing_ok=True)


def _wanted(params: Params, model: str) -> list[Baseline]:
    wanted = []
    if "stock_fusion" in params.evaluate.baselines and params.predict.mode != "cellpose":
        if _is_3d(params, model):
            say("Cellpose has no fusion for a 3D network: that baseline is left out")
        else:
            wanted.append(Baseline(STOCK_FUSION, "stock_fusion", model, "cellpose"))
    if "champion" in params.evaluate.baselines and (champion := _find_champion(params, model)):
        wanted.append(champion)
    return wanted


def _is_3d(params: Params, model: str) -> bool:
    """Say whether the model that is evaluated has a 3D network, as far as the mode or its folder tells."""
    from nuclei3d.models.folder import INFO_FILE
    from nuclei3d.models.info import read_info

    file = Path(model) / INFO_FILE
    return params.predict.mode == "full3d" or (file.is_file() and read_info(file).kind == "full3d")


def _find_champion(params: Params, model: str) -> Baseline | None:
    """Find the registered model that is champion, unless it has the weights of the one that is evaluated."""
    from nuclei3d.models.folder import INFO_FILE
    from nuclei3d.models.info import read_info
    from nuclei3d.tracking.lineage import md5_of_input
    from nuclei3d.tracking.registry import champion_version, fetch_model

    version = champion_version(params)
    if version is None:
        return None
    uri = f"models:/{params.tracking.registered_name}/{version}"
    folder = fetch_model(uri, params)
    info = read_info(folder / INFO_FILE)
    own = Path(model)
    if own.is_dir():
        own = own / read_info(own / INFO_FILE).name
    if own.is_file() and md5_of_input(own) == md5_of_input(folder / info.name):
        say(f"the champion, version {version}, is this very model: that baseline is left out")
        return None
    if info.kind == "full3d":
        mode = "full3d"
    else:
        mode = "ortho" if params.predict.mode in ("full3d", "mixed") else params.predict.mode
    return Baseline(f"champion (version {version})", f"champion_{version}", uri, mode)
