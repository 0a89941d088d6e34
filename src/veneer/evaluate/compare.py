"""Base against tuned on the same held-out rows: exact match of generated answers, and perplexity of the references.

Exact match is judged on text the model generates by itself, greedily, from the prompt alone; perplexity on the
reference's trained tokens. Where all references are JSON objects of the same keys, each key is judged as well
(fields.py). The base is the same model with its adapter switched off, in the same precision; examples in its prompt
show what it can do without training.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from veneer.config import Evaluate
from veneer.data import Batch, Message, Renderer
from veneer.data.prepare import HeldOut
from veneer.engine import Engine
from veneer.engine.temporary import adapter_off
from veneer.evaluate.fields import field_scores
from veneer.evaluate.generation import generate
from veneer.evaluate.intervals import Interval, perplexity, perplexity_difference, proportion
from veneer.evaluate.paired import Paired, paired

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Sample:
    """One held-out row with an answer."""

    place: str
    prompt: str
    reference: str
    answer: str

    @property
    def is_right(self) -> bool:
        return self.answer == self.reference.strip()


@dataclass(frozen=True)
class Score:
    """One model on the held-out rows.

    Attributes:
        right: By each metric that is a share: which of the samples are right.
        losses, tokens: Of each row, the longest first: summed loss and trained tokens; none: not measured.
    """

    metrics: dict[str, Interval]
    samples: list[Sample]
    rows: int
    right: dict[str, list[bool]] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """Base and tuned on the same rows."""

    base: Score
    tuned: Score

    @property
    def is_better(self) -> bool:
        """Whether the tuned model answers more rows exactly right, beyond what chance explains."""
        return self.paired("exact_match").difference.low > 0

    def paired(self, metric: str) -> Paired:
        """Base and tuned by a metric that is a share, on the same rows."""
        return paired(self.base.right[metric], self.tuned.right[metric])

    def difference(self, metric: str) -> Interval:
        """Tuned less base, with an interval that pairs the rows."""
        if metric in self.base.right:
            return self.paired(metric).difference
        return perplexity_difference(self.base.losses, self.tuned.losses, self.base.tokens)

    def as_dict(self) -> dict[str, Any]:
        """As `evaluation.json` has it."""
        metrics = {
            name: {
                "base": self.base.metrics[name].as_dict(),
                "tuned": self.tuned.metrics[name].as_dict(),
                "difference": self.difference(name).as_dict(),
            }
            for name in self.base.metrics
        }
        return {"metrics": metrics, "rows": self.base.rows}

    def samples(self) -> list[dict[str, Any]]:
        """Lines of `samples.jsonl`."""
        return [
            {
                "place": base.place,
                "prompt": base.prompt,
                "reference": base.reference,
                "base": base.answer,
                "tuned": tuned.answer,
                "base_right": base.is_right,
                "tuned_right": tuned.is_right,
            }
            for base, tuned in zip(self.base.samples, self.tuned.samples, strict=True)
        ]


def score(
    model: Any,
    engine: Engine,
    renderer: Renderer,
    held_out: Sequence[HeldOut],
    settings: Evaluate,
    on_done: Progress = lambda done: None,
    examples: Sequence[Message] = (),
    with_losses: bool = True,
) -> Score:
    """Generate an answer to each row and judge it; measure the loss of the references. Documents ask nothing.

    Args:
        examples: Turns that stand between the system prompt and each row's own.
        with_losses: Whether to measure losses, which are of the rows without the examples.
    """
    asked = [row.conversation for row in held_out if not row.conversation.is_document]
    prompts = [renderer.prompt_ids(_behind(examples, chat.prompt()), chat.tools) for chat in asked]
    answers = generate(model, renderer, prompts, settings.max_new_tokens, settings.batch_size, on_done=on_done)
    samples = [
        Sample(
            place=conversation.place,
            prompt=conversation.prompt()[-1].content if conversation.prompt() else "",
            reference=conversation.reference(),
            answer=answer,
        )
        for conversation, answer in zip(asked, answers, strict=True)
    ]
    losses, tokens = _losses(engine, held_out, settings.batch_size) if with_losses else ([], [])
    right = {"exact_match": [sample.is_right for sample in samples]} if samples else {}
    right |= field_scores(answers, [sample.reference for sample in samples])
    metrics = {name: proportion(sum(rows), len(rows)) for name, rows in right.items()}
    if with_losses:
        metrics["perplexity"] = perplexity(losses, tokens)
    return Score(metrics, samples, len(held_out), right, losses, tokens)


def _behind(examples: Sequence[Message], turns: Sequence[Message]) -> list[Message]:
    """A prompt's turns with examples behind its system prompt."""
    systems = 1 if turns and turns[0].role == "system" else 0
    return [*turns[:systems], *examples, *turns[systems:]]


def _losses(engine: Engine, held_out: Sequence[HeldOut], batch_size: int) -> tuple[list[float], list[float]]:
    """Summed loss and trained tokens of each row, the longest row first."""
    losses: list[float] = []
    tokens: list[float] = []
    ordered = sorted((row.example for row in held_out), key=lambda example: -len(example.ids))
    for start in range(0, len(ordered), batch_size):
        examples = ordered[start : start + batch_size]
        losses += engine.losses(Batch.of(examples)).tolist()
        tokens += [example.weight for example in examples]
    return losses, tokens


def compare(
    model: Any,
    engine: Engine,
    renderer: Renderer,
    held_out: Sequence[HeldOut],
    settings: Evaluate,
    on_done: Progress = lambda done: None,
    base: Score | None = None,
) -> Evaluation:
    """Score the base and the tuned model; a base that was scored before may be given."""
    if base is None:
        with adapter_off(model, engine):
            base = score(model, engine, renderer, held_out, settings, on_done)
    return Evaluation(base, score(model, engine, renderer, held_out, settings, on_done))
