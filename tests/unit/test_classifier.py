"""Classifiers: trained on encoders and decoders, the same in plain PEFT, resumed exactly, and bad input refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig

import veneer
from tests.support.classifiers import BASES, classify, save_tiny_base, some_texts
from veneer.api.train import finish, load_job
from veneer.cli.main import main
from veneer.config import JobError, RunFolder, UserError
from veneer.engine.classifier import ClassifierEngine
from veneer.evaluation.classification import accuracy, batching, score
from veneer.model import attach
from veneer.training.metrics import read_metrics


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base("bert", tmp_path_factory.mktemp("bert"))


def plain(folder: Path, tokenizer: Any) -> Any:
    """Load a run's adapter as its users do."""
    names = {0: "bad", 1: "good"}
    return AutoPeftModelForSequenceClassification.from_pretrained(
        folder / "run" / "adapter", id2label=names, pad_token_id=tokenizer.pad_token_id
    ).eval()


@pytest.mark.parametrize("family", BASES)
def test_a_classifier_learns_and_plain_peft_gives_its_scores(family: str, tmp_path: Path) -> None:
    base = save_tiny_base(family, tmp_path / "base")
    job = load_job(classify(base, some_texts(), tmp_path))
    finish(job)
    scores = score(job.engine, job.data.train, batching(job.run))
    assert scores is not None
    assert accuracy(scores) > 0.95  # the label follows from one word; two of three rows are good

    texts = [row["text"] for row in some_texts(6)]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter")
    with torch.no_grad():
        there = plain(tmp_path, tokenizer)(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    here = job.engine.scores([torch.tensor(tokenizer(text)["input_ids"]) for text in texts])  # type: ignore[attr-defined]
    assert (there - here).abs().max() < 1e-4 * there.abs().max()  # float32, in batches of other shapes


def test_a_pair_of_texts_is_told_apart_as_the_tokenizer_does(bert: Path, tmp_path: Path) -> None:
    rows = [
        {"sentence1": row["text"], "sentence2": "the book was great", "category": n % 2}
        for n, row in enumerate(some_texts(24))
    ]
    job = load_job(classify(bert, rows, tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(bert)
    pairs = [(row["sentence1"], row["sentence2"]) for row in rows[:5]]
    given = tokenizer(*map(list, zip(*pairs)), padding=True, return_tensors="pt")
    assert given["token_type_ids"].sum() > 0
    with torch.no_grad():
        plainly = job.model(**given).logits
    ids = [torch.tensor(tokenizer(*pair)["input_ids"]) for pair in pairs]
    assert isinstance(job.engine, ClassifierEngine)
    assert torch.allclose(job.engine.scores(ids), plainly, atol=1e-5)  # float32, rows of other padding


def test_a_run_that_is_resumed_gives_the_same_bits(bert: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train": {"max_steps": 8, "save_steps": 4, "eval_steps": 2}}
    whole = classify(bert, some_texts(), tmp_path / "whole", **settings)
    finish(load_job(whole))
    parted = classify(bert, some_texts(), tmp_path / "parted", **settings)
    load_job(parted).fit_until(4)
    finish(load_job(parted, resume=True))
    adapters = [load_file(run.train.output_dir / "adapter" / "adapter_model.safetensors") for run in (whole, parted)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert any("classifier" in name for name in adapters[0])


@pytest.mark.parametrize(
    ("family", "sections"),
    [
        ("bert", {"model": {"dtype": "bfloat16"}}),
        ("llama", {"quantization": {"bits": 4}}),
        ("llama", {"adapter": {"method": "dora"}, "train": {"gradient_checkpointing": True}}),
        ("bert", {"train": {"learning_rate": "auto", "max_steps": 220}}),
    ],
    ids=["bfloat16", "4 bits", "dora", "rate"],
)
def test_other_ways_to_train_are_delivered_too(family: str, sections: dict[str, Any], tmp_path: Path) -> None:
    base = save_tiny_base(family, tmp_path / "base")
    finish(load_job(classify(base, some_texts(), tmp_path, **{"train": {"max_steps": 3}} | sections)))
    held = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(part.dtype == torch.float32 for part in held.values())


def test_the_best_step_is_found_by_macro_f1(bert: Path, tmp_path: Path) -> None:
    stopping = {"metric": "macro_f1", "patience": 2}
    run = classify(bert, some_texts(), tmp_path, train={"eval_steps": 4, "early_stopping": stopping, "keep": "best"})
    trained = finish(load_job(run))
    values = {
        r["step"]: r["macro_f1"] for r in read_metrics(RunFolder(run.train.output_dir).metrics) if r["kind"] == "eval"
    }
    assert trained.kept_step == next(step for step, value in values.items() if value == max(values.values()))
    assert trained.steps < 40


def test_a_head_that_comes_back_random_is_not_delivered(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_pooler(model: Any, folder: Path) -> None:
        real(model, folder)
        file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
        save_file({name: part for name, part in load_file(file).items() if "pooler" not in name}, file)
        config.write_text(json.dumps(json.loads(config.read_text()) | {"modules_to_save": ["classifier"]}))

    real = attach.write_adapter
    monkeypatch.setattr(attach, "write_adapter", without_pooler)
    run = classify(bert, some_texts(), tmp_path, train={"max_steps": 2})
    with pytest.raises(JobError, match=r"another classifier in plain PEFT: bert\.pooler\S* has other values"):
        finish(load_job(run))
    assert not (run.train.output_dir / "adapter").exists()


def test_balanced_weights_raise_the_loss_of_the_rarer_label(bert: Path, tmp_path: Path) -> None:
    rows = some_texts(30)
    weights = {}
    for setting in ("none", "balanced"):
        job = load_job(
            classify(bert, rows, tmp_path / setting, data={"validation": 0}, train={"class_weights": setting})
        )
        weights[setting] = {int(example.ids[-1]): example.weight for example in job.data.train}
    assert weights == {"none": {0: 1.0, 1: 1.0}, "balanced": {0: 1.5, 1: 0.75}}  # 10 rows and 20


Rows = list[dict[str, Any]]


def labelled(*labels: Any) -> Callable[[Rows], Rows]:
    return lambda rows: [row | {"label": labels[n % len(labels)]} for n, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("change", "sections", "message"),
    [
        (labelled("good"), {}, "all rows have one label, `good`"),
        (labelled(None), {}, "no row has a label"),
        (labelled(0.25, 0.5), {}, "no row has a label"),
        (labelled("good", "bad", None), {}, "no label: none of label"),
        (labelled("good", "bad"), {"data": {"labels": ["bad", "fine"]}}, "the label `good` is none of 2"),
        (labelled(0, 1, 2), {"data": {"labels": ["a", "b"]}}, "the label `2` is none of 2"),
        (labelled("a", "b"), {"data": {"labels": ["a", "b", "c"]}}, "no training row has the label `c`"),
        (labelled("a", "b"), {"data": {"labels": ["a", "a"]}}, "a name stands there twice"),
        (lambda rows: [row | {"text": " "} for row in rows], {}, "`text` is empty"),
        (lambda rows: [{"label": row["label"], "body": row["text"]} for row in rows], {}, "missing `text`"),
        (labelled("a", "b"), {"train": {"class_weights": [1.0, 2.0]}}, "name the labels in data.labels"),
        (labelled("a", "b"), {"data": {"packing": True}}, "data.packing = True: has no effect"),
        (labelled("a", "b"), {"train": {"engine": "fused"}}, "train.engine = fused"),
        (labelled("a", "b"), {"model": {"task": "causal-lm"}, "data": {"labels": ["a", "b"]}}, "data.labels"),
        (labelled("a", "b"), {"adapter": {"bias": "all"}}, "adapter.bias = all: has no effect"),
        (labelled("a", "b"), {"adapter": {"init_lora_weights": "pissa"}}, "a classifier begins with true or gaussian"),
        (labelled("a", "b"), {"adapter": {"target_modules": ["q_proj"]}}, "`q_proj` matches no module"),
    ],
)
def test_bad_input_is_one_message(
    bert: Path, tmp_path: Path, change: Callable[[Rows], Rows], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as told:
        load_job(classify(bert, change(some_texts()), tmp_path, **sections))
    assert message in str(told.value)
    assert not (tmp_path / "run").exists()


def test_a_bases_own_head_keeps_its_labels_and_its_weights(tmp_path: Path) -> None:
    base = save_tiny_base("roberta", tmp_path / "base", head=2, names=["good", "bad"])
    job = load_job(classify(base, some_texts(), tmp_path))
    assert job.renderer.labels == ("good", "bad")
    stored = load_file(base / "model.safetensors")["classifier.out_proj.weight"]
    assert torch.equal(job.model.get_base_model().classifier.modules_to_save["default"].out_proj.weight, stored)


def test_another_number_of_labels_than_the_bases_head_is_refused(tmp_path: Path) -> None:
    base = save_tiny_base("bert", tmp_path / "base", head=3)
    with pytest.raises(UserError, match=r"2 labels \(bad, good\), and the head of model.base = .* has 3"):
        load_job(classify(base, some_texts(), tmp_path))


def test_a_plan_counts_the_head(bert: Path, tmp_path: Path) -> None:
    run = classify(bert, some_texts(), tmp_path)
    planned = veneer.plan(run, gpu="8GiB").as_dict()
    assert planned["parameters"]["trainable"] == load_job(run).parameters["trainable"]
    assert planned["fits"]


def test_merging_at_the_command_line_ends_well_without_a_certificate(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    veneer.train(classify(bert, some_texts(), tmp_path, train={"max_steps": 2}))
    capsys.readouterr()
    run, out = str(tmp_path / "run"), str(tmp_path / "merged")
    with pytest.raises(SystemExit) as ended:
        main(["merge", run, "--out", out, "--dtype", "float32"])
    assert not ended.value.code
    told = capsys.readouterr().out
    assert "it gives the adapter's scores within" in told
    assert "certif" not in told


def test_a_decoder_whose_files_are_in_4_bits_is_planned_and_trained_so(tmp_path: Path) -> None:
    original = save_tiny_base("llama", tmp_path / "original")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = save_tiny_base("llama", tmp_path / "base")
    (base / "model.safetensors").unlink()
    AutoModel.from_pretrained(original, dtype=torch.bfloat16, quantization_config=settings).save_pretrained(base)
    run = classify(base, some_texts(), tmp_path, model={"dtype": "bfloat16"}, train={"max_steps": 2})
    assert veneer.plan(run).prediction.forecast.phases["load"].components["4-bit weights"] > 0
    veneer.train(run)
