"""Chooses the engine of a run, and gives the reason. Nothing else decides it.

The fused engine is taken where it covers the model, and only after it has given the reference engine's numbers on a
few tokens of the run's own rows: its kernels are tested, but not on this GPU, driver and model. Where its numbers
differ, the run warns and goes on with the reference engine. Without CUDA its kernels are plain torch, for tests alone,
so `auto` means the reference engine there.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.config import JobError, Train, UserError
from veneer.data.batch import Batch, Example
from veneer.engine.agreement import agree, even_rows, short_rows
from veneer.engine.fused.decoder import NotCoveredError
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.interface import Engine
from veneer.engine.reference import ReferenceEngine

FUSED_DEVICES = ("cuda",)  # where `auto` takes the fused engine
PROBE = (160, 96)  # tokens of the rows that the engines are compared on
EVEN = (256, 256)  # the same for rows of one length, which go through cuDNN's attention where it is available


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


def build(model: Any, train: Train, device: str) -> EngineChoice:
    """Build the engine that settings and model ask for, not yet checked.

    Args:
        model: PEFT model.
        train: settings, of which `engine` and `gradient_checkpointing` count.
        device: device of the model.

    Raises:
        UserError: see `choose_engine`.
    """
    made: list[Engine] = []

    def not_covered() -> str | None:
        try:
            made.append(FusedEngine(model, train.gradient_checkpointing))
        except NotCoveredError as error:
            return str(error)
        return None

    name, reason = choose_engine(train.engine, device, not_covered)
    engine = made[0] if name == "fused" else ReferenceEngine(model, for_cpu=device == "cpu")
    return EngineChoice(engine, reason)


def choose(model: Any, train: Train, device: str, examples: Sequence[Example]) -> EngineChoice:
    """Choose the engine of a run, and check it on the run's first rows.

    Args:
        model: PEFT model; restored afterwards.
        train: settings.
        device: device of the model.
        examples: training data.

    Raises:
        UserError: see `build`.
        JobError: the fused engine is asked for and gives other numbers than the reference engine.
    """
    choice = build(model, train, device)
    if choice.engine.is_reference:
        return choice
    batches = [Batch.of(short_rows(examples, PROBE)), Batch.of(even_rows(examples, EVEN))]
    agreement = agree(model, choice.engine, batches)
    failure = agreement.describe()
    if agreement.holds:
        return EngineChoice(choice.engine, f"{choice.reason} and gives the reference's numbers: {failure}")
    if train.engine == "fused":
        raise JobError(
            f"train.engine = fused: it does not give the reference engine's numbers here: {failure}\n"
            "  fix: set train.engine to reference; `veneer verify` says more"
        )
    return fall_back(model, failure)


def fall_back(model: Any, failure: str) -> EngineChoice:
    """Replace a fused engine that failed its check by the reference engine."""
    gc.collect()  # the other engine's buffers are in reference cycles
    warning = f"the fused engine does not give the reference engine's numbers here: {failure}"
    for_cpu = model.get_input_embeddings().weight.device.type == "cpu"
    return EngineChoice(
        ReferenceEngine(model, for_cpu), warning, f"{warning}; training goes on with the reference engine, slower"
    )
