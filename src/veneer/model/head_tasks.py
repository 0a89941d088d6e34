"""What each `model.task` with a head, or with pooling in its place, is in Transformers and PEFT."""

from typing import Any, NamedTuple


class HeadTask(NamedTuple):
    """A task.

    Attributes:
        auto: Transformers' class that loads it.
        mapping: Transformers' table of the configurations that it takes.
        ending: end of the names of its models' classes; empty: it has no head.
        task_type: PEFT's name of it.
    """

    auto: str
    mapping: str
    ending: str
    task_type: str

    @property
    def auto_class(self) -> Any:
        """Transformers' class."""
        import transformers

        return getattr(transformers, self.auto)

    def takes(self, config: Any) -> bool:
        """Return whether Transformers has such a model of a configuration."""
        import transformers

        return type(config) in getattr(transformers, self.mapping)


HEAD_TASKS = {
    "sequence-classification": HeadTask(
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
        "ForSequenceClassification",
        "SEQ_CLS",
    ),
    "reward": HeadTask(
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
        "ForSequenceClassification",
        "SEQ_CLS",
    ),
    "token-classification": HeadTask(
        "AutoModelForTokenClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
        "ForTokenClassification",
        "TOKEN_CLS",
    ),
    "embedding": HeadTask("AutoModel", "MODEL_MAPPING", "", "FEATURE_EXTRACTION"),
}
