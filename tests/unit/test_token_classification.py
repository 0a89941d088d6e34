"""Token classification: trained on encoders and decoders, the same in plain PEFT, resumed exactly, bad rows refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForTokenClassification
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification, AutoTokenizer

import veneer
from tests.support.classifiers import BASES, WORDS, save_tiny_base
from tests.support.heads import some_tagged, tag
from tests.support.runs import write_rows
from veneer.api.predict_tags import texts_with_words
from veneer.api.train import finish, load_job
from veneer.config import RunFolder, UserError
from veneer.engine.token_classifier import TokenClassifierEngine
from veneer.evaluation.classification import batching
from veneer.evaluation.tagging import TaggedRows, tag_rows, tag_scores
from veneer.training.metrics import read_metrics

TAGS = ("O", "B-SAID", "I-SAID", "B-THING")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base("bert", tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("family", BASES)
def test_tags_are_learnt_and_plain_peft_gives_the_same_scores(family: str, tmp_path: Path) -> None:
    base = save_tiny_base(family, tmp_path / "base")
    job = load_job(tag(base, some_tagged(), tmp_path, train={"learning_rate": 2e-2}))
    finish(job)
    assert isinstance(job.engine, TokenClassifierEngine)
    assert job.renderer.labels == TAGS
    rows = tag_rows(job.engine, job.data.validation, TAGS, batching(job.run))
    assert rows is not None
    assert tag_scores(rows, TAGS)["entity_f1"].value > 0.8  # each tag follows from a word and the one before

    texts = [" ".join(row["tokens"]) for row in some_tagged(6)]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter")
    there = AutoPeftModelForTokenClassification.from_pretrained(
        tmp_path / "run" / "adapter", id2label=dict(enumerate(TAGS))
    ).eval()
    here = job.engine.token_scores([torch.tensor(tokenizer(text)["input_ids"]) for text in texts])
    for text, scores in zip(texts, here, strict=True):
        with torch.no_grad():
            plainly = there(**tokenizer(text, return_tensors="pt")).logits[0]
        assert (plainly - scores).abs().max() < 1e-4 * plainly.abs().max()  # float32, in batches of other shapes


def test_the_loss_is_that_of_transformers_with_untrained_places(bert: Path, tmp_path: Path) -> None:
    job = load_job(tag(bert, some_tagged(8), tmp_path, data={"validation": 0}))
    losses, weights = 0.0, 0.0
    job.model.eval()
    for example in job.data.train:
        is_tag = example.weights > 0
        ids, targets = (torch.from_numpy(part[~is_tag]).long() for part in (example.ids, example.targets))
        assert int((targets >= 0).sum()) == int(is_tag.sum())
        with torch.no_grad():
            loss = job.model(input_ids=ids[None], labels=targets[None]).loss
        losses, weights = losses + loss.item() * int(is_tag.sum()), weights + float(is_tag.sum())
    found = sum(job.measure_held_out([*job.data.train]))
    assert found == pytest.approx(losses, rel=1e-5)  # float32 sums of some hundred terms


def test_a_run_that_is_resumed_gives_the_same_bits(bert: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train": {"max_steps": 8, "save_steps": 4, "eval_steps": 2}}
    whole = tag(bert, some_tagged(), tmp_path / "whole", **settings)
    finish(load_job(whole))
    parted = tag(bert, some_tagged(), tmp_path / "parted", **settings)
    load_job(parted).fit_until(4)
    finish(load_job(parted, resume=True))
    adapters = [load_file(run.train.output_dir / "adapter" / "adapter_model.safetensors") for run in (whole, parted)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    values = [
        [
            record["entity_f1"]
            for record in read_metrics(RunFolder(run.train.output_dir).metrics)
            if record["kind"] == "eval"
        ]
        for run in (whole, parted)
    ]
    assert values[0] == values[1]


def test_ids_stand_for_the_names_of_data_labels(bert: Path, tmp_path: Path) -> None:
    named = some_tagged(12)
    by_id = [{"tokens": row["tokens"], "ner_tags": [TAGS.index(name) for name in row["ner_tags"]]} for row in named]
    settings: dict[str, Any] = {"data": {"validation": 0, "labels": TAGS}}
    found = [
        [example.ids.tolist() for example in load_job(tag(bert, rows, tmp_path / name, **settings)).data.train]
        for name, rows in (("named", named), ("ids", by_id))
    ]
    assert found[0] == found[1]


def test_rows_are_cut_behind_a_word_with_what_ends_a_text(bert: Path, tmp_path: Path) -> None:
    rows = some_tagged(12)
    job = load_job(tag(bert, rows, tmp_path, data={"validation": 0, "max_length": 16, "overlong": "truncate"}))
    assert job.data.ledger.notes["truncated"] == sum(2 + 2 * len(row["tokens"]) > 16 for row in rows) > 0
    assert any("longer than data.max_length: the end is cut off" in line for line in job.data.ledger.warnings)
    for example in job.data.train:
        text = example.ids[example.weights == 0]
        assert len(example.ids) <= 16
        assert (text[0], text[-1]) == (2, 3)
        assert len(text) == int((example.weights > 0).sum()) + 2  # each word is one token, and has its tag


def test_the_data_command_tells_of_tags_that_begin_within(bert: Path, tmp_path: Path) -> None:
    rows = [*some_tagged(12), {"tokens": ["so", "very"], "ner_tags": ["O", "I-SAID"]}]
    job = load_job(tag(bert, rows, tmp_path))
    assert any("1 row with a tag such as I-PER" in line for line in job.data.ledger.warnings)


Rows = list[dict[str, Any]]


@pytest.mark.parametrize(
    ("rows", "sections", "message"),
    [
        ([{"tokens": ["the", "film"], "ner_tags": ["O"]}], {}, "rows.jsonl:1: 2 words and 1 tags"),
        ([{"tokens": ["the"], "ner_tags": [0]}], {}, "the tags are ids up to 0, without names"),
        ([{"tokens": ["the"], "ner_tags": [4]}], {"data": {"labels": TAGS}}, "the label `4` is none of 4"),
        ([{"tokens": ["the"], "ner_tags": ["B-X"]}], {"data": {"labels": TAGS}}, "the label `B-X` is none of 4"),
        ([{"text": "the film", "label": "a"}], {}, "no row has a label"),
        ([{"tokens": ["the", "so"], "tags": ["O", "O"]}], {}, "all rows have one label, `O`"),
        (some_tagged(8), {"train": {"temperature": 0.1}}, "train.temperature = 0.1: has no effect"),
        (some_tagged(8), {"model": {"pooling": "cls"}}, "model.pooling = cls: has no effect"),
        (some_tagged(8), {"data": {"packing": True}}, "data.packing = True: has no effect"),
        (
            [{"tokens": ["the", thing], "tags": ["DET", "NOUN"]} for thing in WORDS],
            {"train": {"early_stopping": {"metric": "entity_f1"}, "eval_steps": 4}},
            "the tags are not those of entities",
        ),
    ],
)
def test_bad_input_is_one_message(
    bert: Path, tmp_path: Path, rows: Rows, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as told:
        load_job(tag(bert, rows + some_tagged(8) if "2 words" in message else rows, tmp_path, **sections))
    assert message in str(told.value)
    assert not (tmp_path / "run").exists()


def test_the_card_loads_the_adapter(bert: Path, tmp_path: Path) -> None:
    finish(load_job(tag(bert, some_tagged(), tmp_path, train={"max_steps": 1})))
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "pipeline_tag: token-classification" in card
    assert "AutoModelForTokenClassification.from_pretrained(" in card
    passport = json.loads((tmp_path / "run" / "adapter" / "passport.json").read_text())
    assert passport["classifier"]["labels"] == list(TAGS)


@pytest.fixture(scope="module")
def tagger(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tagger")
    finish(load_job(tag(bert, some_tagged(), folder, train={"learning_rate": 2e-2})))
    return folder / "run"


def test_entities_are_found_with_their_characters(tagger: Path) -> None:
    text = "  the film was\tvery  great and so"
    found, words = veneer.predict(tagger, [{"text": text}, {"tokens": ["the", "meal", "was", "poor"]}])
    assert found.words == text.split()
    assert all(text[entity.start : entity.end] == entity.text for entity in found.entities)
    assert ("SAID", "very  great") in [(entity.type, entity.text) for entity in found.entities]
    assert words.text == "the meal was poor"
    assert [(e.type, e.text, e.start) for e in words.entities][:1] == [("THING", "meal", 4)]
    assert words.tags[1] == "B-THING"
    assert words.entities[0].score == words.scores[1] > 0.5


def test_words_of_a_plain_text_are_parted_at_punctuation() -> None:
    text, words = texts_with_words({"text": "so,  the café's film!"})
    assert [text[start:end] for start, end in words] == ["so", ",", "the", "café", "'", "s", "film", "!"]


def test_words_behind_the_last_place_are_outside_and_told_of(tagger: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = veneer.predict(tagger, [{"text": "the film was very great and so " * 8}])
    assert len(found.words) == 56
    assert all(score > 0 for score in found.scores[:23])  # 48 places: 23 words with their tags, and two tokens around
    assert (found.tags[23:], found.scores[23:]) == (["O"] * 33, [0.0] * 33)
    assert "texts are cut off at 48 places" in capsys.readouterr().err


def test_evaluation_and_merge_are_of_the_same_model(tagger: Path, tmp_path: Path) -> None:
    found = veneer.evaluate_classifier(tagger).as_dict()
    metrics = found["metrics"]["entity_f1"]
    assert metrics["base"]["value"] == 0  # the commonest tag marks no entity
    assert metrics["difference"]["value"] == metrics["tuned"]["value"] > 0.8
    assert sorted(found["by_type"]) == ["SAID", "THING"]
    lines = [json.loads(line) for line in (tagger / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == found["rows"] == 24
    assert all(len(line["tags"]) == len(line["predicted"]) for line in lines)

    veneer.merge(str(tagger), tmp_path / "merged", dtype="float32")
    merged = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.id2label == dict(enumerate(TAGS))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    row = {"tokens": ["the", "film", "was", "very", "great"]}
    with torch.no_grad():
        logits = merged(**tokenizer(" ".join(row["tokens"]), return_tensors="pt")).logits[0, 1:-1]
    (predicted,) = veneer.predict(tagger, [row])
    assert [TAGS[n] for n in logits.argmax(1).tolist()] == predicted.tags
    assert logits.softmax(1).amax(1).tolist() == pytest.approx(predicted.scores, abs=1e-4)  # float32, merged


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": " "}, "rows.jsonl:1: `text` is empty"),
        ({"body": "the film"}, "rows.jsonl:1: neither `text` nor `tokens` (fields here: body)"),
        ({"tokens": ["the", None]}, "rows.jsonl:1: `tokens`: word 2 is no text"),
    ],
)
def test_rows_that_cannot_be_tagged_are_one_message(
    tagger: Path, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as told:
        veneer.predict(tagger, write_rows(tmp_path / "rows.jsonl", [row]))
    assert message in str(told.value)


def test_an_evaluation_without_mistakes_does_not_claim_certainty() -> None:
    rows = TaggedRows([["B-SAID", "O"]] * 20, [["B-SAID", "O"]] * 20)
    for result in tag_scores(rows, TAGS).values():
        assert result.interval.value == 1.0
        assert 0.8 < result.interval.low < 0.9  # Wilson's bound of 20 of 20
