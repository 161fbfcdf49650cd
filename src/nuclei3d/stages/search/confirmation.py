"""Telling luck from merit: the best trials once more, with other seeds, in a study of their own."""

from __future__ import annotations

import optuna
from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from nuclei3d.stages.search.records import CONFIRMS, SEED, START
from nuclei3d.stages.search.storage import StudyStorage
from nuclei3d.stages.search.task import SearchTask


def queue_confirmations(store: StudyStorage, study: Study, task: SearchTask) -> Study:
    """Queue the best trials, and the one of params.yaml, with other seeds; those queued before are left."""
    confirmations = optuna.create_study(
        storage=store.backend,
        study_name=f"{study.study_name}-confirm",
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.NopPruner(),
    )
    confirmations.set_user_attr(CONFIRMS, study.study_name)
    queued = {
        (trial.user_attrs[CONFIRMS], trial.user_attrs[SEED])
        for trial in confirmations.get_trials(deepcopy=False)
    }
    best = best_first(study)
    chosen = best[: task.params.search.confirm_top]
    chosen += [trial for trial in best if trial.user_attrs.get(START) and trial not in chosen]
    first = task.params.seed + 1
    for trial in chosen:
        for seed in range(first, first + task.params.search.confirm_seeds):
            if (trial.number, seed) not in queued:
                confirmations.enqueue_trial(
                    dict(trial.params), user_attrs={CONFIRMS: trial.number, SEED: seed}
                )
    return confirmations


def find_confirmations(store: StudyStorage, study: Study) -> Study | None:
    """Load the study of the confirmations; None if there is none."""
    name = f"{study.study_name}-confirm"
    if name not in optuna.get_all_study_names(store.backend):
        return None
    return optuna.load_study(storage=store.backend, study_name=name)


def best_first(study: Study) -> list[FrozenTrial]:
    """List the finished trials, the best one first."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    # sorted() is stable: of equal trials the earlier one, such as that of params.yaml, stays before
    return sorted(finished, key=lambda trial: -(trial.value or 0.0))


def values_over_seeds(
    finished: list[FrozenTrial], confirmations: Study | None
) -> dict[int, tuple[float, ...]]:
    """Give what each finished trial reached: with the seed of params.yaml, then with the others."""
    values = {trial.number: [trial.value] for trial in finished if trial.value is not None}
    if confirmations is not None:
        for trial in confirmations.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            number = trial.user_attrs[CONFIRMS]
            if number in values and trial.value is not None:
                values[number].append(trial.value)
    return {number: tuple(found) for number, found in values.items()}
