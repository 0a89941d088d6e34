"""Measures the loss and the metrics of held-out rows during training, with 95% intervals.

Of a loss that is a weighted sum over tokens, as of supervised training, a row is a loss and a weight, and the mean is a
ratio of two sums over rows (paired_losses.py). Of pairs the interval is over pairs (pair_values.py). Other objectives
have none.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from veneer.data.batch import Batch, Example
from veneer.engine.interface import Engine
from veneer.engine.objective import Objective, StepOutput, TrainedTokens
from veneer.machine.batching import Batching
from veneer.machine.ranks import Ranks
from veneer.training.held_out import HeldOutRows
from veneer.training.outputs import add_up, means_of
from veneer.training.pair_values import describe_pairs, outputs_of_rows
from veneer.training.paired_losses import loss_interval
from veneer.training.parallel import spread_rows
from veneer.training.reference_logprobs import WithReference

LEAST_ROWS = 2  # of which a spread can be estimated


class HeldOutLoss:
    """Measures held-out rows.

    Args:
        engine: Engine of the run.
        objective: Its objective.
        rows: The rows; may be none.
        batching: Batches in which they are measured.
        with_reference: Function that gives a batch the reference's log-probabilities.
        estimate_kl: Function that estimates the KL divergence over them, for objectives that need it.
        ranks: This process among those of the run, each of which measures a share.
    """

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        rows: HeldOutRows,
        batching: Batching,
        with_reference: WithReference,
        estimate_kl: Callable[[], dict[str, float]],
        ranks: Ranks,
    ) -> None:
        self._engine, self._objective, self._rows, self._batching = engine, objective, rows, batching
        self._with_reference, self._estimate_kl, self._ranks = with_reference, estimate_kl, ranks
        self._batch_of = partial(Batch.of, documents_per_row=objective.documents_per_row)
        self._has_row_losses = objective.is_weighted_sum and objective.documents_per_row == 1
        self._values: dict[str, float] | None = None

    def measure(self, stopped: Callable[[], bool]) -> dict[str, Any] | None:
        """Return means, intervals and trained tokens, as the record of an evaluation has them; None: it was stopped."""
        if self._values is None:
            self._values = self._objective.step_values(self._batching.over(self._rows, self._batch_of))
        values = self._values | self._estimate_kl()
        losses: list[torch.Tensor] = []

        def measure(rows: Sequence[Example]) -> list[StepOutput] | None:
            if stopped():
                return None
            batch = self._with_reference(self._batch_of(rows)).with_values(values)
            tokens = TrainedTokens.of(batch, self._engine.token_logprobs(batch))
            outputs = list(outputs_of_rows(self._objective, tokens))
            if self._has_row_losses:
                losses.append(tokens.sum_documents(-tokens.logprobs_N * tokens.weights_N).cpu())
            return outputs

        def measure_all(rows: Sequence[Example]) -> list[StepOutput]:
            outputs: list[StepOutput] = []
            for measured in self._batching.over(rows, measure):
                if measured is None:
                    return []
                outputs += measured
            return outputs

        outputs = spread_rows(self._ranks, self._rows, measure_all)
        if not outputs:
            return None
        means = means_of({name: value.item() for name, value in add_up(outputs).items()})
        trained = sum(example.trained for example in self._rows)
        return means | describe_pairs(outputs) | self._interval(losses) | {"trained_tokens": trained}

    def _interval(self, losses: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Return the interval of the mean loss over rows, from the losses of this rank's documents."""
        if not self._has_row_losses:
            return {}
        shares = self._ranks.gather(torch.cat([*losses]).tolist() if losses else [])
        size = self._ranks.size
        found = self._rows.by_row([shares[n % size][n // size] for n in range(len(self._rows))])
        if len(found.losses) < LEAST_ROWS:
            return {}
        interval = loss_interval([found])
        return {"intervals": {"loss": [interval.low, interval.high]}}


def held_out_batching(rows_at_a_time: int, objective: Objective) -> Batching:
    """Return what takes held-out examples in batches, those of a row together."""
    return Batching(rows_at_a_time, "lower data.max_length", "held-out losses", objective.documents_per_row)
