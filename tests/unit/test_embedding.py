"""Embeddings: learnt on encoders and decoders, however a step is cut; the same in plain PEFT; bad rows refused."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForFeatureExtraction
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

import veneer
from tests.support.classifiers import BASES, save_tiny_base
from tests.support.heads import embed, some_texts_with_positives
from tests.support.notices import notified
from tests.support.runs import losses, write_rows
from veneer.api.train import finish, load_job
from veneer.config import UserError
from veneer.engine.embedder import EmbeddingEngine, Texts, in_batch_logprobs, pool
from veneer.evaluation.classification import batching
from veneer.evaluation.embedding import retrieve
from veneer.evaluation.retrieval import ranks, retrieval_scores
from veneer.training.objectives.in_batch import InBatchNegatives


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base("bert", tmp_path_factory.mktemp("bert"))


def plain_embeddings(model: Any, tokenizer: Any, texts: list[str], pooling: str) -> torch.Tensor:
    """Embeddings as a reader of the card computes them, each text by itself."""
    found = []
    for text in texts:
        with torch.no_grad():
            hidden_LD = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        found.append({"mean": hidden_LD.mean(0), "cls": hidden_LD[0], "last": hidden_LD[-1]}[pooling])
    return torch.nn.functional.normalize(torch.stack(found), dim=1)


@pytest.mark.parametrize("family", BASES)
def test_embeddings_are_learnt_and_plain_peft_gives_the_same(family: str, tmp_path: Path) -> None:
    base = save_tiny_base(family, tmp_path / "base")
    job = load_job(embed(base, some_texts_with_positives(), tmp_path, train={"learning_rate": 1e-2}))
    before = retrieve(job.engine, job.data.validation, batching(job.run))
    finish(job)
    after = retrieve(job.engine, job.data.validation, batching(job.run))
    assert before is not None
    assert after is not None
    assert after["mrr"].value > before["mrr"].value

    texts = [row["anchor"] for row in some_texts_with_positives(6)]
    folder = tmp_path / "run" / "adapter"
    tokenizer, pooling = AutoTokenizer.from_pretrained(folder), "last" if family in ("llama", "qwen2") else "mean"
    there = AutoPeftModelForFeatureExtraction.from_pretrained(folder).eval()
    expected = plain_embeddings(there, tokenizer, texts, pooling)
    found = torch.tensor([row.embedding for row in veneer.predict(tmp_path / "run", write(tmp_path, texts))])
    assert (1 - (expected * found).sum(1)).abs().max() < 1e-5


def write(folder: Path, texts: list[str]) -> str:
    return write_rows(folder / "new.jsonl", [{"text": text} for text in texts])


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling_leaves_padding_out(pooling: str) -> None:
    hidden_BLD = torch.randn(3, 5, 4)
    mask_BL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    found = pool(hidden_BLD, mask_BL, pooling)
    for row, length in enumerate((5, 2, 1)):
        alone = pool(hidden_BLD[row : row + 1, :length], mask_BL[row : row + 1, :length], pooling)
        assert torch.allclose(found[row], alone[0], atol=1e-6)  # float32 sums of five terms
    assert torch.allclose(found.norm(dim=1), torch.ones(3))


def test_the_loss_is_infonce_over_all_texts_of_a_step() -> None:
    texts = Texts(
        [torch.tensor([n]) for n in (0, 1, 2, 3, 4)], torch.tensor([0, 2])
    )  # two rows; the second has a negative
    embeddings = torch.nn.functional.normalize(torch.randn(5, 8, dtype=torch.float64), dim=1)
    found = in_batch_logprobs(texts, embeddings, 0.1)
    candidates = embeddings[[1, 3, 4]]
    for row, (anchor, right) in enumerate(((0, 0), (2, 1))):
        scores = candidates @ embeddings[anchor] / 0.1
        assert found[row].item() == pytest.approx(scores.log_softmax(0)[right].item())


def test_a_text_that_equals_the_positive_or_the_anchor_is_no_negative() -> None:
    same, other = torch.tensor([7, 8]), torch.tensor([9])
    rows = [
        torch.tensor([1]),
        same,
        torch.tensor([2]),
        same,
        torch.tensor([3]),
        other,
        torch.tensor([4]),
        torch.tensor([1]),
    ]
    embeddings = torch.nn.functional.normalize(torch.randn(8, 4, dtype=torch.float64), dim=1)
    found = in_batch_logprobs(Texts(rows, torch.tensor([0, 2, 4, 6])), embeddings, 1.0)
    scores = embeddings[[1, 5]] @ embeddings[0]  # neither the other `same`, nor the anchor's own text as a positive
    assert found[0].item() == pytest.approx(scores.log_softmax(0)[0].item())


def test_a_step_is_the_same_however_it_is_cut(bert: Path, tmp_path: Path) -> None:
    gradients = {}
    for rows, parts in ((8, 1), (4, 2), (1, 8)):
        train = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": parts}
        data = {"validation": 0}
        run = embed(bert, some_texts_with_positives(32, True), tmp_path / str(rows), train=train, data=data)
        job = load_job(run)
        assert isinstance(job.engine, EmbeddingEngine)
        batches = job._batches.step(0)
        objective, scale = InBatchNegatives(), 1 / 8
        loss = sum(
            job.engine.forward_backward(batch.scaled(scale), objective).loss.item()
            for batch in objective.begin_step(job.engine, batches)
        )
        found = [p.grad.clone() for p in job.model.parameters() if p.grad is not None]
        gradients[rows] = (loss, torch.cat([part.flatten() for part in found]))
    for rows in (4, 1):
        assert gradients[rows][0] == pytest.approx(gradients[8][0], rel=1e-5)  # float32, other paddings
        apart = (gradients[rows][1] - gradients[8][1]).abs().max()
        assert apart < 1e-4 * gradients[8][1].abs().max()


def test_a_step_that_runs_out_of_memory_is_cut_and_stays_the_same(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches are cut, but not the step: its negatives are all its texts still."""
    found = {}
    for name, most in (("whole", 8), ("cut", 2)):
        train = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 3}
        rows = some_texts_with_positives(48, True)
        job = load_job(embed(bert, rows, tmp_path / name, train=train, data={"validation": 0}))
        _fail_beyond(most, job.engine, monkeypatch)
        with (
            notified(r"out of memory in step 1 with 8 rows.*the training is the same")
            if name == "cut"
            else nullcontext()
        ):
            finish(job)
        found[name] = losses(job.run.train.output_dir)
    assert found["cut"] == pytest.approx(found["whole"], rel=1e-3)  # float32: other paddings, over three updates


