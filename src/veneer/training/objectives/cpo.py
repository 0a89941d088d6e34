"""Contrastive preference optimization: dpo without a reference, beside the chosen answers' likelihood.

With log-probabilities l = log p(answer | prompt), summed over an answer's trained tokens, n of them, and the margin
m = beta (l_chosen - l_rejected), the loss of a pair is

sigmoid: -(1 - s) log sigmoid(m) - s log sigmoid(-m), s = label_smoothing (arXiv 2401.08417, equation 3)
hinge: max(0, 1 - m) (SLiC, arXiv 2305.10425)
ipo: (l_chosen / n_chosen - l_rejected / n_rejected - 1 / (2 beta))^2 (arXiv 2310.12036, equation 17, without reference)

and cpo_alpha times the negative log-likelihood of the chosen answers, a mean over their tokens, is added.

These are the formulas of TRL's CPOTrainer. Rewards are beta l, of ipo beta l / n.
"""

from dataclasses import dataclass

import torch

from veneer.config import Cpo
from veneer.engine.objective import TrainedTokens
from veneer.training.objectives.pairs import Answers, Compared, PairObjective, difference, margin_loss, opposed


@dataclass(frozen=True)
class ContrastivePreference(PairObjective):
    """The objective of pairs without a reference, with the chosen answers' likelihood.

    Attributes:
        beta: weight of the log-probabilities.
        loss_type: sigmoid, hinge or ipo.
        label_smoothing: share of the pairs that are taken to be the wrong way round; of sigmoid alone.
        cpo_alpha: weight of the chosen answers' negative log-likelihood.
    """

    beta: float = 0.1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    cpo_alpha: float = 1.0

    @staticmethod
    def of(settings: Cpo) -> "ContrastivePreference":
        return ContrastivePreference(settings.beta, settings.loss_type, settings.label_smoothing, settings.cpo_alpha)

    @property
    def likelihood_weight(self) -> float:
        return self.cpo_alpha

    def compare(self, tokens: TrainedTokens, answers: Answers) -> Compared:
        is_ipo = self.loss_type == "ipo"
        share_D = answers.shares if is_ipo else torch.ones_like(answers.weight_D)
        logps_D = answers.logprob_D * share_D
        factor = 1.0 if is_ipo else self.beta
        loss_P, slope_P = margin_loss(factor * difference(logps_D), self.loss_type, self.beta, self.label_smoothing)
        return Compared(loss_P, factor * opposed(slope_P) * share_D, self.beta * logps_D, logps_D)
