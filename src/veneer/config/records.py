"""The records of metrics.jsonl: every key with its type and meaning, in one place.

A line is a JSON object of `kind` train (a logged step), eval (held-out rows after a step) or divergence (a step whose
loss was off). docs/metrics.md is made from here (`python -m tools.metrics_page`). Metrics that `evaluate.during` names
stand in an eval record by their names.
"""

from typing import Annotated, Literal, NotRequired, TypedDict

Number = float | None  # None: it was not finite
Ends = tuple[float, float]

# Means over the rows of a step, or over all held-out rows.
ObjectiveMetrics = TypedDict(
    "ObjectiveMetrics",
    {
        "rewards/chosen": Annotated[Number, "mean reward of chosen (kto: good) answers"],
        "rewards/rejected": Annotated[Number, "mean reward of rejected (kto: bad) answers"],
        "rewards/margins": Annotated[Number, "mean reward of chosen answers less that of rejected ones"],
        "rewards/accuracies": Annotated[Number, "share of pairs whose chosen answer has the higher reward"],
        "logps/chosen": Annotated[Number, "mean log-probability of chosen (kto: good) answers"],
        "logps/rejected": Annotated[Number, "mean log-probability of rejected (kto: bad) answers"],
        "nll_loss": Annotated[Number, "negative log-likelihood of chosen answers, where it is a part of the loss"],
        "log_odds_ratio": Annotated[Number, "orpo: mean of log sigmoid of the log odds ratio"],
        "log_odds_chosen": Annotated[Number, "orpo: mean log odds ratio of chosen against rejected answers"],
        "kl": Annotated[Number, "kto: estimated KL divergence from the reference"],
    },
    total=False,
)

# Of held-out rows alone: of pairs, and of models that write no text (`accuracy` and after).
HeldOutMetrics = TypedDict(
    "HeldOutMetrics",
    {
        "lengths/correlation": Annotated[
            Number, "pairs: rank correlation of margins with the tokens that chosen answers are longer by"
        ],
        "lengths/difference": Annotated[
            float, "pairs: mean of trained tokens of the chosen answer less those of the rejected one"
        ],
        "accuracy": Annotated[float, "share of rows, or of tagged words, whose label is right"],
        "macro_f1": Annotated[float, "mean F1 over labels"],
        "entity_f1": Annotated[float, "F1 of whole entities"],
        "entity_precision": Annotated[float, "precision of whole entities"],
        "entity_recall": Annotated[float, "recall of whole entities"],
        "mrr": Annotated[float, "mean reciprocal rank of the right text"],
        "recall@1": Annotated[float, "share of queries whose right text comes first"],
        "recall@5": Annotated[float, "share of queries whose right text is among the first 5"],
        "recall@10": Annotated[float, "share of queries whose right text is among the first 10"],
    },
    total=False,
)


class TrainRecord(ObjectiveMetrics):
    """A logged step (`train.logging_steps`)."""

    kind: Annotated[Literal["train"], "kind of the record"]
    step: Annotated[int, "optimizer steps done, this one included"]
    epoch: Annotated[float, "passes over the training rows done"]
    loss: Annotated[float, "loss of this step alone, normalized over all its micro-batches"]
    learning_rate: Annotated[float, "learning rate of the step"]
    grad_norm: Annotated[Number, "norm of the gradient before clipping; null: a float16 step that overflowed"]
    grad_norm_by_layer: NotRequired[
        Annotated[
            list[Number],
            "`grad_norm` by decoder layer, the first one first, without what is in none (embeddings, a head); null: "
            "nothing is trained in a layer, or not finite; absent where gradients are dropped within the backward",
        ]
    ]
    tokens: Annotated[int, "tokens that went through the model"]
    trained_tokens: Annotated[int, "tokens that count in the loss"]
    seconds: Annotated[float, "time of the step"]
    tokens_per_second: Annotated[float, "`tokens` by `seconds`"]
    peak_bytes: Annotated[int, "peak of memory since the process began training"]
    predicted_peak_bytes: Annotated[int, "peak that the plan predicted"]
    time: Annotated[str, "when it was recorded, UTC, ISO 8601"]


class EvalRecord(ObjectiveMetrics, HeldOutMetrics):
    """An evaluation of held-out rows (`train.eval_steps`)."""

    kind: Annotated[Literal["eval"], "kind of the record"]
    step: Annotated[int, "optimizer steps done"]
    loss: Annotated[Number, "mean held-out loss"]
    perplexity: NotRequired[Annotated[Number, "exp(loss), of supervised training"]]
    trained_tokens: Annotated[int, "held-out tokens that count in the loss"]
    answered_rows: NotRequired[Annotated[int, "rows that were answered for the metrics of `evaluate.during`"]]
    samples: NotRequired[
        Annotated[
            list[dict[str, str]],
            "the first of these rows: `place`, `prompt`, `reference`, `answer`, once also the `base`'s; texts are "
            "cut at 600 characters. No tracker gets them",
        ]
    ]
    intervals: NotRequired[
        Annotated[
            dict[str, Ends],
            "ends of the 95% interval of a mean, by its key: of supervised training's loss, and of pairs",
        ]
    ]
    best_step: Annotated[int | None, "best step so far, by the metric of `train.early_stopping`, or by the loss"]
    best_value: Annotated[Number, "its value"]
    time: Annotated[str, "when it was recorded, UTC, ISO 8601"]


class DivergenceRecord(TypedDict):
    """A step whose loss or gradient was off (`train.on_divergence`), and what followed."""

    kind: Annotated[Literal["divergence"], "kind of the record"]
    step: Annotated[int, "optimizer steps done, once what follows is done; of a rollback, those of the checkpoint"]
    diverged_step: Annotated[int, "the step"]
    action: Annotated[Literal["none", "skip", "rollback", "stop"], "what follows; none: a spike, which is told"]
    reason: Annotated[str, "what was off"]
    loss: Annotated[Number, "loss of the step"]
    grad_norm: Annotated[Number, "norm of its gradient before clipping"]
    learning_rate: Annotated[float, "learning rate of the step"]
    rate_factor: Annotated[float, "factor of the learning rate from here on; below 1 after a rollback"]
    time: Annotated[str, "when it was recorded, UTC, ISO 8601"]


RECORDS: dict[str, type] = {"train": TrainRecord, "eval": EvalRecord, "divergence": DivergenceRecord}
