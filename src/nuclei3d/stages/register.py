"""From an evaluated model folder to a version in the registry, and back to an earlier champion."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nuclei3d.config import Params
from nuclei3d.console import say

if TYPE_CHECKING:
    from nuclei3d.experiment.registry import Registered


def register(params: Params, model: Path, metrics: Path, *, force: bool = False) -> Registered:
    """Register a model folder as the newest version: the challenger, and champion if it is better.

    A model that was registered before with the same scores is not registered again.

    Parameters
    ----------
    metrics
        metrics.json of its evaluation on held-out embryos, or the folder that holds it.
    force
        Make it the champion whatever the comparison says.
    """
    from nuclei3d.experiment.registry import check_registrable, find_registered, register_model
    from nuclei3d.experiment.runs import stage_run

    metrics = metrics / "metrics.json" if metrics.is_dir() else metrics
    check_registrable(params, model, metrics)
    made = None if force else find_registered(params, model, metrics)
    if made is None:
        with stage_run("register", params, inputs={"model": model, "metrics": metrics}) as run:
            made = register_model(params, model, metrics, run, force=force)
    before = " before" if made.done_before else ""
    say(f"registered{before} {made.name} version {made.version}: {made.reason}")
    if made.champion is not None:
        say(f"champion of {made.name} is version {made.champion}")
    return made


def roll_back(params: Params, version: str | None = None) -> Registered:
    """Make an earlier version the champion again: the one before, or the version given."""
    from nuclei3d.experiment import registry

    made = registry.roll_back(params, version)
    say(f"champion of {made.name} is version {made.version} again ({made.reason})")
    return made
