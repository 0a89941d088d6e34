"""Simple preference optimization: the chosen answer's mean log-probability a token is to be ahead by a margin.

With a = log p(answer | prompt) / n, the mean over an answer's n trained tokens, the loss of a pair is

-log sigmoid(beta (a_chosen - a_rejected) - gamma) (arXiv 2405.14734, equation 6)

as in TRL's CPOTrainer with loss_type simpo and cpo_alpha 0; gamma is its simpo_gamma, and beta times the
gamma_beta_ratio of the paper's code. Rewards are beta a.
"""

from dataclasses import dataclass

from veneer.config import Simpo
from veneer.engine.objective import TrainedTokens
from veneer.training.objectives.pairs import Answers, Compared, PairObjective, difference, margin_loss, opposed


@dataclass(frozen=True)
class SimplePreference(PairObjective):
    """The objective of pairs by mean log-probabilities, without a reference.

    Attributes:
        beta: weight of the mean log-probabilities.
        gamma: margin by which the chosen answer is to be ahead.
    """

    beta: float = 2.0
    gamma: float = 0.5

    @staticmethod
    def of(settings: Simpo) -> "SimplePreference":
        return SimplePreference(settings.beta, settings.gamma)

    def compare(self, tokens: TrainedTokens, answers: Answers) -> Compared:
        average_D = answers.logprob_D * answers.shares
        reward_D = self.beta * average_D
        loss_P, slope_P = margin_loss(difference(reward_D) - self.gamma, "sigmoid", self.beta, 0.0)
        return Compared(loss_P, self.beta * opposed(slope_P) * answers.shares, reward_D, average_D)
