"""What does full fine-tuning take? Tokens/s and peak of a 1B shape on one GPU, beside TRL; and of SmolLM2 on a CPU.

    python3 -m bench.full gpu                               # Llama-3.2-1B's shapes, 4 x 2048, random weights
    python3 -m bench.full gpu --trl-python TRL/bin/python   # and TRL's SFTTrainer, in that Python, a process a case
    python3 -m bench.full gpu --tiny --out /tmp/full.json   # the same code on a CPU, at a tiny shape
    python3 -m bench.full smollm2                           # 2 cores: real rows of the demo, through `veneer.train`

A step is one micro-batch of even rows: forward and backward with recomputed activations, and the update, without
clipping, so that gradients are released (but for the case `held`). Weights are bfloat16, rounded by chance unless a
case has a float32 copy. "Beyond" is the peak of allocated memory less weights, and less gradients too, whether these
are held or not. TRL trains in bfloat16 with rows of the same shape, its own (chunked) or Liger's loss, and the
optimizer that `TRL_CASES` names; a case that runs out of memory is kept as such. A plan is that of `veneer plan`.

Predicted on an H100: 40,000 tokens/s (8 operations a parameter and token of 1.24e9, with recomputation, at 40% of 990
TFLOP/s); beyond weights and gradients 5 GiB with APOLLO, of which 3.2 are states.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

RESULTS = Path(__file__).parent / "results" / "full.json"
TINY = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip
LLAMA_1B = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "apollo": {"optim": "apollo_adamw"},
    "galore": {"optim": "galore_adamw"},
    "adamw 8 bits": {"optim": "adamw_8bit"},
    "adamw 8 bits, float32 copy": {"optim": "adamw_8bit", "master_weights": "float32"},
    "apollo, held": {"optim": "apollo_adamw", "max_grad_norm": 1.0},
}
TRL_CASES: dict[str, dict[str, Any]] = {
    "trl, adamw 8 bits": {"optim": "adamw_8bit"},
    "trl, adamw 8 bits, liger": {"optim": "adamw_8bit", "use_liger_kernel": True},
    "trl, adamw": {"optim": "adamw_torch_fused"},
}
STEPS, SKIPPED = 8, 3
LEAST_BEYOND_GIB, MOST_PLANNED = 8.0, 0.08


def config_of(is_tiny: bool) -> Any:
    """Return the configuration of the shape."""
    import transformers

    return transformers.LlamaConfig(**(TINY if is_tiny else LLAMA_1B))


def random_model(config: Any, device: str) -> Any:
    """Return a model of random bfloat16 weights."""
    import transformers

    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def planned_bytes(config: Any, settings: dict[str, Any], rows: int, length: int, device: str) -> int:
    """Return the peak of a case's steps as `veneer plan` predicts it, knowing the shapes of the rows."""
    from veneer.config import Model, Run
    from veneer.machine.device import find_machine
    from veneer.planning.base import PlannedModel
    from veneer.planning.batch_shapes import Padded, RowShapes
    from veneer.planning.planner import Planner
    from veneer.planning.target import this_device

    full = Padded(rows, length, rows * (length - 1))
    shapes = RowShapes(full, full, 1, rows * length, 1, None, 0, None, None)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        run = Run.model_validate({
            "model": {"base": folder, "dtype": "bfloat16"}, "adapter": "none", "data": {"train": "-"},
            "train": {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1} | settings,
        })  # fmt: skip
        planner = Planner(PlannedModel(Model(base=folder), shapes), this_device(find_machine()))
        forecast = planner.forecast(run)
    return max(forecast.phases[name].bytes for name in ("forward", "backward", "optimizer"))


