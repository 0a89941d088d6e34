"""Base against tuned on the same held-out rows: exact match of generated answers, and perplexity of the references.

Exact match is judged on text the model generates by itself, greedily, from the prompt alone; perplexity on the
reference's trained tokens. The base is the same model with its adapter switched off, in the same precision.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from veneer.config import Evaluate
from veneer.data import Batch, Renderer
from veneer.data.prepare import HeldOut
from veneer.engine import Engine
from veneer.engine.temporary import adapter_off
from veneer.evaluate.generation import generate
from veneer.evaluate.intervals import Interval, perplexity, proportion
from veneer.evaluate.memory import Batching, require_positions

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
    """One model on the held-out rows."""

    metrics: dict[str, Interval]
    samples: list[Sample]
    rows: int
    batching: Batching | None = None  # rows at a time, as they came to be


@dataclass(frozen=True)
class Evaluation:
    """Base and tuned on the same rows."""

    base: Score
    tuned: Score

    @property
    def is_better(self) -> bool:
        """Whether the tuned model answers more rows exactly right, beyond what chance explains."""
        return self.tuned.metrics["exact_match"].low > self.base.metrics["exact_match"].high

    def as_dict(self) -> dict[str, Any]:
        """As `evaluation.json` has it."""
        metrics = {
            name: {"base": self.base.metrics[name].as_dict(), "tuned": self.tuned.metrics[name].as_dict()}
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
    batching: Batching | None = None,
) -> Score:
    """Generate an answer to each row and judge it; measure the loss of the references. Documents ask nothing."""
    batching = batching or Batching(settings.batch_size)
    require_positions(model, [(row.example.place, len(row.example.ids)) for row in held_out])
    asked = [row.conversation for row in held_out if not row.conversation.is_document]
    prompts = [renderer.prompt_ids(conversation.prompt(), conversation.tools) for conversation in asked]
    answers = generate(model, renderer, prompts, settings.max_new_tokens, batching, on_done=on_done)
    samples = [
        Sample(
            place=conversation.place,
            prompt=conversation.prompt()[-1].content if conversation.prompt() else "",
            reference=conversation.reference(),
            answer=answer,
        )
        for conversation, answer in zip(asked, answers, strict=True)
    ]
    losses: list[float] = []
    ordered = sorted((row.example for row in held_out), key=lambda example: -len(example.ids))
    for batch_losses in batching.over(ordered, lambda examples: engine.losses(Batch.of(examples)).tolist()):
        losses += batch_losses
    tokens = [example.weight for example in ordered]
    metrics = {"perplexity": perplexity(losses, tokens)}
    if samples:
        metrics = {"exact_match": proportion(sum(sample.is_right for sample in samples), len(samples))} | metrics
    return Score(metrics, samples, len(held_out), batching)


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
    return Evaluation(base, score(model, engine, renderer, held_out, settings, on_done, base.batching))
