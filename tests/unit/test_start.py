"""What training may start from (`model.adapter`), and `veneer init --from`, which writes the settings."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import veneer
from tests.support.notices import notified
from tests.support.runs import StopAt, losses, some_pairs, some_rows, tiny_run, write_rows
from veneer.config import Interrupted, UserError, load_run
from veneer.data.starter import preference_page
from veneer.training.job import TrainingJob

Call = Callable[..., tuple[int, str, str]]
SHORT = ["train.max_steps=2", "model.dtype=float32", "train.gradient_checkpointing=false", "data.validation=0"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", some_rows())
    write_rows(tmp_path / "pairs.jsonl", some_pairs())
    return tmp_path


@pytest.fixture
def start(here: Path, tiny_model: Callable[..., Path]) -> str:
    """A supervised run, by its relative path."""
    data = {"chat_template": "alpaca", "system_prompt": "be brief: #1"}
    train = {"learning_rate": 3e-2, "max_steps": 3, "save_steps": 1}
    sections: dict[str, Any] = {"data": data, "train": train, "quantization": {"quant_type": "fp4"}}
    veneer.train(tiny_run(tiny_model(), str(here / "rows.jsonl"), here / "runs" / "sft", **sections))
    return "runs/sft"


def dpo(here: Path, start: str, name: str = "dpo", **model: Any) -> veneer.Run:
    """A run on pairs as `init` writes it, of one step."""
    if not (here / "dpo.yaml").exists():
        (here / "dpo.yaml").write_text(preference_page("pairs.jsonl", start, "dpo.yaml")[0])
    changes = [f"model.{key}={value}" for key, value in model.items()]
    return load_run(here / "dpo.yaml", [*SHORT, "train.max_steps=1", f"train.output_dir=runs/{name}", *changes])


def test_init_from_a_run_writes_a_run_that_starts_there(here: Path, start: str, call: Call) -> None:
    status, out, err = call("init", "pairs.jsonl", "--from", start, "--json")
    assert status == 0, err
    assert json.loads(out)["formats"]["pairs.jsonl"].startswith("preference")
    before, run = load_run(here / start / "run.yaml"), load_run(here / "run.yaml")
    assert run.model == before.model.model_copy(update={"adapter": start})
    assert run.quantization == before.quantization
    assert run.adapter == before.adapter
    for name in ("chat_template", "system_prompt", "max_length"):
        assert getattr(run.data, name) == getattr(before.data, name)
    assert run.train.objective == "dpo"
    assert run.train.learning_rate == 1e-5
    assert (run.train.per_device_train_batch_size, run.train.gradient_accumulation_steps) == (2, 2)
    assert run.train.output_dir == Path("runs/sft-dpo")
    assert call("train", "run.yaml", *SHORT)[0] == 0
    assert losses(here / "runs" / "sft-dpo")[0] == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rows.jsonl", "--from", "runs/sft"], "holds rows of the format prompt-completion, and --from takes pairs"),
        (["pairs.jsonl", "--from", "runs/none"], "runs/none: holds no run"),
        (["pairs.jsonl", "--from", "runs/sft", "--model", "x"], "names the base already"),
        (["none.jsonl", "--from", "runs/sft"], "none.jsonl"),
    ],
)
def test_init_from_what_is_no_start_writes_nothing(
    arguments: list[str], message: str, here: Path, start: str, call: Call
) -> None:
    status, _, err = call("init", *arguments)
    assert status == 2
    assert message in " ".join(err.split())
    assert not (here / "run.yaml").exists()


def test_an_interrupted_run_is_refused_and_its_checkpoint_taken(
    here: Path, start: str, tiny_model: Callable[..., Path], call: Call
) -> None:
    before = load_run(here / start / "run.yaml", ["train.output_dir=runs/cut"])
    with pytest.raises(Interrupted):
        veneer.train(before, listeners=[StopAt(2)])
    status, _, err = call("init", "pairs.jsonl", "--from", "runs/cut")
    assert status == 2
    assert "the run has no adapter yet" in err
    with pytest.raises(UserError, match=r"or name a checkpoint: .*step-000001"):
        TrainingJob(dpo(here, start, adapter="runs/cut"))
    checkpoint = Path("runs/cut/checkpoints/step-000001")
    veneer.train(dpo(here, start, "after", adapter=checkpoint))
    assert losses(here / "runs" / "after")[0] == pytest.approx(math.log(2), abs=1e-12)
    file = checkpoint / "adapter_model.safetensors"
    save_file({name: 2 * value for name, value in load_file(file).items()}, file)
    with pytest.raises(UserError, match="missing or damaged"):
        TrainingJob(dpo(here, start, "damaged", adapter=checkpoint))


def test_a_merged_run_still_starts_another_but_not_on_what_it_was_merged_into(here: Path, start: str) -> None:
    veneer.merge(start, here / "merged")
    TrainingJob(dpo(here, start))
    with pytest.raises(UserError, match="holds no adapter"):
        TrainingJob(dpo(here, start, adapter="merged"))
    with pytest.raises(UserError, match="the adapter does not belong to this"):
        TrainingJob(dpo(here, start, base="merged"))


def test_a_plain_peft_folder_is_a_start_and_reference(here: Path, start: str) -> None:
    shutil.copytree(here / start / "adapter", here / "plain")
    for name in ("passport.json", "README.md", "ledger.json"):
        (here / "plain" / name).unlink()
    veneer.train(dpo(here, start, "of-plain", adapter="plain"))
    veneer.train(dpo(here, start, "of-run"))
    assert losses(here / "runs" / "of-plain") == losses(here / "runs" / "of-run")
    assert losses(here / "runs" / "of-plain")[0] == pytest.approx(math.log(2), abs=1e-12)


def test_a_start_on_a_base_that_is_quantized_otherwise_is_told(here: Path, start: str) -> None:
    run = dpo(here, start)
    assert run.quantization is not None
    other = run.model_copy(update={"quantization": run.quantization.model_copy(update={"quant_type": "nf4"})})
    with notified("its base computes slightly other numbers"):
        veneer.train(other)
    assert losses(here / "runs" / "dpo")[0] == pytest.approx(math.log(2), abs=1e-12), "reference and policy share it"


def test_an_adapter_whose_weights_were_replaced_is_refused(here: Path, start: str) -> None:
    run = dpo(here, start)
    file = here / start / "adapter" / "adapter_model.safetensors"
    save_file({name: 2 * value for name, value in load_file(file).items()}, file)
    with pytest.raises(UserError, match="adapter weights"):
        TrainingJob(run)


# What a run trains beside LoRA, or instead of it.
SHAPES: dict[str, dict[str, Any]] = {
    "gaussian": {"adapter": {"init_lora_weights": "gaussian"}},
    "pissa": {"adapter": {"init_lora_weights": "pissa", "use_rslora": True}},
    "eva": {"adapter": {"init_lora_weights": "eva"}},
    "loftq": {"adapter": {"init_lora_weights": "loftq"}, "quantization": {}},
    "dora": {"adapter": {"method": "dora"}},
    "bias": {"adapter": {"bias": "all"}, "model": {"base": "qwen2"}},
    "whole modules": {"adapter": {"modules_to_save": ["lm_head"]}},
    "rows": {"adapter": {"trainable_token_indices": [5, 6]}},
    "new tokens": {"data": {"add_special_tokens": ["<|cat|>"]}},
}


@pytest.fixture
def trained(here: Path, tiny_model: Callable[..., Path]) -> Callable[..., None]:
    """A function that trains a run in runs/sft."""
    rows = [row | {"completion": row["completion"] * 6} for row in some_rows()]  # enough trained tokens for EVA
    write_rows(here / "rows.jsonl", rows)

    def train(**sections: Any) -> None:
        base = tiny_model(sections.pop("model", {}).get("base", "llama"))
        train = {"max_steps": 3, "learning_rate": 3e-2}
        veneer.train(tiny_run(base, str(here / "rows.jsonl"), here / "runs" / "sft", train=train, **sections))

    return train


@pytest.mark.parametrize("shape", SHAPES)
def test_init_from_writes_a_run_that_goes_on_from_any_adapter_of_lora(
    shape: str, here: Path, trained: Callable[..., None], call: Call
) -> None:
    trained(**SHAPES[shape])
    assert call("init", "pairs.jsonl", "--from", "runs/sft")[0] == 0
    settings = ["run.yaml", *SHORT, "train.learning_rate=1e-2"]
    status, _, err = call("train", *settings)
    assert status == 0, err
    first, second = losses(here / "runs" / "sft-dpo")
    assert first == pytest.approx(math.log(2), abs=1e-12), "it begins as its reference"
    assert second != first
    if shape not in ("pissa", "bias", "new tokens"):  # a live one swaps matrices, whole tensors, and rows
        return
    status, _, err = call(
        "train", "run.yaml", *SHORT, "train.learning_rate=1e-2", "train.reference=live", "--overwrite"
    )
    assert status == 0, err
    assert losses(here / "runs" / "sft-dpo") == [first, second]


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"adapter": None}, "leave --from out, and name its model as the base: --model runs/sft/model"),
        ({"adapter": {"method": "ia3", "r": 16, "lora_alpha": 32}}, "it was trained with adapter.method = ia3"),
    ],
)
def test_what_no_run_goes_on_from_is_refused(
    shape: dict[str, Any], said: str, here: Path, trained: Callable[..., None], call: Call
) -> None:
    trained(**shape)
    status, _, err = call("init", "pairs.jsonl", "--from", "runs/sft")
    assert (status, said in " ".join(err.split())) == (2, True), err
    base = load_run(here / "runs/sft/run.yaml").model.base
    with pytest.raises(UserError, match=r"so it has no adapter|of PEFT's kind IA3"):
        TrainingJob(tiny_run(Path(base), "rows.jsonl", here / "next", model={"adapter": "runs/sft"}))


@pytest.mark.parametrize(
    ("shape", "fix"),
    [
        ("bias", "set adapter.bias to what it was trained with"),
        ("whole modules", "set adapter.modules_to_save to the modules"),
        ("new tokens", "set adapter.trainable_token_indices and data.add_special_tokens"),
    ],
)
def test_a_run_that_trains_other_parts_says_which_setting_differs(
    shape: str, fix: str, here: Path, trained: Callable[..., None]
) -> None:
    trained(**SHAPES[shape])
    before = load_run(here / "runs/sft/run.yaml")
    model = before.model.model_copy(update={"adapter": "runs/sft"})
    run = tiny_run(Path(model.base), "rows.jsonl", here / "next").model_copy(update={"model": model})
    with pytest.raises(UserError, match="of its matrices are not those of the run's adapter") as error:
        TrainingJob(run)
    assert fix in str(error.value)
