"""Chooses the engine of a run, and gives the reason. Nothing else decides it.

The fused engine is taken where it covers the model, and only after it has given the reference engine's numbers on a
few tokens of the run's own rows: its kernels are tested, but not on this GPU, driver and model. Where its numbers
differ, the run warns and goes on with the reference engine. Without CUDA its kernels are plain torch, for tests alone,
so `auto` means the reference engine there.

Where weights lie in the host's memory, the reference engine cannot compute with them. The engines are compared on the
first blocks then, which are moved to the device for the check, and there is no engine to go on with if they differ.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from veneer.config import JobError, Train, UserError
from veneer.data.batch import Batch, Example
from veneer.engine.agreement import Agreement, agree, even_rows, pair, short_rows, within_vocabulary
from veneer.engine.fused.decoder import NotCoveredError
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.interface import Engine
from veneer.engine.reference import ReferenceEngine
from veneer.engine.temporary import first_blocks, lies_on_host
from veneer.machine.ranks import ALONE, Ranks
from veneer.model.full import is_full

FUSED_DEVICES = ("cuda",)  # where `auto` takes the fused engine
PROBE = (160, 96)  # tokens of the rows that the engines are compared on
EVEN = (256, 256)  # the same for rows of one length, which go through cuDNN's attention where it is available
UNSHARDED = "leave train.shard out"
FULL_REASON = "full fine-tuning has no other"
# Of a model in the host's memory, so much is checked: kinds of blocks alternate at most (Gemma 2), and a part of the
# vocabulary is enough for the kernels.
CHECKED_BLOCKS, CHECKED_VOCABULARY = 2, 16_384


@dataclass(frozen=True)
class EngineChoice:
    """An engine, and the reason for choosing it.

    Attributes:
        engine: the engine.
        reason: reason for the choice, as plan and log show it.
        warning: warning to notify: that the fused engine failed its check; None: there is none.
    """

    engine: Engine
    reason: str
    warning: str | None = None


def choose_engine(setting: str, device: str, not_covered: Callable[[], str | None]) -> tuple[str, str]:
    """Return the engine of a run, reference or fused, and the reason; plans and runs both call this.

    Args:
        setting: `train.engine`.
        device: cuda, cpu or mps.
        not_covered: function that returns the part of the model that the fused engine does not cover, or None.

    Raises:
        UserError: the fused engine is asked for and does not cover the model.
    """
    if setting == "reference":
        return "reference", "train.engine asks for the reference engine"
    if setting == "auto" and device not in FUSED_DEVICES:
        return "reference", "the fused engine is made for CUDA GPUs"
    missing = "Apple's GPU" if device == "mps" else not_covered()
    if missing is None:
        return "fused", "it covers this model"
    reason = f"the fused engine does not cover {missing}"
    if setting == "fused":
        raise UserError(f"train.engine = fused: {reason}", "set train.engine to auto or reference")
    return "reference", reason


def build(model: Any, train: Train, device: str, ranks: Ranks = ALONE) -> EngineChoice:
    """Build the engine that settings and model ask for, not yet checked.

    Args:
        model: PEFT model.
        train: settings, of which `engine`, `gradient_checkpointing` and `shard` count.
        device: device of the model.
        ranks: processes over whose GPUs `train.shard` spreads the base.

    Raises:
        UserError: see `choose_engine`; or the base cannot be spread over GPUs.
        JobError: the model lies in the host's memory, and the fused engine does not cover it.
    """
    made: list[FusedEngine] = []
    is_sharded = train.shard == "layers" and ranks.local_size > 1

    if is_full(model):
        if train.engine == "fused":
            raise UserError(f"train.engine = fused: {FULL_REASON}", "set train.engine to auto or reference")
        return EngineChoice(ReferenceEngine(model, for_cpu=device == "cpu"), FULL_REASON)

    def not_covered() -> str | None:
        try:
            made.append(FusedEngine(model, train.gradient_checkpointing, ranks=ranks if is_sharded else None))
        except NotCoveredError as error:
            return str(error)
        return None

    name, reason = choose_engine(train.engine, device, not_covered)
    if is_sharded and not (name == "fused" and made[0].is_sharded):
        raise UserError(f"train.shard = layers: no block's weights can be spread over GPUs ({reason})", UNSHARDED)
    if name == "fused":
        return EngineChoice(made[0], reason)
    _require_resident(model, reason)
    return EngineChoice(ReferenceEngine(model, for_cpu=device == "cpu"), reason)


def choose(
    model: Any, train: Train, device: str, examples: Sequence[Example], has_pairs: bool = False, ranks: Ranks = ALONE
) -> EngineChoice:
    """Choose the engine of a run, and check it on the run's first rows.

    Args:
        model: PEFT model; restored afterwards.
        train: settings.
        device: device of the model.
        examples: training data.
        has_pairs: whether these are pairs, whose prompts the engine may compute once.
        ranks: see `build`.

    Raises:
        UserError: see `build`.
        JobError: the fused engine gives other numbers than the reference engine, and either it is asked for or the
            model lies in the host's memory.
    """
    choice = build(model, train, device, ranks)
    if choice.engine.is_reference:
        return choice
    batches = [short_rows(examples, PROBE), even_rows(examples, EVEN)]
    agreement = compare(model, choice.engine, train, device, batches, pair(examples, PROBE) if has_pairs else ())
    failure = agreement.describe()
    if agreement.holds:
        return EngineChoice(choice.engine, f"{choice.reason} and gives the reference's numbers: {failure}")
    if train.engine == "fused":
        raise JobError(
            f"train.engine = fused: it does not give the reference engine's numbers here: {failure}\n"
            "  fix: set train.engine to reference; `veneer verify` says more"
        )
    return fall_back(model, failure)


def compare(
    model: Any,
    engine: Engine,
    train: Train,
    device: str,
    batches: Sequence[Sequence[Example]],
    pairs: Sequence[Example] = (),
) -> Agreement:
    """Compare an engine with the reference engine, in the way of `comparable`.

    Args:
        model: PEFT model; restored afterwards.
        engine: engine of the model.
        train: settings.
        device: device of the model.
        batches: rows of each batch.
        pairs: documents of a batch of pairs.
    """
    with comparable(model, engine, train, device) as same:
        made = [Batch.of(within_vocabulary(rows, model)) for rows in batches]
        return agree(model, same, [*made, Batch.of(within_vocabulary(pairs, model), 2)] if pairs else made)


@contextmanager
def comparable(model: Any, engine: Engine, train: Train, device: str) -> Iterator[Engine]:
    """Within the context, the reference engine can compute with a model; it yields the engine to compare with.

    That is the given one, unless weights lie in the host's memory: then the model is its first blocks, on the device,
    with a part of its vocabulary, and the engine is another one of the same kind.
    """
    if not lies_on_host(model):
        yield engine
        return
    try:
        with first_blocks(model, CHECKED_BLOCKS, CHECKED_VOCABULARY, device):
            yield build(model, train, device).engine
    finally:
        gc.collect()  # the engine's buffers are in reference cycles
        if device == "cuda":
            torch.cuda.empty_cache()


def _require_resident(model: Any, reason: str) -> None:
    """Raise JobError if the reference engine must take over a model in the host's memory."""
    if lies_on_host(model):
        raise JobError(
            f"{reason}; the reference engine cannot go on, since the model does not fit the GPU and the fused engine "
            "alone streams weights from the host's memory\n  fix: name a smaller model.base"
        )


def fall_back(model: Any, failure: str) -> EngineChoice:
    """Replace a fused engine that failed its check by the reference engine.

    Raises:
        JobError: the model lies in the host's memory.
    """
    gc.collect()  # the other engine's buffers are in reference cycles
    warning = f"the fused engine does not give the reference engine's numbers here: {failure}"
    _require_resident(model, warning)
    for_cpu = model.get_input_embeddings().weight.device.type == "cpu"
    return EngineChoice(
        ReferenceEngine(model, for_cpu), warning, f"{warning}; training goes on with the reference engine, slower"
    )
