"""`--on best` chooses the base that a QLoRA adapter is merged into by its answers to held-out rows.

The adapter was trained on the 4-bit base and makes up for its errors; on the 16-bit base it is another model. Usually
the 4-bit base, dequantized, is the better one (docs/release.md); where the 16-bit base is shown to be better, in pairs
of rows, it is taken. What is not shown is not a reason to ship another model than was judged.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from veneer.config import Evaluate, UserError
from veneer.evaluation.paired import Paired, paired
from veneer.model.tuned import TunedModel
from veneer.release.certify.certificate import batch_of, judged_answers
from veneer.release.certify.judged import Recorded
from veneer.release.certify.prompts import Prompt
from veneer.release.certify.runtimes import greedy
from veneer.release.certify.verdict import describe, right_answers
from veneer.release.merge.plan import require_any_bits, trained_on


@dataclass(frozen=True)
class BaseChoice:
    """The chosen base, and why.

    Attributes:
        on: nf4 or base.
        evidence: The 16-bit base against the 4-bit one, in pairs.
        judged, base: Share of rows that each has right.
    """

    on: str
    evidence: Paired
    judged: float
    base: float

    def as_dict(self) -> dict[str, Any]:
        why = f"on 16 bits {describe(self.evidence)}"
        return {"on": self.on, "judged": self.judged, "base": self.base, "rows": self.evidence.rows, "why": why}


def choose_base(
    tuned: TunedModel,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    recorded: dict[str, Recorded],
) -> BaseChoice:
    """Score the adapter on its base in 4 bits and in 16, on the same rows.

    Args:
        tuned: The adapter and its base.
        prompts: Held-out rows.
        max_new_tokens: Longest answer.
        recorded: Answers that evaluation recorded, taken where they are of all rows.

    Raises:
        UserError: The base was not quantized, the adapter belongs to 4 bits alone, or there are no held-out rows.
    """
    if trained_on(tuned) == "base":
        raise UserError(
            f"{tuned.name}: --on best, but training did not quantize its base: there is only one",
            "leave --on out",
        )
    require_any_bits(tuned, "--on best")
    rows = [prompt for prompt in prompts if prompt.reference is not None]
    if not rows:
        raise UserError(f"{tuned.name}: --on best: there are no held-out rows to choose by", "leave --on out")
    renderer, ends = tuned.renderer, set(tuned.stop_ids)
    model = None if all(row.id in recorded for row in rows) else tuned.load(tuned.dtype)
    judged, _ = judged_answers(model, renderer, rows, max_new_tokens, ends, recorded, batch_of(tuned))
    del model
    other = replace(tuned, quantization=None).load(tuned.dtype)
    answers = greedy(other, renderer.tokenizer, [row.ids for row in rows], max_new_tokens, ends, batch_of(tuned))
    settings = tuned.run.evaluate if tuned.run is not None else Evaluate()
    before, after = (right_answers(rows, found, settings) for found in (judged, answers))
    evidence = paired(before, after)
    on = "base" if evidence.verdict == "better" else "nf4"
    return BaseChoice(on, evidence, sum(before) / len(rows), sum(after) / len(rows))
