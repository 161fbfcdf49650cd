"""Trials as the reader sees them: in MLflow, in tables and on the screen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from optuna.trial import FrozenTrial, TrialState

from nuclei3d.stages.search.storage import DIED, REASON, attempts
from nuclei3d.tracking.trials import TrialRecord

# Attributes of trials in the study.
START = "start"
CONFIRMS = "confirms"
SEED = "seed"

_STATES: Mapping[TrialState, Literal["running", "finished", "pruned", "failed"]] = {
    TrialState.WAITING: "running",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


def record_of(trial: FrozenTrial, *, confirms: bool = False) -> TrialRecord:
    """Describe a trial for MLflow and for the tables."""
    reason = trial.user_attrs.get(REASON, "")
    state = _STATES[trial.state]
    tries = attempts(trial)
    if state == "failed" and not reason:
        reason = DIED
    values: dict[str, object] = dict(trial.params)
    if confirms:
        values |= {SEED: trial.user_attrs.get(SEED), CONFIRMS: trial.user_attrs.get(CONFIRMS)}
    return TrialRecord(
        key=_key(trial.number, confirms),
        state=state,
        reason=reason,
        values=values,
        value=trial.value if state == "finished" else None,
        curve=dict(trial.intermediate_values),
        earlier=None if len(tries) == 1 else _key(tries[-2], confirms),
    )


def _key(number: int, confirms: bool) -> str:
    return ("confirmation " if confirms else "") + f"{number:04d}"


def outcome_line(record: TrialRecord, best: float | None) -> str:
    """Say in one line how a trial ended, beside the best value of the search so far."""
    values = ", ".join(
        f"{name.removeprefix('train.')} {_short(value)}" for name, value in record.values.items()
    )
    if record.value is not None:
        outcome = f"{record.value:.4f}, best {best:.4f}"
    else:
        outcome = f"{record.state}: {record.reason}"
    return f"trial {record.key} ({values}): {outcome}"


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
