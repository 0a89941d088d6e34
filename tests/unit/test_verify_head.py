"""`veneer verify` of runs that label, tag, embed and reward texts: it passes, and sees what is wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from tests.support.classifiers import classify, save_tiny_base, some_texts
from tests.support.heads import embed, some_tagged, some_texts_with_positives, tag
from tests.support.runs import some_pairs, tiny_run, write_rows
from veneer.engine.classifier import ClassifierEngine
from veneer.model.attach import save_adapter
from veneer.training import verify_head

Make = Callable[[Path], veneer.Run]


def rewarded(folder: Path) -> veneer.Run:
    rows = [{"prompt": row["prompt"], "chosen": "yes", "rejected": "no no"} for row in some_pairs(12)]
    return tiny_run(
        save_tiny_base("llama", folder / "base"),
        write_rows(folder / "rows.jsonl", rows),
        folder / "run",
        model={"task": "reward"},
        data={"chat_template": "chatml", "duplicates": "keep"},
        evaluate={"max_new_tokens": 256},
    )


RUNS: dict[str, Make] = {
    "labels": lambda folder: classify(save_tiny_base("bert", folder / "base"), some_texts(), folder),
    "decoder": lambda folder: classify(save_tiny_base("llama", folder / "base"), some_texts(), folder),
    "tags": lambda folder: tag(save_tiny_base("distilbert", folder / "base"), some_tagged(), folder),
    "embeddings": lambda folder: embed(
        save_tiny_base("bert", folder / "base"),
        some_texts_with_positives(),
        folder,
        train={"per_device_train_batch_size": 4},
    ),
    "rewards": rewarded,
}


@pytest.mark.parametrize("task", RUNS)
def test_a_run_with_a_head_passes(task: str, tmp_path: Path) -> None:
    found = veneer.verify(RUNS[task](tmp_path))
    assert found.passed, [check for check in found.checks if not check.passed]
    expected = {"mask", "gradients", "padding", "overfit", "plain-peft"}
    assert {check.id for check in found.checks} == expected | ({"preferred"} if task == "rewards" else set())
    assert not (tmp_path / "run").exists(), "nothing is written"


def test_a_saved_head_that_is_random_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = save_adapter

    def forget_head(model: Any, *given: Any) -> None:
        head = model.get_base_model().classifier.modules_to_save["default"].weight
        kept = head.detach().clone()
        torch.nn.init.normal_(head.data)
        save(model, *given)
        head.data.copy_(kept)

    monkeypatch.setattr(verify_head, "save_adapter", forget_head)
    found = {check.id: check for check in veneer.verify(RUNS["labels"](tmp_path)).checks}
    assert not found["plain-peft"].passed
    assert "classifier" in found["plain-peft"].detail


def test_padding_that_is_read_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = ClassifierEngine._logits

    def unmasked(self: Any, texts: Any) -> Any:
        """Give texts as if the padding were a part of them."""
        most = max(map(len, texts))
        return logits(self, [torch.nn.functional.pad(text, (0, most - len(text))) for text in texts])

    monkeypatch.setattr(ClassifierEngine, "_logits", unmasked)
    found = {check.id: check for check in veneer.verify(RUNS["labels"](tmp_path)).checks}
    assert not found["padding"].passed
