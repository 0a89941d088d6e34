"""Measures embeddings on held-out rows: whether each anchor finds its positive among the texts of all these rows."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from veneer.config import Run
from veneer.data.batch import Example
from veneer.data.pipeline import Prepared
from veneer.data.render import Renderer
from veneer.data.texts import split_texts
from veneer.engine.interface import Engine
from veneer.evaluation.classification import batching
from veneer.evaluation.metrics.resampled import RowMean
from veneer.evaluation.retrieval import Recall, ranks, retrieval_scores
from veneer.machine.batching import Batching
from veneer.training.best import BETTER, LOSS

Retrieved = dict[str, RowMean | Recall]


class DuringEmbedding:
    """Measures held-out rows while embeddings are trained; see `DuringMetrics`."""

    def __init__(self, run: Run, data: Prepared, renderer: Renderer) -> None:
        self._rows, self._batching = data.validation, batching(run)
        followed = run.train.early_stopping.metric if run.train.early_stopping is not None else LOSS
        self.better = BETTER[followed]

    def measure(self, model: Any, engine: Engine, stopped: Callable[[], bool]) -> dict[str, float] | None:
        """Return the values; None where it was stopped."""
        found = retrieve(engine, self._rows, self._batching, stopped)
        return None if found is None else {name: float(result.value) for name, result in found.items()}


def retrieve(
    engine: Any, rows: Sequence[Example], batching: Batching, stopped: Callable[[], bool] = lambda: False
) -> Retrieved | None:
    """Score the retrieval of rows' positive texts; None where it was stopped."""
    of_rows = [[ids.tobytes() for ids in split_texts(row.ids)] for row in rows]
    texts = sorted({text for row in of_rows for text in row}, key=lambda text: (-len(text), text))
    number = {text: n for n, text in enumerate(texts)}

    def work(chosen: Sequence[bytes]) -> Any:
        tokens = [torch.from_numpy(np.frombuffer(text, dtype=np.int32).copy()).long() for text in chosen]
        return None if stopped() else engine.scores(tokens).numpy()

    parts = list(batching.over(texts, work))
    if any(part is None for part in parts):
        return None
    embeddings = np.concatenate(parts)
    candidates = sorted({number[text] for row in of_rows for text in row[1:]})
    place = {text: n for n, text in enumerate(candidates)}
    anchors = [number[row[0]] for row in of_rows]
    right = [place[number[row[1]]] for row in of_rows]
    found = ranks(embeddings[anchors], embeddings[candidates], anchors, candidates, right)
    return retrieval_scores(found, len(candidates))
