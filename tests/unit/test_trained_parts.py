"""Biases, whole modules and rows of embeddings: trained, planned, resumed, saved as PEFT's, merged and certified."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import veneer
import veneer.engine.dry_run as dry_run_module
from tests.support.dry_runs import config_of, step
from tests.support.plans import planner_of
from tests.support.runs import StopAt, losses, some_rows, tiny_run, write_rows
from tests.support.tiny import FAMILIES, save_tiny_model
from veneer.config import Adapter, Interrupted, UserError
from veneer.engine.dry_run import Step
from veneer.engine.reference import ReferenceEngine
from veneer.model.attach import detach
from veneer.model.shapes import build, shapes_of
from veneer.model.trained_parts import find_parts
from veneer.model.tuned import find_tuned
from veneer.training.job import TrainingJob
from veneer.training.parts import load_parts

# Family, whether embeddings and head are tied, settings of the adapter, and why the fused engine leaves it alone.
OTHERS, ENDS = "trainable parameters outside the blocks' linear layers", "an adapter on the embeddings"
SETTINGS: dict[str, tuple[str, bool, dict[str, Any], str]] = {
    "biases of adapted modules": ("qwen2", False, {"bias": "lora_only"}, OTHERS),
    "all biases": ("gpt2", True, {"bias": "all", "target_modules": ["c_attn"]}, "the architecture gpt2"),
    "embeddings and head": ("llama", False, {"modules_to_save": ["embed_tokens", "lm_head"]}, ENDS),
    "tied embeddings": ("llama", True, {"modules_to_save": ["lm_head"]}, ENDS),
    "a norm": ("qwen2", False, {"modules_to_save": ["norm"]}, OTHERS),
    "rows": ("llama", False, {"trainable_token_indices": [100, 101]}, ENDS),
    "rows of both": ("llama", False, {"trainable_token_indices": {"embed_tokens": [100], "lm_head": [7, 100]}}, ENDS),
    "tied rows": ("llama", True, {"trainable_token_indices": [100, 101]}, ENDS),
    "LoRA on embeddings": ("llama", False, {"target_modules": ["embed_tokens", "q_proj"]}, ENDS),
}
CERTIFIED = ("all biases", "tied embeddings", "rows of both")  # biases, whole modules and rows


def saved_base(folder: Path, family: str, tied: bool) -> Path:
    kind, sizes = FAMILIES[family]
    save_tiny_model((kind, sizes | {"tie_word_embeddings": tied}), folder)
    return folder


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(300).reshape(5, 60) + 3).logits
    return found


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", SETTINGS)
def test_the_next_trial_of_a_sweep_has_the_base_as_it_was(name: str, tmp_path: Path) -> None:
    family, tied, settings, _ = SETTINGS[name]
    base = saved_base(tmp_path / "base", family, tied)
    parts = load_parts(
        tiny_run(base, write_rows(tmp_path / "rows.jsonl", some_rows()), tmp_path / "x", adapter=settings)
    )
    with torch.no_grad():
        for parameter in parts.model.parameters():
            parameter.add_(float(parameter.requires_grad))
    found = detach(parts.model)
    assert torch.equal(logits_of(found.eval()), logits_of(loaded(base)))
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert (found.get_output_embeddings().weight is found.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_is_planned_verified_resumed_merged_and_certified(name: str, tmp_path: Path) -> None:
    family, tied, settings, why = SETTINGS[name]
    base = saved_base(tmp_path / "base", family, tied)
    rows = write_rows(tmp_path / "rows.jsonl", some_rows())

    def run(name: str) -> veneer.Run:
        train = {"save_steps": 2, "learning_rate": 1e-3}
        return tiny_run(base, rows, tmp_path / name, adapter=settings, train=train)

    planned = planner_of(run("whole"), "8GiB").forecast(run("whole"))
    assert why in planned.engine_reason
    verified = veneer.verify(run("whole"))
    assert verified.passed, verified.as_dict()
    job = TrainingJob(run("whole"))
    job.fit()
    assert job.parameters["trainable"] == planned.trainable
    with pytest.raises(Interrupted):
        veneer.train(run("cut"), listeners=[StopAt(3)])
    veneer.train(run("cut"), resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    live, before = logits_of(job.model.eval()), logits_of(loaded(base))
    assert (live - before).abs().max() > 1e-3
    with ReferenceEngine(job.model).adapter_off():
        assert torch.equal(logits_of(job.model), before), "without the adapter it is the base, biases and all"
    assert torch.equal(logits_of(job.model), live)
    plain = PeftModel.from_pretrained(loaded(base), str(tmp_path / "whole" / "adapter")).eval()
    assert (logits_of(plain) - live).abs().max() <= 1e-5
    veneer.merge(str(tmp_path / "whole"), tmp_path / "merged", dtype="float32")
    merged = loaded(tmp_path / "merged")
    assert (logits_of(merged) - live).abs().max() <= 1e-5
    assert merged.config.tie_word_embeddings == tied
    if name in CERTIFIED:
        certificate, _ = veneer.certify(str(tmp_path / "merged"), str(tmp_path / "whole"), rows=2)
        assert certificate.passed, certificate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "LoRA on embeddings"])
def test_the_stand_ins_hold_what_peft_holds(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    family, tied, settings, _ = SETTINGS[name]
    config = config_of(family)
    config.tie_word_embeddings = tied
    shapes = shapes_of(build(config, dtype))
    adapter = Adapter.model_validate({"r": 4} | settings)
    parts = find_parts(shapes, adapter)
    asked = step(shapes, dtype=dtype, targets=shapes.targets(adapter), parts=parts)
    ours, work = dry_run_module._run(build(config, dtype), asked, 2, True)

    def adapt(base: Any, step: Step) -> None:
        base.requires_grad_(False)
        peft = LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            target_modules=settings.get("target_modules", "all-linear"),
            fan_in_fan_out=family == "gpt2",
            bias=adapter.bias,
            modules_to_save=sorted(parts.modules) or None,
            trainable_token_indices={path: list(tokens) for path, tokens in parts.rows} or None,
            ensure_weight_tying=tied and bool(parts.modules),
        )
        with torch.device("meta"):
            model = get_peft_model(base, peft)
        found = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert found == sum(asked.adapter_sizes(shapes))

    monkeypatch.setattr(dry_run_module, "adapt", adapt)
    real, real_work = dry_run_module._run(build(config, dtype), asked, 2, True)
    for phase, peak in real.items():
        assert ours[phase].bytes == pytest.approx(peak.bytes, rel=0.02), phase
    for what in ("flops", "bytes"):  # PEFT also moves a few indices
        mine, theirs = (sum(getattr(kind, what) * n for kind, n in found.items()) for found in (work, real_work))
        assert mine == pytest.approx(theirs, rel=0.02), what


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no biases": ("llama", {"adapter": {"bias": "all"}}, "this base has no biases"),
    "no biases there": (
        "qwen2",
        {"adapter": {"bias": "lora_only", "target_modules": ["o_proj"]}},
        "the adapted modules have no biases",
    ),
    "no such module": ("llama", {"adapter": {"modules_to_save": ["embed_token"]}}, "nearest: embed_tokens"),
    "no such end": ("llama", {"adapter": {"trainable_token_indices": {"head": [1]}}}, "nearest: lm_head"),
    "beyond the vocabulary": ("llama", {"adapter": {"trainable_token_indices": [384]}}, "from 0 to 383"),
    "twice": ("llama", {"adapter": {"trainable_token_indices": [3, 3]}}, "named twice"),
    "trained twice": (
        "llama",
        {"adapter": {"modules_to_save": ["q_proj"]}},
        r"adapter.modules_to_save trains model.layers.\d.self_attn.q_proj, and so does adapter.target_modules",
    ),
    "rows trained twice": (
        "llama",
        {"adapter": {"modules_to_save": ["embed_tokens"], "trainable_token_indices": [3]}},
        "and so does adapter.trainable_token_indices",
    ),
    "in 4 bits": (
        "llama",
        {"adapter": {"modules_to_save": ["q_proj"], "target_modules": ["v_proj"]}, "quantization": {}},
        "is in 4 bits",
    ),
    "in float16": (
        "llama",
        {"adapter": {"modules_to_save": ["embed_tokens"]}, "model": {"dtype": "float16"}},
        "set model.dtype: bfloat16 or float32",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_is_refused(name: str, tmp_path: Path) -> None:
    family, sections, said = REFUSED[name]
    base = saved_base(tmp_path / "base", family, False)
    rows = write_rows(tmp_path / "rows.jsonl", some_rows())
    with pytest.raises(UserError, match=said):
        veneer.train(tiny_run(base, rows, tmp_path / "run", **sections))
    assert not (tmp_path / "run").exists()


def test_tied_ends_given_other_tokens_are_refused(tmp_path: Path) -> None:
    shapes = shapes_of(loaded(saved_base(tmp_path / "base", "llama", True)))
    with pytest.raises(UserError, match="share their weights, and are given other tokens"):
        find_parts(shapes, Adapter(trainable_token_indices={"embed_tokens": (3,), "lm_head": (4,)}))


def test_rows_are_trained_in_float32_on_a_base_in_16_bits(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", "llama", False)
    rows = write_rows(tmp_path / "rows.jsonl", some_rows())
    settings: dict[str, Any] = {"adapter": {"trainable_token_indices": [100]}, "model": {"dtype": "bfloat16"}}
    job = TrainingJob(tiny_run(base, rows, tmp_path / "run", **settings))
    job.fit()
    assert all(p.dtype == torch.float32 for p in job.model.parameters() if p.requires_grad)
    again = find_tuned(str(tmp_path / "run")).load(torch.bfloat16)
    assert torch.equal(logits_of(again), logits_of(job.model.eval()))


@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": {"bias": "all"}},
        {"adapter": {"modules_to_save": ["norm"]}},
        {"adapter": {"init_lora_weights": "eva"}},
        {"data": {"add_special_tokens": ["<x>"]}},
    ],
)
def test_a_classifier_trains_none_of_them(sections: dict[str, Any], tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", "llama", False)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": f"the cat {n}", "label": "ab"[n % 2]} for n in range(16)])
    model = {"model": {"task": "sequence-classification"}}
    with pytest.raises(UserError, match="leave"):
        veneer.train(tiny_run(base, rows, tmp_path / "run", **model, **sections))
