"""PiSSA and OLoRA: they train as those of PEFT do, and are plain LoRA on the original base when they are saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import veneer
from tests.support.engines import batch_of, gradients
from tests.support.plans import planner_of
from tests.support.runs import StopAt, losses, some_rows, tiny_run, write_rows
from tests.support.tiny import FAMILIES
from veneer.config import Adapter, Interrupted, UserError
from veneer.engine.fused.decoder import NotCoveredError
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.reference import ReferenceEngine
from veneer.model.attach import attach, count_parameters
from veneer.training.job import TrainingJob

KINDS = ["pissa", "olora"]


def base_of(family: str = "llama") -> Any:
    name, sizes = FAMILIES[family]
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**sizes)).eval()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(48).reshape(2, 24) + 3).logits
    return found


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_trained_half_has_the_values_and_gradients_of_pefts(kind: Any, use_rslora: bool) -> None:
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": use_rslora,
        "target_modules": ["q_proj", "up_proj"],
    }
    theirs = get_peft_model(base_of(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=kind, **settings))
    ours = attach(base_of(), Adapter(init_lora_weights=kind, **settings), 0)
    assert (logits_of(ours) - logits_of(base_of())).abs().max() < 1e-5
    wanted_loss, wanted = gradients(ReferenceEngine(theirs), theirs, batch_of())
    loss, found = gradients(ReferenceEngine(ours), ours, batch_of())
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    values = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            half = slice(0, 4)
            mine = (values[name].data, found[name])
            mine = tuple(t[half] if "lora_A" in name else t[:, half] for t in mine)  # type: ignore[assignment]
            torch.testing.assert_close(mine[0], parameter.data, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(mine[1], wanted[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_is_plain_lora_on_the_original_base(
    kind: str, family: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_model(family)
    rows = write_rows(tmp_path / "rows.jsonl", some_rows())
    settings = {"init_lora_weights": kind, "rank_pattern": {r"(q|c)_(proj|attn)": 3}}
    run = tiny_run(base, rows, tmp_path / "run", adapter=settings, train={"save_steps": 4, "learning_rate": 1e-3})
    job = TrainingJob(run)
    job.fit()
    live = logits_of(job.model.eval())
    saved = logits_of(PeftModel.from_pretrained(loaded(base), str(tmp_path / "run" / "adapter")).eval())
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000004"
    assert (live - logits_of(loaded(base))).abs().max() > 1e-3, "the adapter changes the model"
    assert (saved - live).abs().max() <= 1e-5
    assert run.adapter is not None
    begun = dict(attach(loaded(base), run.adapter, run.train.seed).named_parameters())
    held = [load_file(f / "adapter_model.safetensors") for f in (checkpoint, tmp_path / "run" / "adapter")]
    for name, value in held[0].items():
        first = begun[name.replace(".weight", ".default.weight")].data
        axis = 0 if "lora_A" in name else 1
        moved, still = value.chunk(2, axis), first.chunk(2, axis)
        assert torch.equal(moved[1], still[1]), "the part of the base stays as it began"
        assert not torch.equal(moved[0], still[0])
        change = held[1][name].chunk(2, axis)
        assert torch.equal(change[1], -still[1] if axis else change[0] - still[0]), "it is delivered as its change"


@pytest.mark.parametrize("kind", KINDS)
def test_a_delivered_adapter_bears_the_rounding_of_those_who_load_it(
    kind: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """A change of small steps is a small part of B A, most of which 16 bits would lose."""
    rows = write_rows(tmp_path / "rows.jsonl", some_rows())
    run = tiny_run(
        tiny_model(), rows, tmp_path / "run", adapter={"init_lora_weights": kind}, train={"learning_rate": 1e-4}
    )
    job = TrainingJob(run)
    job.fit()
    base, live = logits_of(loaded(tiny_model())), logits_of(job.model.eval())

    def rounded(model: Any) -> torch.Tensor:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.bfloat16().float()
        return logits_of(model.eval())

    delivered = rounded(PeftModel.from_pretrained(loaded(tiny_model()), str(tmp_path / "run" / "adapter")))
    trained = rounded(job.model)
    change = (live - base).norm()
    # bfloat16 rounds by at most 2^-8 of a value, and independently, so sums of many err by less.
    assert (delivered - live).norm() < 2**-7 * change
    assert (trained - live).norm() > 0.1 * change, "as it is trained, rounding would matter"


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_planned_resumed_merged_and_certified(
    kind: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", some_rows())

    def run(name: str) -> veneer.Run:
        train = {"save_steps": 2, "learning_rate": 1e-3}
        return tiny_run(tiny_model(), rows, tmp_path / name, adapter={"init_lora_weights": kind}, train=train)

    planned = planner_of(run("whole"), "8GiB").forecast(run("whole"))
    adapter = run("whole").adapter
    assert adapter is not None
    assert planned.trainable == count_parameters(attach(loaded(tiny_model()), adapter, 0))["trainable"]
    assert planned.engine_reason == "the fused engine does not cover adapters of the method PiSSA or OLoRA"
    veneer.train(run("whole"))
    with pytest.raises(Interrupted):
        veneer.train(run("cut"), listeners=[StopAt(3)])
    veneer.train(run("cut"), resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0]
    veneer.merge(str(tmp_path / "whole"), tmp_path / "merged", dtype="float32")
    certificate, _ = veneer.certify(str(tmp_path / "merged"), str(tmp_path / "whole"), rows=4)
    assert certificate.passed, certificate
    card = (tmp_path / "whole" / "adapter" / "README.md").read_text()
    assert f"begun as {kind}; saved as plain LoRA of twice the rank" in card


def test_the_fused_engine_leaves_it_to_the_reference_engine() -> None:
    model = attach(base_of(), Adapter(init_lora_weights="pissa"), 0)
    with pytest.raises(NotCoveredError, match="adapters of the method PiSSA or OLoRA"):
        FusedEngine(model)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"quantization": {}}, "the base is in 4 bits"),
        ({"train": {"weight_decay": 0.1}}, "set train.weight_decay: 0"),
        ({"adapter": {"r": 200}}, "lower adapter.r"),
        ({"adapter": {"target_modules": ["embed_tokens"]}}, "is no linear layer"),
        ({"model": {"adapter": "first"}}, "training starts from model.adapter"),
    ],
)
def test_what_it_cannot_begin_with_is_refused(
    sections: dict[str, Any], said: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", some_rows())
    adapter = {"init_lora_weights": "pissa"} | sections.pop("adapter", {})
    with pytest.raises(UserError, match=said):
        veneer.train(tiny_run(tiny_model(), rows, tmp_path / "run", adapter=adapter, **sections))
    assert not (tmp_path / "run" / "adapter").exists()
