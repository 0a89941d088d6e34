"""Batch sizes of evaluation: as many rows as the plan says fit, and fewer once memory runs out.

`rows_at_a_time` asks the arithmetic of the plan, so `veneer plan` shows the number that is used. What else holds memory
nobody foresees; where it runs out nevertheless, `Batching` (machine/batching.py) goes on with half as many rows. Each
row is padded by itself and judged by itself, so the number changes answers by no more than rounding.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from veneer.config import Run, UserError
from veneer.config.notify import notify
from veneer.model.shapes import positions_of
from veneer.planning.base import PlannedModel
from veneer.planning.batch_shapes import Padded
from veneer.planning.planner import Planner
from veneer.planning.target import TargetDevice

LESS_MEMORY = (  # advice where a single row does not fit
    "lower evaluate.max_new_tokens (--max-new-tokens), use shorter prompts, or set `quantization: {bits: 4}`; "
    "`veneer plan` says what fits"
)


def rows_at_a_time(run: Run, rows: Padded, target: TargetDevice) -> int:
    """Return how many rows fit at a time, as `veneer plan` foresees it.

    Args:
        run: Base, adapter and `evaluate.batch_size`.
        rows: Number of rows, and the most tokens and trained tokens of one.
        target: the device, before the model was loaded.
    """
    if min(rows.rows, run.evaluate.batch_size) <= 1:
        return 1
    return Planner(PlannedModel(run.model, "only its size is asked for"), target).generation(run, rows)[0]


def room_for_answers(model: Any, prompts: Sequence[list[int]], max_new_tokens: int) -> list[int]:
    """Return the longest answer that each prompt leaves room for; a notice says where that is less than asked for.

    Beyond a model's positions learned ones end in an index error, and rotary ones in text that gets worse unnoticed.

    Raises:
        UserError: A prompt leaves no room.
    """
    positions = _positions(model)
    if positions is None:
        return [max_new_tokens] * len(prompts)
    longest = max(map(len, prompts), default=0)
    if longest >= positions:
        raise UserError(
            f"a prompt has {longest} tokens, and the model has positions for {positions}, including the answer",
            "shorten the prompt (the system prompt is part of it), or leave that row out",
        )
    room = [min(max_new_tokens, positions - len(prompt)) for prompt in prompts]
    if capped := sum(tokens < max_new_tokens for tokens in room):
        notify(
            f"{capped} of {len(prompts)} prompts leave room for answers of fewer than {max_new_tokens} tokens (of "
            f"{min(room)} at least): the model has positions for {positions}",
            where="evaluate.max_new_tokens",
        )
    return room


def alike(room: Sequence[int], lengths: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Group prompts by the room for their answers, the shortest prompts first: (tokens, numbers of the prompts).

    Those with the same room go together, so that no row's answer is cut because of another row.
    """
    order = sorted(range(len(lengths)), key=lambda n: lengths[n])
    for tokens, numbers in groupby(order, key=lambda n: room[n]):
        yield tokens, list(numbers)


def require_positions(model: Any, rows: Sequence[tuple[str, int]]) -> None:
    """Raise UserError for rows, by place and tokens, that are longer than the model's positions."""
    positions = _positions(model)
    for place, tokens in rows:
        if positions is not None and tokens > positions:
            raise UserError(
                f"{place}: the row has {tokens} tokens, the model has positions for {positions}",
                f"set data.max_length to {positions} or less, or shorten the row",
            )


def _positions(model: Any) -> int | None:
    config = model.config
    return positions_of(config.get_text_config() if hasattr(config, "get_text_config") else config)
