"""EVA and LoftQ: what an adapter begins with, on which bits, and where it may be merged."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel

import veneer
from tests.support.plans import planner_of
from tests.support.runs import StopAt, losses, some_pairs, tiny_run, write_rows
from veneer.config import Interrupted, UserError
from veneer.engine.fused.engine import FusedEngine
from veneer.model.adapters import from_rows
from veneer.model.attach import detach
from veneer.training.job import TrainingJob
from veneer.training.parts import load_parts

ANIMALS, SOUNDS = ("cat", "dog", "owl", "hen", "pig"), ("moo", "mew", "hoo", "oink")


@pytest.fixture
def rows_file(tmp_path: Path) -> str:
    """Rows with enough trained tokens for EVA."""
    rows = [
        {"prompt": f"what does the cat say {animal}", "completion": " ".join([animal, sound] * 12)}
        for animal in ANIMALS
        for sound in SOUNDS
    ]
    return write_rows(tmp_path / "rows.jsonl", rows)


def run_of(kind: str, base: Path, rows_file: str, folder: Path, is_4bit: bool = False, **sections: Any) -> veneer.Run:
    adapter = {"init_lora_weights": kind} | sections.pop("adapter", {})
    quantization: dict[str, Any] = {"quantization": {}} if is_4bit else {}
    train = {"save_steps": 2, "learning_rate": 1e-3}
    return tiny_run(base, rows_file, folder, adapter=adapter, train=train, **quantization, **sections)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(48).reshape(2, 24) + 3).logits
    return found


@pytest.mark.parametrize(("kind", "is_4bit"), [("eva", False), ("eva", True), ("loftq", True)])
def test_a_run_is_verified_resumed_merged_and_certified(
    kind: str, is_4bit: bool, tiny_model: Callable[..., Path], rows_file: str, tmp_path: Path
) -> None:
    base = tiny_model()

    def run(name: str) -> veneer.Run:
        return run_of(kind, base, rows_file, tmp_path / name, is_4bit)

    assert planner_of(run("whole"), "8GiB").forecast(run("whole")).engine == "fused"
    verified = veneer.verify(run("whole"))
    assert verified.passed, verified.as_dict()
    job = TrainingJob(run("whole"))
    job.fit()
    with pytest.raises(Interrupted):
        veneer.train(run("cut"), listeners=[StopAt(3)])
    veneer.train(run("cut"), resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    live = logits_of(job.model.eval())
    plain = detach(load_parts(run("again")).model)
    saved = PeftModel.from_pretrained(plain, str(tmp_path / "whole" / "adapter")).eval()
    assert (logits_of(saved) - live).abs().max() <= 1e-5
    veneer.merge(str(tmp_path / "whole"), tmp_path / "merged", dtype="float32")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert (logits_of(merged) - live).abs().max() <= 1e-5
    certificate, _ = veneer.certify(str(tmp_path / "merged"), str(tmp_path / "whole"), rows=4)
    assert certificate.passed, certificate
    card = (tmp_path / "cut" / "adapter" / "README.md").read_text()
    assert f"begun as {kind}" in card
    assert ("belongs to no other" in card) == (kind == "loftq")


def test_eva_gives_ranks_to_the_directions_of_the_rows(
    tiny_model: Callable[..., Path], rows_file: str, tmp_path: Path
) -> None:
    parts = load_parts(run_of("eva", tiny_model(), rows_file, tmp_path / "run"))
    layers = {path: layer for path, layer in parts.model.named_modules() if "default" in getattr(layer, "lora_A", ())}
    ranks = {path: len(layer.lora_A["default"].weight) for path, layer in layers.items()}
    assert sum(ranks.values()) == 4 * 14, "ranks are moved between modules"
    assert max(ranks.values()) <= 8
    assert FusedEngine(parts.model).blocks, "the fused engine takes adapters of several ranks"
    fit = batches_of(parts)
    for path, layer in layers.items():
        assert not layer.lora_B["default"].weight.any()
        a_RI = layer.lora_A["default"].weight
        torch.testing.assert_close(a_RI @ a_RI.T, torch.eye(len(a_RI)), rtol=0, atol=1e-3)
        assert layer.scaling["default"] == 2.0, "whatever the rank"
        x_TI = fit[path] - fit[path].mean(0)
        explained = (x_TI @ a_RI.T).square().sum() / x_TI.square().sum()
        chance = len(a_RI) / x_TI.shape[1]
        assert explained > 2 * chance, path


def batches_of(parts: Any) -> dict[str, torch.Tensor]:
    """The inputs of each adapted module at the trained tokens of all rows."""
    found: dict[str, list[torch.Tensor]] = {}
    hooks = []
    trained = torch.empty(0)

    def note(path: str) -> Callable[..., None]:
        return lambda module, inputs: found.setdefault(path, []).append(inputs[0][0][trained])

    for path, module in parts.model.named_modules():
        if "default" in getattr(module, "lora_A", ()):
            hooks.append(module.register_forward_pre_hook(note(path)))
    for row in parts.data.train:
        trained = torch.from_numpy(row.weights) > 0
        with torch.no_grad():
            parts.model(torch.from_numpy(row.ids).long()[None])
    for hook in hooks:
        hook.remove()
    return {path: torch.cat(inputs) for path, inputs in found.items()}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_loftq_makes_up_for_rounding_as_well_as_its_rank_can(
    use_rslora: bool, tiny_model: Callable[..., Path], rows_file: str, tmp_path: Path
) -> None:
    base = tiny_model()
    whole = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    adapter = {"r": 16, "lora_alpha": 8, "use_rslora": use_rslora}
    parts = load_parts(run_of("loftq", base, rows_file, tmp_path / "run", True, adapter=adapter))
    for path, layer in parts.model.get_base_model().named_modules():
        if "default" not in getattr(layer, "lora_A", ()):
            continue
        packed = layer.get_base_layer().weight
        error = whole.get_parameter(f"{path}.weight") - dequantize_4bit(packed.data, packed.quant_state)
        left = error - layer.get_delta_weight("default")
        best = torch.linalg.svdvals(error)[16:].square().sum().sqrt()
        assert left.norm() <= 1.02 * best  # the decomposition is a randomized one
    near = (logits_of(parts.model.eval()) - logits_of(whole)).norm()
    with parts.model.disable_adapter():
        far = (logits_of(parts.model) - logits_of(whole)).norm()
    assert near < 0.8 * far


def test_a_loftq_adapter_is_merged_into_4_bits_alone(
    tiny_model: Callable[..., Path], rows_file: str, tmp_path: Path
) -> None:
    veneer.train(run_of("loftq", tiny_model(), rows_file, tmp_path / "run", True, data={"validation": 4}))
    run = str(tmp_path / "run")
    for on in ("base", "best"):
        with pytest.raises(UserError, match=rf"--on {on}, but .* base in 16 bits has no such error, and would get one"):
            veneer.merge(run, tmp_path / "merged", on=on)
    with pytest.raises(UserError, match=r"--adapter-only, but .* the base in 16 bits has no such error"):
        veneer.export(run, tmp_path / "gguf", adapter_only=True)
    # From the passport alone, which is what ships.
    with pytest.raises(UserError, match="the base in 16 bits has no such error"):
        veneer.merge(str(tmp_path / "run" / "adapter"), tmp_path / "merged", on="base")


@pytest.mark.parametrize("from_checkpoint", [False, True])
def test_what_goes_on_from_a_loftq_adapter_belongs_to_4_bits_too(
    from_checkpoint: bool, tiny_model: Callable[..., Path], rows_file: str, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    veneer.train(run_of("loftq", tiny_model(), rows_file, first, True))
    start = first / "checkpoints" / "step-000004" if from_checkpoint else first
    adapter, model = {"r": 4, "lora_alpha": 8}, {"adapter": str(start)}
    with pytest.raises(UserError, match=r"began with the error of its base's 4 bits[^Z]*set `quantization: {bits: 4}`"):
        veneer.train(tiny_run(tiny_model(), rows_file, tmp_path / "next", adapter=adapter, model=model))
    veneer.train(tiny_run(tiny_model(), rows_file, tmp_path / "next", adapter=adapter, model=model, quantization={}))
    for name in ("next", "next/adapter"):
        with pytest.raises(UserError, match="the base in 16 bits has no such error"):
            veneer.merge(str(tmp_path / name), tmp_path / "merged", on="base")


@pytest.mark.parametrize("reference", ["cached", "live"])
def test_the_reference_of_a_resumed_run_is_the_loftq_adapter_it_began_with(
    reference: str, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", some_pairs())

    def run(name: str) -> veneer.Run:
        sections: dict[str, Any] = {"adapter": {"init_lora_weights": "loftq"}, "quantization": {}}
        train = {"reference": reference, "save_steps": 2, "learning_rate": 1e-2}
        return tiny_run(tiny_model(), pairs, tmp_path / name, train=train, **sections)

    veneer.train(run("whole"))
    assert losses(tmp_path / "whole")[0] == pytest.approx(math.log(2), abs=1e-12)
    with pytest.raises(Interrupted):
        veneer.train(run("cut"), listeners=[StopAt(3)])
    monkeypatch.setenv("VENEER_CACHE", str(tmp_path / "another-cache"))
    veneer.train(run("cut"), resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    ("kind", "is_4bit", "sections", "said"),
    [
        ("loftq", False, {}, "this base is not"),
        ("eva", False, {"adapter": {"r": 200}}, "and rank 200 needs 1,600"),
        ("eva", False, {"model": {"adapter": "first"}}, "training starts from model.adapter"),
    ],
)
def test_what_they_cannot_begin_with_is_refused(
    kind: str,
    is_4bit: bool,
    sections: dict[str, Any],
    said: str,
    tiny_model: Callable[..., Path],
    rows_file: str,
    tmp_path: Path,
) -> None:
    run = run_of(kind, tiny_model(), rows_file, tmp_path / "run", is_4bit, **sections)
    with pytest.raises(UserError, match=said):
        veneer.train(run)
    assert not (tmp_path / "run").exists()


def test_directions_that_do_not_hold_still_are_refused(
    tiny_model: Callable[..., Path], rows_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(from_rows, "MOST_BATCHES", 2)
    with pytest.raises(UserError, match="after 2 minibatches the directions of the rows do not hold still"):
        veneer.train(run_of("eva", tiny_model(), rows_file, tmp_path / "run"))


def test_bases_in_4_bits_already_have_no_weights_for_loftq(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_model().iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text())
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    run = tiny_run(base, "-", tmp_path / "run", adapter={"init_lora_weights": "loftq"})
    with pytest.raises(UserError, match="files are in 4 bits already"):
        planner_of(run, "8GiB").forecast(run)
