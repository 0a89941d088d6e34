"""How wrong are the plan's predictions? Runs real steps on random weights and compares.

python bench/plan.py gpu --models /tmp/models --out DIR     on a CUDA GPU: memory and time of the reference engine
"""

import argparse
import json
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from veneer.config import Adapter, Model, Quantization, Train
from veneer.data import Batch
from veneer.data.batch import Example
from veneer.engine import ReferenceEngine
from veneer.engine.rehearsal import rehearse
from veneer.model import attach, load_model
from veneer.model.locate import Source
from veneer.model.shapes import build, shapes_of
from veneer.plan import find_machine
from veneer.plan.memory import Step, phases
from veneer.train.optimizer import build_optimizer

SHAPES: dict[str, dict[str, Any]] = {
    "1B": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, head_dim=64,
               num_key_value_heads=8, tie_word_embeddings=True),
    "3B": dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, head_dim=128,
               num_key_value_heads=8, tie_word_embeddings=True),
    "8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=8),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    model: str
    method: str
    rows: int
    length: int
    checkpointing: bool
    r: int
    accumulation: int = 1
    trained: float = 1.0
    optim: str = "adamw_8bit"
    targets: str = "all-linear"
    dropout: float = 0.0


CASES = [
    Case("1B", "lora", 1, 512, True, 8),
    Case("1B", "lora", 8, 2048, True, 16, accumulation=2),
    Case("1B", "lora", 4, 2048, False, 64),
    Case("1B", "lora", 1, 8192, False, 16, trained=0.3),
    Case("1B", "qlora", 8, 512, True, 8, optim="adamw_torch"),
    Case("1B", "qlora", 4, 2048, False, 16),
    Case("1B", "qlora", 2, 8192, True, 64, accumulation=2, trained=0.5),
    Case("1B", "qlora", 1, 1024, True, 32, dropout=0.05),
    Case("3B", "lora", 2, 1024, True, 16),
    Case("3B", "lora", 8, 512, False, 32, accumulation=2),
    Case("3B", "lora", 1, 8192, True, 64),
    Case("3B", "qlora", 4, 2048, True, 16),
    Case("3B", "qlora", 2, 2048, False, 8, dropout=0.05),
    Case("3B", "qlora", 8, 1024, True, 64, accumulation=2, trained=0.25, targets="attention"),
    Case("8B", "lora", 1, 2048, True, 16),
    Case("8B", "lora", 4, 1024, False, 16),
    Case("8B", "lora", 8, 2048, True, 64, accumulation=2),
    Case("8B", "qlora", 1, 512, True, 8),
    Case("8B", "qlora", 4, 2048, True, 16),
    Case("8B", "qlora", 2, 1024, False, 16, accumulation=2, optim="adamw_32bit"),
    Case("8B", "qlora", 2, 8192, True, 16),
    Case("8B", "qlora", 8, 512, True, 64, trained=0.2, targets="attention"),
    Case("8B", "qlora", 2, 2048, False, 32),
]
TARGETS = {"all-linear": "all-linear", "attention": ("q_proj", "k_proj", "v_proj", "o_proj")}


def config_of(name: str) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        **SHAPES[name], vocab_size=128256, max_position_embeddings=131072, rms_norm_eps=1e-5,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip


def make(name: str, folder: Path) -> Source:
    """A folder of random weights."""
    if not (folder / "config.json").exists():
        from transformers import LlamaForCausalLM

        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            model = LlamaForCausalLM(config_of(name))
        torch.set_default_dtype(torch.float32)
        model.save_pretrained(folder)
        del model
        torch.cuda.empty_cache()
    return Source("folder", str(folder), name)


def predict(case: Case, eval_rows: int, eval_length: int) -> dict[str, Any]:
    config = config_of(case.model)
    started = time.perf_counter()
    shapes = shapes_of(build(config, torch.bfloat16))
    targets = shapes.targets(TARGETS[case.targets])  # type: ignore[arg-type]
    quantized = shapes.quantizable() if case.method == "qlora" else frozenset()
    step = Step(
        case.rows, case.length, round(case.rows * (case.length - 1) * case.trained), torch.bfloat16, case.method,
        targets, quantized, case.r, case.dropout, True, case.checkpointing, case.accumulation > 1,
    )  # fmt: skip
    evaluation = Step(
        eval_rows, eval_length, eval_rows * (eval_length - 1), torch.bfloat16, case.method,
        targets, quantized, case.r, training=False,
    )  # fmt: skip
    rehearsed = [
        rehearse(lambda depth: build(config, torch.bfloat16, depth), shapes.depth, shapes.period, which)
        for which in (step, evaluation)
    ]
    found = phases(shapes, step, case.optim, *rehearsed, "cuda")
    work = [(*operation, count) for operation, count in rehearsed[0].work.items()]
    return {
        "phases": {name: moment.bytes for name, moment in found.items()},
        "components": {name: moment.components for name, moment in found.items()},
        "seconds": time.perf_counter() - started,
        "work": work,
    }


