"""What a trial of the search computes: a training, then its value on whole validation volumes in 3D."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nuclei3d.errors import InputError
from nuclei3d.stages.search_task import TrialJob

if TYPE_CHECKING:
    from nuclei3d.core.assessment import Assessment
    from nuclei3d.core.training_state import EpochReport


def train_and_validate(job: TrialJob, on_epoch: Callable[[EpochReport], None]) -> float:
    """Train with the job's parameters and measure the model on the validation volumes.

    The training keeps no MLflow run of its own: the trial's run has its curves. A trial that was killed goes
    on from its last checkpoint.

    Raises
    ------
    InputError
        If slices or embryos are unusable, or there is no validation volume.
    """
    from nuclei3d.stages.train import train

    silent = job.params.tracking.model_copy(update={"enabled": False})
    params = job.params.model_copy(update={"tracking": silent})
    folder = job.folder / params.train.name
    train(params, job.slices, folder, data=job.data, resume=True, on_epoch=on_epoch)
    raise InputError("validation follows")


def value_of(
    assessments: Sequence[Assessment], objective: str, precision: float, edges: Sequence[float]
) -> float:
    """Reduce assessed validation volumes to what is maximised, pooled over the volumes."""
    from nuclei3d.core.assessment import recall_at_precision
    from nuclei3d.core.metrics import score, stack_tallies

    pooled = score(stack_tallies([assessment.tally for assessment in assessments]).total())
    if objective == "ap":
        return pooled.ap_at(0.5)
    reached = recall_at_precision(assessments, precision, edges=edges)
    if reached is not None:
        return reached[0]
    # below every model that reaches the precision, and the lower the further away
    return float(pooled.precision) - precision - 1.0


__all__ = ["Path", "train_and_validate", "value_of"]
