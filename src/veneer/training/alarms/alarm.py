"""What an alarm is, and what it is shown: the job once, and each step before its passes and after its record."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch

from veneer.data.batch import Batch, Example
from veneer.engine.interface import Engine


@dataclass(frozen=True)
class JobFacts:
    """What alarms know of a job.

    Attributes:
        engine: Engine of the run.
        device: Device of the model.
        is_causal_lm: Whether the model writes text.
        masks_prompts: Whether the data says that prompts are not trained: they have answers, and `data.loss_on` is not
            all.
        is_supervised: Whether the loss is the weighted sum of log-probabilities.
        has_dropout: Whether training passes drop anything.
        is_16_bit: Whether passes compute in 16 bits.
        documents_per_row: Documents of a row.
        steps_per_epoch: Steps of a pass over the data.
        known_duplicates: Rows equal to an earlier one that the ledger counts.
        known_held_out: Training rows that stand among the held-out ones, as the ledger counts them.
        held_out: The held-out examples.
        rate: Function that gives the scheduled rate of a step, counted from 0.
        rate_ratio: The watched parameter's rate in these.
        watched: A float32 parameter that AdamW updates and that has a gradient from the first step on; None: there is
            none.
        planned_speed: Planned tokens a second; None: the plan does not say.
        memory: Function that returns the bytes that the process has on the device now.
    """

    engine: Engine
    device: str = "cpu"
    is_causal_lm: bool = True
    masks_prompts: bool = False
    is_supervised: bool = True
    has_dropout: bool = False
    is_16_bit: bool = False
    documents_per_row: int = 1
    steps_per_epoch: int = 1
    known_duplicates: int = 0
    known_held_out: int = 0
    held_out: Sequence[Example] = ()
    rate: Callable[[int], float] = lambda step: 0.0
    rate_ratio: float = 1.0
    watched: torch.nn.Parameter | None = None
    planned_speed: float | None = None
    memory: Callable[[], int] = lambda: 0


@dataclass
class WatchedStep:
    """A step as alarms see it.

    Attributes:
        number: The step, counted from 1.
        in_process: Steps that this process has made, this one included.
        batches: Its micro-batches.
        engine: Engine of the run.
        documents_per_row: Documents of a row.
        record: Its record; empty before the passes.
    """

    number: int
    in_process: int
    batches: Sequence[Batch]
    engine: Engine
    documents_per_row: int
    record: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def logprobs(self) -> list[torch.Tensor]:
        """The log-probability of each trained token by micro-batch, measured apart from training; on the host."""
        return [self.engine.token_logprobs(batch).cpu().double() for batch in self.batches]

    @cached_property
    def row_hashes(self) -> list[int]:
        """A hash of the tokens of each row."""
        found = []
        for batch in self.batches:
            ids, ends = batch.ids_T.numpy(), [0, *accumulate(batch.lengths)]
            documents = [ids[start:end] for start, end in pairwise(ends)]
            size = self.documents_per_row
            found += [hash_of(documents[n : n + size]) for n in range(0, len(documents), size)]
        return found


class Alarm(Protocol):
    """Watches for one fault, and tells of it once.

    Attributes:
        where: Setting, or file, that the fault is about.
    """

    where: str

    def __init__(self, facts: JobFacts) -> None: ...

    def before(self, step: WatchedStep) -> None:
        """Look at a step before its passes; it may run passes of its own, and changes nothing."""
        return None

    def after(self, step: WatchedStep) -> str | None:
        """Look at a step that was made; return what is wrong, with what to change, or None."""
        ...


def hash_of(documents: Sequence[Any]) -> int:
    """Return a hash of the tokens, int64, of documents that belong together."""
    return hash(tuple(ids.tobytes() for ids in documents))
