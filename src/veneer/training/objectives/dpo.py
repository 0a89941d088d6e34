"""Direct preference optimization: a pair's chosen answer is to gain on the rejected one, relative to a reference.

With log-ratios r = log p(answer | prompt) - log p_reference(answer | prompt), summed over an answer's trained tokens,
n of them, and the margin m = beta (r_chosen - r_rejected), the loss of a pair is

sigmoid: -(1 - s) log sigmoid(m) - s log sigmoid(-m), s = label_smoothing (arXiv 2305.18290, equation 7; with s > 0 it
    is conservative DPO, https://ericmitchell.ai/cdpo.pdf)
hinge: max(0, 1 - m) (SLiC, arXiv 2305.10425, with the reference as in arXiv 2309.06657)
ipo: (r_chosen / n_chosen - r_rejected / n_rejected - 1 / (2 beta))^2 (arXiv 2310.12036, equation 17)

These are the formulas of TRL's DPOTrainer, with its mean over tokens in ipo. Loss and metrics are means over pairs;
rewards are beta r.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from veneer.config import Dpo
from veneer.data.batch import Batch
from veneer.engine.objective import Objective, StepOutput, TrainedTokens


@dataclass(frozen=True)
class DirectPreference(Objective):
    """The objective of pairs. D documents, of which each two are a pair, the chosen one first; P pairs.

    Attributes:
        beta: weight of the log-ratios.
        loss_type: sigmoid, hinge or ipo.
        label_smoothing: share of the pairs that are taken to be the wrong way round; of sigmoid alone.
    """

    beta: float = 0.1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0

    documents_per_row = 2
    needs_reference = True

    @staticmethod
    def of(settings: Dpo) -> "DirectPreference":
        return DirectPreference(settings.beta, settings.loss_type, settings.label_smoothing)

    @property
    def may_lack_reference(self) -> bool:
        """Whether the loss is one without a reference, too: in ipo the log-ratio is what it regularizes."""
        return self.loss_type != "ipo"

    def start_loss(self) -> float:
        return {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 1 / (2 * self.beta) ** 2}[self.loss_type]

    def weight(self, batch: Batch) -> float:
        return len(batch.lengths) / 2

    def __call__(self, tokens: TrainedTokens) -> tuple[StepOutput, torch.Tensor]:
        logprob_D = tokens.sum_documents(tokens.logprobs_N * tokens.weights_N)
        reference_D = tokens.sum_documents(tokens.values["reference"])
        # Both rounded alike, so that their difference is exactly 0 where the model still is the reference.
        ratio_D = (logprob_D.to(reference_D.dtype) - reference_D).to(logprob_D.dtype)
        weight_D = tokens.sum_documents(tokens.weights_N.to(logprob_D.dtype))
        is_pair_P = weight_D.view(-1, 2).amin(1) > 0
        factor_D = 1 / weight_D.clamp_min(1) if self.loss_type == "ipo" else torch.full_like(weight_D, self.beta)
        loss_P, slope_P = self._loss(_difference(ratio_D * factor_D))
        slope_D = torch.stack([slope_P, -slope_P], 1).view(-1) * factor_D
        logprob_PS, reward_PS = logprob_D.view(-1, 2), self.beta * ratio_D.view(-1, 2)
        margin_P = reward_PS[:, 0] - reward_PS[:, 1]
        of_pairs = {
            "rewards/chosen": reward_PS[:, 0],
            "rewards/rejected": reward_PS[:, 1],
            "rewards/margins": margin_P,
            "rewards/accuracies": (margin_P > 0).to(margin_P.dtype),
            "logps/chosen": logprob_PS[:, 0],
            "logps/rejected": logprob_PS[:, 1],
        }
        metrics = {name: torch.where(is_pair_P, value_P, 0.0).sum() for name, value_P in of_pairs.items()}
        loss = torch.where(is_pair_P, loss_P, 0.0).sum()
        return StepOutput(loss, is_pair_P.sum(), metrics), tokens.to_tokens(slope_D) * tokens.weights_N

    def _loss(self, margin_P: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of each pair, and its derivative by the margin (of ipo: by the difference of means)."""
        if self.loss_type == "ipo":
            error_P = margin_P - 1 / (2 * self.beta)
            return error_P.square(), 2 * error_P
        if self.loss_type == "hinge":
            return torch.relu(1 - margin_P), -(margin_P < 1).to(margin_P.dtype)
        s = self.label_smoothing
        loss_P = -(1 - s) * F.logsigmoid(margin_P) - s * F.logsigmoid(-margin_P)
        return loss_P, s * torch.sigmoid(margin_P) - (1 - s) * torch.sigmoid(-margin_P)


def _difference(score_D: torch.Tensor) -> torch.Tensor:
    """Return the chosen document's value less the rejected one's; (P,)."""
    return score_D[::2] - score_D[1::2]
