"""Which trials are compared when one of them may be given up."""

from __future__ import annotations

import optuna
import pytest
from optuna.trial import TrialState

from nuclei3d.config.sections import SearchParams
from nuclei3d.stages.search.worker import new_pruner

SEARCH = SearchParams(first_rung=0.5, reduction=2)

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


@pytest.fixture
def study() -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(direction="maximize", pruner=new_pruner(SEARCH))


def report(trial: optuna.Trial, value: float) -> bool:
    """Report a value at the half of a trial's epochs; tell whether it is to be given up."""
    trial.report(value, 500)
    return trial.should_prune()


def test_of_two_the_better_one_goes_on(study: optuna.Study) -> None:
    assert not report(study.ask(), 1.0)
    assert report(study.ask(), 0.5)
    assert not report(study.ask(), 2.0)


def test_a_trial_that_was_put_back_is_counted_once(study: optuna.Study) -> None:
    """Of 3, 2 and 1 the two best would fill the upper half if the 3 counted three times."""
    best = study.ask()
    report(best, 3.0)
    for _ in range(2):
        study._storage.set_trial_state_values(best._trial_id, TrialState.WAITING)
        again = study.ask()
        assert again.number == best.number
        assert not again.should_prune(), "it does not race against itself"
    report(study.ask(), 1.0)
    report(study.ask(), 0.5)
    assert not report(study.ask(), 2.0), "2 is among the better half of 3, 2, 1, 0.5"


def test_trials_that_were_pruned_or_finished_still_count(study: optuna.Study) -> None:
    first, second = study.ask(), study.ask()
    report(first, 1.0)
    study.tell(first, 1.0)
    report(second, 0.7)
    study.tell(second, state=TrialState.PRUNED)
    assert report(study.ask(), 0.8), "0.8 is not the best of 1, 0.7, 0.8"


def test_nothing_is_pruned_where_that_is_switched_off() -> None:
    study = optuna.create_study(
        direction="maximize", pruner=new_pruner(SEARCH.model_copy(update={"prune": False}))
    )
    assert not any(report(study.ask(), value) for value in (3.0, 2.0, 1.0))
