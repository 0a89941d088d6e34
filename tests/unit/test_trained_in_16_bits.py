"""Biases and whole modules beside an adapter on bases in 16 and 4 bits: small updates add up in a float32 copy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

import veneer
from tests.support.plans import planner_of, run_of
from tests.support.runs import losses, some_rows, tiny_run, write_rows
from tests.support.tiny import FAMILIES, save_tiny_model
from veneer.config.manifest import ADAPTER, OPTIMIZER
from veneer.engine.reference import ReferenceEngine
from veneer.engine.trace import rounded
from veneer.training import checkpoint
from veneer.training.job import TrainingJob

# Family, whether embeddings and head are tied, settings of the adapter, settings of the training.
SETTINGS: dict[str, tuple[str, bool, dict[str, Any], dict[str, Any]]] = {
    "biases": ("qwen2", False, {"bias": "lora_only"}, {"optim": "adamw_torch", "loraplus_lr_ratio": 4}),
    "tied embeddings": ("llama", True, {"modules_to_save": ["embed_tokens"]}, {"optim": "paged_adamw_8bit"}),
    "head and norm": ("llama", False, {"modules_to_save": ["lm_head", "norm"]}, {"optim": "adamw_8bit"}),
}


def saved_base(folder: Path, family: str, tied: bool) -> Path:
    kind, sizes = FAMILIES[family]
    save_tiny_model((kind, sizes | {"tie_word_embeddings": tied}), folder)
    return folder


def plain_base(folder: Path, is_4bit: bool) -> Any:
    """Load a base by Transformers alone."""
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    loaded: dict[str, Any] = {"quantization_config": settings} if is_4bit else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **loaded).eval()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(300).reshape(5, 60) + 3).logits
    return found.float()


def bytes_of(tensors: Any) -> int:
    return sum(rounded(tensor.numel() * tensor.element_size()) for tensor in tensors if torch.is_tensor(tensor))


@pytest.mark.parametrize("is_4bit", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_is_planned_resumed_delivered_merged_and_verified(name: str, is_4bit: bool, tmp_path: Path) -> None:
    family, tied, adapter, train = SETTINGS[name]
    base = saved_base(tmp_path / "base", family, tied)
    rows = write_rows(tmp_path / "rows.jsonl", some_rows())
    sections: dict[str, Any] = {"model": {"dtype": "bfloat16"}, "adapter": adapter}
    sections |= {"train": train | {"learning_rate": 1e-3}} | ({"quantization": {}} if is_4bit else {})
    run = tiny_run(base, rows, tmp_path / "whole", **sections)
    job = TrainingJob(run)
    before = logits_of(job.model.eval())
    job.fit()

    trained = {name: parameter for name, parameter in job.model.named_parameters() if parameter.requires_grad}
    masters = {name: job._loop._optimizer.state[parameter].get("master") for name, parameter in trained.items()}
    beside = {name for name in trained if "lora_" not in name}
    assert {name for name, master in masters.items() if master is not None} == beside
    planned = job.prediction.forecast.phases["optimizer"].components
    states = [value for state in job._loop._optimizer.state.values() for value in state.values()]
    assert planned["optimizer"] + planned["float32 weights"] == bytes_of(states)
    assert planned["float32 weights"] == bytes_of(masters.values())
    assert planned["adapter"] == planned["gradients"] == bytes_of(trained.values())
    assert job.parameters["trainable"] == job.prediction.forecast.trainable

    cut = tiny_run(base, rows, tmp_path / "cut", **sections)
    TrainingJob(cut).fit_until(3)
    veneer.train(cut, resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    saved, again = (load_file(tmp_path / name / "adapter" / ADAPTER) for name in ("whole", "cut"))
    assert_equal(saved, again)
    assert {tensor.dtype for key, tensor in saved.items() if "lora_" not in key} == {torch.bfloat16}

    live = logits_of(job.model.eval())
    assert (live - before).abs().max() > 0.02, "training shows in the logits, of which one is rounded by 0.004"
    with ReferenceEngine(job.model).adapter_off():
        assert torch.equal(logits_of(job.model), before)
    plain = plain_base(base, is_4bit)
    # On a CPU bitsandbytes multiplies 4-bit weights in another order than the copies of them that a run has: the
    # loaded adapter may be off by what the bare base is off, which is 0 in 16 bits, and as much again.
    apart = (logits_of(plain) - before).abs().max()
    assert is_4bit or apart == 0
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "whole" / "adapter")).eval()
    assert (logits_of(loaded) - live).abs().max() <= 2 * apart
    for key, parameter in loaded.named_parameters():
        if key in trained:
            assert torch.equal(parameter, trained[key]), key

    verified = veneer.verify(run)
    assert verified.passed, verified.as_dict()
    veneer.merge(str(tmp_path / "whole"), tmp_path / "merged")
    certificate, _ = veneer.certify(str(tmp_path / "merged"), str(tmp_path / "whole"), rows=4)
    assert certificate.passed, certificate


def assert_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key


def test_updates_that_round_to_nothing_add_up(tmp_path: Path) -> None:
    """A norm's weights, all 1 at first, are trained in bfloat16 and in float32 for 20 steps.

    A step of AdamW is at most (1 - b1) / sqrt(1 - b2) = 3.2 times the rate (Kingma and Ba, section 2.1), here 0.0016;
    numbers of bfloat16 are 0.0039 apart below 1 and twice that above, so that none of the steps by itself would move a
    weight. Gradients in bfloat16 are off by about a percent, and AdamW divides each by its own size: where they keep
    their sign, as most of a norm's do, its step is the rate in both. A tenth of the way is ten times that.
    """
    base = saved_base(tmp_path / "base", "llama", False)
    rows = write_rows(tmp_path / "rows.jsonl", some_rows())
    rate, steps = 5e-4, 20
    train = {"learning_rate": rate, "max_steps": steps, "warmup_ratio": 0.0, "lr_scheduler_type": "constant"}
    found, delivered = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for dtype in ("float32", "bfloat16"):
        sections: dict[str, Any] = {"model": {"dtype": dtype}, "adapter": {"modules_to_save": ["norm"]}, "train": train}
        job = TrainingJob(tiny_run(base, rows, tmp_path / dtype, **sections))
        norm = job.model.get_base_model().model.norm.modules_to_save["default"].weight
        assert torch.equal(norm, torch.ones_like(norm))
        job.fit()
        delivered[dtype] = norm.detach()
        found[dtype] = job._loop._optimizer.state[norm].get("master", norm).detach()
    way = found["float32"] - 1
    assert (1 - torch.tensor(3.2 * rate)).bfloat16() == 1
    assert way.abs().max() > 0.9 * rate * steps
    assert (found["bfloat16"] - found["float32"]).norm() < 0.1 * way.norm()
    assert torch.equal(delivered["bfloat16"], found["bfloat16"].bfloat16())
    assert (delivered["bfloat16"] != 1).float().mean() > 0.5


def test_paged_states_are_planned_on_the_gpu() -> None:
    def states(optim: str, **adapter: Any) -> tuple[int, int]:
        forecast = planner_of(run := run_of(adapter=adapter, train={"optim": optim}), "80GiB").forecast(run)
        return forecast.phases["optimizer"].components.get("optimizer", 0), forecast.host_bytes

    assert states("paged_adamw_8bit", modules_to_save=["norm"]) == states("adamw_8bit", modules_to_save=["norm"])
    assert states("paged_adamw_8bit") != states("adamw_8bit"), "beside nothing they are paged"


def test_the_rate_is_found_from_the_same_weights(tmp_path: Path) -> None:
    """Each trial begins with a copy of the weights as they were: the run is the one that has the found rate written."""
    base = saved_base(tmp_path / "base", "llama", False)
    rows = write_rows(tmp_path / "rows.jsonl", some_rows())

    def run(name: str, rate: float | str) -> veneer.Run:
        sections: dict[str, Any] = {"model": {"dtype": "bfloat16"}, "adapter": {"modules_to_save": ["norm", "lm_head"]}}
        sections |= {"data": {"validation": 8}, "train": {"learning_rate": rate, "max_steps": 200}}
        return tiny_run(base, rows, tmp_path / name, **sections)

    job = TrainingJob(run("found", "auto"))
    job.fit_until(2)
    assert isinstance(job.run.train.learning_rate, float)
    TrainingJob(run("written", job.run.train.learning_rate)).fit_until(2)
    files = [checkpoint.path_of(tmp_path / name / "checkpoints", 2) for name in ("found", "written")]
    assert_equal(*(load_file(file / ADAPTER) for file in files))
    assert_equal(*(load_file(file / OPTIMIZER) for file in files))
