"""The learning rate is a pure function of the step, so nothing about it needs saving."""

import math


def learning_rate(step: int, steps: int, peak: float, warmup_ratio: float, kind: str) -> float:
    """Compute the learning rate of step `step` (from 0) of `steps`.

    It rises linearly over the first `warmup_ratio` of the steps, reaching `peak`, then falls to zero at the end of
    the last step (cosine, linear) or stays (constant), as Transformers' schedules of the same names do.
    """
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if kind == "constant":
        return peak
    progress = (step - warmup) / max(1, steps - warmup)
    if kind == "linear":
        return peak * (1 - progress)
    assert kind == "cosine"
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
