"""Checks of a run that classifies, embeds or rewards texts, in place of those of written answers in verify.py.

They take the shortest rows, whole: a label belongs to a whole text. Afterwards the adapter and the head are what they
were.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from veneer.config import Run
from veneer.config.results import Check
from veneer.data.batch import Batch, Example
from veneer.engine.agreement import short_name
from veneer.engine.classifier import ClassifierEngine
from veneer.engine.head_engine import texts_of
from veneer.engine.temporary import fill_zeros, preserve_adapter
from veneer.model.attach import save_adapter
from veneer.training.choose_objective import choose_objective
from veneer.training.overfit import overfit
from veneer.training.parts import RunParts
from veneer.training.plain_peft import compare_in_plain_peft

ROWS = 8


def head_checks(run: Run, parts: RunParts, engine: ClassifierEngine) -> Iterator[Check]:
    """Check gradients, padding, learning, and the saved model in plain PEFT.

    Args:
        run: settings.
        parts: the run's parts.
        engine: engine of their model.
    """
    model, objective = parts.model, choose_objective(run, parts.data)
    rows = _shortest(parts.data.train, objective.documents_per_row)
    batch = Batch.of(rows, objective.documents_per_row)
    with preserve_adapter(model):
        fill_zeros(model)
        engine.forward_backward(batch.scaled(1 / objective.weight(batch)), objective)
        yield _gradients(model)
    with preserve_adapter(model):
        fill_zeros(model)
        yield _padding(engine, [text for row in rows for text in texts_of(run.model.task, row)])
    with preserve_adapter(model):
        yield from overfit(run, parts, engine, objective, rows)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "adapter"
            save_adapter(model, parts.tokenizer, parts.renderer.template, parts.source, folder)
            found = compare_in_plain_peft(run, parts.source, parts.renderer, engine, parts.data.train, folder)
    difference = found.difference if found.other is None else math.inf
    name = "scores of the saved model in plain PEFT, against the live ones"
    yield Check.at_most("plain-peft", difference, found.limit, name, found.other or "")


def _shortest(examples: Sequence[Example], each: int) -> list[Example]:
    """Return the examples of the shortest rows."""
    lengths = [sum(len(examples[row + n].ids) for n in range(each)) for row in range(0, len(examples), each)]
    rows = sorted(sorted(range(len(lengths)), key=lambda row: lengths[row])[:ROWS])
    return [examples[row * each + n] for row in rows for n in range(each)]


def _gradients(model: Any) -> Check:
    """Check that all matrices learn; the bias of a reward does not, since it is the same of both answers."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and p.dim() > 1}
    bad = sorted(name for name, p in trained.items() if p.grad is None or not 0 < p.grad.abs().amax().item() < math.inf)
    worst = short_name(bad[0]) if bad else ""
    name = "matrices of adapter and head without a usable gradient"
    return Check.at_most("gradients", float(len(bad)), 0, name, f"first {worst}" if bad else "")


def _padding(engine: ClassifierEngine, texts: Sequence[torch.Tensor]) -> Check:
    """Compare scores of texts that are padded to one length with those of each alone."""
    together = engine.scores(texts)
    alone = torch.cat([engine.scores([text]) for text in texts])
    is_exact = engine.model.get_input_embeddings().weight.dtype == torch.float32
    limit = (1e-4 if is_exact else 0.05) * max(1.0, alone.abs().max().item())
    apart = (together - alone).abs().max().item()
    return Check.at_most("padding", apart, limit, "scores of texts padded together, against each alone")
