"""How many held-out rows go at a time, and what that holds: for the held-out loss, and for `veneer evaluate`.

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
    """The rows that go at a time: those asked for, halved until they fit with room to spare; at least one.

    Args:
        asked: Rows at a time at most.
        peak_of: What so many rows hold at their fullest, with all that rests beside them.
        resting_bytes: What is held whatever their number.
        budget_bytes: What may be held.
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
        resting: What the run holds between its passes.
        train: The dry run of its micro-batch; recordings of it stay.
        held_out: The dry run of the held-out batch.
    """
    parts = Counter(resting) + Counter({"recorded passes": train.recorded_bytes})
    parts += Counter(held_out.fullest("forward").components)
    return Peak(sum(parts.values()), dict(parts))


def answers_peak(loaded: Mapping[str, int], shapes: Shapes, asked: Step, dry: DryRun, max_new_tokens: int) -> Peak:
    """The peak of `veneer evaluate`, which answers a batch of prompts and measures the loss of references.

    Args:
        loaded: Base and adapter.
        shapes: Of the base.
        asked: The batch, through Transformers, which generates whatever the engine.
        dry: That batch.
        max_new_tokens: Longest answer; the model's positions may leave room for less.
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
