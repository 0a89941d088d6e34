"""Says once, while pairs are learnt, what their loss does not show.

Chosen answers may lose probability, as long as rejected ones lose more (arXiv 2410.08847; the remedy by their own
likelihood: arXiv 2404.19733). And margins may follow from lengths alone: summed over tokens, long answers have large
log-ratios (arXiv 2403.19159). Both are read from the records of metrics.jsonl, so that any objective is watched whose
metrics have these names.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from veneer.config.notify import notify
from veneer.training.pair_values import LENGTH_CORRELATION, MARGINS, is_shown_above

FALL = 0.1  # of the chosen answers' log-probability, beyond which it is told
STEPS = 10  # training steps whose mean is taken
CORRELATION = 0.5  # of margins with lengths by rank, beyond which it is told
CHOSEN, LOGPS = "rewards/chosen", "logps/chosen"
WHERE = "train.objective"


class PreferenceWatch:
    """A listener that warns of chosen answers that fall, and of margins that follow lengths.

    Args:
        beta: weight of the log-ratios in rewards; None: they are relative to no reference, and the first evaluation is
            what later ones are compared with.
        held_out: number of held-out pairs.
    """

    def __init__(self, beta: float | None, held_out: int) -> None:
        self._beta, self._held_out = beta, held_out
        self._steps: deque[Mapping[str, Any]] = deque(maxlen=STEPS)
        self._first: float | None = None
        self._told: set[str] = set()

    def recall(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take records of a resumed run into account, which were told of before."""
        for record in records:
            self._findings(record)

    def __call__(self, record: Mapping[str, Any]) -> None:
        for message in self._findings(record):
            notify(message, where=WHERE)

    def _findings(self, record: Mapping[str, Any]) -> list[str]:
        """Return what a record shows for the first time."""
        found = {"fall": self._fall(record), "length": self._length(record)}
        new = {name: message for name, message in found.items() if message and name not in self._told}
        self._told |= set(new)
        return list(new.values())

    def _fall(self, record: Mapping[str, Any]) -> str:
        if record.get(LOGPS) is None:
            return ""
        is_held_out = record["kind"] == "eval"
        if is_held_out:
            now, before = record[LOGPS], self._before(record)
            is_shown = self._beta is None or record.get("intervals", {}).get(CHOSEN, [0, 0])[1] < 0
        else:
            self._steps.append(record)
            if len(self._steps) < STEPS or self._beta is None:
                return ""
            now, before = (sum(values) / STEPS for values in zip(*map(self._both, self._steps), strict=True))
            is_shown = True
        if before is None or before >= 0 or not is_shown or now > before * (1 + FALL):
            return ""
        whose = "held-out pairs" if is_held_out else f"the pairs of the last {STEPS} steps"
        since = "the first evaluation" if self._beta is None else "the reference"
        return (
            f"step {record['step']}: chosen answers lose probability. Their log-probability is {now:.1f} on {whose}, "
            f"{before - now:.1f} below that of {since} ({before:.1f}): where margins grow, rejected answers lose "
            "more\n  fix: lower train.learning_rate, raise beta, or weigh the chosen answers' own likelihood "
            "(rpo_alpha of dpo, cpo_alpha of cpo)"
        )

    def _before(self, record: Mapping[str, Any]) -> float | None:
        if self._beta is not None and record.get(CHOSEN) is not None:
            return self._both(record)[1]
        if self._first is None:
            self._first = record[LOGPS]
        return self._first

    def _both(self, record: Mapping[str, Any]) -> tuple[float, float]:
        """Return the log-probability of chosen answers, and that of the reference."""
        assert self._beta is not None
        return record[LOGPS], record[LOGPS] - record[CHOSEN] / self._beta

    def _length(self, record: Mapping[str, Any]) -> str:
        correlation = record.get(LENGTH_CORRELATION)
        if correlation is None or (record.get(MARGINS) or 0) <= 0:
            return ""
        if not is_shown_above(correlation, CORRELATION, self._held_out):
            return ""
        return (
            f"step {record['step']}: margins on held-out pairs follow the lengths of their answers (rank correlation "
            f"{correlation:.2f} with the tokens that the chosen one is longer by): the model may learn to write long "
            "answers, and little else\n  fix: compare means a token (dpo or cpo with loss_type: ipo, or simpo), or add "
            "pairs whose chosen answer is the shorter one"
        )
