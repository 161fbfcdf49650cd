"""Which trials are compared when one of them may be given up."""

from __future__ import annotations

import optuna
import pytest
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from nuclei3d.config.sections import SearchParams
from nuclei3d.stages.search.worker import new_pruner

SEARCH = SearchParams(first_rung=0.5, reduction=2)

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


@pytest.fixture
def study() -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="maximize", pruner=new_pruner(SEARCH))


def begin(study: optuna.Study, value: float) -> tuple[optuna.Trial, bool]:
    """Begin a trial, report a value at the half of its epochs; tell whether it is to be given up."""
    trial = study.ask()
    trial.report(value, 500)
    return trial, trial.should_prune()


def run_again(study: optuna.Study, trial: optuna.Trial) -> FrozenTrial:
    """End a trial as the death of its worker does; give the attempt that is queued for it."""
    study.tell(trial, state=TrialState.FAIL)
    dead = study.get_trials()[trial.number]
    RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)(study, dead)
    return study.get_trials()[-1]


def test_of_two_the_better_one_goes_on(study: optuna.Study) -> None:
    assert not begin(study, 1.0)[1]
    assert begin(study, 0.5)[1]
    assert not begin(study, 2.0)[1]


def test_a_trial_that_was_run_again_is_counted_once(study: optuna.Study) -> None:
    """Of 3, 2 and 1 the two best would fill the upper half if the 3 counted three times."""
    best, _ = begin(study, 3.0)
    for _ in range(2):
        run_again(study, best)
        best = study.ask()
    assert study.get_trials()[best.number].system_attrs["completed_rung_0"] == 3.0
    begin(study, 1.0)
    begin(study, 0.5)
    assert not begin(study, 2.0)[1], "2 is among the better half of 3, 2, 1, 0.5"


def test_an_attempt_does_not_race_against_the_one_that_died(study: optuna.Study) -> None:
    first, _ = begin(study, 1.0)
    study.tell(first, state=TrialState.FAIL)
    # another seed of the machine's arithmetic: a little worse than before
    assert not begin(study, 0.9)[1]


def test_trials_that_were_pruned_or_finished_still_count(study: optuna.Study) -> None:
    study.tell(begin(study, 1.0)[0], 1.0)
    study.tell(begin(study, 0.7)[0], state=TrialState.PRUNED)
    assert begin(study, 0.8)[1], "0.8 is not the best of 1, 0.7, 0.8"


def test_nothing_is_pruned_where_that_is_switched_off() -> None:
    study = optuna.create_study(
        direction="maximize", pruner=new_pruner(SEARCH.model_copy(update={"prune": False}))
    )
    assert not any(begin(study, value)[1] for value in (3.0, 2.0, 1.0))
