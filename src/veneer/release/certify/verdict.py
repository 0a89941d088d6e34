"""Compares the score of an artifact with that of the judged model on the same held-out rows, in pairs.

Two models with equal scores may have other rows right, so each row counts: from wrong to right, from right to wrong.
The difference has a paired interval, and the verdict says what so many rows can show: better, same (no loss of 5
points), worse, or neither, with the number of rows that would. Only `worse` fails.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from veneer.config import Evaluate
from veneer.config.results import Check
from veneer.evaluation.metrics import right_rows
from veneer.evaluation.metrics.metric import Sample
from veneer.evaluation.paired import Paired, paired
from veneer.release.certify.prompts import Prompt
from veneer.release.certify.runtimes import Answer
from veneer.training.intervals import proportion


@dataclass(frozen=True)
class Verdict:
    """The score of an artifact beside that of the judged model.

    Attributes:
        judged, artifact: Which rows each has right, in the order of the rows.
        same_answers: Rows that both answer in the same words.
        source: Source of the judged answers: samples.jsonl, or answered again.
    """

    judged: tuple[bool, ...]
    artifact: tuple[bool, ...]
    same_answers: int
    source: str

    def turns(self) -> list[str]:
        """Say of each row what became of it: wrong to right, right to wrong, still right, still wrong."""
        return [TURNS[pair] for pair in zip(self.judged, self.artifact, strict=True)]

    @property
    def paired(self) -> Paired:
        return paired(self.judged, self.artifact)

    def as_dict(self) -> dict[str, Any]:
        rows = len(self.judged)
        scores = {
            name: proportion(sum(right), rows).as_dict()
            for name, right in (("judged", self.judged), ("artifact", self.artifact))
        }
        found = self.paired
        return scores | found.as_dict() | {
            "same_answers": self.same_answers,
            "smallest_visible": found.smallest_visible,
            "judged_answers": self.source,
        }  # fmt: skip

    def check(self) -> Check:
        """Return the check that fails where the score is worse."""
        found, rows = self.paired, len(self.judged)
        score, other = (f"{sum(right) / rows:.1%} ({sum(right)} of {rows})" for right in (self.artifact, self.judged))
        detail = describe(found)
        if not any(self.judged) and not any(self.artifact):
            detail += "; no row is answered exactly, so this score tells little: see the agreement"
        limit = f"not worse than {other}"
        return Check("score", found.verdict != "worse", score, limit, "held-out rows right", detail)


def describe(found: Paired) -> str:
    """Describe a paired comparison in one line."""
    low, value, high = (100 * x for x in (found.difference.low, found.difference.value, found.difference.high))
    what = "same (no loss of 5 points)" if found.verdict == "same" else found.verdict
    return (
        f"{what}: {value:+.1f} points ({low:+.1f} to {high:+.1f}), "
        f"{found.gained} from wrong to right, {found.lost} from right to wrong"
    )


def verdict_of(
    prompts: Sequence[Prompt],
    judged: Sequence[Answer],
    answers: Sequence[Answer],
    source: str,
    settings: Evaluate | None = None,
) -> Verdict | None:
    """Compare the answers to held-out rows by the run's first metric that says right or wrong; None: there are no rows.

    Args:
        prompts: Held-out rows and edge cases.
        judged, answers: Answers of the judged model, and of the artifact.
        source: Source of the judged answers.
        settings: Settings of the run; None: it has none, and the metric is chosen by the rows.
    """
    rows = [n for n, prompt in enumerate(prompts) if prompt.reference is not None]
    if not rows:
        return None
    asked = [prompts[n] for n in rows]
    before, after = (right_answers(asked, [of[n] for n in rows], settings or Evaluate()) for of in (judged, answers))
    return Verdict(tuple(before), tuple(after), sum(judged[n].text == answers[n].text for n in rows), source)


def right_answers(prompts: Sequence[Prompt], answers: Sequence[Answer], settings: Evaluate) -> Sequence[bool]:
    """Return which answers to held-out rows are right by the run's settings."""
    samples = [
        Sample(prompt.id, prompt.messages[-1].content, prompt.reference or "", answer.text)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return right_rows(samples, settings)


TURNS = {
    (False, True): "wrong to right",
    (True, False): "right to wrong",
    (True, True): "still right",
    (False, False): "still wrong",
}
