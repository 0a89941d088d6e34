"""Gives texts a label, tags or an embedding with a model that was trained; see predict_tags.py and embed_texts.py."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from veneer.api.embed_texts import embed_texts, texts_to_embed
from veneer.api.predict_tags import predict_tags, texts_with_words
from veneer.config import Data, UserError
from veneer.config.notify import notify
from veneer.config.rows import rows_as_file
from veneer.data.conversation import BadRowError
from veneer.data.formats import with_our_names
from veneer.data.labelled import LabelledRenderer
from veneer.data.labels import texts_of
from veneer.data.ledger import Ledger
from veneer.data.pipeline import read_files
from veneer.data.rewarded import RewardRenderer
from veneer.data.row_parser import blocks_of, without
from veneer.data.sources.block import Unreadable
from veneer.data.sources.find import find_sources
from veneer.data.sources.read import parse
from veneer.data.tagging import TaggedRenderer
from veneer.data.texts import TextsRenderer
from veneer.engine.classifier import ClassifierEngine
from veneer.engine.head_engine import head_engine
from veneer.engine.token_classifier import TokenClassifierEngine
from veneer.evaluation.classification import scores_of
from veneer.machine.batching import Batching
from veneer.machine.ranks import join_ranks
from veneer.model.tuned import TunedModel, find_tuned

Asked = TypeVar("Asked")
SORTED = 64  # batches whose texts are sorted by length together


@dataclass(frozen=True)
class Predicted:
    """The label of a row.

    Attributes:
        place: file and line of the row.
        label: the likeliest label.
        score: its probability.
        scores: probability of each label; of a reward model the reward, which is no probability.
    """

    place: str
    label: str
    score: float
    scores: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def predict(
    name: str | Path, data: Any, batch_size: int = 32, base: str | None = None, force: bool = False
) -> Iterator[Any]:
    """Give each row of a file its label, its tags or its embedding, in order.

    Example:
        for row in veneer.predict("runs/routing", "messages.jsonl"):
            print(row.label, row.score)

    Args:
        name: run that classifies, one of its checkpoints, or its adapter.
        data: files as `data.train` takes them, or rows; they need no labels. Texts longer than in training are cut off.
        batch_size: rows at a time; fewer if memory is short.
        base: another base than the adapter names.
        force: whether to go on if the adapter's passport does not match the base.

    Returns:
        A `Predicted`, `PredictedTags` or `EmbeddedText` of each row, by the model's task.

    Raises:
        UserError: there is no such classifier, or a row has no text; a bad row is found before anything is predicted.
    """
    ranks = join_ranks()
    tuned = find_tuned(str(name), base, force)
    renderer = tuned.labelled_renderer
    files = rows_as_file(data, "data")
    if isinstance(renderer, RewardRenderer):
        return _rewards(files, renderer, tuned, Batching(batch_size, "shorten the answers", "rewards", ranks=ranks))
    settings = (tuned.data or Data(train="-")).model_copy(update={"columns": _columns(tuned.data)})
    batching = Batching(batch_size, "shorten the texts", "scores", ranks=ranks)
    if isinstance(renderer, TaggedRenderer):
        words = _checked(files, settings, texts_with_words)
        engine = _engine(tuned, renderer)
        assert isinstance(engine, TokenClassifierEngine)
        return predict_tags(words, renderer, engine, batching)
    if isinstance(renderer, TextsRenderer):
        texts = _checked(files, settings, texts_to_embed)
        return embed_texts(texts, renderer, _engine(tuned, renderer), batching)
    rows = _checked(files, settings, texts_of)
    return _predicted(rows, renderer, _engine(tuned, renderer), batching)


def _engine(tuned: TunedModel, renderer: LabelledRenderer) -> ClassifierEngine:
    return head_engine(tuned.model, tuned.load_classifier(), renderer.tokenizer)


def _checked(files: Any, data: Data, read: Callable[[Mapping[str, Any]], Asked]) -> Iterator[tuple[str, Asked]]:
    """Return the rows, of which a bad one says so before the model is loaded."""
    for _ in _texts(files, data, read):
        pass
    return _texts(files, data, read)


def _rewards(files: Any, renderer: RewardRenderer, tuned: TunedModel, batching: Batching) -> Iterator[Predicted]:
    """Yield the reward of each row's answer; of a pair, of both, and the one that is preferred with its probability."""
    given = read_files(files, "data", renderer.settings.model_copy(update={"overlong": "refuse"}), renderer, Ledger())
    engine = ClassifierEngine.of(tuned.load_classifier(), renderer.tokenizer)
    rows = given.corpus.rows["examples"].tolist()
    encoded = [example.ids[:-1].tolist() for example in given.corpus]
    rewards = iter(scores_of(encoded, engine, batching)[:, 0].tolist())
    for row, count in enumerate(rows):
        names = ("chosen", "rejected") if count == 2 else ("reward",)
        scores = {name: next(rewards) for name in names}
        if count == 1:
            yield Predicted(given.corpus.place(row), "reward", scores["reward"], scores)
            continue
        margin = scores["chosen"] - scores["rejected"]
        sure = 1 / (1 + math.exp(-abs(margin)))
        yield Predicted(given.corpus.place(row), "chosen" if margin > 0 else "rejected", sure, scores)


def _columns(data: Data | None) -> dict[str, str]:
    """Return `data.columns` without those of labels and tags, which rows to predict need not have."""
    return {ours: theirs for ours, theirs in (data.columns if data else {}).items() if ours not in ("label", "tags")}


def _texts(files: Any, data: Data, read: Callable[[Mapping[str, Any]], Asked]) -> Iterator[tuple[str, Asked]]:
    """Yield the place of each row, and what is read of it.

    Raises:
        UserError: a row cannot be read, or has no text.
    """
    for source in find_sources(files, "data"):
        for block in blocks_of(source, "data", data):
            for at, raw in enumerate(block.rows):
                row, place = parse(raw), block.place(at)
                if isinstance(row, Unreadable):
                    raise UserError(f"{place}: {row.reason}", "mend the row")
                try:
                    yield place, read(with_our_names(without(row, data.ignore_columns), data.columns))
                except KeyError as error:
                    raise UserError(
                        f"{place}: no column `{error.args[0]}` (fields here: {', '.join(row)})",
                        "name the columns as training's rows do",
                    ) from None
                except BadRowError as error:
                    raise UserError(f"{place}: {error}", "mend the row") from None


def _predicted(
    rows: Iterable[tuple[str, tuple[str, ...]]],
    renderer: LabelledRenderer,
    engine: ClassifierEngine,
    batching: Batching,
) -> Iterator[Predicted]:
    rows, has_told = iter(rows), False
    while chosen := list(islice(rows, SORTED * batching.size)):
        encoded = renderer.encode([texts for _, texts in chosen])
        if not has_told and any(len(ids) >= renderer.settings.max_length - 1 for ids in encoded):
            has_told = True
            notify(f"texts are cut off at {renderer.settings.max_length - 1} tokens", "info", "data.max_length")
        for (place, _), logits_C in zip(chosen, scores_of(encoded, engine, batching), strict=True):
            scores = dict(zip(renderer.labels, logits_C.double().softmax(0).tolist(), strict=True))
            label = max(scores, key=lambda name: scores[name])
            yield Predicted(place, label, scores[label], scores)
