"""Settings of other tools: each is answered with what to write here, and none by mere likeness."""

import re
from pathlib import Path

import pytest

from veneer.config import UserError, run_of
from veneer.config.foreign import foreign, misspelt, names_of_others
from veneer.config.load import sections

CALLED, INSTEAD = names_of_others()
OURS = {f"{name}.{key}" for name, section in sections().items() for key in section.model_fields}
ASKED = {
    "load_in_8bit", "bf16", "fp16", "use_reentrant", "lora_modules_to_save",
    "peft_init_lora_weights", "neftune_noise_alpha", "deepspeed", "fsdp", "wandb_project", "group_by_length",
    "dataset_text_field", "sample_packing", "flash_attention", "datasets", "sequence_len", "micro_batch_size",
    "ddp_timeout", "ddp_find_unused_parameters", "warmup_steps", "evaluation_strategy",
    "per_device_eval_batch_size", "push_to_hub", "trust_remote_code", "use_dora", "layers_pattern",
    "task_type", "gradient_checkpointing_kwargs", "load_in_4bit", "torch_dtype",
    "max_seq_length", "cutoff_len", "val_set_size", "template", "lora_target", "use_unsloth", "random_state",
}  # fmt: skip


def message(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        run_of({"model": {"base": "x"}, "data": {"train": "y"}}, overrides)
    return str(caught.value)


def test_the_table_knows_what_other_tools_call_things() -> None:
    assert len(CALLED.keys() | INSTEAD.keys()) >= 60
    assert not CALLED.keys() & INSTEAD.keys()
    assert not ASKED - (CALLED.keys() | INSTEAD.keys())


@pytest.mark.parametrize("name", sorted(CALLED.keys() | INSTEAD.keys()))
def test_each_name_is_answered_with_settings_that_exist(name: str) -> None:
    told = message(f"train.{name}=1")
    assert f"unknown key `train.{name}`; {foreign(name)}" in told
    assert "did you mean" not in told
    if name in CALLED:
        assert CALLED[name] in OURS
        assert f"it is called `{CALLED[name]}` here" in told
        return
    named = re.findall(r"`((?:model|quantization|adapter|data|train|evaluate)\.\w+)", INSTEAD[name])
    assert set(named) <= OURS
    assert named or re.search(r"nothing: |section|`veneer |HF_", INSTEAD[name])


def test_no_foreign_name_is_one_of_our_own() -> None:
    ours = {path.split(".")[1] for path in OURS} | set(sections())
    assert ours & (CALLED.keys() | INSTEAD.keys()) == {"batch_size"}  # ours is that of the evaluation


def test_other_spellings_of_a_foreign_name_are_known() -> None:
    assert foreign("Load-In-8bit") == foreign("load_in_8bit")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.leanring_rate=1", "did you mean `learning_rate`?"),
        ("train.learningrate=1", "did you mean `learning_rate`?"),
        ("train.gradient_acumulation_step=1", "did you mean `gradient_accumulation_steps`?"),
        ("data.pakcing=1", "did you mean `packing`?"),
        ("data.max_lenght=1", "did you mean `max_length`?"),
        ("model.dtyp=1", "did you mean `dtype`?"),
        ("tain.seed=1", "did you mean `train`?"),
        ("train.lora_alhpa=1", "did you mean `adapter.lora_alpha`?"),
        ("lr=1", "it is called `train.learning_rate` here"),
        ("learning_rate=1", "it belongs in the section `train`: Peak learning rate."),
        ("data.rows=5", "it belongs in the section `evaluate`: Maximum number of held-out rows"),
    ],
)
def test_a_misspelling_of_our_own_is_answered_with_it(override: str, expected: str) -> None:
    assert expected in message(override)


@pytest.mark.parametrize(
    "trap",
    [
        "min_length", "min_steps", "min_new_tokens", "data_format", "epoch_steps", "rate", "warm", "save",
        "lora_beta", "lora_layers", "drop", "test", "train_batches", "batch", "tokens_per_second", "eval_rows", "r2",
        "lp", "save_total", "quant", "max_tokens", "learning_steps", "logging_rate", "eval_dropout", "gradient_steps",
    ],
)  # fmt: skip
def test_what_only_looks_alike_is_not_suggested(trap: str) -> None:
    for section in sections():
        assert "did you mean" not in message(f"{section}.{trap}=1")


def test_a_name_of_our_own_is_no_misspelling_of_another() -> None:
    for path in OURS:
        key = path.split(".")[1]
        others = {other.split(".")[1] for other in OURS} - {key}
        assert misspelt(key, others) is None, key


def test_a_file_of_another_tool_is_answered_line_by_line(tmp_path: Path) -> None:
    from veneer.config import load_run

    path = tmp_path / "axolotl.yaml"
    path.write_text(
        "base_model: NousResearch/Llama-3.2-1B\ndatasets:\n  - path: a.jsonl\nload_in_8bit: true\nmicro_batch_size: 2\n"
    )
    with pytest.raises(UserError) as caught:
        load_run(path)
    told = str(caught.value)
    assert "axolotl.yaml:1: unknown key `base_model`; it is called `model.base` here" in told
    assert "axolotl.yaml:4: unknown key `load_in_8bit`; not in Veneer: weights are not stored in 8 bits" in told
    assert "axolotl.yaml:5: unknown key `micro_batch_size`; it is called `train.per_device_train_batch_size`" in told
