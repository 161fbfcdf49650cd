"""Learning rates as functions of the step."""

from __future__ import annotations

import math

from nuclei3d.config.train import TrainParams


def learning_rate(params: TrainParams, step: int, steps_per_epoch: int) -> float:
    """Give the learning rate of a step (counted from 0 over the whole training).

    ``constant`` and ``warmup_cosine`` rise linearly over ``warmup_steps``; the cosine then falls to a
    hundredth at the last step. ``cellpose`` is the schedule of ``cellpose.train.train_seg``: by epochs, ten
    of warm-up from 0, then, in trainings of more than 100 (300) epochs, ten halvings over the last 50 (100).
    """
    peak = params.learning_rate
    if params.schedule == "cellpose":
        return peak * _cellpose_factor(step // steps_per_epoch, params.epochs)
    warmup = min(1.0, (step + 1) / (params.warmup_steps + 1))
    if params.schedule == "constant":
        return peak * warmup
    total = params.epochs * steps_per_epoch
    progress = max(0.0, step - params.warmup_steps) / max(1, total - 1 - params.warmup_steps)
    return peak * warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def _cellpose_factor(epoch: int, epochs: int) -> float:
    if epoch < 10:
        return epoch / 9
    halvings, length = (10, 10) if epochs > 300 else (10, 5) if epochs > 100 else (0, 1)
    first = epochs - halvings * length
    return 0.5 ** max(0, (epoch - first) // length + 1) if epoch >= first and halvings else 1.0
