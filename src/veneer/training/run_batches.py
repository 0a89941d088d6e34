"""Makes the steps of a run over its training rows, and says what shapes their micro-batches have."""

from typing import Any

import numpy as np

from veneer.config import Run
from veneer.data.batch import Batches
from veneer.data.pipeline import Part


def largest_rows(batches: Batches, rows: int, documents_per_row: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens of each row, or pack, of the largest micro-batch; of pairs, of each document, and `shared`."""
    if documents_per_row > 1:
        largest = batches.largest()[0]
        return largest.lengths, largest.shared
    return tuple(sorted(batches.sizes.tolist(), reverse=True)[:rows]), ()


def batches_of(
    run: Run, part: Part, documents_per_row: int = 1, shares_prompts: bool = False, ranks: int = 1
) -> Batches:
    """Return all steps of a run over its training rows.

    Args:
        run: the settings.
        part: the examples.
        documents_per_row: documents of a row.
        shares_prompts: whether the engine computes the prompt of a pair once.
        ranks: processes that share a step.
    """
    train = run.train
    return Batches(
        part,
        part.lengths,
        train.per_device_train_batch_size,
        train.gradient_accumulation_steps,
        train.seed,
        run.data.max_length if run.data.packing else None,
        documents_per_row,
        part.shared if shares_prompts and documents_per_row > 1 else None,
        ranks,
    )


def vary(part: Part, sizes: Any, rows: int) -> bool:
    """Return whether micro-batches differ in shape: in documents' lengths, trained tokens or number of rows.

    Args:
        part: The examples.
        sizes: Tokens of every row, or pack.
        rows: Rows of a micro-batch; the last of an epoch may hold fewer.
    """
    counts = (sizes, part.lengths, part.corpus.trained[part.examples])
    return len(sizes) % rows > 0 or any(len(np.unique(count)) > 1 for count in counts)