def _fail_beyond(rows: int, engine: Any, patch: pytest.MonkeyPatch) -> None:
    """Let an engine run out of memory with more rows than these at a time, with a gradient or without."""
    embed_texts, has_texts_of = engine._embed, 3  # at most, in each row

    def limited(texts: Any) -> torch.Tensor:
        if engine.model.training and len(texts) > rows * has_texts_of:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        found: torch.Tensor = embed_texts(texts)
        return found

    patch.setattr(engine, "_embed", limited)


def test_dropout_is_drawn_alike_in_both_passes_of_a_step(bert: Path, tmp_path: Path) -> None:
    run = embed(
        bert,
        some_texts_with_positives(16),
        tmp_path,
        adapter={"lora_dropout": 0.5},
        train={"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 2},
        data={"validation": 0},
    )
    finish(job := load_job(run))  # B is no longer zero, so that dropout changes embeddings
    engine, objective = job.engine, InBatchNegatives()
    assert isinstance(engine, EmbeddingEngine)
    seen: list[torch.Tensor] = []
    embed_texts = engine._embed

    def recorded(texts: Any) -> torch.Tensor:
        found = embed_texts(texts)
        seen.append(found.detach().clone())
        return found

    engine._embed = recorded  # type: ignore[method-assign]
    for batch in objective.begin_step(engine, job._batches.step(0)):
        engine.forward_backward(batch, objective)
    first, second = seen[:2], seen[2:]
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_run_that_is_resumed_gives_the_same_bits(bert: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "adapter": {"lora_dropout": 0.1},
        "train": {"max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    }
    whole = embed(bert, some_texts_with_positives(), tmp_path / "whole", **settings)
    finish(load_job(whole))
    parted = embed(bert, some_texts_with_positives(), tmp_path / "parted", **settings)
    load_job(parted).fit_until(3)
    finish(load_job(parted, resume=True))
    adapters = [load_file(run.train.output_dir / "adapter" / "adapter_model.safetensors") for run in (whole, parted)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_evaluation_compares_with_the_base_and_a_merge_embeds_alike(bert: Path, tmp_path: Path) -> None:
    run = embed(bert, some_texts_with_positives(negatives=True), tmp_path, train={"learning_rate": 1e-2})
    finish(load_job(run))
    found = veneer.evaluate_classifier(tmp_path / "run").as_dict()
    assert found["compared_with"] == "the base itself"
    assert found["metrics"]["mrr"]["difference"]["value"] > 0
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["metrics"] == found["metrics"]

    veneer.merge(str(tmp_path / "run"), tmp_path / "merged", dtype="float32")
    texts = [row["anchor"] for row in some_texts_with_positives(5)]
    merged, tokenizer = AutoModel.from_pretrained(tmp_path / "merged").eval(), AutoTokenizer.from_pretrained(bert)
    expected = plain_embeddings(merged, tokenizer, texts, "mean")
    here = torch.tensor([row.embedding for row in veneer.predict(tmp_path / "run", write(tmp_path, texts))])
    assert (1 - (expected * here).sum(1)).abs().max() < 1e-5
    for folder in (tmp_path / "merged", tmp_path / "run" / "adapter"):
        pooled = json.loads((folder / "1_Pooling" / "config.json").read_text())
        assert (pooled["pooling_mode_mean_tokens"], pooled["word_embedding_dimension"]) == (True, 32)
        assert [part["path"] for part in json.loads((folder / "modules.json").read_text())] == [
            "",
            "1_Pooling",
            "2_Normalize",
        ]


def test_the_bases_own_pooling_is_kept(tmp_path: Path) -> None:
    base = save_tiny_base("bert", tmp_path / "base")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    job = load_job(embed(base, some_texts_with_positives(), tmp_path))
    assert isinstance(job.engine, EmbeddingEngine)
    assert job.engine.pooling == "cls"


def test_ranks_count_ties_against_the_model_and_pass_over_equal_texts() -> None:
    anchors = np.array([[1.0, 0.0], [0.0, 1.0]])
    candidates = np.array([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8], [1.0, 0.0]])
    assert ranks(anchors, candidates, [10, 11], [1, 1, 2, 3], [0, 2]).tolist() == [2, 1]  # 3 ties with the positive
    assert ranks(anchors, candidates, [3, 11], [1, 1, 2, 3], [0, 2]).tolist() == [1, 1]  # 3 is the anchor's own text
    scores = retrieval_scores(np.array([1, 2, 4, 20]), 30)
    assert scores["mrr"].value == pytest.approx((1 + 1 / 2 + 1 / 4 + 1 / 20) / 4)
    assert [scores[f"recall@{k}"].value for k in (1, 5, 10)] == [0.25, 0.75, 0.75]


@pytest.mark.parametrize(
    ("row", "sections", "message"),
    [
        ({"anchor": "the film"}, {}, "none of the fields positive, document"),
        ({"anchor": "the film", "positive": " "}, {}, "`positive` is empty"),
        ({"anchor": "the film", "positive": 4}, {}, "`positive` must be a text"),
        ({"anchor": "the film", "positive": "the film"}, {}, "both texts are the same"),
        ({"anchor": "a", "positive": "b", "negative": ["c", "b"]}, {}, "the negative text is the positive one"),
        ({"sentence1": "a", "sentence2": "b", "score": 0.4}, {}, "degrees of similarity are not learnt"),
        ({"sentence1": "a", "sentence2": "b", "label": 0}, {}, "found bad"),
        ({"anchor": "a", "positive": "b"}, {"data": {"labels": ["a", "b"]}}, "data.labels = ('a', 'b'): has no effect"),
        ({"anchor": "a", "positive": "b"}, {"train": {"class_weights": "balanced"}}, "has no effect"),
        ({"anchor": "a", "positive": "b"}, {"train": {"objective": "dpo"}}, "train.objective = dpo: has no effect"),
        ({"anchor": "the film", "positive": "so"}, {"data": {"max_length": 8, "overlong": "refuse"}}, "overlong"),
    ],
)
def test_bad_input_is_one_message(
    bert: Path, tmp_path: Path, row: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as told:
        load_job(embed(bert, [*some_texts_with_positives(8), row], tmp_path, **sections))
    assert message in str(told.value)
    assert not (tmp_path / "run").exists()
