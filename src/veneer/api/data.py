"""What a run's data is, before anything is trained."""

from dataclasses import dataclass
from typing import Any

from veneer.config import Data, Model
from veneer.data import Renderer
from veneer.data.pipeline import prepare
from veneer.model import load_tokenizer, locate


@dataclass(frozen=True)
class Inspected:
    """What data becomes for a model: the ledger, and some rows with their tokens."""

    ledger: dict[str, Any]
    rows: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return self.ledger | {"samples": self.rows}


def inspect_data(model: Model, data: Data, seed: int = 42, rows: int = 3) -> Inspected:
    """Render data as a run would, without loading the model.

    Args:
        model: The base; only its tokenizer is loaded.
        data: The settings.
        seed: Of the split and the sample.
        rows: How many rows to show, spread over the training rows.

    Raises:
        UserError: The data is not usable.
    """
    renderer = Renderer(load_tokenizer(locate(model)), data)
    prepared = prepare(data, renderer, seed)
    train = prepared.train
    count = min(rows, len(train))
    shown = [train[n * len(train) // count] for n in range(count)]
    return Inspected(
        prepared.ledger.as_dict(),
        [
            {
                "place": example.place,
                "tokens": len(example.ids),
                "trained": example.trained,
                "pieces": renderer.pieces(example),
            }
            for example in shown
        ],
    )
