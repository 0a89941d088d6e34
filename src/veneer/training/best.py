"""Finds the best step of a run, and the step after which waiting for a better one ends.

Both follow one metric of the evaluations during training. Their state is what those evaluations found, which their
records in metrics.jsonl keep: a resumed run reads it back from there.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from typing import Any

from veneer.config import EarlyStopping, Run, UserError

LOSS = "loss"
# What an evaluation measures beside the loss, of models that write no text; by `model.task`.
OF_TASKS = {
    "sequence-classification": ("accuracy", "macro_f1"),
    "token-classification": ("entity_f1", "entity_precision", "entity_recall", "accuracy"),
    "embedding": ("mrr", "recall@1"),
}
# Values of an evaluation's record that a best step may be found by, with their better values.
BETTER = {
    **dict.fromkeys(("rewards/margins", "rewards/accuracies", "rewards/chosen", "logps/chosen"), "higher"),
    **dict.fromkeys(chain.from_iterable(OF_TASKS.values()), "higher"),
    **dict.fromkeys((LOSS, "perplexity", "rewards/rejected", "logps/rejected"), "lower"),
}


class BestStep:
    """The best step so far by a metric.

    Args:
        settings: metric, patience and min_delta; None: the held-out loss, and training never ends early.
        better: the metric's better values: lower or higher.

    Attributes:
        metric: name of the metric in an evaluation's record.
        step, value: the best step, and what the metric was there; None: no value was finite yet. Of equal values the
            earlier one is the best.
        waited: evaluations since the last improvement of more than min_delta.
    """

    def __init__(self, settings: EarlyStopping | None = None, better: str = "lower") -> None:
        self._better = better
        self.settings = settings or EarlyStopping(patience=None)
        self.metric = self.settings.metric
        self.step: int | None = None
        self.value: float | None = None
        self.waited = 0
        self._improved_to: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether training is to end."""
        return self.settings.patience is not None and self.waited >= self.settings.patience

    def see(self, record: Mapping[str, Any]) -> bool:
        """Take an evaluation's record into account; returns whether its step is the best so far."""
        value = record.get(self.metric)
        if value is None or not math.isfinite(value):
            self.waited += 1
            return False
        is_best = self.value is None or self._gain(self.value, value) > 0
        if is_best:
            self.step, self.value = record["step"], value
        if self._improved_to is None or self._gain(self._improved_to, value) > self.settings.min_delta:
            self._improved_to, self.waited = value, 0
        else:
            self.waited += 1
        return is_best

    def recall(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take the evaluations of metrics.jsonl into account, as a run does that is resumed."""
        for record in records:
            if record["kind"] == "eval":
                self.see(record)

    def take_last(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take over what the last evaluation in metrics.jsonl says of the best step."""
        for record in records:
            if record["kind"] == "eval":
                self.step, self.value = record.get("best_step"), record.get("best_value")

    def kept_step(self, keep: str, last: int) -> int:
        """Return the step whose adapter is delivered: the best one with `train.keep=best`, where there is any."""
        return self.step if keep == "best" and self.step is not None else last

    def _gain(self, before: float, after: float) -> float:
        return before - after if self._better == "lower" else after - before

    def as_dict(self) -> dict[str, Any]:
        """Return `best_step` and `best_value`, as an evaluation's record and a run's result have them."""
        return {"best_step": self.step, "best_value": self.value}


def require_evaluations(run: Run, held_out: int, measured: Collection[str]) -> None:
    """Raise UserError for settings that follow evaluations which the run does not make.

    Args:
        run: the settings.
        held_out: number of held-out rows.
        measured: names of what an evaluation measures.
    """
    train = run.train
    asked = {
        "evaluate.during": bool(run.evaluate.during),
        "train.early_stopping": train.early_stopping is not None,
        "train.keep=best": train.keep == "best",
    }
    name = next((name for name, is_asked in asked.items() if is_asked), None)
    if name is None:
        return
    if not held_out:
        raise UserError(
            f"{name}: it is measured on held-out rows, and the run holds none out (data.validation = "
            f"{run.data.validation})",
            f"raise data.validation, or name a file of rows there, or leave {name.partition('=')[0]} out",
        )
    if train.eval_steps is None and (train.early_stopping is not None or train.keep == "best"):
        name = "train.early_stopping" if train.early_stopping is not None else "train.keep=best"
        raise UserError(
            f"{name}: with train.eval_steps = null nothing is measured before the last step",
            "set train.eval_steps to the steps between two evaluations",
        )
    metric = train.early_stopping.metric if train.early_stopping is not None else LOSS
    if metric not in measured:
        raise UserError(
            f"train.early_stopping: the metric `{metric}` is not measured during training (measured: "
            f"{', '.join(measured)})",
            "name one of these, or add it to evaluate.during",
        )
