"""Every recipe is a run, and the guides' recipes say what the guides say."""

from pathlib import Path

import pytest

from veneer.config import load_run
from veneer.config.sweep import load_sweep

RECIPES = Path(__file__).parents[2] / "recipes"
SWEEPS = sorted(RECIPES.rglob("sweep-*.yaml"))
FILES = sorted(set(RECIPES.rglob("*.yaml")) - set(SWEEPS))
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# r, alpha, dropout, targets, bits, micro-batch, accumulation, epochs, max_length; the learning rate is 2e-4 in all.
GUIDES = {
    "guide-0-llama3-8b-24gb": (16, 32, 0.05, SEVEN, 4, 2, 8, 2, 1024),
    "guide-1-llama2-7b-r64": (64, 16, 0.05, SEVEN, 4, 1, 8, 3, 2048),
    "guide-2-gpt2-sentiment": (8, 32, 0.1, ("c_attn",), None, 4, 4, 3, 128),
    "guide-3-llama3-70b-80gb": (16, 32, 0.05, SEVEN, 4, 4, 4, 3, 2048),
    "guide-4-opt-125m-lora": (16, 32, 0.05, ("q_proj", "k_proj", "v_proj", "out_proj"), None, 4, 4, 1, 512),
    "guide-4-opt-125m-qlora": (16, 32, 0.05, ("q_proj", "k_proj", "v_proj", "out_proj"), 4, 4, 4, 1, 512),
}


def test_there_are_as_many_recipes_as_there_should_be() -> None:
    assert len(FILES) == 13


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_parses(path: Path) -> None:
    run = load_run(path)
    assert run.train.output_dir.parts[0] == "runs"
    assert path.read_text().startswith("# ")


def test_the_sweep_of_ranks_is_of_the_demos_run() -> None:
    planned = load_sweep(RECIPES / "sweep-ranks.yaml")
    assert [one.settings for one in planned.combinations] == [{"adapter.r": r} for r in (4, 8, 16, 32)]
    assert planned.run.model == load_run(RECIPES / "smollm2-demo.yaml").model


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_parses(path: Path) -> None:
    planned = load_sweep(path)
    assert len(planned.combinations) >= 3
    assert path.read_text().startswith("# ")


def test_full_fine_tuning_of_a_small_base_is_compared_with_lora_of_a_larger_one() -> None:
    """On the same rows, whatever they are, and with as many rows a step."""
    full, lora = (load_run(RECIPES / "compare" / f"{name}.yaml") for name in ("full-1.5b", "lora-7b"))
    assert full.data == lora.data
    assert full.adapter is None
    assert full.releases_gradients
    assert lora.adapter is not None
    sizes = [run.train.per_device_train_batch_size * run.train.gradient_accumulation_steps for run in (full, lora)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", GUIDES)
def test_a_guides_recipe_has_the_guides_settings(name: str) -> None:
    run = load_run(RECIPES / "guides" / f"{name}.yaml")
    assert run.adapter is not None
    assert GUIDES[name] == (
        run.adapter.r,
        run.adapter.lora_alpha,
        run.adapter.lora_dropout,
        run.adapter.target_modules,
        run.quantization.bits if run.quantization else None,
        run.train.per_device_train_batch_size,
        run.train.gradient_accumulation_steps,
        run.train.num_train_epochs,
        run.data.max_length,
    )
    assert run.train.learning_rate == 2e-4
    if run.quantization:
        assert (run.quantization.quant_type, run.quantization.double_quant) == ("nf4", True)
