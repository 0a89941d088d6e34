"""What objectives of pairs have in common: sums of each answer, losses of a margin, and the chosen answers' likelihood.

Loss and metrics are means over pairs. The negative log-likelihood of chosen answers is a mean over their tokens, as TRL
has it, here over all of an optimizer step: so it does not depend on how the step is cut into micro-batches.

Shapes: D documents, of which each two are a pair, the chosen one first; P pairs; N trained tokens.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F

from veneer.data.batch import Batch
from veneer.engine.objective import Objective, StepOutput, TrainedTokens

# Of a step: its pairs by the summed weights of the chosen answers' tokens.
PAIRS_PER_TOKEN = "pairs_per_token"


class Answers(NamedTuple):
    """The answers of a batch: summed log-probability and weight of each, and which pairs are none but padding."""

    logprob_D: torch.Tensor
    weight_D: torch.Tensor
    is_pair_P: torch.Tensor

    @staticmethod
    def of(tokens: TrainedTokens) -> "Answers":
        logprob_D = tokens.sum_documents(tokens.logprobs_N * tokens.weights_N)
        weight_D = tokens.sum_documents(tokens.weights_N.to(logprob_D.dtype))
        return Answers(logprob_D, weight_D, weight_D.view(-1, 2).amin(1) > 0)

    @property
    def shares(self) -> torch.Tensor:
        """One by the tokens of each, (D,), which makes a mean of a sum."""
        return 1 / torch.where(self.weight_D > 0, self.weight_D, 1.0)


class Compared(NamedTuple):
    """What an objective finds.

    Attributes:
        loss_P: loss of each pair.
        slope_D: its derivative by the summed log-probability of each answer.
        reward_D: reward of each answer, for metrics.
        logps_D: log-probability of each answer as the objective reads it, for metrics.
        metrics: further metrics, by name; (P,).
    """

    loss_P: torch.Tensor
    slope_D: torch.Tensor
    reward_D: torch.Tensor
    logps_D: torch.Tensor
    metrics: Mapping[str, torch.Tensor] = {}


class PairObjective(Objective):
    """An objective of pairs of answers: a comparison, and where it has a weight the chosen answers' likelihood."""

    documents_per_row = 2

    @property
    def likelihood_weight(self) -> float:
        """Weight of the negative log-likelihood of chosen answers; 0: it is not computed."""
        return 0.0

    @abstractmethod
    def compare(self, tokens: TrainedTokens, answers: Answers) -> Compared:
        """Return the loss of each pair and its derivative."""
        ...

    def weight(self, batch: Batch) -> float:
        return len(batch.lengths) / 2

    def step_values(self, batches: Iterable[Batch]) -> dict[str, float]:
        if not self.likelihood_weight:
            return {}
        weights_D = [host.sum_documents(host.weights_N.double()) for host in map(TrainedTokens.on_host, batches)]
        chosen = torch.cat(weights_D)[::2]
        return {PAIRS_PER_TOKEN: len(chosen) / float(chosen.sum())}

    def __call__(self, tokens: TrainedTokens) -> tuple[StepOutput, torch.Tensor]:
        answers = Answers.of(tokens)
        found = self.compare(tokens, answers)
        coefficients_N = tokens.to_tokens(found.slope_D) * tokens.weights_N
        reward_PS, logprob_PS = found.reward_D.view(-1, 2), found.logps_D.view(-1, 2)
        margin_P = reward_PS[:, 0] - reward_PS[:, 1]
        of_pairs = {
            "rewards/chosen": reward_PS[:, 0],
            "rewards/rejected": reward_PS[:, 1],
            "rewards/margins": margin_P,
            "rewards/accuracies": (margin_P > 0).to(margin_P.dtype),
            "logps/chosen": logprob_PS[:, 0],
            "logps/rejected": logprob_PS[:, 1],
            **found.metrics,
        }
        loss_P = found.loss_P
        if self.likelihood_weight:
            per_token = tokens.values[PAIRS_PER_TOKEN].amax()  # all have one value, and padding 0
            of_pairs["nll_loss"] = nll_P = -per_token * answers.logprob_D[::2]
            loss_P = loss_P + self.likelihood_weight * nll_P
            is_chosen_D = (torch.arange(len(answers.logprob_D), device=loss_P.device) % 2 == 0).to(loss_P.dtype)
            factor_N = tokens.to_tokens(is_chosen_D) * tokens.weights_N
            coefficients_N = coefficients_N - self.likelihood_weight * per_token * factor_N
        metrics = {name: torch.where(answers.is_pair_P, value_P, 0.0).sum() for name, value_P in of_pairs.items()}
        loss = torch.where(answers.is_pair_P, loss_P, 0.0).sum()
        return StepOutput(loss, answers.is_pair_P.sum(), metrics), coefficients_N


def margin_loss(
    margin_P: torch.Tensor, loss_type: str, beta: float, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each pair, and its derivative by the margin.

    Args:
        margin_P: margin of each pair, beta in it; of ipo: difference of the means, without beta.
        loss_type: sigmoid, hinge or ipo.
        beta: weight of the margin, for ipo.
        label_smoothing: share of the pairs that are taken to be the wrong way round, for sigmoid.
    """
    if loss_type == "ipo":
        error_P = margin_P - 1 / (2 * beta)
        return error_P.square(), 2 * error_P
    if loss_type == "hinge":
        return torch.relu(1 - margin_P), -(margin_P < 1).to(margin_P.dtype)
    s = label_smoothing
    loss_P = -(1 - s) * F.logsigmoid(margin_P) - s * F.logsigmoid(-margin_P)
    return loss_P, s * torch.sigmoid(margin_P) - (1 - s) * torch.sigmoid(-margin_P)


def difference(score_D: torch.Tensor) -> torch.Tensor:
    """Return the chosen document's value less the rejected one's; (P,)."""
    return score_D[::2] - score_D[1::2]


def opposed(slope_P: torch.Tensor) -> torch.Tensor:
    """Return a derivative by a difference as one by each of its two documents; (D,)."""
    return torch.stack([slope_P, -slope_P], 1).view(-1)
