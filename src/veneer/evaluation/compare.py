"""Base against tuned on the same held-out rows: exact match of generated answers, and perplexity of the references.

Exact match is judged on text the model generates by itself, greedily, from the prompt alone (right.py); perplexity on
the reference's trained tokens. Where all references are JSON objects of the same keys, each key is judged as well
(fields.py). The base is the same model with its adapter switched off, in the same precision; examples in its prompt
show what it can do without training.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from veneer.config import Evaluate
from veneer.data import Batch, Conversation, Message, Renderer
from veneer.data.pipeline import HeldOut
from veneer.engine import Engine
from veneer.evaluation.fields import RECORD, field_scores
from veneer.evaluation.generation import generate
from veneer.evaluation.intervals import Interval, perplexity, perplexity_difference, proportion
from veneer.evaluation.memory import Batching, require_positions
from veneer.evaluation.paired import Paired, paired
from veneer.evaluation.right import expected_answer, is_right

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
        return is_right(self.answer, self.reference)


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
    batching: Batching | None = None  # rows at a time, as they came to be


@dataclass(frozen=True)
class Evaluation:
    """Base and tuned on the same rows.

    Attributes:
        shown: The base with examples in its prompt; None: not measured.
        exported: The tuned model as it was exported; None: not measured.
    """

    base: Score
    tuned: Score
    shown: Score | None = None
    exported: Score | None = None

    @property
    def decisive(self) -> str:
        """The metric that says whether a row is right: the whole record of JSON answers, else their text."""
        return RECORD if RECORD in self.base.right else "exact_match"

    @property
    def is_better(self) -> bool:
        """Whether the tuned model answers more rows right, beyond what chance explains."""
        return self.paired(self.decisive).difference.low > 0

    def paired(self, metric: str) -> Paired:
        """Tuned against the base, with examples where it was given some, by a metric that is a share."""
        return paired((self.shown or self.base).right[metric], self.tuned.right[metric])

    def as_dict(self) -> dict[str, Any]:
        """As `evaluation.json` has it."""
        found: dict[str, Any] = {
            "metrics": {name: self._metric(name) for name in self.base.metrics},
            "rows": self.base.rows,
        }
        if self.exported is not None:
            found["exported"] = paired(self.tuned.right[self.decisive], self.exported.right[self.decisive]).as_dict()
        return found

    def _metric(self, name: str) -> dict[str, Any]:
        """One metric of all models; differences pair the rows."""
        values = {"base": self.base.metrics[name].as_dict(), "tuned": self.tuned.metrics[name].as_dict()}
        if name not in self.base.right:
            losses = self.base.losses, self.tuned.losses, self.base.tokens
            return values | {"difference": perplexity_difference(*losses).as_dict()}
        values["difference"] = paired(self.base.right[name], self.tuned.right[name]).difference.as_dict()
        if self.shown is not None:
            values["base_with_examples"] = self.shown.metrics[name].as_dict()
            values["difference_with_examples"] = self.paired(name).difference.as_dict()
        if self.exported is not None:
            values["exported"] = self.exported.metrics[name].as_dict()
        return values

    def samples(self) -> list[dict[str, Any]]:
        """Lines of `samples.jsonl`."""
        lines: list[dict[str, Any]] = [
            {
                "place": base.place,
                "prompt": base.prompt,
                "reference": base.reference,
                "base": base.answer,
                "tuned": tuned.answer,
                "base_right": base_right,
                "tuned_right": tuned_right,
            }
            for base, tuned, base_right, tuned_right in zip(
                self.base.samples,
                self.tuned.samples,
                self.base.right.get(self.decisive, ()),  # none of documents, which ask nothing
                self.tuned.right.get(self.decisive, ()),
                strict=True,
            )
        ]
        for name, score in (("base_with_examples", self.shown), ("exported", self.exported)):
            for line, sample in zip(lines, score.samples if score else (), strict=score is not None):
                line[name] = sample.answer
        return lines


@dataclass(frozen=True)
class Scorer:
    """Scores a model on held-out rows, with its adapter and without.

    Attributes:
        model: The PEFT model, which answers.
        engine: The engine that runs it: it measures losses and switches the adapter off.
        renderer: Its tokenizer and template.
        held_out: The rows.
        settings: max_new_tokens and batch_size.
    """

    model: Any
    engine: Engine
    renderer: Renderer
    held_out: Sequence[HeldOut]
    settings: Evaluate

    def compare(self, on_done: Progress = lambda done: None) -> Evaluation:
        """The scores of the base and of the tuned model; `on_done` gets the number of rows just answered."""
        with self.engine.adapter_off():
            base = self.score(on_done)
        return Evaluation(base, self.score(on_done, batching=base.batching))

    def score(
        self,
        on_done: Progress = lambda done: None,
        examples: Sequence[Message] = (),
        with_losses: bool = True,
        batching: Batching | None = None,
    ) -> Score:
        """Generate an answer to each row and judge it; measure the loss of the references. Documents ask nothing.

        Args:
            on_done: Called with the number of rows just answered.
            examples: Turns that stand between the system prompt and each row's own.
            with_losses: Whether to measure losses, which are of the rows without the examples.
            batching: Rows at a time, as they came to be for another model; None: `evaluate.batch_size`.
        """
        batching = batching or Batching(self.settings.batch_size)
        model, renderer, held_out = self.model, self.renderer, self.held_out
        require_positions(model, [(row.example.place, len(row.example.ids)) for row in held_out])
        asked = questions(held_out)
        prompts = [renderer.prompt_ids(_behind(examples, chat.prompt()), chat.tools) for chat in asked]
        answers = generate(model, renderer, prompts, self.settings.max_new_tokens, batching, on_done=on_done)
        losses, tokens = _losses(self.engine, held_out, batching) if with_losses else ([], [])
        return replace(judge(renderer, held_out, answers, losses, tokens), batching=batching)


def questions(held_out: Sequence[HeldOut]) -> list[Conversation]:
    """The rows that ask something: documents do not."""
    return [row.conversation for row in held_out if not row.conversation.is_document]


def count_rows(held_out: Sequence[HeldOut]) -> int:
    """How many rows these are; pieces of one document, which are not independent, are one."""
    return len({row.conversation.place for row in held_out})


def judge(
    renderer: Renderer,
    held_out: Sequence[HeldOut],
    answers: Sequence[str],
    losses: Sequence[float] = (),
    tokens: Sequence[float] = (),
) -> Score:
    """Score answers, whoever gave them.

    Args:
        renderer: Of the training: what it makes of a row's last answer is the right one.
        held_out: The rows.
        answers: One to each row that asks something.
        losses, tokens: Summed loss and trained tokens of each row; none: not measured.
    """
    samples = [
        Sample(
            place=conversation.place,
            prompt=conversation.prompt()[-1].content if conversation.prompt() else "",
            reference=expected_answer(renderer, conversation),
            answer=answer,
        )
        for conversation, answer in zip(questions(held_out), answers, strict=True)
    ]
    right = {"exact_match": [sample.is_right for sample in samples]} if samples else {}
    right |= field_scores(answers, [sample.reference for sample in samples])
    metrics = {name: proportion(sum(rows), len(rows)) for name, rows in right.items()}
    if losses:
        metrics["perplexity"] = perplexity(losses, tokens)
    return Score(metrics, samples, count_rows(held_out), right, list(losses), list(tokens))


def _behind(examples: Sequence[Message], turns: Sequence[Message]) -> list[Message]:
    """A prompt's turns with examples behind its system prompt."""
    systems = 1 if turns and turns[0].role == "system" else 0
    return [*turns[:systems], *examples, *turns[systems:]]


def _losses(engine: Engine, held_out: Sequence[HeldOut], batching: Batching) -> tuple[list[float], list[float]]:
    """Summed loss and trained tokens of each row, the longest first; pieces of one document are one row."""
    ordered = sorted(held_out, key=lambda row: -len(row.example.ids))
    of_batches = batching.over(
        [row.example for row in ordered], lambda examples: engine.losses(Batch.of(examples)).tolist()
    )
    losses: dict[str, float] = defaultdict(float)
    tokens: dict[str, float] = defaultdict(float)
    for row, loss in zip(ordered, chain.from_iterable(of_batches), strict=True):
        losses[row.conversation.place] += loss
        tokens[row.conversation.place] += row.example.weight
    return [*losses.values()], [*tokens.values()]
