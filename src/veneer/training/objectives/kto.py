"""Kahneman-Tversky optimization: good answers are to gain on a reference, and bad ones to lose, as rated one by one.

With the log-ratio r = log p(answer | prompt) - log p_reference(answer | prompt), summed over an answer's trained
tokens, and the reference point z, the loss of a row is (arXiv 2402.01306, equations 7 and 8)

good: desirable_weight (1 - sigmoid(beta (r - z)))
bad: undesirable_weight (1 - sigmoid(beta (z - r)))

z estimates the KL divergence of the model from the reference: the mean of r over prompts with the answers of other
rows, and 0 where that is below 0. It has no gradient. `veneer.training.kl_estimate` measures it, over all of a step.

These are the formulas of TRL's KTOTrainer, whose z is a micro-batch's. Loss is a mean over rows, `rewards/chosen` and
`logps/chosen` are means over good rows, those of rejected over bad ones; rewards are beta r.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from veneer.config import Kto
from veneer.data.batch import Batch
from veneer.engine.objective import Objective, StepOutput, TrainedTokens

KL = "kl"
# Of a step: its rows by those that are good, or bad; 0: there are none.
ROWS_PER_GOOD, ROWS_PER_BAD = "rows_per_good", "rows_per_bad"


@dataclass(frozen=True)
class KahnemanTversky(Objective):
    """The objective of rated rows. D documents, one a row.

    Attributes:
        beta: weight of the log-ratios.
        desirable_weight, undesirable_weight: weights of the loss of good and of bad answers.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    needs_reference = True
    needs_kl = True

    @staticmethod
    def of(settings: Kto) -> "KahnemanTversky":
        return KahnemanTversky(settings.beta, settings.desirable_weight, settings.undesirable_weight)

    def start_loss(self) -> float | None:
        return 0.5 if self.desirable_weight == self.undesirable_weight == 1 else None

    def weight(self, batch: Batch) -> float:
        return float(len(batch.lengths))

    def step_values(self, batches: Iterable[Batch]) -> dict[str, float]:
        labels = torch.cat([host.sum_documents(host.values["label"]) for host in map(TrainedTokens.on_host, batches)])
        good, bad = int((labels > 0).sum()), int((labels < 0).sum())
        found = {ROWS_PER_GOOD: good, ROWS_PER_BAD: bad}
        return {KL: 0.0} | {name: len(labels) / count if count else 0.0 for name, count in found.items()}

    def __call__(self, tokens: TrainedTokens) -> tuple[StepOutput, torch.Tensor]:
        logprob_D = tokens.sum_documents(tokens.logprobs_N * tokens.weights_N)
        reference_D = tokens.sum_documents(tokens.values["reference"])
        # Both rounded alike, so that their difference is exactly 0 where the model still is the reference.
        ratio_D = (logprob_D.to(reference_D.dtype) - reference_D).to(logprob_D.dtype)
        label_D = tokens.sum_documents(tokens.values["label"]).to(logprob_D.dtype)  # 1, -1, and 0 of padding
        kl, per_good, per_bad = (
            # All tokens have one value, and padding 0.
            tokens.values[name].amax().to(logprob_D.dtype)
            for name in (KL, ROWS_PER_GOOD, ROWS_PER_BAD)
        )
        value_D = torch.sigmoid(self.beta * label_D * (ratio_D - kl))
        weight_D = torch.where(label_D > 0, self.desirable_weight, self.undesirable_weight) * label_D.abs()
        slope_D = -self.beta * weight_D * label_D * value_D * (1 - value_D)
        rows = label_D.abs().sum()
        metrics = {"kl": kl * rows}
        for side, per_row, is_of_side_D in (("chosen", per_good, label_D > 0), ("rejected", per_bad, label_D < 0)):
            for name, found_D in (("rewards", self.beta * ratio_D), ("logps", logprob_D)):
                total = torch.where(is_of_side_D, found_D, 0.0).sum() * per_row
                metrics[f"{name}/{side}"] = torch.where(per_row > 0, total, torch.nan)
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        loss = (weight_D * (1 - value_D)).sum()
        return StepOutput(loss, rows, metrics), tokens.to_tokens(slope_D) * tokens.weights_N
