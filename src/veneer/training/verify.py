"""Small experiments that check whether training works with this run's model, data and machine.

Each check looks at one thing that otherwise goes wrong in silence, and has a number with its limit. They work on short
pieces of the run's own rows. Afterwards the adapter is what it was; nothing is written into the run's folder.

Losses are compared in nats a trained token. In float32 they agree to a thousandth and better; in 16 bits rounding alone
moves the loss of a single token by up to a tenth, and the mean of a row's by a hundredth or two.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from veneer.config import Run
from veneer.config.results import Check
from veneer.data.batch import Batch, Example
from veneer.engine.agreement import (
    MIN_TRAINED,
    Agreement,
    all_trained,
    even_rows,
    short_name,
    short_rows,
    within_vocabulary,
)
from veneer.engine.choose import EVEN, EngineChoice, build, comparable, compare, fall_back
from veneer.engine.head_engine import head_engine
from veneer.engine.interface import Engine, document_losses
from veneer.engine.objective import LIKELIHOOD
from veneer.engine.reference import ReferenceEngine
from veneer.engine.temporary import fill_zeros, preserve_adapter
from veneer.model.attach import save_adapter, set_adapter
from veneer.model.full import is_full, load_weights, write_weights
from veneer.model.quiet import quiet
from veneer.training.choose_objective import choose_objective
from veneer.training.first_gradients import learn_first
from veneer.training.overfit import overfit
from veneer.training.parts import RunParts, load_parts
from veneer.training.verify_head import head_checks
from veneer.training.verify_preference import (
    is_preference,
    preference_checks,
    short_documents,
)

RELOADED = "loss with the adapter from its file, against the live one"
LENGTHS = (256, 192, 128, 96)  # tokens of the packed rows, at most
ROWS, ROW_TOKENS = 8, 192  # that are overfitted
ROWS_OF_TOKENS = ".trainable_tokens_delta."  # in PEFT's names


@dataclass(frozen=True)
class Verification:
    """The checks of a run.

    Attributes:
        checks: Checks in the order they were made.
        choice: The engine that the run would train with.
        seconds: Time that the checks took, without loading.
    """

    checks: tuple[Check, ...]
    choice: EngineChoice
    seconds: float

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "checks": [check.as_dict() for check in self.checks],
            "engine": self.choice.engine.name,
            "engine_reason": self.choice.reason,
            "seconds": round(self.seconds, 1),
        }


def verify(run: Run, force: bool = False, on_check: Callable[[Check], None] = lambda check: None) -> Verification:
    """Load a run's parts and check them.

    Args:
        run: The settings.
        force: whether to load a run that is predicted not to fit.
        on_check: Callback that gets each check as it is made.

    Raises:
        UserError: The run cannot be carried out as it is written.
    """
    parts = load_parts(run, force)
    if run.model.task != "causal-lm":
        return _verify_head(run, parts, on_check)
    return verify_parts(run, parts, build(parts.model, run.train, parts.machine.device), on_check)


def _verify_head(run: Run, parts: RunParts, on_check: Callable[[Check], None]) -> Verification:
    began, found = time.perf_counter(), []
    engine = head_engine(run.model, parts.model, parts.tokenizer, run.train.temperature)
    for check in (_of_masks(parts), *head_checks(run, parts, engine)):
        found.append(check)
        on_check(check)
    choice = EngineChoice(engine, "classifiers run on Transformers")
    return Verification(tuple(found), choice, time.perf_counter() - began)


def verify_parts(
    run: Run, parts: RunParts, choice: EngineChoice, on_check: Callable[[Check], None] = lambda check: None
) -> Verification:
    """Check a run that is loaded; the adapter is afterwards what it was.

    Args:
        run: The settings.
        parts: The run's parts.
        choice: The engine, not yet checked.
        on_check: Callback that gets each check as it is made.
    """
    began = time.perf_counter()
    rows = short_rows(parts.data.train, LENGTHS)
    found: list[Check] = []

    def note(check: Check) -> None:
        found.append(check)
        on_check(check)

    for check in _of_data(parts):
        note(check)
    agreement = _agreement(run, parts, choice.engine, rows)
    for check in _of_agreement(choice, agreement):
        note(check)
    if agreement is not None and not agreement.holds:
        choice = fall_back(parts.model, agreement.describe())
    for check in _of_engine(run, parts, choice.engine, rows):
        note(check)
    return Verification(tuple(found), choice, time.perf_counter() - began)


def _of_masks(parts: RunParts) -> Check:
    trained = parts.data.train.corpus.trained[parts.data.train.examples]
    return Check.at_most("mask", float(np.count_nonzero(trained == 0)), 0, "rows without a trained token")


def _of_data(parts: RunParts) -> Iterator[Check]:
    ledger = parts.data.ledger
    yield _of_masks(parts)
    ends = ledger.tokens["end_of_turn"]
    name = "end-of-turn tokens that are trained"
    if any(known["format"] == "text" for known in ledger.formats.values()):
        yield Check("end-of-turn", True, name=name, detail="plain text has no turns")
    else:
        yield Check("end-of-turn", ends >= 1, ends, 1, name, bound="at least")


def _agreement(run: Run, parts: RunParts, engine: Engine, rows: list[Example]) -> Agreement | None:
    """Compare both engines on rows of several lengths and on rows of one; None: the run has no fused engine."""
    if engine.is_reference:
        return None
    batches = [rows, even_rows(parts.data.train, EVEN)]
    return compare(parts.model, engine, run.train, parts.machine.device, batches)


def _of_agreement(choice: EngineChoice, found: Agreement | None) -> Iterator[Check]:
    names = {
        "fused-loss": "loss, fused against reference, relative",
        "fused-gradient": "gradient of all adapters, fused against reference, relative",
        "fused-matrix": "gradient of a kind of matrix, fused against reference, relative",
    }
    if found is None:
        for id, name in names.items():
            yield Check(id, True, name=name, detail=choice.reason)
        return
    values = (found.loss, found.gradient, found.matrix)
    for (id, name), value, limit in zip(names.items(), values, found.limits[:3], strict=True):
        worst = "" if id == "fused-loss" else _worst(found.worst)
        yield Check.at_most(id, value, limit, name, found.failure or worst)


def _of_engine(run: Run, parts: RunParts, engine: Engine, rows: list[Example]) -> Iterator[Check]:
    """Check the engine that the run trains with, on its own rows."""
    model = parts.model
    is_exact = model.get_input_embeddings().weight.dtype == torch.float32
    with preserve_adapter(model):
        yield _gradients(model, engine, rows)
    with preserve_adapter(model):
        fill_zeros(model)
        own = short_rows(parts.data.train, LENGTHS, least=1)
        with comparable(model, engine, run.train, parts.machine.device) as same:
            yield _targets(model, same, within_vocabulary(own, model), 1e-3 if is_exact else 0.05)
        whole = [all_trained(row) for row in rows]
        yield _packed(engine, whole, 1e-3 if is_exact else 0.05)
        yield _isolated(engine, whole)
    objective = choose_objective(run, parts.data)
    if is_preference(objective):
        pairs = short_documents(parts.data.train, objective.documents_per_row)
        yield from preference_checks(run, parts, engine, objective, pairs)
    with preserve_adapter(model):
        if is_preference(objective):
            learnt = short_documents(parts.data.train, objective.documents_per_row, ROWS)
        else:
            learnt, objective = short_rows(parts.data.train, [ROW_TOKENS] * ROWS, least=1), LIKELIHOOD
        yield from overfit(run, parts, engine, objective, learnt)
        with comparable(model, engine, run.train, parts.machine.device):
            yield _reload(parts, within_vocabulary(rows, model))


def _gradients(model: Any, engine: Engine, rows: list[Example]) -> Check:
    """Check that what begins as zeros (LoRA's B) has gradients then, and all else (A) once it is not zero."""
    batch = Batch.of(rows)
    batch = batch.scaled(1 / batch.weight)
    engine.forward_backward(batch, LIKELIHOOD)
    bad = _without_gradient(model, first=True)
    fill_zeros(model)
    for parameter in model.parameters():
        parameter.grad = None
    engine.forward_backward(batch, LIKELIHOOD)
    names = sorted(bad | _without_gradient(model, first=False))
    worst = short_name(names[0]) if names else ""
    return Check.at_most("gradients", float(len(names)), 0, "adapter matrices without a usable gradient", _worst(worst))


def _without_gradient(model: Any, first: bool) -> set[str]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if first or is_full(model):
        named = learn_first(model)
    sizes = {n: p.grad.abs().amax() for n, p in named.items() if p.grad is not None}
    values = torch.stack(list(sizes.values())).tolist() if sizes else []
    # Tokens whose rows are trained may be in none of these rows of data.
    usable = {n for n, value in zip(sizes, values, strict=True) if -(ROWS_OF_TOKENS in n) < value < math.inf}
    return set(named) - usable


def _targets(model: Any, engine: Engine, rows: list[Example], limit: float) -> Check:
    """Compare losses with the plain model's logits, by the definition: token n is predicted at n - 1.

    A row of few trained tokens counts as one of `ENOUGH`.
    """
    apart = []
    for row, loss in zip(rows, _losses(engine, rows), strict=True):
        model.eval()
        with torch.no_grad(), quiet():
            ids = torch.from_numpy(row.ids.astype(np.int64)).to(model.device)
            logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
        plain = sum(
            weight * float(F.cross_entropy(logits[start - 1 : end - 1], ids[start:end], reduction="sum"))
            for start, end, weight in row.spans
        )
        apart.append(abs(plain - loss) / max(row.weight, MIN_TRAINED))
    return _largest("targets", apart, limit, "loss of the trained tokens, against the plain model's logits", rows)


def _packed(engine: Engine, rows: list[Example], limit: float) -> Check:
    alone = [_losses(engine, [row])[0] for row in rows]
    apart = [abs(a - b) / row.weight for row, a, b in zip(rows, _losses(engine, rows), alone, strict=True)]
    return _largest("packed", apart, limit, "loss of rows packed together, against each alone", rows)


def _isolated(engine: Engine, rows: list[Example]) -> Check:
    """Reorder the first row's tokens; the losses of the other rows must stay as they are."""
    name = "loss of rows when a neighbour changes"
    if len(rows) < 2:
        return Check("isolated", True, name=name, detail="there is one row")
    other = replace(rows[0], ids=np.ascontiguousarray(rows[0].ids[::-1]))
    before, after = _losses(engine, rows), _losses(engine, [other, *rows[1:]])
    apart = [abs(a - b) / row.weight for row, a, b in zip(rows, before, after, strict=True)]
    return _largest("isolated", apart[1:], 1e-6, name, rows[1:])


def _reload(parts: RunParts, rows: list[Example]) -> Check:
    """Load the trained adapter from its file onto the same base, and compare it with the live one."""
    model = parts.model
    reference = ReferenceEngine(model)
    name = "loss with the weights from their file, against the live ones" if is_full(model) else RELOADED
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "adapter"
        if is_full(model):
            write_weights(model, folder)
            live = _losses(reference, rows)
            load_weights(model, folder)
            return _largest("reload", _each(rows, live, _losses(reference, rows)), 0.0, name, rows)
        save_adapter(model, parts.tokenizer, parts.renderer.template, parts.source, folder)
        live = _losses(reference, rows)
        config = model.peft_config["default"]
        if config.bias == "none" and not getattr(config, "ensure_weight_tying", False):
            with quiet():
                model.load_adapter(str(folder), adapter_name="reloaded")
            model.set_adapter("reloaded")
            again = _losses(reference, rows)
            model.set_adapter("default")
            model.delete_adapter("reloaded")
        else:  # PEFT keeps one such adapter at a time; what was trained is zeroed, so that all is from the file
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.zero_()
            set_adapter(model, folder)
            again = _losses(reference, rows)
    return _largest("reload", _each(rows, live, again), 0.0, name, rows)


def _each(rows: Sequence[Example], one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Return how far two losses of each row are apart, a trained token."""
    return [abs(a - b) / row.weight for row, a, b in zip(rows, one, other, strict=True)]


def _losses(engine: Engine, rows: Sequence[Example]) -> list[float]:
    return document_losses(engine, Batch.of(rows))


def _largest(id: str, apart: list[float], limit: float, name: str, rows: Sequence[Example]) -> Check:
    """Check the largest difference, in nats a token."""
    number = max(range(len(apart)), key=lambda n: math.inf if math.isnan(apart[n]) else apart[n])
    worst = rows[number].place if apart[number] > 0 else ""
    return Check.at_most(id, apart[number], limit, f"{name}, in nats a token", _worst(worst))


def _worst(place: str) -> str:
    return f"worst in {place}" if place else ""
