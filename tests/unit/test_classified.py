"""What follows a classifier's training: predictions, metrics with intervals, a merged model, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import veneer
from tests.support.classifiers import classify, save_tiny_base, some_texts
from tests.support.runs import write_rows
from veneer.api.load import load
from veneer.cli.main import main
from veneer.config import UserError
from veneer.evaluation.classification import METRICS, Scores, confusions, judge, majority, wilson
from veneer.model.tuned import find_tuned


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classified")
    base = save_tiny_base("distilbert", folder / "base")
    veneer.train(classify(base, some_texts(), folder))
    return folder / "run"


def call(*words: str) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return ended.value.code


def test_predictions_are_those_of_plain_peft_in_order(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": row["text"]} for row in some_texts(12)]
    file = write_rows(tmp_path / "new.jsonl", rows)
    assert call("predict", str(run), file, "--output", str(tmp_path / "found.jsonl")) == 0
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert [row["place"] for row in found] == [f"new.jsonl:{n}" for n in range(1, 13)]
    tuned = find_tuned(str(run))
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    with torch.no_grad():
        given = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        plain = tuned.load_classifier()(**given).logits.softmax(1)
    assert torch.allclose(
        torch.tensor([[row["scores"]["bad"], row["scores"]["good"]] for row in found]), plain, atol=1e-5
    )
    assert all(row["score"] == max(row["scores"].values()) == row["scores"][row["label"]] for row in found)

    capsys.readouterr()
    assert call("predict", str(run), file) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == found


def test_rows_in_python_are_predicted_too_and_long_ones_are_cut(run: Path) -> None:
    (found,) = veneer.predict(run, [{"text": "the film was great " * 50}])
    assert set(found.scores) == {"good", "bad"}


def test_a_row_without_a_text_is_refused_before_anything_is_predicted(run: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "new.jsonl", [{"text": "the film"}, {"text": ""}, {"body": "the film"}])
    with pytest.raises(UserError, match=r"new.jsonl:2: `text` is empty"):
        veneer.predict(run, file)


def test_an_evaluation_is_written_and_names_what_it_is_compared_with(run: Path) -> None:
    found = veneer.evaluate_classifier(run)
    assert found.file == run / "evaluation.json"
    told = json.loads(found.file.read_text())
    assert told["rows"] == 12
    assert told["compared_with"] == "the majority label of the training rows"
    assert told["metrics"]["accuracy"]["base"]["value"] == 0.75  # nine of the held-out rows are good
    assert sum(map(sum, told["confusions"])) == 12
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    right = sum(row["label"] == row["predicted"] for row in samples) / 12
    assert told["metrics"]["accuracy"]["tuned"]["value"] == right
    assert f"| accuracy | {right:.4f}" in (run / "adapter" / "README.md").read_text()


def test_a_merged_classifier_is_the_same_in_plain_transformers(run: Path, tmp_path: Path) -> None:
    veneer.merge(str(run), tmp_path / "merged", dtype="float32")
    texts = [row["text"] for row in some_texts(8)]
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        plain = merged(**tokenizer(texts, padding=True, return_tensors="pt")).logits.softmax(1)
    found = list(veneer.predict(run, [{"text": text} for text in texts]))
    assert [merged.config.id2label[n] for n in plain.argmax(1).tolist()] == [row.label for row in found]
    scores = torch.tensor([[row.scores["bad"], row.scores["good"]] for row in found])
    assert torch.allclose(plain, scores, atol=1e-5)


@pytest.mark.parametrize("adapter", [{"r": 4}, {"method": "vera", "r": 4}, {"method": "ia3", "r": 16}])
def test_a_merge_tells_how_many_tensors_changed_whatever_the_method(adapter: dict[str, Any], tmp_path: Path) -> None:
    """Six linear layers in each of two layers, and weight and bias of the head's two layers."""
    settings = {"lora_alpha": 32} | adapter
    run = classify(save_tiny_base("distilbert", tmp_path / "base"), some_texts(), tmp_path, adapter=settings)
    veneer.train(run)
    assert veneer.merge(str(tmp_path / "run"), tmp_path / "merged").changed == 2 * 6 + 4


@pytest.mark.parametrize("words", [["export", "{run}", "--out", "{out}"], ["generate", "{run}", "--prompt", "a"]])
def test_what_is_made_for_written_answers_is_refused(
    words: list[str], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*(word.format(run=run, out=tmp_path / "out") for word in words)) == 2
    assert "this one classifies" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="this one classifies"):
        load(str(run))


def test_metrics_of_a_table() -> None:
    sure = np.array([0.9, 0.8, 0.6, 0.7, 0.95])
    given, labels = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0])
    probabilities = np.full((5, 3), 0.0)
    probabilities[np.arange(5), given] = sure
    probabilities += (1 - probabilities.sum(1, keepdims=True)) / 3 * (probabilities == 0)  # never the likeliest
    scores = Scores(labels, probabilities)
    assert confusions(scores).tolist() == [[1, 0, 1], [1, 2, 0], [0, 0, 0]]
    assert METRICS["accuracy"](scores) == 0.6
    assert METRICS["macro_f1"](scores) == pytest.approx((2 * 1 / 4 + 2 * 2 / 5) / 2)  # no row has the third label
    # Bins of 0.9 to 1 (0.9 right, 0.95 wrong), 0.8 (wrong), 0.7 and 0.6 (right).
    assert METRICS["calibration_error"](scores) == pytest.approx((0.85 + 0.8 + 0.3 + 0.4) / 5)


def test_intervals_hold_what_they_are_of() -> None:
    labels = np.array([0, 1] * 20)
    scores = Scores(labels, np.where(np.eye(2)[np.where(np.arange(40) < 36, labels, 1 - labels)] > 0, 0.8, 0.2))
    judged = judge(("a", "b"), scores, majority(labels, 0, 2), "the majority")
    found: dict[str, Any] = judged.metrics["accuracy"]
    assert found["tuned"]["value"] == 0.9
    assert (found["tuned"]["low"], found["tuned"]["high"]) == wilson(36, 40)
    assert found["base"]["value"] == 0.5
    assert found["difference"]["low"] < 0.4 <= found["difference"]["high"]
    assert wilson(36, 40) == pytest.approx((0.7695, 0.9604), abs=1e-4)  # Wilson 1927
