"""When a trial is given up on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.trial import FrozenTrial, TrialState

from nuclei3d.config.search import SearchParams
from nuclei3d.stages.search.task import STEPS

if TYPE_CHECKING:
    from collections.abc import Container

    from optuna.study import Study


class LivingTrialsPruner(BasePruner):
    """A pruner that compares a trial with those that live or ended well, not with those that failed.

    A trial that is run again inherits the values of the attempt that died. Counted twice, they would fill the
    better half of every comparison with one and the same training, and the trial would race against itself.

    Parameters
    ----------
    inner
        The pruner that decides.
    """

    def __init__(self, inner: BasePruner) -> None:
        self._inner = inner

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Tell whether the trial is to be given up at its last step."""
        return self._inner.prune(cast("Study", _LivingTrials(study)), trial)


class _LivingTrials:
    """A study without its failed trials."""

    def __init__(self, study: Study) -> None:
        self._study = study

    def get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        found = self._study.get_trials(deepcopy=deepcopy, states=states)
        return [trial for trial in found if trial.state != TrialState.FAIL]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)


def new_pruner(search: SearchParams) -> BasePruner:
    """Make the pruner: asynchronous successive halving (Li et al. 2020) on the share of epochs done."""
    if not search.prune:
        return NopPruner()
    halving = SuccessiveHalvingPruner(
        min_resource=max(1, round(STEPS * search.first_rung)), reduction_factor=search.reduction
    )
    return LivingTrialsPruner(halving)
