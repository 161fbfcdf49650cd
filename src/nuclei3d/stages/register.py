"""From an evaluated model folder to a version in the registry, and back to an earlier champion."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nuclei3d.config import Params
from nuclei3d.console import say


@dataclass(frozen=True)
class RegisterResult:
    """What the registry holds now.

    Attributes
    ----------
    name, version
        The registered model and the version that this call was about.
    champion
        The version that is champion after it; None if there is none.
    reason
        Why the champion moved or stayed.
    run_id
        The MLflow run that logged the model; None after a roll-back.
    """

    name: str
    version: str
    champion: str | None
    reason: str
    run_id: str | None

    def as_json(self) -> dict[str, Any]:
        """Give the result as plain data."""
        return {
            "name": self.name,
            "version": self.version,
            "is_champion": self.champion == self.version,
            "champion": self.champion,
            "reason": self.reason,
            "uri": f"models:/{self.name}/{self.version}",
            "run_id": self.run_id,
        }


def register(params: Params, model: Path, metrics: Path, *, force: bool = False) -> RegisterResult:
    """Register a model folder as the newest version: the challenger, and champion if it is better.

    Parameters
    ----------
    params
        The sections tracking and predict are used.
    model
        The model folder.
    metrics
        metrics.json of its evaluation on held-out embryos, or the folder that holds it.
    force
        Make it the champion whatever the comparison says.

    Raises
    ------
    InputError
        If the model or the metrics cannot be read, or the tracking store does not answer.
    """
    from nuclei3d.experiment.registry import check_registrable, register_model
    from nuclei3d.experiment.runs import stage_run

    metrics = metrics / "metrics.json" if metrics.is_dir() else metrics
    check_registrable(params, model, metrics)
    with stage_run("register", params, inputs={"model": model, "metrics": metrics}) as run:
        made = register_model(params, model, metrics, run, force=force)
    say(f"registered {made.name} version {made.version}: {made.verdict.reason}")
    if made.champion is not None:
        say(f"champion of {made.name} is version {made.champion}")
    return RegisterResult(made.name, made.version, made.champion, made.verdict.reason, run.run_id)


def roll_back(params: Params, version: str | None = None) -> RegisterResult:
    """Make an earlier version the champion again: the one before, or the version given.

    Raises
    ------
    InputError
        If there is no such version.
    """
    from nuclei3d.experiment.registry import roll_back as give_back

    made = give_back(params, version)
    say(f"champion of {made.name} is version {made.version} again ({made.verdict.reason})")
    return RegisterResult(made.name, made.version, made.champion, made.verdict.reason, None)
