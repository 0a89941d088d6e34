"""Reward modelling: the reward of the chosen answer is to be above that of the rejected one.

With rewards r, the loss of a pair is -log sigmoid(r_chosen - r_rejected), by which Bradley and Terry (1952) model that
the one is preferred (arXiv 2203.02155, equation 1). The engine gives a reward in a log-probability's place.
"""

from dataclasses import dataclass

from veneer.engine.objective import TrainedTokens
from veneer.training.objectives.pairs import Answers, Compared, PairObjective, difference, margin_loss, opposed


@dataclass(frozen=True)
class BradleyTerry(PairObjective):
    """The objective of reward models."""

    def compare(self, tokens: TrainedTokens, answers: Answers) -> Compared:
        reward_D = answers.logprob_D
        loss_P, slope_P = margin_loss(difference(reward_D), "sigmoid", 1.0, 0.0)
        return Compared(loss_P, opposed(slope_P), reward_D, reward_D)
