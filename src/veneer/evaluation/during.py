"""Measures metrics of generated answers while a model is being trained (`evaluate.during`).

The model that is trained answers by itself, through Transformers, with the adapter as it is at that step. A sample of
the held-out rows, drawn once by `train.seed`, is answered greedily each time, so that the values of a run compare with
each other; `veneer evaluate` answers more rows, and with longer answers, and its values are the ones to report.
Nothing of the training changes: random numbers and the model's mode are put back, and no gradient is computed.

The sample is bounded by tokens and not by rows: a row takes its prompt and the longest answer that may be generated.
No answer may be longer than twice the longest reference, since a model that does not end its answer is wrong by then.

The first rows' answers stand in the record (`samples`), for the page of the run to show how they change; the base's
own answers to them are generated once, and stand in the first record of each process.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from veneer.config import JobError, Run, UserError
from veneer.config.foreign import misspelt
from veneer.data.pipeline import Prepared
from veneer.data.render import Renderer
from veneer.engine.interface import Engine
from veneer.evaluation.compare import Score, count_rows, judge, questions_of, reference_of
from veneer.evaluation.generation import generate
from veneer.evaluation.memory import LESS_MEMORY
from veneer.evaluation.metrics import METRICS, choose
from veneer.evaluation.metrics.metric import MetricResult, Sample, ScoredRows
from veneer.machine.batching import Batching
from veneer.machine.device import rng_state, set_rng_state
from veneer.model.full import is_full
from veneer.training.best import BETTER, LOSS
from veneer.training.objectives.supervised import Supervised
from veneer.training.parts import ON_HOST, ON_HOST_FIX

SHOWN = 3  # rows whose answers are recorded
SHOWN_CHARACTERS = 600  # of a text there


class _StoppedError(Exception):
    """The run is to stop while it answers."""


class DuringTraining:
    """Measures `evaluate.during` on a sample of a run's held-out rows.

    Args:
        run: The settings.
        data: The run's data.
        renderer: Tokenizer and template of the model.

    Attributes:
        rows: The sample, in the order in which it was drawn.
        max_new_tokens: Longest answer.
        better: Better values of the metric by which the best step is found: lower or higher.

    Raises:
        UserError: A metric is unknown, these rows cannot carry it, or the best step cannot be found by it.
    """

    def __init__(self, run: Run, data: Prepared, renderer: Renderer) -> None:
        settings = run.evaluate
        self._renderer = renderer
        of_answers = {LOSS, *Supervised().held_out_metrics(0.0)}
        self._recorded = of_answers if data.kind == "single" else set(BETTER) - of_answers | {LOSS}  # in every record
        self._names: list[str] = [name for name in settings.during if name not in self._recorded]
        self._settings = settings.model_copy(update={"metrics": tuple(self._names)})
        longest = int(data.validation.corpus.trained[data.validation.examples].max())
        self.max_new_tokens = min(settings.max_new_tokens, 2 * longest)
        most = max(1, settings.during_tokens // self.max_new_tokens)
        drawn = data.held_out_sample(min(most, settings.rows or most), run.train.seed)
        asked = [row for row in drawn if not row.conversation.is_document]
        prompts = [renderer.prompt_ids(row.conversation.prompt(), row.conversation.tools) for row in asked]
        count = _within(prompts, self.max_new_tokens, settings.during_tokens)
        self.rows, self._prompts = asked[:count], prompts[:count]
        self._batching = Batching(settings.batch_size, LESS_MEMORY)  # fewer rows at a time, once memory was short
        self._has_base = False  # whether the base's answers were recorded
        self._require_names()
        self._followed = run.train.early_stopping.metric if run.train.early_stopping is not None else LOSS
        self.better = BETTER[self._followed] if self._followed in self._recorded else self._better()

    def measure(self, model: Any, engine: Engine, stopped: Callable[[], bool]) -> dict[str, Any] | None:
        """Answer the sample and return the metrics' values, rows answered and samples; None where it was stopped.

        Args:
            model: The PEFT model that is trained; its mode is put back.
            engine: The engine that trains it.
            stopped: Function that says whether to stop; it is asked before each batch.

        Raises:
            JobError: Not even one row at a time fits into memory, or weights are in the host's memory.
        """
        if not self._names:
            return {}
        if len({parameter.device for parameter in model.parameters()}) > 1:
            raise JobError(f"evaluate.during: {ON_HOST}\n  fix: {ON_HOST_FIX}")

        def go_on(done: int) -> None:
            if stopped():
                raise _StoppedError

        began_with, was_training = rng_state(), model.training
        try:
            go_on(0)
            write = partial(generate, model, self._renderer, max_new_tokens=self.max_new_tokens)
            answers = write(self._prompts, batch_size=self._batching, on_done=go_on)
            of_base: list[str] = []
            if not (self._has_base or is_full(model)):
                with engine.adapter_off():
                    of_base = write(self._prompts[:SHOWN], batch_size=self._batching, on_done=go_on)
                self._has_base = True
        except _StoppedError:
            return None
        finally:
            set_rng_state(began_with)
            model.train(was_training)
        score = judge(self._renderer, self.rows, answers, ScoredRows((), settings=self._settings))
        values = {name: result.interval.value for name, result in score.results.items()}
        if self._followed in self._names and self._followed not in values:
            values[self._followed] = self._deciding(score).interval.value
        return values | {"answered_rows": count_rows(self.rows), "samples": _shown(score.samples[:SHOWN], of_base)}

    def _deciding(self, score: Score) -> MetricResult:
        """Return the result that stands for the metric by which the best step is found, whatever name it has."""
        metric = next(metric for metric in choose(self._questions()).metrics if metric.name == self._followed)
        return next(iter(metric.measure(ScoredRows(score.samples, settings=self._settings)).values()))

    def _better(self) -> str:
        """Return the better values of that metric, as its result on the right answers says.

        Raises:
            UserError: It has none.
        """
        references = [reference_of(self._renderer, row.conversation) for row in self.rows]
        better = self._deciding(judge(self._renderer, self.rows, references, self._questions())).better
        if not better:
            raise UserError(
                f"train.early_stopping.metric = {self._followed}: it describes answers and does not judge them",
                "name another metric of evaluate.during, or loss",
            )
        return better

    def _questions(self) -> ScoredRows:
        return questions_of(self._renderer, self.rows, self._settings)

    def _require_names(self) -> None:
        """Raise UserError for names that no metric has, or none that these rows' own references give a value to."""
        known = [*self._recorded, *(name for name, metric in METRICS.items() if metric.reads == "answers")]
        for name in self._names:
            if not self.rows or (name not in known and ":" not in name):
                near = misspelt(name, known)
                raise UserError(
                    f"evaluate.during: `{name}` is no metric of answers to the held-out rows",
                    f"did you mean `{near}`?" if near else f"name some of {', '.join(sorted(known))}",
                )
        if self._names:
            choose(self._questions())


def _shown(samples: Sequence[Sample], of_base: Sequence[str]) -> list[dict[str, str]]:
    """Return what a record says of answers, with those of the base where they were generated."""
    texts = [
        {"place": one.place, "prompt": one.prompt, "reference": one.reference, "answer": one.answer} for one in samples
    ]
    for text, answer in zip(texts, of_base):
        text["base"] = answer
    return [{key: value[:SHOWN_CHARACTERS] for key, value in text.items()} for text in texts]


def _within(prompts: Sequence[Sequence[int]], max_new_tokens: int, budget: int) -> int:
    """Return how many prompts fit into a budget of tokens with their answers; at least one."""
    used = 0
    for count, prompt in enumerate(prompts):
        used += len(prompt) + max_new_tokens
        if used > budget:
            return max(1, count)
    return len(prompts)
