"""Parameters of the search for training parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from nuclei3d.config.section import Section

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Range(Section):
    """The values that are tried for one parameter: a few `choices`, or all from `low` to `high`.

    With `log` each factor of ten is as likely as the next. For a parameter that is a whole number only
    whole numbers are tried.
    """

    low: Finite | None = None
    high: Finite | None = None
    log: bool = False
    choices: Annotated[tuple[bool | int | float | str | None, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Range:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log:
                raise ValueError("give choices, or low and high, not both")
            return self
        if self.low is None or self.high is None:
            raise ValueError("give both low and high, or choices")
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range starts above 0, low is {self.low:g}")
        return self


_RECIPE_RANGES = {
    "epochs": Range(low=5, high=60, log=True),
    "batch_size": Range(choices=(8, 16, 32, 64)),
    "learning_rate": Range(low=1e-4, high=1e-2, log=True),
    "weight_decay": Range(low=1e-6, high=1e-1, log=True),
}


class SearchParams(Section):
    """What is searched, for what, and when a trial is given up.

    Attributes
    ----------
    study
        Name of the search in its storage; null: that of the folder it writes.
    objective
        What is maximised on the validation volumes in 3D: ``ap``, the average precision at IoU 0.5, or
        ``faint_recall``, the recall of the faintest fifth of the nuclei where the precision is `precision`.
    precision
        The precision at which ``faint_recall`` is read off; a model that reaches it nowhere scores below 0.
    volumes
        Number of validation volumes that are segmented, spread evenly over them; null: all.
    epochs, batch_size, learning_rate, weight_decay
        Ranges of these parameters of the section train; null leaves one as it is.
    more
        Ranges of further parameters by their dotted name, such as ``train.augment.dim_share``.
    prune
        Give unpromising trials up on the way, by asynchronous successive halving (ASHA).
    prune_on
        What is compared on the way, after every epoch that has it: the validation ``loss``, or the ``ap`` in
        3D (then `train.validate_volumes_every` says after which epochs it is computed).
    first_rung, reduction
        Trials are compared when `first_rung` of their own epochs are done, and again each time that share
        has grown `reduction` times; about one in `reduction` goes on.
    startup_trials
        Trials drawn at random before the sampler (TPE) starts to learn; null: a third of all, at most ten.
    confirm_top, confirm_seeds
        After the search, train the best `confirm_top` trials and the starting values again with
        `confirm_seeds` other seeds; the best mean wins. 0 seeds: no confirmation.
    keep_models
        Model folders of so many best trials stay on disk.
    max_retries
        How often a trial whose process died is run again.
    max_failures
        After so many trials that failed with an error the search stops.
    heartbeat_s, grace_s
        With PostgreSQL: seconds between two signs of life of a worker, and the silence after which it
        counts as dead.
    """

    study: Annotated[str, Field(min_length=1)] | None = None
    objective: Literal["ap", "faint_recall"] = "ap"
    precision: Annotated[float, Field(gt=0, lt=1)] = 0.9
    volumes: Annotated[int, Field(ge=1)] | None = None
    epochs: Range | None = _RECIPE_RANGES["epochs"]
    batch_size: Range | None = _RECIPE_RANGES["batch_size"]
    learning_rate: Range | None = _RECIPE_RANGES["learning_rate"]
    weight_decay: Range | None = _RECIPE_RANGES["weight_decay"]
    more: Mapping[str, Range] = Field(default_factory=dict)
    prune: bool = True
    prune_on: Literal["loss", "ap"] = "loss"
    first_rung: Annotated[float, Field(gt=0, lt=1)] = 0.125
    reduction: Annotated[int, Field(ge=2)] = 2
    startup_trials: Annotated[int, Field(ge=1)] | None = None
    confirm_top: Annotated[int, Field(ge=1)] = 3
    confirm_seeds: Annotated[int, Field(ge=0)] = 0
    keep_models: Annotated[int, Field(ge=1)] = 3
    max_retries: Annotated[int, Field(ge=0)] = 5
    max_failures: Annotated[int, Field(ge=1)] = 3
    heartbeat_s: Annotated[int, Field(ge=1)] = 30
    grace_s: Annotated[int, Field(ge=2)] = 120

    @model_validator(mode="before")
    @classmethod
    def _complete_ranges(cls, given: Any) -> Any:
        """Take what a range leaves out, as in ``epochs: {high: 30}``, from the default."""
        if not isinstance(given, Mapping):
            return given
        completed = dict(given)
        for name, default in _RECIPE_RANGES.items():
            value = given.get(name)
            if isinstance(value, Mapping) and default.choices is None and "choices" not in value:
                completed[name] = default.model_dump(exclude={"choices"}) | dict(value)
        return completed

    @model_validator(mode="after")
    def _grace_outlasts_heartbeat(self) -> SearchParams:
        if self.grace_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"grace_s ({self.grace_s}) must be at least twice heartbeat_s ({self.heartbeat_s})"
            )
        return self

    def ranges(self) -> dict[str, Range]:
        """Give every searched parameter's range by its dotted name."""
        recipe = {f"train.{name}": getattr(self, name) for name in _RECIPE_RANGES}
        return {name: found for name, found in recipe.items() if found is not None} | dict(self.more)
