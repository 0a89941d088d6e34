"""Odds ratio preference optimization: the chosen answers' likelihood, and their odds against the rejected ones.

With a = log p(answer | prompt) / n, the mean over an answer's n trained tokens, and its log-odds
o = a - log(1 - exp(a)), the loss of a pair is

-beta log sigmoid(o_chosen - o_rejected) (arXiv 2403.07691, equations 4 to 7)

and the negative log-likelihood of the chosen answers, a mean over their tokens, is added with weight 1.

These are the formulas of TRL's ORPOTrainer, whose beta is the paper's lambda, but for one thing: its likelihood is that
of prompts too. Here it is that of answers, as in supervised training. Rewards are beta a.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from veneer.config import Orpo
from veneer.engine.objective import TrainedTokens
from veneer.training.objectives.pairs import Answers, Compared, PairObjective, difference, opposed

CERTAIN = -1e-7  # log-probability of an answer whose odds are as good as infinite


@dataclass(frozen=True)
class OddsRatioPreference(PairObjective):
    """The objective of pairs by odds, without a reference.

    Attributes:
        beta: weight of the odds ratio.
    """

    beta: float = 0.1

    @staticmethod
    def of(settings: Orpo) -> "OddsRatioPreference":
        return OddsRatioPreference(settings.beta)

    @property
    def likelihood_weight(self) -> float:
        return 1.0

    def compare(self, tokens: TrainedTokens, answers: Answers) -> Compared:
        average_D = (answers.logprob_D * answers.shares).clamp(max=CERTAIN)
        unlikely_D = -torch.expm1(average_D)  # 1 - p
        log_odds_P = difference(average_D - unlikely_D.log())
        ratio_P = F.logsigmoid(log_odds_P)
        slope_D = -self.beta * opposed(torch.sigmoid(-log_odds_P)) / unlikely_D * answers.shares
        metrics = {"log_odds_ratio": ratio_P, "log_odds_chosen": log_odds_P}
        return Compared(-self.beta * ratio_P, slope_D, self.beta * average_D, average_D, metrics)
