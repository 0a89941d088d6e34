"""What an objective says of each held-out pair of answers, and the 95% intervals of its means over pairs.

An objective returns sums over a batch. Here it is asked for one pair at a time, on the host, so that no objective need
know of intervals; its means stay what they are. Intervals are those of evaluation: Wilson's for a share, the
studentized bootstrap for any other number.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from veneer.engine.objective import Objective, StepOutput, TrainedTokens
from veneer.training.bootstrap import FEWEST, GroupedRows, bootstrap
from veneer.training.intervals import Interval, proportion

MARGINS, ACCURACIES = "rewards/margins", "rewards/accuracies"
LENGTH_CORRELATION = "lengths/correlation"  # with margins, by rank
LENGTH_DIFFERENCE = "lengths/difference"  # trained tokens of the chosen answer less those of the rejected one


def outputs_of_rows(objective: Objective, tokens: TrainedTokens) -> Iterator[StepOutput]:
    """Yield what an objective gives each pair of a batch, on the host; of other rows, all together."""
    if objective.documents_per_row != 2:
        yield objective(tokens)[0]
        return
    values = {name: value_N.cpu() for name, value_N in tokens.values.items()}
    logprobs_N, weights_N, index_N, bounds = (part.cpu() for part in tokens[:4])
    for start in range(0, len(bounds) - 2, 2):
        of_pair = bounds[start : start + 3]
        is_in_N = (index_N >= of_pair[0]) & (index_N < of_pair[2]) & (weights_N != 0)
        pair = tokens._replace(
            logprobs_N=logprobs_N[is_in_N],
            weights_N=weights_N[is_in_N],
            index_N=index_N[is_in_N],
            bounds=of_pair,
            values={name: value_N[is_in_N] for name, value_N in values.items()},
        )
        output = objective(pair)[0]
        chosen, rejected = pair.sum_documents((pair.weights_N != 0).to(output.loss.dtype))
        yield output._replace(metrics=output.metrics | {LENGTH_DIFFERENCE: chosen - rejected})


def metric_names(objective: Objective) -> tuple[str, ...]:
    """Return the names of an objective's metrics, asked of two documents of a token each."""
    zeros_N = torch.zeros(2)
    values: Mapping[str, torch.Tensor] = defaultdict(lambda: zeros_N)
    tokens = TrainedTokens(zeros_N, torch.ones(2), torch.arange(2), torch.arange(3), values)
    return tuple(objective(tokens)[0].metrics)


def describe_pairs(outputs: Sequence[StepOutput]) -> dict[str, Any]:
    """Return what an evaluation's record says of pairs beside the means; of other rows nothing.

    Args:
        outputs: values of all batches, from `outputs_of_rows`.

    Returns:
        `intervals`: ends of the 95% interval of each mean, by name. LENGTH_CORRELATION: rank correlation of margins
        with the tokens that chosen answers are longer by; None where either does not vary.
    """
    pairs = [one for one in outputs if LENGTH_DIFFERENCE in one.metrics and one.weight.item() > 0]
    if not pairs:
        return {}
    values = {name: np.array([one.metrics[name].item() for one in pairs]) for name in pairs[0].metrics}
    longer = values.pop(LENGTH_DIFFERENCE)
    values["loss"] = np.array([one.loss.item() for one in pairs])
    intervals = {name: _interval(name, each) for name, each in values.items()}
    told: dict[str, Any] = {"intervals": {name: [one.low, one.high] for name, one in intervals.items() if one}}
    if MARGINS in values:
        told[LENGTH_CORRELATION] = rank_correlation(values[MARGINS], longer)
    return told


def _interval(name: str, values_P: Any) -> Interval | None:
    """Return the interval of a mean over pairs; None: they are too few, or one is not finite."""
    if len(values_P) < FEWEST or not np.isfinite(values_P).all():
        return None
    if name == ACCURACIES:
        return proportion(int(values_P.sum()), len(values_P))
    return bootstrap(GroupedRows.of(values_P))[0]


def rank_correlation(first: Any, second: Any) -> float | None:
    """Return Spearman's correlation, with equal ranks for equal values; None where one does not vary."""
    ranks = [_ranks(values) for values in (first, second)]
    if len(first) < FEWEST or any(np.ptp(one) == 0 for one in ranks):
        return None
    return float(np.corrcoef(*ranks)[0, 1])


def is_shown_above(correlation: float, least: float, rows: int) -> bool:
    """Return whether a rank correlation lies above a bound with 97.5% confidence (Fisher's z; Fieller et al. 1957)."""
    if rows < 4:
        return False
    bounded = max(-1 + 1e-9, min(correlation, 1 - 1e-9))
    return math.atanh(bounded) - 1.96 * math.sqrt(1.06 / (rows - 3)) > math.atanh(least)


def _ranks(values: Any) -> Any:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]
