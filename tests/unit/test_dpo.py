"""Direct preference optimization has TRL's losses, autograd's gradients, and the same ones on either engine."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.engines import model_of, worst
from tests.support.notices import notified
from tests.support.preference import gradients_of, pairs, step
from veneer.data.batch import Batch, Example
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.objective import TrainedTokens
from veneer.engine.reference import ReferenceEngine
from veneer.machine.batching import Batching
from veneer.training.objectives import DirectPreference

OBJECTIVES = [
    DirectPreference(0.1),
    DirectPreference(0.3, "sigmoid", 0.2),
    DirectPreference(0.1, "hinge"),
    DirectPreference(0.5, "ipo"),
]
IDS = [f"{one.loss_type} {one.label_smoothing}" for one in OBJECTIVES]


def of_trl(
    objective: DirectPreference, logps_D: torch.Tensor, references_D: torch.Tensor, tokens_D: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each pair and the reward of each answer, as TRL's DPOTrainer writes them (concatenated_forward and
    dpo_loss), of summed log-probabilities, the chosen one first."""
    beta, smoothing = objective.beta, objective.label_smoothing
    rewards_D = beta * (logps_D - references_D)
    if objective.loss_type == "ipo":
        logps_D, references_D = logps_D / tokens_D, references_D / tokens_D
    logits_P = (logps_D[::2] - logps_D[1::2]) - (references_D[::2] - references_D[1::2])
    if objective.loss_type == "sigmoid":
        losses_P = -F.logsigmoid(beta * logits_P) * (1 - smoothing) - F.logsigmoid(-beta * logits_P) * smoothing
    elif objective.loss_type == "hinge":
        losses_P = torch.relu(1 - beta * logits_P)
    else:
        losses_P = (logits_P - 1 / (2 * beta)) ** 2
    return losses_P, rewards_D


def with_references(batch: Batch, references_D: torch.Tensor) -> Batch:
    """A batch whose documents have these sums, as `Batch.of` lays them, and tokens of weight 1."""
    values_T, start = torch.zeros(batch.tokens, dtype=references_D.dtype), 0
    for length, reference in zip(batch.lengths, references_D, strict=True):
        values_T[start + int((batch.targets_T[start : start + length] >= 0).nonzero()[0])] = reference
        start += length
    weights_T = (batch.targets_T >= 0).float()
    made = Batch(batch.ids_T, batch.targets_T, weights_T, batch.lengths, batch.trained, float(weights_T.sum()))
    return Batch(**{**made.__dict__, "values": {"reference": values_T}, "documents_per_row": 2})


def document_sums(values_T: torch.Tensor, batch: Batch) -> torch.Tensor:
    return torch.stack([part.sum() for part in torch.split(values_T, list(batch.lengths))])


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
def test_the_loss_is_trls_and_the_coefficients_are_its_derivative(objective: DirectPreference) -> None:
    generator = torch.Generator().manual_seed(4)
    references_D = -3 * torch.rand(6, dtype=torch.float64, generator=generator) - 3
    batch = with_references(pairs(), references_D)
    logprobs_N = -torch.rand(batch.trained, dtype=torch.float64, generator=generator).requires_grad_()
    is_trained_T = batch.targets_T >= 0
    logprobs_T = torch.zeros(batch.tokens, dtype=torch.float64).masked_scatter(is_trained_T, logprobs_N)
    logps_D, tokens_D = document_sums(logprobs_T, batch), document_sums(batch.weights_T.double(), batch)
    losses_P, rewards_D = of_trl(objective, logps_D, references_D, tokens_D)
    (wanted_N,) = torch.autograd.grad(losses_P.sum(), logprobs_N)

    output, found_N = objective(TrainedTokens.of(batch, logprobs_N.detach()))
    torch.testing.assert_close(output.loss, losses_P.sum().detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_N, wanted_N, rtol=1e-12, atol=1e-12)
    assert output.weight == objective.weight(batch) == 3
    margins_P = rewards_D[::2] - rewards_D[1::2]
    wanted = {
        "rewards/chosen": rewards_D[::2],
        "rewards/rejected": rewards_D[1::2],
        "rewards/margins": margins_P,
        "rewards/accuracies": (margins_P > 0).double(),
        "logps/chosen": logps_D[::2],
        "logps/rejected": logps_D[1::2],
    }
    assert {name: value.item() for name, value in output.metrics.items()} == pytest.approx(
        {name: value.sum().item() for name, value in wanted.items()}
    )


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
@pytest.mark.parametrize("engine", ["reference", "reference for the CPU", "fused", "fused, padded"])
def test_both_engines_give_autograds_gradients(engine: str, objective: DirectPreference) -> None:
    model = model_of("llama")
    batch = pairs()
    logps_D = log_probabilities(model, with_references(batch, torch.zeros(6)))
    batch = with_references(batch, logps_D.detach() + torch.tensor([1.0, -1, 0.5, 0, -2, 3])).scaled(1 / 3)
    tokens_D = document_sums(batch.weights_T, batch)
    model.zero_grad()
    losses_P, _ = of_trl(objective, logps_D, document_sums(batch.values["reference"], batch), tokens_D)
    (losses_P.sum() * batch.scale).backward()  # type: ignore[no-untyped-call]
    wanted = gradients_of(model)

    made: Any = ReferenceEngine(model, for_cpu="CPU" in engine) if "reference" in engine else FusedEngine(model)
    made._pads = "padded" in engine
    output, found = step(made, model, [batch], objective)
    assert output.loss.item() == pytest.approx(losses_P.sum().item(), rel=1e-4)
    assert worst(found, wanted)[0] < 1e-3, worst(found, wanted)


