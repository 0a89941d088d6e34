"""Loads a trained classifier again in plain PEFT, and refuses to deliver one that gives other scores there.

A head that was not saved comes back random, without a message. So the adapter's folder is loaded as its users will:
Transformers' base with a fresh head, and PEFT's adapter on it. Its logits of a few rows are compared, and each weight
of the head. In float32 logits differ by rounding alone; of a 16-bit base the head computes in 16 bits there.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from veneer.config import JobError, Run
from veneer.data.batch import Example
from veneer.data.render import Renderer
from veneer.engine.head_engine import head_engine, texts_of
from veneer.machine.device import find_machine, release_memory, rng_state, set_rng_state
from veneer.model.attach import load_adapter
from veneer.model.classifier import classifier_settings, labels_of, read_classifier
from veneer.model.load import freeze
from veneer.model.locate import BaseSource
from veneer.model.shapes import find_config

ROWS = 8  # shortest rows that are compared
LIMITS = {torch.float32: 1e-4}  # largest difference of logits, as a share of the largest one (at least of 1)
LIMIT_16_BITS = 0.05


class Compared(NamedTuple):
    """What plain PEFT gives, beside the trained model.

    Attributes:
        difference: largest difference of logits, or of embeddings.
        limit: difference that rounding explains.
        other: a weight of the head that is not the trained one; None: all are.
    """

    difference: float
    limit: float
    other: str | None


def require_same_scores(
    run: Run, source: BaseSource, renderer: Renderer, engine: Any, rows: Sequence[Example], folder: Path
) -> None:
    """Raise JobError where a saved classifier is another one in plain PEFT than the one that was trained.

    Args:
        run, source, renderer, engine, rows, folder: arguments of `compare_in_plain_peft`.
    """
    difference, limit, other = compare_in_plain_peft(run, source, renderer, engine, rows, folder)
    if other is not None or not difference <= limit:
        what = f"{other} has other values" if other else f"logits differ by {difference:.3g} (limit {limit:.3g})"
        raise JobError(
            f"the saved adapter is another classifier in plain PEFT: {what}; it is not delivered\n"
            "  fix: this is a defect of Veneer or of the installed PEFT; report it with the run's run.yaml. The last "
            "checkpoint is kept"
        )


def compare_in_plain_peft(
    run: Run, source: BaseSource, renderer: Renderer, engine: Any, rows: Sequence[Example], folder: Path
) -> Compared:
    """Load a saved classifier as its users will, and compare it with the one that was trained.

    Args:
        run: settings of the run.
        source: base of the run.
        renderer: labels and tokenizer.
        engine: engine of the trained model.
        rows: training rows.
        folder: folder of the saved adapter.
    """
    began_with = rng_state()
    try:
        base = load_plain(run, source, renderer)
        model = load_adapter(base, folder)
        shortest = sorted(range(len(rows)), key=lambda row: len(rows[row].ids))[:ROWS]
        texts = [text for row in shortest for text in texts_of(run.model.task, rows[row])]
        trained, plain = engine.scores(texts), head_engine(run.model, model, renderer.tokenizer).scores(texts)
        dtype = base.get_input_embeddings().weight.dtype
        limit = LIMITS.get(dtype, LIMIT_16_BITS) * max(1.0, trained.abs().max().item())
        difference = (trained - plain).abs().max().item()
        other = _first_other(engine.model, model)
    finally:
        set_rng_state(began_with)
    del base, model
    release_memory()
    return Compared(difference, limit, other)


def load_plain(run: Run, source: BaseSource, renderer: Renderer) -> Any:
    """Load a run's base with a fresh head as its users do, with Transformers alone."""
    labels, pad = labels_of(renderer), renderer.tokenizer.pad_token_id
    base, _ = read_classifier(
        source, classifier_settings(run, find_config(run.model), labels, pad, find_machine()), run.model.task
    )
    freeze(base)
    return base


def _first_other(trained: Any, plain: Any) -> str | None:
    """Return the name of the first weight of the head that is not the trained one; None: all are."""
    there = dict(plain.named_parameters())
    for name, parameter in trained.named_parameters():
        if ".modules_to_save.default." in name:
            plainly = name.replace(".modules_to_save.default.", ".")
            other = there.get(name, there.get(plainly))
            if other is None or not torch.equal(other.cpu(), parameter.detach().to(other.dtype).cpu()):
                return str(plainly).removeprefix("base_model.model.")
    return None
