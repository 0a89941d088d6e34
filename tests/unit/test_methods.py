"""Adapter methods by PEFT's modules: planned, trained, resumed, verified, saved, merged, exported and certified."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

import veneer
from tests.support.dry_runs import config_of, step
from tests.support.plans import planner_of
from tests.support.runs import StopAt, losses, some_rows, tiny_run, write_rows
from veneer.config import Adapter, Interrupted, UserError
from veneer.engine import dry_run as dry_run_module
from veneer.engine.dry_run import Step
from veneer.model.adapters import METHODS, PLAIN, find_method
from veneer.model.adapters.method import AdapterMethod
from veneer.model.attach import attach, count_parameters
from veneer.model.shapes import build, shapes_of
from veneer.training.job import TrainingJob

NAMES = [method.setting for method in PLAIN]
CERTIFIED = ("vera", "ia3", "oft")  # projections that modules share, factors, rotations; others add matrices as LoRA
RATES = {"vera": 3e-2, "ia3": 3e-2, "fourierft": 3e-2}  # of vectors; others have matrices


def find_method_named(setting: str) -> AdapterMethod:
    return next(method for method in METHODS if method.setting == setting)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(48).reshape(2, 24) + 3).logits
    return found


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def run_of(base: Path, folder: Path, method: str, **sections: Any) -> veneer.Run:
    rows = write_rows(folder.parent / "rows.jsonl", some_rows())
    adapter = {"r": 16, "lora_alpha": 32, "method": method} | sections.get("adapter", {})
    train = {"save_steps": 2, "learning_rate": RATES.get(method, 5e-3)} | sections.get("train", {})
    return tiny_run(base, rows, folder, **sections | {"adapter": adapter, "train": train})


def test_a_setting_names_each_method() -> None:
    assert set(get_args(Adapter.model_fields["method"].annotation)) == {method.setting for method in METHODS}


@pytest.mark.parametrize("method", NAMES)
def test_a_run_is_planned_resumed_saved_merged_and_certified(
    method: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_model()
    whole, cut = (run_of(base, tmp_path / name, method) for name in ("whole", "cut"))
    planned = planner_of(whole, "8GiB").forecast(whole)
    assert whole.adapter is not None
    model = attach(loaded(base), whole.adapter, 0)
    assert planned.trainable == count_parameters(model)["trainable"]
    name = find_method(whole.adapter).name
    assert planned.engine_reason == f"the fused engine does not cover adapters of the method {name}"
    assert (logits_of(model.eval()) - logits_of(loaded(base))).abs().max() < 1e-5, "it begins as the base"

    job = TrainingJob(whole)
    job.fit()
    with pytest.raises(Interrupted):
        veneer.train(cut, listeners=[StopAt(3)])
    veneer.train(cut, resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0]

    live = logits_of(job.model.eval())
    assert (live - logits_of(loaded(base))).abs().max() > 1e-3, "the adapter changes the model"
    saved = logits_of(PeftModel.from_pretrained(loaded(base), str(tmp_path / "whole" / "adapter")).eval())
    torch.testing.assert_close(saved, live, rtol=0, atol=1e-5)
    veneer.merge(str(tmp_path / "whole"), tmp_path / "merged", dtype="float32")
    torch.testing.assert_close(logits_of(loaded(tmp_path / "merged")), live, rtol=0, atol=1e-4)
    if method in CERTIFIED:
        certificate, _ = veneer.certify(str(tmp_path / "merged"), str(tmp_path / "whole"), rows=2)
        assert certificate.passed, certificate
    with pytest.raises(UserError, match="export the merged model: leave --adapter-only out"):
        veneer.export(str(tmp_path / "whole"), tmp_path / "alone", adapter_only=True)


@pytest.mark.parametrize("method", NAMES)
def test_parameters_say_which_of_them_learn_first(method: str, tiny_model: Callable[..., Path]) -> None:
    model = attach(loaded(tiny_model()), Adapter.model_validate({"method": method}), 0)
    described = find_method(model.peft_config["default"])
    assert described.setting == method
    ids = torch.arange(48).reshape(2, 24) + 3
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            learns = parameter.grad is not None and bool(parameter.grad.any())
            assert learns == described.learns_first(name), name


@pytest.mark.parametrize("method", NAMES)
def test_verify_passes(method: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    verified = veneer.verify(run_of(tiny_model(), tmp_path / "run", method))
    assert verified.passed, [check for check in verified.checks if not check.passed]


@pytest.mark.parametrize("method", [method.setting for method in PLAIN if method.on_4_bits])
def test_bases_in_4_bits_are_taken(method: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    veneer.train(run_of(tiny_model(), tmp_path / "run", method, quantization={"bits": 4}))
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"adapter": {"method": "ia3", "r": 4}}, r"\(IA\)\^3 has no adapter\.r\n.*it takes the modules alone"),
        (
            {"adapter": {"method": "vera", "use_rslora": True}},
            r"VeRA has no adapter\.use_rslora\n.*adapter\.r, ad",
        ),
        ({"adapter": {"method": "loha", "lora_dropout": 0.1}}, r"LoHa has no adapter\.lora_dropout"),
        ({"adapter": {"method": "hra", "init_lora_weights": "pissa"}}, r"HRA has no adapter\.init_lora_weights"),
        ({"adapter": {"method": "hra", "target_modules": ["embed_tokens"]}}, "model.embed_tokens is an embedding"),
        ({"adapter": {"method": "lokr"}, "quantization": {}}, r"no LoKr on weights in 4 bits\n.*to lora, dora, "),
        ({"adapter": {"method": "vera"}, "model": {"adapter": "first"}}, "only lora and dora"),
        ({"adapter": {"method": "vera"}, "train": {"loraplus_lr_ratio": 16}}, "only lora and dora have"),
    ],
)
def test_what_a_method_does_not_take_is_refused(
    sections: dict[str, Any], said: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = sections["adapter"]
    if "model" in sections:
        sections = sections | {"model": {"base": str(tiny_model()), "dtype": "float32"} | sections["model"]}
    run = run_of(tiny_model(), tmp_path / "run", adapter["method"], **sections)
    with pytest.raises(UserError, match=said):
        veneer.train(run)


def test_an_unknown_method_is_refused_with_the_list(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="write lora, dora, vera, ia3, loha, lokr, oft, hra or fourierft"):
        run_of(tiny_model(), tmp_path / "run", "adalora")


@pytest.mark.parametrize(
    ("method", "family", "checkpointing"),
    # The indices of FourierFT are on the CPU, and copied in each pass; PEFT would make them on the meta device here.
    [
        (name, family, checkpointing)
        for name in ("dora", *NAMES)
        if name != "fourierft"
        for family, checkpointing in (("llama", True), ("qwen2", False))
    ]
    + [("dora", "gpt2", True), ("vera", "gpt2", False), ("ia3", "gpt2", True)],
)
def test_a_dry_run_holds_what_peft_holds(
    method: str, family: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(family)
    adapter = Adapter.model_validate({"method": method} | ({"r": 4} if find_method_named(method).has("r") else {}))

    def make() -> Any:
        return build(config, torch.bfloat16)

    shapes = shapes_of(make())
    settings = {"adapter": find_method(adapter), "checkpointing": checkpointing, "targets": shapes.targets(adapter)}
    asked = step(shapes, **settings)
    ours, _ = dry_run_module._run(make(), asked, 2, True)

    def adapt(base: Any, step: Step) -> None:
        base.requires_grad_(False)
        with torch.device("meta"):
            attach(base, adapter, 0)

    monkeypatch.setattr(dry_run_module, "adapt", adapt)
    real, _ = dry_run_module._run(make(), asked, 2, True)
    for phase, peak in real.items():
        assert ours[phase].bytes == pytest.approx(peak.bytes, rel=0.01), phase


@pytest.mark.parametrize(("engine", "optim"), [("fused", "adamw_8bit"), ("reference", "adamw_torch")])
def test_the_rate_of_b_is_a_multiple_of_that_of_a(
    engine: str, optim: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """AdamW's first step moves each value by its rate, whatever the gradient."""

    def moved(name: str, ratio: float | None) -> dict[str, float]:
        train = {"engine": engine, "optim": optim, "loraplus_lr_ratio": ratio, "max_steps": 2, "warmup_ratio": 0.0,
                 "lr_scheduler_type": "constant", "learning_rate": 1e-3, "save_steps": 1}  # fmt: skip
        run = run_of(tiny_model(), tmp_path / name, "dora", train=train)
        veneer.train(run)
        first = load_file(tmp_path / name / "checkpoints" / "step-000001" / "adapter_model.safetensors")
        assert run.adapter is not None
        begun = attach(loaded(tiny_model()), run.adapter, run.train.seed).state_dict()
        found: dict[str, float] = {}
        for key, value in first.items():
            kind = next(kind for kind in ("lora_A", "lora_B", "lora_magnitude_vector") if kind in key)
            before = begun[key.replace(".weight", ".default.weight") if kind != "lora_magnitude_vector"
                           else f"{key}.default.weight"]  # fmt: skip
            found[kind] = max(found.get(kind, 0.0), float((value - before).abs().max()))
        return found

    plain, faster = moved("plain", None), moved("plus", 8.0)
    assert faster["lora_B"] == pytest.approx(8 * plain["lora_B"], rel=0.02)
    assert plain["lora_B"] == pytest.approx(1e-3, rel=0.02)
    assert faster["lora_magnitude_vector"] == pytest.approx(1e-3, rel=0.02)


def test_a_run_with_several_rates_is_resumed(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    whole, cut = (
        run_of(tiny_model(), tmp_path / name, "lora", train={"loraplus_lr_ratio": 16, "engine": "fused"})
        for name in ("whole", "cut")
    )
    veneer.train(whole)
    with pytest.raises(Interrupted):
        veneer.train(cut, listeners=[StopAt(3)])
    veneer.train(cut, resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.parametrize("method", [method.setting for method in PLAIN if not method.on_conv1d])
def test_transposed_weights_are_refused_where_peft_takes_them_for_others(
    method: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="a Conv1D, whose weight is transposed"):
        veneer.train(run_of(tiny_model("gpt2"), tmp_path / "run", method))
