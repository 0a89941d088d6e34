"""Measures what held-out rows do not show: suites of general abilities and safety, memorisation, personal data."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from veneer.api.held_out import prepared_as_trained
from veneer.api.load import LoadedModel
from veneer.api.tasks import MeasuredTasks
from veneer.config import RunFolder
from veneer.engine.interface import Engine
from veneer.evaluation.compare import Evaluation
from veneer.evaluation.gate import Measured
from veneer.evaluation.memory import LESS_MEMORY, rows_at_a_time
from veneer.evaluation.metrics.metric import ShareRight
from veneer.evaluation.responder import ModelResponder, Progress
from veneer.evaluation.suites import Suite
from veneer.evaluation.suites.compare import SuiteComparison, answer_suites, forgetting, pair_suites
from veneer.evaluation.suites.memorisation import WANTED, comes_back, memorisation, passages_of, sample
from veneer.evaluation.suites.personal import count_personal
from veneer.machine.batching import Batching
from veneer.machine.ranks import ALONE, Ranks
from veneer.planning.batch_shapes import Padded
from veneer.training.intervals import Interval

LONGEST_PROMPT = 512  # tokens; no item of a suite has more, with any tokenizer


@dataclass(frozen=True)
class Beside:
    """What was measured beside the held-out rows.

    Attributes:
        facts: keys and values for evaluation.json.
        compared: suites that were asked, with their answers.
        tasks: tasks of lm-eval that were asked.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    compared: Sequence[SuiteComparison] = ()
    tasks: MeasuredTasks = field(default_factory=MeasuredTasks)

    def as_dict(self) -> dict[str, Any]:
        """Return its keys of evaluation.json."""
        return self.facts | ({"tasks": self.tasks.as_dict()} if self.tasks.compared else {})

    def sample_lines(self) -> str:
        """Return the answers to suites, JSON, a line an item."""
        lines = (sample for pair in self.compared for sample in pair.samples())
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def measured(self) -> dict[str, Measured]:
        """Return what a gate may name of the tuned model: tasks, suites, differences from the base, forgetting."""
        found = self.tasks.measured()
        for pair in self.compared:
            name, right = pair.suite.name, ShareRight(pair.tuned.right)
            found[name] = Measured(right.interval, len(right.true), right.unit)
            found[f"difference({name})"] = Measured(pair.difference, len(right.true), right.unit)
        if (lost := self.facts.get("suites", {}).get("forgetting")) is not None:
            interval = Interval(lost["value"], lost["low"], lost["high"])
            found["forgetting"] = Measured(interval, lost["rows"], lost["unit"])
        return found


def measure_suites(
    suites: Sequence[Suite],
    loaded: LoadedModel,
    engine: Engine,
    evaluation: Evaluation,
    on_done: Progress = lambda done: None,
    ranks: Ranks = ALONE,
) -> Beside:
    """Ask suites of the base and of the tuned model, and count personal data in all answers.

    Args:
        suites: Suites to ask.
        loaded: The tuned model.
        engine: The engine that switches its adapter off.
        evaluation: Answers to the held-out rows, in which personal data is counted too.
        on_done: Callback that gets the number of items just answered.
        ranks: This process among those that share the items.
    """
    batching = _batching(
        *(loaded, ranks),
        max(len(suite.items) for suite in suites),
        LONGEST_PROMPT,
        max(suite.max_new_tokens for suite in suites),
    )
    responder = ModelResponder(loaded.model, engine, loaded.renderer, batching)
    with engine.adapter_off():
        base = answer_suites(suites, responder, on_done)
    return beside_of(pair_suites(base, answer_suites(suites, responder, on_done)), evaluation)


def beside_of(compared: Sequence[SuiteComparison], evaluation: Evaluation) -> Beside:
    """Return suites as evaluation.json has them, with the personal data in all answers."""
    facts = {
        "suites": {
            "scores": {pair.suite.name: pair.as_dict() for pair in compared},
            "forgetting": forgetting(compared),
        },
        "personal": personal(evaluation, compared),
    }
    return Beside(facts, compared)


def personal(evaluation: Evaluation, compared: Sequence[SuiteComparison]) -> dict[str, Any]:
    """Count personal data in the answers of each model to held-out rows and suites, by kind."""
    found: dict[str, Any] = {"answers": len(evaluation.base.samples) + sum(len(pair.base.answers) for pair in compared)}
    for name in ("base", "tuned"):
        samples = getattr(evaluation, name).samples
        answers = [(sample.answer, f"{sample.prompt}\n{sample.reference}") for sample in samples]
        for pair in compared:
            answers += [
                (answer, item["prompt"])
                for item, answer in zip(pair.suite.items, getattr(pair, name).answers, strict=True)
            ]
        found[name] = count_personal(answers)
    return found


def measure_memorisation(
    rows: int,
    folder: RunFolder,
    loaded: LoadedModel,
    engine: Engine,
    on_begin: Progress = lambda answers: None,
    on_done: Progress = lambda done: None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Measure how much of a run's training rows comes back word for word, beside its held-out rows.

    Args:
        rows: Number of training rows to draw, and the most held-out rows beside them.
        folder: The run's folder.
        loaded, engine, on_done, ranks: arguments of `measure_suites`.
        on_begin: Callback that gets the number of answers to come.

    Raises:
        UserError: The data are not those of training any more.
    """
    assert loaded.run is not None
    data = prepared_as_trained(
        *(folder, loaded.run, loaded.renderer),
        "what comes back of them says nothing",
        "restore the data, or leave --memorisation out",
    )
    seed = loaded.run.train.seed
    drawn = sample(data.train, rows, seed)
    ends = loaded.renderer.stop_ids
    known, unseen = passages_of(drawn, ends), passages_of(sample(data.validation, rows, seed), ends)
    longest = max((len(passage.prompt) for passage in (*known, *unseen)), default=1)
    parts = (_batching(loaded, ranks, rows, longest, WANTED), on_done)
    on_begin(2 * len(known) + len(unseen))
    with engine.adapter_off():
        base = comes_back(loaded.model, loaded.renderer, known, *parts)
    tuned = comes_back(loaded.model, loaded.renderer, known, *parts)
    return memorisation(len(drawn), base, tuned, comes_back(loaded.model, loaded.renderer, unseen, *parts))


def _batching(loaded: LoadedModel, ranks: Ranks, rows: int, tokens: int, new_tokens: int) -> Batching:
    """Return how many prompts fit at a time, by the plan.

    Args:
        loaded: The tuned model of a run.
        ranks: This process among those that share the prompts.
        rows, tokens: Number of prompts, and tokens of the longest.
        new_tokens: Longest answer.
    """
    assert loaded.run is not None
    settings = loaded.run.evaluate.model_copy(update={"max_new_tokens": max(1, new_tokens)})
    run = loaded.run.model_copy(update={"evaluate": settings})
    return Batching(
        rows_at_a_time(run, Padded(rows, tokens, max(1, new_tokens)), loaded.target), LESS_MEMORY, ranks=ranks
    )
