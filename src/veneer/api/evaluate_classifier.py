"""Measures a classifier on the rows that its run held out, or on those of a file."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.api.held_out import prepared_as_trained
from veneer.api.live_page import renew_page
from veneer.config import RunFolder, UserError
from veneer.config.folder import write_json, write_text
from veneer.config.notify import notify_on_error
from veneer.data.batch import Example
from veneer.data.labelled import LabelledRenderer
from veneer.data.ledger import Ledger
from veneer.data.pipeline import Part, read_files
from veneer.engine.classifier import ClassifierEngine
from veneer.engine.embedder import EmbeddingEngine
from veneer.engine.head_engine import head_engine
from veneer.engine.token_classifier import TokenClassifierEngine
from veneer.evaluation.classification import Judged, Scores, batching, judge, majority, score
from veneer.evaluation.judged_task import JudgedTask, judge_embeddings, judge_rewards, judge_tags
from veneer.machine.batching import Batching
from veneer.machine.ranks import join_ranks
from veneer.model.tuned import TunedModel, find_tuned
from veneer.release.publish.card import renew_card

OWN_HEAD, MAJORITY = "the base's own head", "the majority label of the training rows"


@dataclass(frozen=True)
class EvaluatedClassifier:
    """Metrics of a classifier, and where they were written.

    Attributes:
        judged: the metrics.
        file: file that they were written to; None: they were written nowhere.
    """

    judged: Judged | JudgedTask
    file: Path | None

    def as_dict(self) -> dict[str, Any]:
        return self.judged.as_dict() | {"file": None if self.file is None else str(self.file)}


def evaluate_classifier(
    name: str | Path, data: str | None = None, rows: int | None = None, base: str | None = None, force: bool = False
) -> EvaluatedClassifier:
    """Measure a model that labels, tags, embeds or rewards texts, with 95% intervals; docs/ has a page of each task.

    Without `data` and `rows` it is the run's record: evaluation.json and samples.jsonl, and the scores of its card.

    Example:
        found = veneer.evaluate_classifier("runs/routing").judged.metrics["accuracy"]["tuned"]

    Args:
        name: run that classifies.
        data: file of rows with labels, instead of the held-out ones.
        rows: largest number of rows; None: as `evaluate.rows` in the run.
        base: another base than the run names.
        force: whether to go on if the adapter's passport does not match the base.

    Raises:
        UserError: there is no such run, or it holds no rows out.
    """
    ranks = join_ranks()
    tuned = find_tuned(str(name), base, force)
    if tuned.run is None or tuned.folder is None:
        raise UserError(f"{name}: an adapter alone holds no rows out", "name the run's folder")
    run, renderer = tuned.run, tuned.labelled_renderer
    prepared = prepared_as_trained(
        tuned.folder,
        run,
        renderer.like(run.data) if isinstance(renderer, LabelledRenderer) else renderer,
        "held-out rows may have been trained on",
        "restore the data",
    )
    part = prepared.validation
    if data is not None:
        given = read_files(data, "--data", run.data, renderer, Ledger())
        part = Part(given.corpus, range(len(given.corpus.rows)))
        if run.model.task == "reward" and len(part) != 2 * len(part.rows):
            raise UserError(f"{data}: rewards are compared in pairs", "name rows with prompt, chosen and rejected")
    each = 2 if run.model.task == "reward" else 1  # examples of a row
    count = each * (rows or run.evaluate.rows or len(part))
    chosen = [part[n] for n in range(min(count, len(part)))]
    if not chosen:
        raise UserError(
            f"the run holds no rows out (data.validation = {run.data.validation})", "name a file with --data"
        )
    engine = head_engine(tuned.model, tuned.load_classifier(), renderer.tokenizer, run.train.temperature)
    at_a_time = batching(run, ranks)
    is_record = data is None and rows is None and not tuned.is_checkpoint and ranks.is_first
    if not isinstance(renderer, LabelledRenderer):
        found = judge_rewards(engine, chosen, at_a_time, tuned.base_has_head)
    elif isinstance(engine, TokenClassifierEngine):
        found = judge_tags(renderer, engine, prepared.train, chosen, at_a_time)
    elif isinstance(engine, EmbeddingEngine):
        found = judge_embeddings(engine, chosen, at_a_time)
    else:
        found = None
    if found is not None:
        evaluated = EvaluatedClassifier(found, _save_lines(tuned.folder, found, found.lines) if is_record else None)
    else:
        scores = score(engine, chosen, at_a_time)
        assert scores is not None
        assert isinstance(renderer, LabelledRenderer)
        judged = judge(renderer.labels, scores, *_compared(tuned, engine, prepared.train, chosen, scores, at_a_time))
        evaluated = EvaluatedClassifier(judged, _save(tuned.folder, judged, chosen, scores) if is_record else None)
    ranks.gather(None)  # the others wait until the first one has written all
    return evaluated


def _compared(
    tuned: TunedModel,
    engine: ClassifierEngine,
    train: Sequence[Example],
    rows: Sequence[Example],
    scores: Scores,
    at_a_time: Batching,
) -> tuple[Scores, str]:
    """Return the scores of the base's own head, or of the majority label where it has none; and which it is."""
    if tuned.base_has_head:
        with engine.adapter_off():
            found = score(engine, rows, at_a_time)
        assert found is not None
        return found, OWN_HEAD
    ((most, _),) = Counter(int(example.ids[-1]) for example in train).most_common(1)
    return majority(scores.labels_R, most, scores.probabilities_RC.shape[1]), MAJORITY


def _save(folder: RunFolder, judged: Judged, rows: Sequence[Example], scores: Scores) -> Path:
    lines = []
    for example, label, given in zip(rows, scores.labels_R, scores.probabilities_RC, strict=True):
        likeliest = int(given.argmax())
        told = {"place": example.place, "label": judged.labels[label], "predicted": judged.labels[likeliest]}
        lines.append(told | {"score": float(given[likeliest])})
    return _save_lines(folder, judged, lines)


def _save_lines(folder: RunFolder, judged: Judged | JudgedTask, lines: Sequence[dict[str, Any]]) -> Path:
    write_text(folder.samples, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_json(folder.evaluation, judged.as_dict())
    notify_on_error("the card", lambda: renew_card(folder))
    renew_page(folder)
    return folder.evaluation
