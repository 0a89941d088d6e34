"""How many held-out rows go at a time, and what that holds: for the held-out loss, and for `veneer evaluate`.

Both take `evaluate.batch_size` rows where they fit, else half as many, until they do. Training, `veneer evaluate` and
the plan ask the same functions, so a plan shows the number that is used.
"""

from collections import Counter
from collections.abc import Callable, Mapping

from veneer.engine.dry_run import Rehearsed, Step
from veneer.engine.trace import Moment
from veneer.model.shapes import Shapes

SPARE = 0.05  # of the peak: pages the allocator cannot fill, and what a prediction may be under


def rows_that_fit(asked: int, moment_of: Callable[[int], Moment], resting_bytes: int, budget_bytes: int) -> int:
    """The rows that go at a time: those asked for, halved until they fit with room to spare; at least one.

    Args:
        asked: Rows at a time at most.
        moment_of: What so many rows hold at their fullest, with all that rests beside them.
        resting_bytes: What is held whatever their number.
        budget_bytes: What may be held.
    """
    if resting_bytes > budget_bytes:
        return 1
    rows = asked
    while rows > 1 and moment_of(rows).bytes * (1 + SPARE) > budget_bytes:
        rows //= 2
    return rows


def loss_moment(resting: Mapping[str, int], train: Rehearsed, held_out: Rehearsed) -> Moment:
    """The fullest moment of a held-out loss within training.

    Args:
        resting: What the run holds between its passes.
        train: Its micro-batch rehearsed; recordings of it stay.
        held_out: The held-out batch rehearsed.
    """
    parts = Counter(resting) + Counter({"recorded passes": train.recorded_bytes})
    parts += Counter(held_out.fullest("forward").components)
    return Moment(sum(parts.values()), dict(parts))


def answers_moment(
    loaded: Mapping[str, int], shapes: Shapes, asked: Step, rehearsed: Rehearsed, max_new_tokens: int
) -> Moment:
    """The fullest moment of `veneer evaluate`, which answers a batch of prompts and measures the loss of references.

    Args:
        loaded: Base and adapter.
        shapes: Of the base.
        asked: The batch, through Transformers, which generates whatever the engine.
        rehearsed: That batch.
        max_new_tokens: Longest answer; the model's positions may leave room for less.
    """
    tokens = asked.length + max_new_tokens
    tokens = asked.rows * (tokens if shapes.positions is None else min(tokens, max(shapes.positions, asked.length)))
    cache = shapes.key_value_bytes * tokens * asked.dtype.itemsize // 2
    logits = asked.rows * shapes.vocabulary * (4 + 4 + asked.dtype.itemsize)
    # Keys and values of all layers, and one layer's again while they grow.
    generated = {
        "generation cache": cache + cache // shapes.depth,
        "activations": max(rehearsed.moments["forward"].bytes, logits),
    }
    scored = rehearsed.fullest("forward").components
    parts = Counter(loaded) + Counter(scored if sum(scored.values()) > sum(generated.values()) else generated)
    return Moment(sum(parts.values()), dict(parts))
