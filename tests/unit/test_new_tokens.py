"""Tokens that a run adds: recognised in rows, begun as the mean, trained, and one model wherever they are loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

import veneer
from tests.support.plans import planner_of
from tests.support.runs import StopAt, losses, some_rows, tiny_run, write_rows
from tests.support.tiny import CHATML, FAMILIES, save_tiny_model
from veneer.config import Data, Interrupted, UserError
from veneer.model.load import load_tokenizer
from veneer.model.locate import BaseSource
from veneer.model.tuned import find_tuned
from veneer.training.job import TrainingJob

TOKENS = ["<|route|>", "<|a|>", "<|b|>"]
KNOWN = 310  # tokens of the tiny tokenizer


def rows_with_tokens(folder: Path) -> str:
    rows = [
        {
            "prompt": f"<|route|> {row['prompt']}",
            "completion": f"{'<|a|>' if n % 2 else '<|b|>'}{row['completion']}",
        }
        for n, row in enumerate(some_rows())
    ]
    return write_rows(folder / "rows.jsonl", rows)


def saved_base(folder: Path, tied: bool, vocabulary: int) -> Path:
    kind, sizes = FAMILIES["llama"]
    save_tiny_model((kind, sizes | {"tie_word_embeddings": tied, "vocab_size": vocabulary}), folder)
    return folder


def run_of(base: Path, folder: Path, name: str, **sections: Any) -> veneer.Run:
    data = {"add_special_tokens": TOKENS} | sections.pop("data", {})
    train = {"save_steps": 2, "learning_rate": 1e-3}
    return tiny_run(base, rows_with_tokens(folder), folder / name, data=data, train=train, **sections)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(313)[None, ::5]).logits
    return found


# Every pair of two. 384: the base has rows to spare, as Qwen's.
@pytest.mark.parametrize(
    ("whole", "tied", "vocabulary"),
    [(False, False, KNOWN), (False, True, 384), (True, False, 384), (True, True, KNOWN)],
)
def test_a_run_that_adds_tokens_is_one_model_everywhere(
    whole: bool, tied: bool, vocabulary: int, tmp_path: Path
) -> None:
    base = saved_base(tmp_path / "base", tied, vocabulary)
    sections = {"adapter": {"modules_to_save": ["embed_tokens", "lm_head"]}} if whole else {}
    run = run_of(base, tmp_path, "run", **sections)
    verified = veneer.verify(run)
    assert verified.passed, verified.as_dict()
    job = TrainingJob(run)
    planned = planner_of(run, "8GiB").forecast(run).trainable
    assert job.parameters["trainable"] == pytest.approx(planned, rel=0.01)
    job.fit()
    with pytest.raises(Interrupted):
        veneer.train(run_of(base, tmp_path, "cut", **sections), listeners=[StopAt(3)])
    veneer.train(run_of(base, tmp_path, "cut", **sections), resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "run")
    live = logits_of(job.model.eval())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter")
    assert tokenizer.convert_tokens_to_ids(TOKENS) == [KNOWN, KNOWN + 1, KNOWN + 2]

    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if len(tokenizer) > vocabulary:
        plain.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    plain = PeftModel.from_pretrained(plain, str(tmp_path / "run" / "adapter")).eval()
    assert (logits_of(plain) - live).abs().max() <= 1e-5
    for name in ("run", "cut/checkpoints/step-000006"):
        assert (logits_of(find_tuned(str(tmp_path / name)).load(torch.float32)) - live).abs().max() <= 1e-5

    veneer.merge(str(tmp_path / "run"), tmp_path / "merged", dtype="float32")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert (logits_of(merged) - live).abs().max() <= 1e-5
    assert merged.config.tie_word_embeddings == tied
    assert merged.config.vocab_size == max(vocabulary, KNOWN + 3) == len(merged.get_input_embeddings().weight)
    certificate, _ = veneer.certify(str(tmp_path / "merged"), str(tmp_path / "run"), rows=4)
    assert certificate.passed, certificate
    exported = veneer.export(str(tmp_path / "run"), tmp_path / "gguf", quant="f16")
    certificate, _ = veneer.certify(str(tmp_path / "gguf" / exported.file), str(tmp_path / "run"), rows=4)
    assert all(check.passed for check in certificate.checks if check.id == "weights"), certificate

    passport = json.loads((tmp_path / "cut" / "adapter" / "passport.json").read_text())
    ids = {token: KNOWN + n for n, token in enumerate(TOKENS)}
    assert passport["added_tokens"] == {"ids": ids, "rows": max(vocabulary, KNOWN + 3)}
    card = (tmp_path / "cut" / "adapter" / "README.md").read_text()
    assert "tokens that were added" in card
    assert "base.resize_token_embeddings(len(tokenizer), mean_resizing=False)" in card


def test_new_rows_begin_as_the_mean_and_the_base_keeps_its_own(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", False, 384)
    before = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    job = TrainingJob(run_of(base, tmp_path, "run"))
    for ends in ("get_input_embeddings", "get_output_embeddings"):
        weight = getattr(before, ends)().weight
        after = getattr(job.model, ends)().token_adapter
        begun = after.trainable_tokens_delta["default"]
        torch.testing.assert_close(begun, weight[:KNOWN].mean(0).expand(3, -1), rtol=1e-6, atol=1e-7)
        kept = after.base_layer.weight
        assert torch.equal(kept[:KNOWN], weight[:KNOWN])
        assert torch.equal(kept[KNOWN + 3 :], weight[KNOWN + 3 :])


def test_tokens_are_whole_in_rows_and_answers_unless_the_template_writes_them(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", False, 384)
    run = run_of(base, tmp_path, "run")
    prepared = veneer.prepare(run)
    for sample in prepared.samples:
        text = "".join(piece["text"] for piece in sample["pieces"])
        assert "<|route|>" in text
    (ids,) = ([int(token) for token in row.ids] for row in [prepared.train[0]])
    assert KNOWN in ids
    assert KNOWN + 1 in ids or KNOWN + 2 in ids
    source = BaseSource("folder", str(base), str(base))
    tokenizer = load_tokenizer(source, run.data)
    assert tokenizer.decode([KNOWN, KNOWN + 1], skip_special_tokens=True) == "<|route|><|a|>"
    template = tmp_path / "template.jinja"
    template.write_text(CHATML.replace("<|im_start|>assistant", "<|a|><|im_start|>assistant"))
    data = Data(train="-", add_special_tokens=tuple(TOKENS), chat_template=str(template))
    tokenizer = load_tokenizer(source, data)
    assert tokenizer.decode([KNOWN, KNOWN + 1], skip_special_tokens=True) == "<|route|>"


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {"add_special_tokens": ["<x>", "<|im_end|>"]}}, "`<|im_end|>` is a token of this base already"),
        ({"data": {"add_special_tokens": ["cat"]}}, "adapter.trainable_token_indices: [271] trains its row"),
        ({"data": {"add_special_tokens": ["<x>", "<x>"]}}, "`<x>` is named twice"),
        ({"data": {"add_special_tokens": [" <x>"]}}, "begins or ends with a space"),
        (
            {"adapter": {"target_modules": ["embed_tokens", "q_proj"]}},
            "add_special_tokens (of the section data) trains model.embed_tokens, and so does adapter.target_modules",
        ),
    ],
)
def test_tokens_that_cannot_be_added_are_refused(sections: dict[str, Any], said: str, tmp_path: Path) -> None:
    run = run_of(saved_base(tmp_path / "base", False, 384), tmp_path, "run", **sections)
    with pytest.raises(UserError) as caught:
        veneer.train(run)
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_methods_without_trained_rows_are_refused_by_the_plan(tmp_path: Path) -> None:
    adapter = {"method": "vera", "r": 4, "lora_alpha": 32}
    run = run_of(saved_base(tmp_path / "base", False, 384), tmp_path, "run", adapter=adapter)
    with pytest.raises(UserError, match=r"beside LoRA and DoRA alone, and the run has adapter\.method = vera"):
        veneer.plan(run)


def test_a_merge_with_tokens_is_not_taken_apart(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", False, KNOWN)
    veneer.train(run_of(base, tmp_path, "run"))
    veneer.merge(str(tmp_path / "run"), tmp_path / "merged")
    with pytest.raises(UserError, match="the original ones are not in it"):
        veneer.unmerge(str(tmp_path / "merged"), str(tmp_path / "run"), tmp_path / "apart")
