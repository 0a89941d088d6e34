"""Reward models: one output, learnt from pairs by Bradley and Terry's loss; the same in plain PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

import veneer
from tests.support.classifiers import save_tiny_base
from tests.support.runs import some_pairs, some_rows, tiny_run, write_rows
from veneer.api.train import load_job
from veneer.config import RunFolder, UserError
from veneer.config.files import read_json
from veneer.data.batch import Batch
from veneer.engine.classifier import ClassifierEngine
from veneer.training.metrics import read_metrics


def reward_run(tmp_path: Path, rows: list[dict[str, Any]], **sections: Any) -> veneer.Run:
    base = save_tiny_base("llama", tmp_path / "base")
    given: dict[str, Any] = {
        "model": {"task": "reward"},
        "data": {"validation": 0.25, "chat_template": "chatml", "duplicates": "keep"},
        "train": {"max_steps": 12},
        "evaluate": {"max_new_tokens": 256},
    }
    for name, section in sections.items():
        given[name] = given.get(name, {}) | section
    return tiny_run(base, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run", **given)


def short_wins(count: int = 24) -> list[dict[str, Any]]:
    """Pairs whose chosen answer is the one that says yes."""
    return [{"prompt": row["prompt"], "chosen": "yes", "rejected": "no no"} for row in some_pairs(count)]


def test_the_gradient_is_that_of_bradley_and_terrys_loss(tmp_path: Path) -> None:
    job = load_job(reward_run(tmp_path, short_wins()))
    assert isinstance(job.engine, ClassifierEngine)
    batch = Batch.of([job.data.train[n] for n in range(6)], 2, False)
    weights = [p for p in job.model.parameters() if p.requires_grad]
    found = job.engine.forward_backward(batch.scaled(1 / 3), job.objective)
    gradients = [p.grad.clone() for p in weights if p.grad is not None]
    assert len(gradients) == len(weights)
    for parameter in weights:
        parameter.grad = None
    rewards = torch.cat(
        [job.model(input_ids=torch.tensor(job.data.train[n].ids[:-1]).long()[None]).logits[:, 0] for n in range(6)]
    )
    loss = -F.logsigmoid(rewards[::2] - rewards[1::2])
    loss.mean().backward()  # type: ignore[no-untyped-call]
    assert found.loss.item() == pytest.approx(loss.sum().item(), rel=1e-5)  # float32, rows of other padding
    for gradient, parameter in zip(gradients, weights, strict=True):
        assert parameter.grad is not None
        assert torch.allclose(gradient, parameter.grad, rtol=1e-3, atol=1e-6)


def test_a_reward_model_prefers_what_was_chosen_in_plain_peft_too(tmp_path: Path) -> None:
    run = reward_run(tmp_path, short_wins())
    veneer.train(run)
    last = [line for line in read_metrics(RunFolder(run.train.output_dir).metrics) if line["kind"] == "eval"][-1]
    assert last["rewards/accuracies"] == 1.0
    ledger = read_json(run.train.output_dir / "ledger.json")
    assert not any("end-of-turn" in warning for warning in ledger["warnings"]), "nothing is written that has to end"
    evaluated = veneer.evaluate_classifier(run.train.output_dir)
    judged = evaluated.as_dict()
    assert judged["rows"] == 6
    assert judged["metrics"]["rewards/accuracies"]["tuned"]["value"] == 1.0
    assert judged["metrics"]["rewards/accuracies"]["difference"]["low"] > 0, "better than a coin"
    margins = judged["metrics"]["rewards/margins"]["tuned"]
    assert margins["value"] == pytest.approx(last["rewards/margins"], rel=1e-4)
    assert margins["low"] > 0
    few = veneer.evaluate_classifier(run.train.output_dir, str(run.data.train), rows=3)
    assert few.judged.rows == 3
    with pytest.raises(UserError, match="rewards are compared in pairs"):
        veneer.evaluate_classifier(
            run.train.output_dir, write_rows(tmp_path / "alone.jsonl", [{"prompt": "a", "completion": "yes"}])
        )

    rows = [{"prompt": "what does the cat say", "chosen": "no no", "rejected": "yes"}]
    (pair,) = veneer.predict(run.train.output_dir, rows)
    assert pair.label == "rejected"
    answers = [{"prompt": "what does the cat say", "completion": answer} for answer in ("no no", "yes")]
    found = [row.scores["reward"] for row in veneer.predict(run.train.output_dir, answers)]
    assert found == pytest.approx([pair.scores["chosen"], pair.scores["rejected"]], rel=1e-4)

    adapter = run.train.output_dir / "adapter"
    plain = AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=1, pad_token_id=2).eval()
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    turns = [{"role": "user", "content": answers[1]["prompt"]}, {"role": "assistant", "content": "yes"}]
    with torch.no_grad():
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        logits = plain(**tokenizer(text, return_tensors="pt")).logits
    assert logits.item() == pytest.approx(found[1], rel=1e-4)


def test_other_rows_and_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rewards are learnt from pairs"):
        load_job(reward_run(tmp_path / "a", some_rows()))
    with pytest.raises(UserError, match=r"train.objective = dpo: has no effect with model.task = reward"):
        load_job(reward_run(tmp_path / "b", short_wins(), train={"objective": "dpo"}))