def log_probabilities(model: Any, batch: Batch) -> torch.Tensor:
    """The summed log-probability of each document by the plain model."""
    found, start = [], 0
    for length in batch.lengths:
        part = slice(start, start + length)
        logits = model(input_ids=batch.ids_T[part][None], use_cache=False).logits[0].float()
        logprobs = torch.log_softmax(logits, -1).gather(1, batch.targets_T[part].clamp(min=0)[:, None])[:, 0]
        found.append((logprobs * batch.weights_T[part]).sum())
        start += length
    return torch.stack(found)


def test_pairs_without_an_answer_do_not_count() -> None:
    """Padding of recorded passes is such pairs."""
    batch = with_references(pairs(), -torch.ones(6))
    logprobs_N = -torch.rand(batch.trained, dtype=torch.float64)
    tokens = TrainedTokens.of(batch, logprobs_N)
    padded = tokens._replace(bounds=torch.cat([tokens.bounds, tokens.bounds[-1:].expand(4)]))
    for objective in OBJECTIVES:
        (alone, alone_N), (with_padding, with_padding_N) = objective(tokens), objective(padded)
        assert with_padding == alone
        assert torch.equal(with_padding_N, alone_N)


def test_a_documents_value_stands_at_its_first_trained_target() -> None:
    ids = torch.arange(4, dtype=torch.int32).numpy()
    examples = [Example(ids, ((2, 4, 1.0),), "", {"reference": -value}) for value in (1.5, 2.5)]
    batch = Batch.of(examples, 2)
    assert batch.values["reference"].tolist() == [0, -1.5, 0, 0, 0, -2.5, 0, 0]
    assert batch.rows == 1


def test_a_cut_batch_keeps_pairs_whole() -> None:
    ids = torch.arange(40, dtype=torch.int32).numpy()
    examples = [Example(ids[:length], ((1, 2, 1.0),), "") for length in (30, 3, 4, 5, 6, 7)]
    first, second = Batch.of(examples, 2).halved()
    assert (first.lengths, second.lengths) == ((30, 3), (4, 5, 6, 7))
    assert [half.lengths for half in second.halved()] == [(4, 5), (6, 7)]


def test_batches_without_gradients_keep_pairs_whole_once_memory_is_short() -> None:
    taken: list[list[int]] = []

    def work(rows: Sequence[int]) -> int:
        if len(rows) > 2:
            raise MemoryError
        taken.append(list(rows))
        return len(rows)

    with notified("out of memory with 6 rows at a time"):
        assert list(Batching(7, "fix", together=2).over(range(6), work)) == [2, 2, 2]
    assert taken == [[0, 1], [2, 3], [4, 5]]
    assert Batching(1, "fix", together=2).size == 2
