"""The number of held-out rows at a time, and its memory: for the held-out loss, and for `veneer evaluate`.

Both take `evaluate.batch_size` rows where they fit, else half as many, until they do. Training, `veneer evaluate` and
the plan ask the same functions, so a plan shows the number that is used.
"""

from collections import Counter
from collections.abc import Callable, Mapping

from veneer.engine.dry_run import DryRun, Step
from veneer.engine.trace import Peak
from veneer.model.shapes import Shapes

SPARE = 0.05  # of the peak: pages the allocator cannot fill, and what a prediction may be under


def rows_that_fit(asked: int, peak_of: Callable[[int], Peak], resting_bytes: int, budget_bytes: int) -> int:
    """The rows that go at a time: those asked for, halved until they fit with memory left over; at least one.

    Args:
        asked: rows at a time at most.
        peak_of: gives the peak of so many rows, with all that is held beside them.
        resting_bytes: bytes that are held whatever their number.
        budget_bytes: bytes that may be held.
    """
    if resting_bytes > budget_bytes:
        return 1
    rows = asked
    while rows > 1 and peak_of(rows).bytes * (1 + SPARE) > budget_bytes:
        rows //= 2
    return rows


def loss_peak(resting: Mapping[str, int], train: DryRun, held_out: DryRun) -> Peak:
    """The peak of a held-out loss within training.

    Args:
        resting: bytes that the run holds between its passes.
        train: dry run of its micro-batch; recordings of it stay.
        held_out: dry run of the held-out batch.
    """
    parts = Counter(resting) + Counter({"recorded passes": train.recorded_bytes})
    parts += Counter(held_out.fullest("forward").components)
    return Peak(sum(parts.values()), dict(parts))


def answers_peak(loaded: Mapping[str, int], shapes: Shapes, asked: Step, dry: DryRun, max_new_tokens: int) -> Peak:
    """The peak of `veneer evaluate`, which answers a batch of prompts and measures the loss of references.

    Args:
        loaded: bytes of base and adapter.
        shapes: shapes of the base.
        asked: the batch, through Transformers, which generates whatever the engine.
        dry: dry run of that batch.
        max_new_tokens: tokens of the longest answer; the model's positions may allow less.
    """
    tokens = asked.length + max_new_tokens
    tokens = asked.rows * (tokens if shapes.positions is None else min(tokens, max(shapes.positions, asked.length)))
    cache = shapes.key_value_bytes * tokens * asked.dtype.itemsize // 2
    logits = asked.rows * shapes.vocabulary * (4 + 4 + asked.dtype.itemsize)
    # Keys and values of all layers, and one layer's again while they grow.
    generated = {
        "generation cache": cache + cache // shapes.depth,
        "activations": max(dry.peaks["forward"].bytes, logits),
    }
    scored = dry.fullest("forward").components
    parts = Counter(loaded) + Counter(scored if sum(scored.values()) > sum(generated.values()) else generated)
    return Peak(sum(parts.values()), dict(parts))
