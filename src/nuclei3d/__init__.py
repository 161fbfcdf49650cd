"""Retrain Cellpose on labelled 3D embryos, measure it honestly, serve it, segment time-lapses.

In a notebook::

    import nuclei3d
    from pathlib import Path

    image, voxel_size = nuclei3d.read_volume("embryo.tif")
    segmenter = nuclei3d.Segmenter("models/nuclei_3d")
    result = segmenter.segment(image, voxel_size)  # result.labels, result.nuclei, result.scores

    params = nuclei3d.load_params(Path("params.yaml"), ["train.epochs=30"])
    nuclei3d.prepare(params, Path("data"), Path("slices"))
    nuclei3d.train(params, Path("slices"), Path("models/mine"))
    nuclei3d.evaluate(params, Path("truth"), Path("masks"), Path("report"))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nuclei3d.config import load_params
    from nuclei3d.images.frames import read_volume
    from nuclei3d.segmentation.segmenter import Segmenter
    from nuclei3d.stages.evaluate import evaluate
    from nuclei3d.stages.prepare import prepare
    from nuclei3d.stages.train import train

__version__ = "0.1.0"
__all__ = ["Segmenter", "evaluate", "load_params", "prepare", "read_volume", "train"]

_ROOMS = {
    "Segmenter": "segmentation.segmenter",
    "evaluate": "stages.evaluate",
    "load_params": "config",
    "prepare": "stages.prepare",
    "read_volume": "images.frames",
    "train": "stages.train",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for at its first use: the whole package takes seconds."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'nuclei3d' has no attribute '{name}'")
    return getattr(import_module(f"nuclei3d.{_ROOMS[name]}"), name)
