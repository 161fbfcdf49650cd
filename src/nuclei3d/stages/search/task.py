"""What is searched and how: the task that every worker of a search shares."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.samplers import TPESampler

from nuclei3d.config import Params, params_as_dict
from nuclei3d.config.search import SearchParams
from nuclei3d.stages.search.space import SearchSpace

if TYPE_CHECKING:
    from nuclei3d.core.training.state import EpochReport

# Trials are compared by the share of their own epochs that is done, in thousandths (see docs/search.md).
STEPS = 1000

# Parameters of train and predict that say where and how fast, not what is computed.
_WITHOUT_EFFECT = ("name", "device", "workers", "memory_limit_gb", "memory_gb", "scheduler")


@dataclass(frozen=True)
class TrialJob:
    """What a trial is to compute.

    Attributes
    ----------
    params
        All parameters, with the trial's own values in place.
    slices, data
        The slice data set; the labelled embryos for validation in 3D (None: where the slices were cut from).
    folder
        The trial's folder; what an attempt that was killed left there may be used.
    """

    params: Params
    slices: Path
    folder: Path
    data: Path | None


#: Trains and validates; reports every epoch; gives what is maximised.
Objective = Callable[[TrialJob, "Callable[[EpochReport], None]"], float]


@dataclass(frozen=True)
class SearchTask:
    """What every worker of a search knows; it can be sent to another process.

    Attributes
    ----------
    params
        As in params.yaml.
    slices, out, data
        Inputs, and the folder of the search.
    storage
        Address of the storage; None: a journal in `out`.
    study
        Name of the study.
    trials
        Finished and pruned trials wanted in all.
    objective
        What a trial computes.
    """

    params: Params
    slices: Path
    out: Path
    data: Path | None
    storage: str | None
    study: str
    trials: int
    objective: Objective

    def seed_of(self, trials_so_far: int) -> int:
        """Give the seed of the next draw: a restarted search must not draw the same values again."""
        return int(np.random.SeedSequence([self.params.seed, trials_so_far]).generate_state(1)[0])


def new_sampler(search: SearchParams, trials: int, seed: int) -> TPESampler:
    """Make the sampler: random trials, then tree-structured Parzen estimators (Bergstra et al. 2011)."""
    return TPESampler(n_startup_trials=search.startup_trials or min(10, max(1, trials // 3)), seed=seed)


def fingerprint(task: SearchTask, space: SearchSpace, slices_md5: str) -> str:
    """Describe, as JSON, all that makes trials comparable: trials of different kinds do not share a study."""
    tree = params_as_dict(task.params)
    for name in space.distributions:
        *sections, key = name.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node.pop(key, None)
    for key in _WITHOUT_EFFECT:
        tree["train"].pop(key, None)
        tree["predict"].pop(key, None)
    search = task.params.search
    described = {
        "slices": slices_md5,
        "seed": task.params.seed,
        "data": tree["data"],
        "train": tree["train"],
        "calibrate": tree["calibrate"],
        "predict": tree["predict"],
        "search.objective": search.objective,
        "search.precision": search.precision if search.objective == "faint_recall" else None,
        "search.volumes": search.volumes,
        "search.prune_on": search.prune_on,
        "ranges": {name: str(found) for name, found in space.distributions.items()},
    }
    return json.dumps(described, sort_keys=True)


def differences(known: str, wanted: str) -> str:
    """Name the settings in which two fingerprints differ."""
    old, new = _flat(json.loads(known)), _flat(json.loads(wanted))
    names = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    return "; ".join(f"{name} was {old.get(name)}, is {new.get(name)}" for name in names[:3])


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
