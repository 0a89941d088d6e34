"""Direct preference optimization: a pair's chosen answer is to gain on the rejected one, relative to a reference.

With log-ratios r = log p(answer | prompt) - log p_reference(answer | prompt), summed over an answer's trained tokens,
n of them, and the margin m = beta (r_chosen - r_rejected), the loss of a pair is

sigmoid: -(1 - s) log sigmoid(m) - s log sigmoid(-m), s = label_smoothing (arXiv 2305.18290, equation 7; with s > 0 it
    is conservative DPO, https://ericmitchell.ai/cdpo.pdf)
hinge: max(0, 1 - m) (SLiC, arXiv 2305.10425, with the reference as in arXiv 2309.06657)
ipo: (r_chosen / n_chosen - r_rejected / n_rejected - 1 / (2 beta))^2 (arXiv 2310.12036, equation 17)

and rpo_alpha times the negative log-likelihood of the chosen answers, a mean over their tokens, is added (arXiv
2404.19733, equation 1, with the mean over tokens that TRL's `rpo_alpha` had and its loss_type `sft` has).

These are the formulas of TRL's DPOTrainer, with its mean over tokens in ipo. Loss and metrics are means over pairs;
rewards are beta r.
"""

import math
from dataclasses import dataclass

import torch

from veneer.config import Dpo
from veneer.engine.objective import TrainedTokens
from veneer.training.objectives.pairs import Answers, Compared, PairObjective, difference, margin_loss, opposed


@dataclass(frozen=True)
class DirectPreference(PairObjective):
    """The objective of pairs with a reference.

    Attributes:
        beta: weight of the log-ratios.
        loss_type: sigmoid, hinge or ipo.
        label_smoothing: share of the pairs that are taken to be the wrong way round; of sigmoid alone.
        rpo_alpha: weight of the chosen answers' negative log-likelihood.
    """

    beta: float = 0.1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    rpo_alpha: float = 0.0

    needs_reference = True

    @staticmethod
    def of(settings: Dpo) -> "DirectPreference":
        return DirectPreference(settings.beta, settings.loss_type, settings.label_smoothing, settings.rpo_alpha)

    @property
    def may_lack_reference(self) -> bool:
        """Whether the loss is one without a reference, too: in ipo the log-ratio is what it regularizes."""
        return self.loss_type != "ipo"

    def start_loss(self) -> float | None:
        if self.rpo_alpha:
            return None
        return {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 1 / (2 * self.beta) ** 2}[self.loss_type]

    @property
    def likelihood_weight(self) -> float:
        return self.rpo_alpha

    def compare(self, tokens: TrainedTokens, answers: Answers) -> Compared:
        logprob_D, reference_D = answers.logprob_D, tokens.sum_documents(tokens.values["reference"])
        # Both rounded alike, so that their difference is exactly 0 where the model still is the reference.
        ratio_D = (logprob_D.to(reference_D.dtype) - reference_D).to(logprob_D.dtype)
        factor_D = answers.shares if self.loss_type == "ipo" else torch.full_like(answers.weight_D, self.beta)
        margin_P = difference(ratio_D * factor_D)
        loss_P, slope_P = margin_loss(margin_P, self.loss_type, self.beta, self.label_smoothing)
        return Compared(loss_P, opposed(slope_P) * factor_D, self.beta * ratio_D, logprob_D)
