"""Supervised training: the cross-entropy of the trained tokens, each by its weight."""

import math

from veneer.engine.objective import NegativeLogLikelihood


class Supervised(NegativeLogLikelihood):
    """The objective of rows with answers."""

    def held_out_metrics(self, loss: float) -> dict[str, float | None]:
        return {"perplexity": math.exp(loss) if loss < 700 else None}
