"""Architectures against plan, train, merge and export: each cell works, or is refused with a message that says why."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

import veneer
from tests.support.notices import notified
from tests.support.runs import tiny_run, write_rows
from tests.support.tiny import ARCHITECTURES, FAMILIES, save_tiny_model
from veneer.config import UserError
from veneer.model.quiet import quiet
from veneer.model.shapes import positions_of
from veneer.planning.base import PlannedModel
from veneer.planning.planner import Planner
from veneer.planning.target import device_named
from veneer.release.merge.adapter_delta import through_four_bits

CELLS = ("plan", "train", "merge", "export")
NO_GGUF = "cannot be exported to GGUF; these can"
WORKS = ("works",) * 4
MERGES = ("works", "works", "works", NO_GGUF)
STATE_SPACE = (r"has state-space \(Mamba\) layers",) * 2
# Architecture: a cell each; what follows a refused one is not tried.
TABLE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3"), WORKS),
    **dict.fromkeys(("gpt2", "opt", "gpt_neox", "gemma3", "gemma3_vision", "gpt_oss", "qwen3_moe", "mixtral"), MERGES),
    **dict.fromkeys(("deepseek_v3", "qwen3_next", "lfm2", "llama4"), MERGES),
    **dict.fromkeys(("mamba", "jamba", "granite_hybrid"), STATE_SPACE),
    "recurrent_gemma": ("has RG-LRU layers",) * 2,
    "rwkv": ("has RWKV layers",) * 2,
    "bert": ("is an encoder: each token sees those behind it",) * 2,
    "bart": ("is half an encoder",) * 2,
}
IDS_BL = torch.arange(5, 21)[None]


@pytest.mark.usefixtures("any_notice")
@pytest.mark.parametrize("name", TABLE)
def test_an_architecture_works_or_says_why_not(name: str, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    save_tiny_model((FAMILIES | ARCHITECTURES)[name], tmp_path / "base")
    # MoE in float32 too, which is what `auto` means where there is no bfloat16.
    run = tiny_run(
        tmp_path / "base",
        write_rows(tmp_path / "rows.jsonl", rows),
        tmp_path / "run",
        model={"dtype": "float32" if name in ("mixtral", "gpt_oss") else "bfloat16"},
        train={"max_steps": 2},
    )

    def merge() -> None:
        veneer.merge(str(tmp_path / "run"), tmp_path / "merged", dtype="float32")
        with quiet():
            adapted = PeftModel.from_pretrained(_load(tmp_path / "base"), tmp_path / "run" / "adapter").eval()
        with torch.no_grad():
            right = adapted(IDS_BL).logits
            assert torch.allclose(_load(tmp_path / "merged")(IDS_BL).logits, right, atol=1e-5)
            with adapted.disable_adapter():
                assert not torch.allclose(adapted(IDS_BL).logits, right, atol=1e-4), "the adapter does something"

    steps: dict[str, Callable[[], object]] = {
        "plan": lambda: veneer.plan(run),
        "train": lambda: veneer.train(run),
        "merge": merge,
        "export": lambda: veneer.export(str(tmp_path / "run"), tmp_path / "gguf", quant="f16"),
    }
    for cell, expected in zip(CELLS, TABLE[name]):
        if expected == "works":
            steps[cell]()
        else:
            with pytest.raises(UserError, match=expected):
                steps[cell]()
    assert (tmp_path / "run").exists() == (TABLE[name][1] == "works"), "nothing is written of what is refused"


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_a_vision_tower_is_left_as_it_is(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    """By all-linear and by the names that its layers share with those of the text."""
    save_tiny_model(ARCHITECTURES["gemma3_vision"], tmp_path / "base")
    names = ["q_proj", "v_proj"]
    run = tiny_run(
        tmp_path / "base",
        write_rows(tmp_path / "rows.jsonl", rows),
        tmp_path / "run",
        adapter={"target_modules": names},
        train={"max_steps": 1},
    )
    veneer.train(run)
    adapted = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["target_modules"]
    assert len(adapted) == 4
    assert not any("vision" in path for path in adapted)


def test_experts_without_an_adapter_are_told(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    save_tiny_model(ARCHITECTURES["gpt_oss"], tmp_path / "base")
    run = tiny_run(
        tmp_path / "base", write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run", train={"max_steps": 1}
    )
    assert "experts" in {advice.id for advice in veneer.plan(run).prediction.advice}
    with notified(r"all-linear leaves \d+% of the weights without an adapter: .*experts"):
        veneer.train(run)


@pytest.mark.parametrize("on", ["trained", "original"])
def test_a_base_that_is_stored_in_4_bits_merges(on: str, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    """Into the weights that training computed with: the stored ones dequantized, or the original quantized again."""
    save_tiny_model(FAMILIES["llama"], tmp_path / "original")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    in_4_bits = AutoModelForCausalLM.from_pretrained(
        tmp_path / "original", dtype=torch.bfloat16, quantization_config=settings
    )
    save_tiny_model(FAMILIES["llama"], tmp_path / "base")
    for file in (tmp_path / "base").glob("*.safetensors"):
        file.unlink()
    in_4_bits.save_pretrained(tmp_path / "base")
    run = tiny_run(
        tmp_path / "base",
        write_rows(tmp_path / "rows.jsonl", rows),
        tmp_path / "run",
        model={"dtype": "bfloat16"},
        train={"max_steps": 2},
    )
    veneer.train(run)
    assert veneer.plan(run).prediction.forecast.phases["load"].components["4-bit weights"] > 0
    if on == "original":
        with pytest.raises(UserError, match=r"was stored in 4 bits, which .* is not"):
            veneer.merge(str(tmp_path / "run"), tmp_path / "merged", base=str(tmp_path / "original"))
        merged = veneer.merge(
            str(tmp_path / "run"), tmp_path / "merged", "float32", base=str(tmp_path / "original"), force=True
        )
        assert merged.on == "nf4"
    else:
        with pytest.raises(UserError, match="already in 4 bits and always merged dequantized"):
            veneer.merge(str(tmp_path / "run"), tmp_path / "merged", on="nf4")
        veneer.merge(str(tmp_path / "run"), tmp_path / "merged", "float32")

    found = _load(tmp_path / "merged").state_dict()
    adapter = PeftModel.from_pretrained(_load(tmp_path / "original"), tmp_path / "run" / "adapter")
    was = _load(tmp_path / "original").state_dict()
    from veneer.config import Quantization

    for path, layer in adapter.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            held = through_four_bits(was[f"{path}.weight"], Quantization(), torch.bfloat16, False).float()
            assert torch.equal(found[f"{path}.weight"], held + layer.get_delta_weight("default"))


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_embeddings_that_peft_saves_beside_an_adapter_merge(target: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    save_tiny_model(FAMILIES["llama"], tmp_path / "base")
    model = get_peft_model(
        _load(tmp_path / "base"), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", target])
    )
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.05)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    veneer.merge(str(tmp_path / "adapter"), tmp_path / "merged", "float32", base=str(tmp_path / "base"))
    with torch.no_grad():
        assert torch.allclose(_load(tmp_path / "merged")(IDS_BL).logits, model.eval()(IDS_BL).logits, atol=1e-5)

    grown = _load(tmp_path / "base")
    grown.resize_token_embeddings(390)
    grown.save_pretrained(tmp_path / "grown")
    with pytest.raises(UserError, match=r"of 384 tokens, the base has 390: its vocabulary was resized"):
        veneer.merge(str(tmp_path / "adapter"), tmp_path / "other", base=str(tmp_path / "grown"))


def test_modules_named_by_layer_are_planned_where_they_are(tmp_path: Path) -> None:
    """On the last third of the layers: forward saves nothing of the others, and backward ends before them."""
    kind, settings = FAMILIES["llama"]
    save_tiny_model((kind, settings | {"num_hidden_layers": 12}), tmp_path / "base")

    def forecast(targets: list[str]) -> Any:
        run = tiny_run(
            tmp_path / "base",
            "-",
            tmp_path / "run",
            adapter={"target_modules": targets},
            train={"engine": "reference"},
        )
        planner = Planner(PlannedModel(run.model, "none are there"), device_named("rtx 4090"))
        return planner.forecast(run)

    every, last = [[f"layers.{n}.self_attn.q_proj" for n in range(first, 12)] for first in (0, 8)]
    by_name, by_layer, third = forecast(["q_proj"]), forecast(every), forecast(last)
    assert (by_layer.trainable, by_layer.peak_bytes) == (by_name.trainable, by_name.peak_bytes)
    assert third.trainable * 3 == by_name.trainable
    assert (
        third.phases["backward"].components["activations"] < 0.6 * by_name.phases["backward"].components["activations"]
    )
    assert third.step_seconds[1] < 0.8 * by_name.step_seconds[1]


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "default"}, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16_384),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0}, 4096),
    ],
)  # fmt: skip
def test_positions_are_those_to_which_a_configuration_extends_them(rope: dict[str, Any], longest: int) -> None:
    config = LlamaConfig(max_position_embeddings=4096, rope_parameters={"rope_theta": 10_000.0} | rope)
    assert positions_of(config) == longest
