"""Preference training over pairs of documents: an objective whose coefficients depend on the log-probabilities."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from veneer.data.batch import Batch
from veneer.engine.interface import Engine
from veneer.engine.objective import Objective, StepOutput, TrainedTokens

LENGTHS = (37, 22, 60, 5, 25, 24)  # three pairs, chosen before rejected; the reference engine pads several groups


@dataclass(frozen=True)
class Preference(Objective):
    """Direct preference optimization (https://arxiv.org/abs/2305.18290), with a weight for each token."""

    beta: float = 0.05

    def weight(self, batch: Batch) -> float:
        return len(batch.lengths) / 2

    def __call__(self, tokens: TrainedTokens) -> tuple[StepOutput, torch.Tensor]:
        ratio_N = tokens.logprobs_N - tokens.values["reference"]
        chosen_P, rejected_P = tokens.sum_documents(ratio_N * tokens.weights_N).view(-1, 2).unbind(1)
        is_pair_P = tokens.sum_documents(tokens.weights_N).view(-1, 2).amin(1) > 0
        margin_P = self.beta * (chosen_P - rejected_P)
        slope_P = self.beta * torch.sigmoid(-margin_P)
        coefficients_N = tokens.to_tokens(torch.stack([-slope_P, slope_P], 1).view(-1)) * tokens.weights_N
        loss = torch.where(is_pair_P, -F.logsigmoid(margin_P), 0.0).sum()
        metrics = {"accuracy": (is_pair_P & (margin_P > 0)).sum()}
        return StepOutput(loss, is_pair_P.sum(), metrics), coefficients_N


def pairs(lengths: tuple[int, ...] = LENGTHS, prompt: int = 0, seed: int = 1) -> Batch:
    """Documents of which each trains some tokens; all begin with the same ones where `prompt` says how many."""
    generator = torch.Generator().manual_seed(seed)
    total, starts = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)[:-1]
    ids = torch.randint(3, 384, (total,), generator=generator)
    is_trained = torch.rand(total, generator=generator) < 0.6
    for start, length in zip(starts.tolist(), lengths, strict=True):
        ids[start : start + prompt] = torch.arange(10, 10 + prompt)
        is_trained[start : start + prompt] = False
        is_trained[start + length - 2], is_trained[start + length - 1] = True, False
    targets = torch.where(is_trained, ids.roll(-1), -100)
    weights = torch.where(is_trained, torch.rand(total, generator=generator) + 0.5, 0.0)
    values = {"reference": -5 * torch.rand(total, generator=generator)}
    trained, weight = int(is_trained.sum()), float(weights.sum())
    return Batch(ids, targets, weights, lengths, trained, weight, values=values)


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def step(engine: Engine, model: Any, batches: list[Batch], objective: Any) -> tuple[StepOutput, dict[str, Any]]:
    """Sums and gradients of all batches together."""
    model.zero_grad()
    outputs = [engine.forward_backward(batch, objective) for batch in batches]
    loss, weight = (torch.stack([torch.as_tensor(output[n]) for output in outputs]).sum() for n in (0, 1))
    metrics = {name: torch.stack([output.metrics[name] for output in outputs]).sum() for name in outputs[0].metrics}
    return StepOutput(loss, weight, metrics), gradients_of(model)
