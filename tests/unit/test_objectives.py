"""Objectives of preferences have TRL's losses in float64, autograd's gradients, and the same ones on either engine."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.engines import model_of, worst
from tests.support.preference import gradients_of, pairs, step
from tests.unit.test_dpo import document_sums, log_probabilities
from veneer.data.batch import Batch
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.objective import Objective, TrainedTokens
from veneer.engine.reference import ReferenceEngine
from veneer.training.objectives import (
    ContrastivePreference,
    DirectPreference,
    KahnemanTversky,
    OddsRatioPreference,
    SimplePreference,
)

LABELS = torch.tensor([1.0, 1, -1, 1, -1, 1])
KL = 0.375  # exact in float32
OBJECTIVES: list[Any] = [
    DirectPreference(0.1, rpo_alpha=0.7),
    KahnemanTversky(0.1),
    KahnemanTversky(0.4, 1.3, 0.6),
    OddsRatioPreference(0.1),
    OddsRatioPreference(2.0),
    SimplePreference(),
    SimplePreference(3.0, 1.5),
    ContrastivePreference(),
    ContrastivePreference(0.3, "sigmoid", 0.2, 0.0),
    ContrastivePreference(0.05, "hinge", cpo_alpha=0.5),
    ContrastivePreference(0.5, "ipo"),
]
IDS = [f"{type(one).__name__} {number}" for number, one in enumerate(OBJECTIVES)]


def of_trl(objective: Any, logps_D: torch.Tensor, references_D: torch.Tensor, tokens_D: torch.Tensor) -> Any:
    """The loss of a batch as TRL 1.16 computes it in one micro-batch, of summed log-probabilities.

    Its cpo_loss, odds_ratio_loss and KTO's _compute_loss, with the cross-entropy of chosen answers over all their
    tokens at once.
    """
    if isinstance(objective, KahnemanTversky):
        beta, ratios_D = objective.beta, logps_D - references_D
        good = 1 - torch.sigmoid(beta * (ratios_D[LABELS > 0] - KL))
        bad = 1 - torch.sigmoid(beta * (KL - ratios_D[LABELS < 0]))
        return torch.cat([objective.desirable_weight * good, objective.undesirable_weight * bad]).mean()
    nll = -logps_D[::2].sum() / tokens_D[::2].sum()
    means_D = logps_D / tokens_D
    chosen, rejected = (means_D if _averages(objective) else logps_D).view(-1, 2).unbind(1)
    if isinstance(objective, OddsRatioPreference):
        log_odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
        return nll - (objective.beta * F.logsigmoid(log_odds)).mean()
    if isinstance(objective, SimplePreference):
        logits = chosen - rejected - objective.gamma / objective.beta
        return -F.logsigmoid(objective.beta * logits).mean()
    logits = chosen - rejected
    if isinstance(objective, DirectPreference):
        logits = logits - (references_D[::2] - references_D[1::2])
        return -F.logsigmoid(objective.beta * logits).mean() + objective.rpo_alpha * nll
    if objective.loss_type == "sigmoid":
        smoothing = objective.label_smoothing
        losses = -F.logsigmoid(objective.beta * logits) * (1 - smoothing)
        losses = losses - F.logsigmoid(-objective.beta * logits) * smoothing
    elif objective.loss_type == "hinge":
        losses = torch.relu(1 - objective.beta * logits)
    else:
        losses = (logits - 1 / (2 * objective.beta)) ** 2
    return losses.mean() + objective.cpo_alpha * nll


def _averages(objective: Any) -> bool:
    is_ipo = isinstance(objective, ContrastivePreference) and objective.loss_type == "ipo"
    return is_ipo or isinstance(objective, OddsRatioPreference | SimplePreference)


def laid(batch: Batch, objective: Objective, references_D: torch.Tensor) -> Batch:
    """A batch with all that an objective reads, and tokens of weight 1."""
    is_trained_T = batch.targets_T >= 0
    firsts, start = [], 0
    for length in batch.lengths:
        firsts.append(start + int(is_trained_T[start : start + length].nonzero()[0]))
        start += length
    values = {}
    for name, values_D in (("reference", references_D), ("label", LABELS)):
        values[name] = torch.zeros(batch.tokens)
        values[name][firsts] = values_D[: len(firsts)].float()
    weights_T = is_trained_T.float()
    made = replace(batch, weights_T=weights_T, weight=float(weights_T.sum()), values=values, documents_per_row=2)
    return with_step_values([made], objective)[0]


def with_step_values(batches: list[Batch], objective: Objective) -> list[Batch]:
    """The batches of a step, as the loop gives them to an engine."""
    found = objective.step_values(batches) | ({"kl": KL} if objective.needs_kl else {})
    made = []
    for batch in batches:
        given = {name: torch.full_like(batch.weights_T, value) for name, value in found.items()}
        made.append(replace(batch, values={**batch.values, **given}))
    return made


REFERENCES_D = torch.tensor([-11.0, -9.5, -20.25, -2.0, -8.75, -9.0], dtype=torch.float64)


def made(objective: Objective) -> tuple[Batch, torch.Tensor]:
    """A batch, and log-probabilities of its trained tokens."""
    batch = laid(pairs(), objective, REFERENCES_D)
    generator = torch.Generator().manual_seed(4)
    return batch, -torch.rand(batch.trained, dtype=torch.float64, generator=generator).requires_grad_()


def wanted_of(objective: Objective, batch: Batch, logprobs_N: torch.Tensor) -> Any:
    logprobs_T = torch.zeros(batch.tokens, dtype=torch.float64).masked_scatter(batch.targets_T >= 0, logprobs_N)
    return of_trl(
        objective, document_sums(logprobs_T, batch), REFERENCES_D, document_sums(batch.weights_T.double(), batch)
    )


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
def test_the_loss_is_trls_and_the_coefficients_are_its_derivative(objective: Any) -> None:
    batch, logprobs_N = made(objective)
    wanted = wanted_of(objective, batch, logprobs_N)
    (wanted_N,) = torch.autograd.grad(wanted, logprobs_N)
    output, found_N = objective(TrainedTokens.of(batch, logprobs_N.detach()))
    rows = objective.weight(batch)
    assert output.weight == rows == (6 if isinstance(objective, KahnemanTversky) else 3)
    # A value of all tokens is a float32.
    torch.testing.assert_close(output.loss / rows, wanted.detach(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found_N / rows, wanted_N, rtol=1e-6, atol=1e-9)


def swapped(batch: Batch) -> Batch:
    """Rejected before chosen; the lengths of all documents are the same."""
    order = [n for first in range(0, len(batch.lengths), 2) for n in (first + 1, first)]
    places = torch.split(torch.arange(batch.tokens), list(batch.lengths))
    order_T = torch.cat([places[n] for n in order])
    values = {name: value_T[order_T] for name, value_T in batch.values.items()}
    return replace(
        batch, targets_T=batch.targets_T[order_T], weights_T=batch.weights_T[order_T],
        lengths=tuple(batch.lengths[n] for n in order), values=values,
    )  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
def test_planted_faults_change_the_loss(objective: Any) -> None:
    """Each is a fault that an objective could have: the comparison above would see it."""
    batch, logprobs_N = made(objective)
    right = wanted_of(objective, batch, logprobs_N).item()

    def loss(batch: Batch, logprobs_N: torch.Tensor = logprobs_N) -> float:
        output, _ = objective(TrainedTokens.of(batch, logprobs_N.detach()))
        return float(output.loss / objective.weight(batch))

    assert loss(batch) == pytest.approx(right, rel=1e-6)
    # A sum where a mean belongs, over tokens or over rows.
    ones = {name: torch.ones_like(v) if name == "pairs_per_token" else v for name, v in batch.values.items()}
    if objective.step_values([batch]).keys() & {"pairs_per_token"}:
        assert abs(loss(replace(batch, values=ones)) - right) > 1e-3
    if _averages(objective):
        tokens_D = document_sums(batch.weights_T.double(), batch)
        summed = tokens_D[0] * logprobs_N
        assert abs(loss(batch, summed) - right) > 1e-3
    assert abs(loss(batch) * objective.weight(batch) - right) > 1e-3
    if isinstance(objective, KahnemanTversky):
        for name in ("label", "kl", "reference"):
            planted = {**batch.values, name: -batch.values[name] if name == "label" else 0 * batch.values[name]}
            assert abs(loss(replace(batch, values=planted)) - right) > 1e-4, name
    else:
        turned = swapped(batch)
        order_T = torch.cat([torch.full((n,), at) for at, n in enumerate(batch.lengths)])
        parts = [logprobs_N[order_T[batch.targets_T >= 0] == at] for at in (1, 0, 3, 2, 5, 4)]
        assert abs(loss(turned, torch.cat(parts)) - right) > 1e-3


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
@pytest.mark.parametrize("engine", ["reference", "reference for the CPU", "fused", "fused, padded"])
def test_both_engines_give_autograds_gradients(engine: str, objective: Any) -> None:
    model = model_of("llama")
    batch = laid(pairs(), objective, REFERENCES_D)
    logps_D = log_probabilities(model, batch)
    references_D = logps_D.detach() + torch.tensor([1.0, -1, 0.5, 0, -2, 3])
    batch = laid(pairs(), objective, references_D).scaled(1 / objective.weight(batch))
    model.zero_grad()
    wanted = of_trl(objective, logps_D, references_D.float(), document_sums(batch.weights_T, batch))
    wanted.backward()
    gradients = gradients_of(model)
    run: Any = ReferenceEngine(model, for_cpu="CPU" in engine) if "reference" in engine else FusedEngine(model)
    run._pads = "padded" in engine
    output, found = step(run, model, [batch], objective)
    assert output.loss.item() * batch.scale == pytest.approx(wanted.item(), rel=1e-4)
    assert worst(found, gradients)[0] < 1e-3, worst(found, gradients)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
def test_padding_of_recorded_passes_does_not_count(objective: Any) -> None:
    batch, logprobs_N = made(objective)
    tokens = TrainedTokens.of(batch, logprobs_N.detach())
    padded = TrainedTokens(
        F.pad(tokens.logprobs_N, (0, 3)),
        F.pad(tokens.weights_N, (0, 3)),
        F.pad(tokens.index_N, (0, 3)),
        torch.cat([tokens.bounds, tokens.bounds[-1:].expand(4)]),
        {name: F.pad(value_N, (0, 3)) for name, value_N in tokens.values.items()},
    )
    (alone, alone_N), (with_padding, with_padding_N) = objective(tokens), objective(padded)
    assert with_padding.weight == alone.weight
    torch.testing.assert_close([with_padding.loss, with_padding.metrics], [alone.loss, alone.metrics])
    assert torch.equal(with_padding_N[:-3], alone_N)
    assert not with_padding_N[-3:].any()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
def test_a_step_does_not_depend_on_its_cut(objective: Any) -> None:
    batch, logprobs_N = made(objective)
    whole, whole_N = objective(TrainedTokens.of(batch, logprobs_N.detach()))
    first, second = replace(batch, values={n: batch.values[n] for n in ("reference", "label")}).halved()
    parts = with_step_values([first, second], objective)
    cut = torch.split(logprobs_N.detach(), [part.trained for part in parts])
    outputs = [objective(TrainedTokens.of(part, some)) for part, some in zip(parts, cut, strict=True)]
    assert sum(output.loss for output, _ in outputs).item() == pytest.approx(whole.loss.item(), rel=1e-9)
    torch.testing.assert_close(torch.cat([found for _, found in outputs]), whole_N, rtol=1e-9, atol=1e-12)
    for name, value in whole.metrics.items():
        assert sum(o.metrics[name] for o, _ in outputs).item() == pytest.approx(value.item(), rel=1e-6), name


def test_metrics_have_trls_names_and_values() -> None:
    batch, logprobs_N = made(OddsRatioPreference())
    logprobs_T = torch.zeros(batch.tokens, dtype=torch.float64).masked_scatter(batch.targets_T >= 0, logprobs_N)
    logps_D = document_sums(logprobs_T, batch).detach()
    tokens_D = document_sums(batch.weights_T.double(), batch)
    means_D = logps_D / tokens_D
    output, _ = OddsRatioPreference(0.2)(TrainedTokens.of(batch, logprobs_N.detach()))
    found = {name: value.item() / 3 for name, value in output.metrics.items()}
    log_odds = torch.logit(means_D.exp())[::2] - torch.logit(means_D.exp())[1::2]
    assert found == pytest.approx(
        {
            "rewards/chosen": 0.2 * means_D[::2].mean().item(),
            "rewards/rejected": 0.2 * means_D[1::2].mean().item(),
            "rewards/margins": 0.2 * (means_D[::2] - means_D[1::2]).mean().item(),
            "rewards/accuracies": (means_D[::2] > means_D[1::2]).double().mean().item(),
            "logps/chosen": means_D[::2].mean().item(),
            "logps/rejected": means_D[1::2].mean().item(),
            "log_odds_ratio": F.logsigmoid(log_odds).mean().item(),
            "log_odds_chosen": log_odds.mean().item(),
            "nll_loss": (-logps_D[::2].sum() / tokens_D[::2].sum()).item(),
        }
    )

    objective = KahnemanTversky(0.2)
    batch, _ = made(objective)
    output, _ = objective(TrainedTokens.of(batch, logprobs_N.detach()))
    found = {name: value.item() / 6 for name, value in output.metrics.items()}
    good, bad, reward_D = LABELS > 0, LABELS < 0, 0.2 * (logps_D - REFERENCES_D)
    assert found == pytest.approx(
        {
            "kl": KL,
            "rewards/chosen": reward_D[good].mean().item(),
            "rewards/rejected": reward_D[bad].mean().item(),
            "rewards/margins": (reward_D[good].mean() - reward_D[bad].mean()).item(),
            "logps/chosen": logps_D[good].mean().item(),
            "logps/rejected": logps_D[bad].mean().item(),
        },
        rel=1e-5,
    )


def test_an_answer_that_is_certain_has_finite_odds() -> None:
    batch, logprobs_N = made(OddsRatioPreference())
    output, found_N = OddsRatioPreference()(TrainedTokens.of(batch, torch.zeros_like(logprobs_N)))
    assert output.loss.isfinite()
    assert found_N.isfinite().all()