def batch(case: Case) -> Batch:
    generator = torch.Generator().manual_seed(1)
    examples = []
    trained = round((case.length - 1) * case.trained)
    for row in range(case.rows):
        ids = torch.randint(3, 128000, (case.length,), generator=generator, dtype=torch.int32).numpy()
        examples.append(Example(ids, ((case.length - trained, case.length, 1.0),), str(row)))
    return Batch.of(examples)


def measure(case: Case, base: Any, eval_rows: int, eval_length: int) -> tuple[Any, dict[str, Any]]:
    cuda = torch.cuda
    result: dict[str, Any] = {"frozen": cuda.memory_allocated()}
    adapter = Adapter(r=case.r, lora_dropout=case.dropout, target_modules=TARGETS[case.targets])  # type: ignore[arg-type]
    model = attach(base, adapter, 0, case.checkpointing)
    engine = ReferenceEngine(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(parameters, Train(optim=case.optim, learning_rate=1e-4), "cuda")  # type: ignore[arg-type]
    result["attached"] = cuda.memory_allocated()
    micro = batch(case)
    scale = 1 / (micro.trained * case.accumulation)
    seconds, losses = [], []
    for n in range(4):
        if n == 1:
            cuda.synchronize()
            result["resting"] = cuda.memory_allocated()
            cuda.empty_cache()
            cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        total = torch.stack([engine.forward_backward(micro, scale) for _ in range(case.accumulation)]).sum()
        losses.append(total.item() * scale)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    result["peak"] = cuda.max_memory_allocated()
    result["reserved"] = cuda.max_memory_reserved()
    result["seconds"] = seconds
    free, total_bytes = cuda.mem_get_info()
    result["process"] = total_bytes - free
    result["losses"] = losses
    cuda.empty_cache()
    cuda.reset_peak_memory_stats()
    engine.losses(batch(Case(case.model, case.method, eval_rows, eval_length, False, 1)))
    result["evaluation"] = cuda.max_memory_allocated()
    base = model.unload()
    base.gradient_checkpointing_disable()
    base.requires_grad_(False)
    del model, engine, optimizer, parameters, micro
    cuda.empty_cache()
    return base, result


def on_gpu(models: Path, out: Path, only: int | None) -> None:
    machine = find_machine()
    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    results: dict[str, Any] = {
        "machine": machine.as_dict(),
        "torch": torch.__version__,
        "context": total - free,
        "sdp_priority": str(torch._C._get_sdp_priority_order()) if hasattr(torch._C, "_get_sdp_priority_order") else "",
        "loads": {},
        "cases": [],
    }
    kinds = list(dict.fromkeys((case.model, case.method) for case in CASES))
    for name, method in kinds:
        source = make(name, models / name)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        quantization = Quantization() if method == "qlora" else None
        base = load_model(source, Model(base=name, dtype="bfloat16"), quantization, machine)
        torch.cuda.synchronize()
        results["loads"][f"{name} {method}"] = {
            "seconds": time.perf_counter() - started,
            "allocated": torch.cuda.memory_allocated(),
            "peak": torch.cuda.max_memory_allocated(),
        }
        for case in [c for c in CASES if (c.model, c.method) == (name, method)][:only]:
            eval_rows, eval_length = (16, 512)
            predicted = predict(case, eval_rows, eval_length)
            try:
                base, measured = measure(case, base, eval_rows, eval_length)
            except torch.OutOfMemoryError as error:
                print("OOM", case, str(error)[:100], flush=True)
                base = None
                break
            guess = max(predicted["phases"][p] for p in ("forward", "backward", "optimizer"))
            error = guess / measured["peak"] - 1
            eval_error = predicted["phases"]["evaluation"] / measured["evaluation"] - 1
            tokens = case.rows * case.length * case.accumulation
            step = statistics.median(measured["seconds"][1:])
            print(
                f"{name} {method:5} {case.rows}x{case.length}x{case.accumulation} ckpt={case.checkpointing:d} r={case.r:3d} "
                f"frozen {measured['frozen'] / 2**30:.3f} att {measured['attached'] / 2**30:.3f} rest "
                f"{measured['resting'] / 2**30:.3f} peak {measured['peak'] / 2**30:.3f} predicted {guess / 2**30:.3f} "
                f"{error:+.2%} eval {measured['evaluation'] / 2**30:.3f} {eval_error:+.2%} res "
                f"{measured['reserved'] / 2**30:.2f} proc {measured['process'] / 2**30:.2f} {tokens / step:.0f} tok/s",
                flush=True,
            )
            results["cases"].append({"case": case.__dict__, "predicted": predicted, "measured": measured})
            (out / "plan_gpu.json").write_text(json.dumps(results))
        del base
        torch.cuda.empty_cache()
        shutil.rmtree(models / name) if method == "qlora" else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["gpu"])
    parser.add_argument("--models", type=Path, default=Path("/tmp/models"))
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--only", type=int, help="So many cases of each model and method.")
    arguments = parser.parse_args()
    on_gpu(arguments.models, arguments.out, arguments.only)


if __name__ == "__main__":
    main()
