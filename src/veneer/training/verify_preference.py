"""Checks of `veneer verify` for runs that prefer answers: where they start, what they compare with, what they learn.

They know an objective by its protocol alone (`engine/objective.py`), so they are made of any that reads rows of several
documents or a reference, on the run's shortest rows, cut to the end of the prompt and the beginning of the answers. On
a CPU passes with and without gradients round alike, and what starts at the reference differs from it by nothing. On a
GPU they may take other shapes: in 16 bits the log-probability of a token then moves as much as verify.py says.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from veneer.config import Run
from veneer.config.results import Check
from veneer.data.batch import Batch, Example
from veneer.data.pipeline import Part
from veneer.engine.agreement import MIN_TRAINED, limits_of, within_vocabulary
from veneer.engine.choose import comparable
from veneer.engine.interface import Engine, document_losses
from veneer.engine.objective import Objective, StepOutput, TrainedTokens
from veneer.engine.temporary import fill_zeros, preserve_adapter
from veneer.model.adapters import find_method
from veneer.model.quiet import quiet
from veneer.model.start import take_weights
from veneer.training.parts import RunParts
from veneer.training.reference_logprobs import NAME, completes_batches, document_sums, with_sums

ROWS = 8
PROMPT_TOKENS, ANSWER_TOKENS = 64, 128  # of each document, at most
NO_REFERENCE = "the run compares with no reference"


@dataclass(frozen=True)
class LogRatios(Objective):
    """The difference of each document from the reference; it has no gradient."""

    needs_reference = True

    def weight(self, batch: Batch) -> float:
        return float(len(batch.lengths))

    def __call__(self, tokens: TrainedTokens) -> tuple[StepOutput, torch.Tensor]:
        logprob_D = tokens.sum_documents(tokens.logprobs_N * tokens.weights_N)
        reference_D = tokens.sum_documents(tokens.values[NAME])
        weight_D = tokens.sum_documents(tokens.weights_N.to(logprob_D.dtype))
        ratio_D = (logprob_D.to(reference_D.dtype) - reference_D).to(logprob_D.dtype).abs()
        largest = (ratio_D / weight_D.clamp_min(MIN_TRAINED)).amax()
        count = (weight_D > 0).sum()
        return StepOutput(ratio_D.sum(), count, {"largest": largest}), torch.zeros_like(tokens.logprobs_N)


def is_preference(objective: Objective) -> bool:
    """Return whether these checks are made of an objective."""
    return objective.documents_per_row > 1 or objective.needs_reference


def compares(run: Run, objective: Objective) -> bool:
    """Return whether a run compares its answers with a reference."""
    return objective.needs_reference and run.train.reference != "none"


def short_documents(part: Part, documents_per_row: int, rows: int = ROWS) -> list[Example]:
    """Return the documents of the shortest rows, each cut to the prompt's last and the answer's first tokens."""
    per_row = part.lengths.reshape(-1, documents_per_row).sum(1)
    found: list[Example] = []
    for row in np.sort(np.argsort(per_row, kind="stable")[:rows]).tolist():
        documents = [part[row * documents_per_row + n] for n in range(documents_per_row)]
        start = max(0, min(document.spans[0][0] for document in documents) - PROMPT_TOKENS)
        found += [_window(document, start, start + PROMPT_TOKENS + ANSWER_TOKENS) for document in documents]
    return found


def _window(example: Example, start: int, end: int) -> Example:
    spans = ((max(first, start) - start, min(last, end) - start, weight) for first, last, weight in example.spans)
    return replace(example, ids=example.ids[start:end], spans=tuple(span for span in spans if span[0] < span[1]))


def completed(run: Run, parts: RunParts, engine: Engine, objective: Objective, batches: Sequence[Batch]) -> list[Batch]:
    """Return the batches of a step with all values that training would give them, with the model as it is now."""
    values = objective.step_values(batches)
    return [_referred(run, parts, engine, objective, batch).with_values(values) for batch in batches]


def _referred(run: Run, parts: RunParts, engine: Engine, objective: Objective, batch: Batch) -> Batch:
    if not objective.needs_reference:
        return batch
    if run.train.reference == "none":
        return with_sums(batch, [0.0] * len(batch.lengths))
    if run.train.reference == "live":
        return completes_batches(run.train, objective, parts.model, engine)(batch)
    return with_sums(batch, document_sums(engine, batch))


def preference_checks(
    run: Run, parts: RunParts, engine: Engine, objective: Objective, rows: list[Example]
) -> Iterator[Check]:
    """Check a run that prefers answers; the adapter is afterwards what it was.

    Args:
        run: the settings.
        parts: the run's parts.
        engine: engine that the run trains with.
        objective: the run's objective.
        rows: documents of `short_documents`.
    """
    model = parts.model
    (batch,) = completed(run, parts, engine, objective, [Batch.of(rows, objective.documents_per_row)])
    has_reference = compares(run, objective)
    with preserve_adapter(model), engine.dropout_off():
        if has_reference:
            yield _log_ratio(model, engine, batch)
            yield _start_loss(model, engine, objective, batch)
        else:
            yield Check("log-ratio", True, name="log-ratio at the start", detail=NO_REFERENCE)
            yield Check("start-loss", True, name="loss at the start", detail=NO_REFERENCE)
    if has_reference:
        yield _reference(run, parts, engine, objective, batch)
    else:
        yield Check("reference", True, name="the reference against the starting adapter", detail=NO_REFERENCE)
    yield _answer_ends(parts, engine, objective, batch)
    with preserve_adapter(model), engine.dropout_off():
        yield _split(run, parts, engine, objective, rows)
    with preserve_adapter(model):
        yield _gradient(run, parts, engine, objective, rows[: 2 * objective.documents_per_row])


def _log_ratio(model: Any, engine: Engine, batch: Batch) -> Check:
    """Compare training passes of the model as it is with its reference."""
    largest = engine.forward_backward(batch, LogRatios()).metrics["largest"].item()
    name = "log-ratio to the reference at the start, in nats a token"
    return Check.at_most("log-ratio", largest, _rounding(model), name)


def _start_loss(model: Any, engine: Engine, objective: Objective, batch: Batch) -> Check:
    """Compare the first loss with the one that the objective has where all log-ratios are 0."""
    wanted, name = objective.start_loss(), "loss at the start, against that of log-ratios of 0"
    if wanted is None:
        return Check("start-loss", True, name=name, detail="the objective has no loss of its own there")
    output = engine.forward_backward(batch, objective)
    _, coefficients_N = objective(TrainedTokens.of(batch, engine.token_logprobs(batch)))
    assert coefficients_N is not None
    # So much moves it, to first order, where each token moves by as much as rounding may move it.
    limit = max(1e-12, _rounding(model) * (coefficients_N.abs().sum() / output.weight).item())
    return Check.at_most("start-loss", abs((output.loss / output.weight).item() - wanted), limit, name)


def _rounding(model: Any) -> float:
    """Return the largest difference, in nats a token, of passes with gradients from those without."""
    weight = model.get_input_embeddings().weight
    if next(p for p in model.parameters() if p.requires_grad).device.type == "cpu":
        return 0.0
    return 1e-3 if weight.dtype == torch.float32 else 0.05


def _reference(run: Run, parts: RunParts, engine: Engine, objective: Objective, batch: Batch) -> Check:
    """Compare the reference with the adapter in the file that training starts from, or with the base alone.

    Of methods that begin as the base but for rounding, or otherwise, it is compared with the adapter as it begins.

    A reference that is computed live has to stay it when the adapter has moved.
    """
    model = parts.model
    sums_D = TrainedTokens.of(batch, torch.zeros(batch.trained)).sum_documents(batch.values[NAME][batch.targets_T >= 0])
    found = sums_D.tolist()
    if run.train.reference == "live":
        complete = completes_batches(run.train, objective, model, engine)
        with preserve_adapter(model):
            fill_zeros(model)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.mul_(1.5)
            moved = complete(batch).values[NAME][batch.targets_T >= 0]
        found = TrainedTokens.of(batch, torch.zeros(batch.trained)).sum_documents(moved).tolist()
    what = "the base alone"
    with preserve_adapter(model), ExitStack() as stack:
        if parts.start is not None:
            what = "the adapter that training starts from"
            take_weights(model, parts.start, str(run.model.adapter))
        elif run.adapter is not None and not find_method(run.adapter).begins_as_base:
            what = "the adapter as it begins"
        elif run.adapter is not None:  # else the weights still are the base's
            stack.enter_context(engine.adapter_off())
        wanted = [-loss for loss in document_losses(engine, batch)]
    apart = max(abs(one - float(np.float32(other))) for one, other in zip(found, wanted, strict=True))
    return Check.at_most(
        "reference", apart, 0.0, f"the reference's log-probabilities, against {what}, in nats", "it is another model"
    )


def _answer_ends(parts: RunParts, engine: Engine, objective: Objective, batch: Batch) -> Check:
    """Count answers without a trained end token, among all rows, and those whose end the objective passes over."""
    train = parts.data.train
    without = int(np.count_nonzero(train.corpus.ends[train.examples] == 0))
    tokens = TrainedTokens.of(batch, engine.token_logprobs(batch))
    _, coefficients_N = objective(tokens)
    if coefficients_N is not None:
        document_N = tokens.to_tokens(torch.arange(len(batch.lengths), device=tokens.index_N.device))
        is_last_N = torch.diff(document_N, append=document_N.new_tensor([-1])) != 0
        # A document may count as a whole for nothing: the margin of hinge that is large enough.
        counts_N = tokens.to_tokens(tokens.sum_documents(coefficients_N.abs())) > 0
        without += int((counts_N & is_last_N & (coefficients_N == 0)).sum())
    return Check.at_most("answer-ends", float(without), 0, "answers whose end token does not count")


def _split(run: Run, parts: RunParts, engine: Engine, objective: Objective, rows: list[Example]) -> Check:
    """Compare the gradient of a step in one micro-batch with that of the same step, a row at a time."""
    size = objective.documents_per_row
    whole = [Batch.of(rows, size)]
    single = [Batch.of(rows[n : n + size], size) for n in range(0, len(rows), size)]
    whole, single = (completed(run, parts, engine, objective, batches) for batches in (whole, single))
    fill_zeros(parts.model)
    found, wanted = (_gradients(parts.model, engine, objective, batches) for batches in (whole, single))
    name = f"gradient of {len(single)} rows at once, against one at a time, relative"
    return Check.at_most("split", _apart(found, wanted), _limit(parts), name)


def _gradient(run: Run, parts: RunParts, engine: Engine, objective: Objective, rows: list[Example]) -> Check:
    """Compare the engine's gradient with autograd's of the objective's loss on the plain model's log-probabilities."""
    model = parts.model
    with comparable(model, engine, run.train, parts.machine.device) as same, same.dropout_off():
        rows = within_vocabulary(rows, model)
        (batch,) = completed(run, parts, same, objective, [Batch.of(rows, objective.documents_per_row)])
        fill_zeros(model)
        for parameter in model.parameters():  # away from the reference
            if parameter.requires_grad:
                parameter.data.mul_(1.1)
        found = _gradients(model, same, objective, [batch])
        wanted = _plain_gradients(model, objective, batch, rows)
    name = "gradient of all adapters, against autograd's of the loss on the plain model, relative"
    return Check.at_most("preference-gradient", _apart(found, wanted), _limit(parts), name)


def _plain_gradients(model: Any, objective: Objective, batch: Batch, rows: list[Example]) -> torch.Tensor:
    logprobs = []
    model.zero_grad()
    model.eval()
    with quiet():
        for row in rows:
            ids = torch.from_numpy(row.ids.astype(np.int64)).to(model.device)
            logprobs_LV = model(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
            logprobs += [
                logprobs_LV[start - 1 : end - 1].gather(1, ids[start:end, None])[:, 0] for start, end, _ in row.spans
            ]
    logprobs_N = torch.cat(logprobs).detach().requires_grad_()
    loss = objective(TrainedTokens.of(batch, logprobs_N.double()))[0].loss / objective.weight(batch)
    (slope_N,) = torch.autograd.grad(loss, logprobs_N)
    torch.cat(logprobs).backward(slope_N)  # type: ignore[no-untyped-call]
    return _flat_gradient(model)


def _gradients(model: Any, engine: Engine, objective: Objective, batches: Sequence[Batch]) -> torch.Tensor:
    """Return the gradient of a step over micro-batches, as one vector."""
    for parameter in model.parameters():
        parameter.grad = None
    scale = 1 / sum(map(objective.weight, batches))
    for batch in batches:
        engine.forward_backward(batch.scaled(scale), objective)
    return _flat_gradient(model)


def _flat_gradient(model: Any) -> torch.Tensor:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1).clone() for p in trained])


def _apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    apart = ((found - wanted).norm() / wanted.norm().clamp_min(torch.finfo(torch.float32).tiny)).item()
    return math.inf if math.isnan(apart) else apart


def _limit(parts: RunParts) -> float:
    dtype = parts.model.get_input_embeddings().weight.dtype
    return limits_of(dtype, parts.machine.device).gradient