def run_case(name: str, is_tiny: bool, rows: int, length: int) -> dict[str, Any]:
    """Measure a case of Veneer."""
    from bench.engine import batch_of
    from veneer.config import Train
    from veneer.engine.objective import LIKELIHOOD
    from veneer.engine.reference import ReferenceEngine
    from veneer.model.full import train_all
    from veneer.training.full_optimizer import FullOptimizer, ReleasedGradients
    from veneer.training.optimizer import allocate_states, optimizer_of

    device = "cpu" if is_tiny else "cuda"
    settings = {"max_grad_norm": 0.0, "master_weights": "none", "optim_rank": 16 if is_tiny else 256} | CASES[name]
    train = Train(**settings)
    config = config_of(is_tiny)
    planned = planned_bytes(config, settings, rows, length, device)
    model = random_model(config, device).requires_grad_(False)
    model.config.use_cache = False
    engine = ReferenceEngine(train_all(model, gradient_checkpointing=True))
    engine.run_in_one_pass()
    parameters = dict(model.named_parameters())
    optimizer = optimizer_of(model, parameters, train, device)
    assert isinstance(optimizer, FullOptimizer)
    allocate_states(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 1e-5
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters.values())
    batches = [batch_of(rows, length, config.vocab_size) for _ in range(STEPS + SKIPPED)]
    seconds, losses = [], []
    _reset(device)
    for batch in batches:
        began = time.perf_counter()
        batch = batch.scaled(1 / batch.weight)
        if train.max_grad_norm:
            output = engine.forward_backward(batch, LIKELIHOOD)
            torch.nn.utils.clip_grad_norm_(parameters.values(), train.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        else:
            with optimizer.released(ReleasedGradients()):
                output = engine.forward_backward(batch, LIKELIHOOD)
        losses.append(output.loss.item() / batch.weight)
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return _result(seconds[SKIPPED:], rows * length, peak, weights, losses) | {"planned_gib": round(planned / 2**30, 2)}


def run_trl(name: str, is_tiny: bool, rows: int, length: int) -> dict[str, Any]:
    """Measure a case of TRL."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    device = "cpu" if is_tiny else "cuda"

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

    config = config_of(is_tiny)
    model = random_model(config, device)
    model.config.use_cache = False
    words = {"<pad>": 0, "<end>": 1, "<unk>": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), pad_token="<pad>", eos_token="<end>"
    )
    count = (STEPS + SKIPPED) * rows
    ids = torch.randint(3, config.vocab_size, (count, length), generator=torch.Generator().manual_seed(1)).tolist()
    settings = TRL_CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder, per_device_train_batch_size=rows, gradient_accumulation_steps=1,
            max_steps=STEPS + SKIPPED, learning_rate=1e-5, bf16=True, use_cpu=device == "cpu", max_grad_norm=0.0,
            logging_steps=1, save_strategy="no", report_to="none", max_length=length, packing=False, seed=0,
            gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, **settings,
        )  # fmt: skip
        clock = Clock()
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict({"input_ids": ids}),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        _reset(device)
        trainer.train()
    seconds = [after - before for before, after in zip(clock.times, clock.times[1:])][SKIPPED - 1 :]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    dtypes = sorted({str(parameter.dtype) for parameter in model.parameters()})
    return _result(seconds, rows * length, peak, weights, losses) | {"weights": dtypes, "settings": settings}


def _reset(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _result(seconds: list[float], tokens: int, peak: int, weights: int, losses: list[float]) -> dict[str, Any]:
    return {
        "tokens_per_second": round(tokens / statistics.median(seconds)),
        "step_seconds_median": round(statistics.median(seconds), 4),
        "step_seconds": [round(second, 4) for second in seconds],
        "peak_allocated_gib": round(peak / 2**30, 2),
        "beyond_weights_and_gradients_gib": round((peak - 2 * weights) / 2**30, 2),
        "losses": [round(loss, 4) for loss in losses],
    }


def in_a_process(python: str, name: str, a: argparse.Namespace) -> dict[str, Any]:
    """Measure a case in a process of its own, so that no case inherits another one's memory."""
    command = [python, "-m", "bench.full", "case", "--case", name, "--rows", str(a.rows), "--length", str(a.length)]
    done = subprocess.run(
        [*command, *(["--tiny"] if a.tiny else [])], capture_output=True, text=True, timeout=a.limit, check=False
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if found:
        return dict(json.loads(found[-1].removeprefix("RESULT ")))
    error = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return {"failed": error[:300]}


def gpu(a: argparse.Namespace) -> None:
    """Measure all cases, and keep each as it comes."""
    pythons = dict.fromkeys(CASES, sys.executable) | dict.fromkeys(TRL_CASES if a.trl_python else (), a.trl_python)
    for name in a.only.split(";") if a.only else pythons:
        try:
            result = in_a_process(pythons[name], name, a)
        except subprocess.TimeoutExpired:
            result = {"failed": f"more than {a.limit} s"}
        save(a.out, name, result)


def smollm2(a: argparse.Namespace) -> None:
    """Train SmolLM2 whole on the demo's rows, as a user does; the measured peak beside the planned one."""
    import veneer
    from veneer.training.metrics import read_metrics

    demo = Path(veneer.__file__).parent / "data" / "demo"
    for optim in ("adamw_torch", "apollo_adamw"):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            settings = {
                "model": {"base": "smollm2-135m-instruct"},
                "adapter": "none",
                "data": {"train": str(demo / "train.jsonl"), "validation": 0, "limit": 64, "max_length": 512},
                "train": {"output_dir": str(run), "max_steps": 4, "per_device_train_batch_size": 8, "optim": optim,
                          "gradient_accumulation_steps": 1, "max_grad_norm": 0, "learning_rate": 2e-5,
                          "save_steps": None},
            }  # fmt: skip
            script = (
                f"import json, veneer; veneer.train(veneer.Run.model_validate(json.loads({json.dumps(settings)!r})))"
            )
            subprocess.run([sys.executable, "-c", script], check=True, timeout=a.limit, stdout=sys.stderr)
            steps = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]
        peak, planned = (max(step[name] for step in steps) / 2**30 for name in ("peak_bytes", "predicted_peak_bytes"))
        save(a.out, f"smollm2, {optim}", {
            "tokens_per_second": statistics.median(step["tokens_per_second"] for step in steps[1:]),
            "peak_gib": round(peak, 2), "planned_gib": round(planned, 2),
            "losses": [round(step["loss"], 4) for step in steps],
        })  # fmt: skip


def save(out: Path, name: str, result: dict[str, Any]) -> None:
    """Print a case, and merge it into the file of results."""
    from veneer.machine.device import find_machine

    with_ = {package: metadata.version(package) for package in ("torch", "transformers", "bitsandbytes")}
    result = result | {"device": find_machine().name, "with": with_, "date": time.strftime("%Y-%m-%d")}
    print(json.dumps({name: result}), flush=True)
    kept = json.loads(out.read_text()) if out.is_file() else {}
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(kept | {name: result}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["gpu", "smollm2", "case"])
    parser.add_argument("--case")
    parser.add_argument("--only", help="names of cases, with ; between; by default all")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--trl-python", help="a Python with trl, datasets and liger-kernel")
    parser.add_argument("--limit", type=int, default=120, help="seconds that a case may take")
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    if a.tiny:
        a.length = min(a.length, 128)
    if a.what == "case":
        result = (run_case if a.case in CASES else run_trl)(a.case, a.tiny, a.rows, a.length)
        print("RESULT " + json.dumps(result), flush=True)
    else:
        {"gpu": gpu, "smollm2": smollm2}[a.what](a)


if __name__ == "__main__":
    main()
