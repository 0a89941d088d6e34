"""Turns a run's data into tokens, before anything is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from veneer.config import Run
from veneer.data.batch import Example
from veneer.data.pipeline import prepare as prepare_data
from veneer.model.classifier import make_renderer
from veneer.model.load import load_tokenizer
from veneer.model.locate import locate


@dataclass(frozen=True)
class PreparedRows:
    """The rows of a run as tokens.

    Attributes:
        train: training examples, each with `ids` (tokens), `weights` (the loss mask, one a token) and `place`.
        validation: held-out examples.
        ledger: account of every row and token, as ledger.json has it.
        samples: some training rows with their place and their text, in pieces of equal weight.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    ledger: dict[str, Any]
    samples: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return self.ledger | {"samples": self.samples}


def prepare(run: Run, samples: int = 3) -> PreparedRows:
    """Read, check and tokenize the rows of a run, as its training would. Of the model, only the tokenizer is loaded.

    Example:
        prepared = veneer.prepare(run)
        print(prepared.ledger["rows"], prepared.ledger["tokens"])

    Args:
        run: settings of the run.
        samples: number of training rows to show, spread over all of them.

    Raises:
        UserError: The rows, the template or the split are not usable.
    """
    renderer = make_renderer(run, load_tokenizer(locate(run.model), run.data))
    data = prepare_data(run.data, renderer, run.train.seed)
    count = min(samples, len(data.train))
    shown = [data.train[n * len(data.train) // count] for n in range(count)]
    return PreparedRows(
        data.train,
        data.validation,
        data.ledger.as_dict(),
        [
            {"place": row.place, "tokens": len(row.ids), "trained": row.trained, "pieces": renderer.pieces(row)}
            for row in shown
        ],
    )
