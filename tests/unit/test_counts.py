"""Parameters counted from a configuration alone: the published figures, and PEFT's own count family by family."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from veneer.config import Model, UserError
from veneer.model.adapters.lora import LORA
from veneer.model.families import FAMILIES
from veneer.model.known import MODEL_SIZES, known_shape
from veneer.model.shapes import Shapes, build, find_config, shapes_of


def shapes(name: str) -> Shapes:
    return shapes_of(build(find_config(Model(base=name)), torch.bfloat16))


def trained(name: str, r: int, targets: str | tuple[str, ...] = "all-linear") -> int:
    found = shapes(name)
    return sum(LORA.sizes(found, found.targets(targets), r))


@pytest.mark.parametrize(
    ("base", "r", "targets", "expected"),
    [
        ("meta-llama/Meta-Llama-3-8B", 16, "all-linear", 41_943_040),
        ("meta-llama/Meta-Llama-3-8B", 32, "all-linear", 83_886_080),
        ("meta-llama/Llama-2-7b-hf", 16, "all-linear", 39_976_960),
        ("meta-llama/Llama-2-7b-hf", 16, ("q_proj", "k_proj", "v_proj", "o_proj"), 16_777_216),
        ("meta-llama/Llama-2-13b-hf", 16, "all-linear", 62_586_880),
        ("openai-community/gpt2", 8, ("c_attn",), 294_912),
    ],
)
def test_adapters_of_well_known_models(base: str, r: int, targets: str | tuple[str, ...], expected: int) -> None:
    assert trained(base, r, targets) == expected


@pytest.mark.parametrize(
    ("base", "targets"),
    [
        ("Qwen/Qwen2.5-1.5B", "all-linear"),
        ("google/gemma-2-2b", "all-linear"),
        ("microsoft/Phi-3-mini-4k-instruct", "all-linear"),
        ("mistralai/Mistral-7B-v0.1", ("q_proj", "v_proj", "down_proj")),
        ("facebook/opt-125m", "all-linear"),
        ("openai-community/gpt2", "all-linear"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", ("k_proj", "embed_tokens")),
    ],
)
def test_peft_counts_the_same(base: str, targets: Any) -> None:
    model = build(find_config(Model(base=base)), torch.bfloat16)
    total = sum(p.numel() for p in model.parameters())
    assert shapes(base).total == total
    target_modules = targets if isinstance(targets, str) else list(targets)
    conv1d = "gpt2" in base  # keeps its weights the other way round
    config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=target_modules, fan_in_fan_out=conv1d)
    with torch.device("meta"):
        adapted = get_peft_model(model, config)
    assert adapted.get_nb_trainable_parameters() == (trained(base, 8, targets), total + trained(base, 8, targets))


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        # As published with each model, or counted in its checkpoint.
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Llama-3.1-70B", 70_553_706_496),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("mistralai/Mistral-7B-v0.1", 7_241_732_096),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("google/gemma-2-9b", 9_241_705_984),
        ("microsoft/Phi-3-mini-4k-instruct", 3_821_079_552),
        ("facebook/opt-125m", 125_239_296),
        ("openai-community/gpt2", 124_439_808),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
    ],
)
def test_totals_of_published_models(base: str, expected: int) -> None:
    assert shapes(base).total == expected


def test_every_published_shape_builds_and_repeats() -> None:
    for family in FAMILIES.values():
        for series in family.published:
            for name, settings in series.items():
                assert known_shape(name) == (family.model_type, settings)
    assert shapes("google/gemma-2-2b").period == 2, "sliding and full attention take turns"
    assert shapes("meta-llama/Llama-3.2-1B").period == 1
    totals = [shapes(name).total for name in MODEL_SIZES]
    assert totals == sorted(totals)


def test_names_are_known_with_and_without_owner_and_ending() -> None:
    assert known_shape("llama-3-8b") == known_shape("meta-llama/Meta-Llama-3-8B-Instruct")
    assert known_shape("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit") == known_shape("meta-llama/Llama-3.1-8B")
    assert known_shape("someone/Llama-3.1-8B") is None, "anybody may call anything by that name"


def test_a_target_that_matches_nothing_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"`o_proj` matches no module.*out_proj"):
        trained("facebook/opt-125m", 8, ("q_proj", "o_proj"))
