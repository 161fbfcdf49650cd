"""Validated parameters: one class per section of params.yaml."""

from nuclei3d.config.loading import load_params
from nuclei3d.config.sections import Params

__all__ = ["Params", "load_params"]
