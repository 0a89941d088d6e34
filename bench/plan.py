"""How wrong are the plan's predictions? Runs real steps on random weights and compares.

python bench/plan.py gpu --models /tmp/models --out DIR     on a CUDA GPU: memory and time of the reference engine
python bench/plan.py gpu --engine fused --out DIR           the same of the fused engine, on weights made there
python bench/plan.py cpu                                    memory of `veneer train` on the CPU, with SmolLM2
python bench/plan.py answer                                 how long `veneer plan` takes for a 70B base
python bench/plan.py table                                  the errors as a table
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the command sets it

import torch
from transformers import GenerationConfig

from veneer.config import Adapter, Model, Quantization, Run, Train
from veneer.data.batch import Batch, Example
from veneer.engine.interface import BatchShapes, document_losses
from veneer.engine.objective import LIKELIHOOD
from veneer.engine.reference import ReferenceEngine
from veneer.machine.device import find_machine, peak_resident_bytes
from veneer.machine.environment import environment
from veneer.model.attach import attach
from veneer.model.load import load_model
from veneer.model.locate import BaseSource
from veneer.model.quiet import quiet
from veneer.planning.base import PlannedModel
from veneer.planning.batch_shapes import Padded, RowShapes
from veneer.planning.forecast import Forecast
from veneer.planning.measure import measure_ceilings
from veneer.planning.planner import Planner
from veneer.planning.target import TargetDevice, device_named, this_device
from veneer.training.optimizer import build_optimizer

HELD_OUT = (16, 512)  # rows and tokens of the held-out loss, and of the prompts that are answered
NEW_TOKENS = 64
LIMITS = (0.9, 0.97, 1.0, 1.02, 1.05)  # of the predicted peak, as the allocator's limit
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
    engine: str = "reference"
    fills: bool = False


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
# Of the fused engine: checkpointing keeps the last block's tensors alone; fills: what `FUSED_BUDGET` has room for.
FUSED_BUDGET = "24GiB"
FUSED_CASES = [
    Case("1B", "lora", 4, 2048, True, 16),
    Case("1B", "qlora", 4, 2048, False, 16),
    Case("8B", "lora", 1, 2048, True, 16),
    Case("8B", "qlora", 4, 2048, True, 16),
    Case("8B", "qlora", 4, 2048, True, 16, fills=True),
    Case("8B", "qlora", 2, 8192, True, 16),
]
TARGETS = {"all-linear": "all-linear", "attention": ("q_proj", "k_proj", "v_proj", "o_proj")}


def config_of(name: str) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        **SHAPES[name], vocab_size=128256, max_position_embeddings=131072, rms_norm_eps=1e-5,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip


def make(name: str, folder: Path) -> BaseSource:
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
    return BaseSource("folder", str(folder), name)


def run_of_case(case: Case) -> Run:
    """The settings of a case as a user would write them."""
    return Run.model_validate(
        {
            "model": {"base": case.model, "dtype": "bfloat16"},
            "quantization": {"bits": 4} if case.method == "qlora" else None,
            "adapter": {"r": case.r, "lora_dropout": case.dropout, "target_modules": TARGETS[case.targets]},
            "data": {"train": "-", "max_length": case.length},
            "train": {
                "per_device_train_batch_size": case.rows,
                "gradient_accumulation_steps": case.accumulation,
                "gradient_checkpointing": "auto" if case.fills else case.checkpointing,
                "engine": case.engine,
                "optim": case.optim,
                "max_steps": 1,
            },
            "evaluate": {"batch_size": HELD_OUT[0], "max_new_tokens": NEW_TOKENS},
        }
    )


def predict(case: Case, folder: Path, target: TargetDevice) -> Forecast:
    """As `veneer plan` would, knowing the shapes of the rows."""
    trained = round((case.length - 1) * case.trained)
    full = Padded(case.rows, case.length, case.rows * trained)
    held_out = Padded(HELD_OUT[0], HELD_OUT[1], HELD_OUT[0] * (HELD_OUT[1] - 1))
    answered = None if case.fills else Padded(HELD_OUT[0], HELD_OUT[1], HELD_OUT[1] - 1)
    tokens = case.rows * case.length * case.accumulation
    # Memory is filled by what training needs, so that case is predicted without its held-out loss.
    rows = RowShapes(full, full, case.accumulation, tokens, 1, None if case.fills else held_out, 0, answered, None)
    return Planner(PlannedModel(Model(base=str(folder)), rows), target).forecast(run_of_case(case))


def batch(case: Case) -> Batch:
    generator = torch.Generator().manual_seed(1)
    examples = []
    trained = round((case.length - 1) * case.trained)
    for row in range(case.rows):
        ids = torch.randint(3, 128000, (case.length,), generator=generator, dtype=torch.int32).numpy()
        examples.append(Example(ids, ((case.length - trained, case.length, 1.0),), str(row)))
    return Batch.of(examples)


def train_steps(engine: ReferenceEngine, optimizer: Any, micro: Batch, times: int) -> float:
    """One optimizer step, as the loop does it; its loss."""
    parameters = [p for p in engine.model.parameters() if p.requires_grad]
    scale = 1 / (micro.trained * times)
    losses = [engine.forward_backward(micro.scaled(scale), LIKELIHOOD).loss for _ in range(times)]
    loss = torch.stack(losses).sum().item() * scale
    torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    return loss


def under_limit(engine: ReferenceEngine, optimizer: Any, case: Case, limit: float) -> bool:
    """Whether a step passes where the allocator may take no more than a limit, as on a smaller card."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.mem_get_info()[1]))
    try:
        for _ in range(2):
            train_steps(engine, optimizer, batch(case), case.accumulation)
        return True
    except torch.OutOfMemoryError:
        optimizer.zero_grad(set_to_none=True)
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        gc.collect()
        torch.cuda.empty_cache()


def measure(case: Case, base: Any, peak: int, limited: bool) -> tuple[Any, dict[str, Any]]:
    cuda = torch.cuda
    result: dict[str, Any] = {"frozen": cuda.memory_allocated()}
    adapter = Adapter(r=case.r, lora_dropout=case.dropout, target_modules=TARGETS[case.targets])
    model = attach(base, adapter, 0, case.checkpointing)
    engine = ReferenceEngine(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(parameters, Train(optim=case.optim, learning_rate=1e-4), "cuda")
    result["attached"] = cuda.memory_allocated()
    micro = batch(case)
    seconds, losses = [], []
    for n in range(4):
        if n == 1:
            cuda.synchronize()
            result["resting"] = cuda.memory_allocated()
            cuda.empty_cache()
            cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        losses.append(train_steps(engine, optimizer, micro, case.accumulation))
        seconds.append(time.perf_counter() - started)
    result["peak"] = cuda.max_memory_allocated()
    result["reserved"] = cuda.max_memory_reserved()
    result["seconds"] = seconds
    free, total_bytes = cuda.mem_get_info()
    result["process"] = total_bytes - free
    result["losses"] = losses
    if limited:
        result["limits"] = {str(part): under_limit(engine, optimizer, case, part * peak) for part in LIMITS}
    cuda.empty_cache()
    cuda.reset_peak_memory_stats()
    asked = batch(Case(case.model, case.method, *HELD_OUT, False, 1))
    engine.token_logprobs(asked)
    result["evaluation"] = cuda.max_memory_allocated()
    optimizer.state.clear()
    cuda.empty_cache()
    cuda.reset_peak_memory_stats()
    model.eval()
    ids = asked.ids_T.reshape(HELD_OUT).cuda()
    with torch.no_grad(), quiet():
        settings = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True, pad_token_id=2)
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    result["generation"] = cuda.max_memory_allocated()
    base = model.unload()
    base.gradient_checkpointing_disable()
    base.requires_grad_(False)
    del model, engine, optimizer, parameters, micro
    gc.collect()
    cuda.empty_cache()
    return base, result


def on_gpu(models: Path, out: Path, only: int | None) -> None:
    """Memory and time of the reference engine on the GPU at hand, into `out`/plan_gpu.json."""
    machine = find_machine()
    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    started = time.perf_counter()
    measured_ceilings = measure_ceilings(machine)
    results: dict[str, Any] = {
        "machine": machine.as_dict(),
        "versions": {
            name: metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "triton")
        },
        "allocator": os.environ["PYTORCH_ALLOC_CONF"],
        "context_bytes": total - free,
        "ceilings": asdict(measured_ceilings),
        "ceilings_seconds": time.perf_counter() - started,
        "loads": {},
        "cases": [],
    }
    print(results, flush=True)
    devices = {
        "measured": replace(this_device(machine), ceilings=measured_ceilings),
        "data sheet": device_named("h100"),
    }
    for name, method in dict.fromkeys((case.model, case.method) for case in CASES):
        source = make(name, models / name)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        quantization = Quantization() if method == "qlora" else None
        base = load_model(source, Model(base=name, dtype="bfloat16"), quantization, machine)
        torch.cuda.synchronize()
        cases = [c for c in CASES if (c.model, c.method) == (name, method)][:only]
        load = {
            "predicted": predict(cases[0], models / name, devices["measured"]).phases["load"].bytes,
            "peak": torch.cuda.max_memory_allocated(),
            "allocated": torch.cuda.memory_allocated(),
            "seconds": time.perf_counter() - started,
        }
        results["loads"][f"{name} {method}"] = load
        print("load", name, method, f"{load['peak'] / load['predicted'] - 1:+.2%}", load, flush=True)
        for number, case in enumerate(cases):
            forecasts = {which: predict(case, models / name, target) for which, target in devices.items()}
            forecast = forecasts["measured"]
            guess = max(forecast.phases[phase].bytes for phase in ("forward", "backward", "optimizer"))
            base, measured = measure(case, base, guess, number in (0, 2))
            step = statistics.median(measured["seconds"][1:])
            row = {
                "case": asdict(case),
                "predicted": {phase: peak.bytes for phase, peak in forecast.phases.items()} | {"peak": guess},
                "components": forecast.phases[forecast.peak_phase].components,
                "predicted_seconds": {which: f.step_seconds and f.step_seconds[1] for which, f in forecasts.items()},
                "measured": measured,
                "step_seconds": step,
                "error": guess / measured["peak"] - 1,
            }
            print(
                f"{name} {method:5} {case.rows}x{case.length}x{case.accumulation} "
                f"ckpt={case.checkpointing:d} r={case.r:3d} "
                f"peak {measured['peak'] / 2**30:.3f} {row['error']:+.2%} "
                f"eval {forecast.phases['evaluation'].bytes / measured['evaluation'] - 1:+.2%} "
                f"gen {forecast.phases['generation'].bytes / measured['generation'] - 1:+.2%} "
                f"reserved {measured['reserved'] / measured['peak']:.3f} "
                f"beside {(measured['process'] - measured['reserved']) >> 20} MiB time {step:.3f} "
                f"{[round(s / step, 2) for s in row['predicted_seconds'].values()]} {measured.get('limits')}",
                flush=True,
            )
            results["cases"].append(row)
            results["host_bytes"] = peak_resident_bytes()
            (out / "plan_gpu.json").write_text(json.dumps(results))
        del base
        gc.collect()
        torch.cuda.empty_cache()
        if method == "qlora":
            shutil.rmtree(models / name)


def fused_steps(engine: Any, case: Case) -> dict[str, Any]:
    """Peak and time of steps that repeat one batch, so that the later ones are replayed."""
    cuda = torch.cuda
    optimizer = build_optimizer([engine.master], Train(optim=case.optim, learning_rate=1e-4), "cuda")
    micro, seconds = batch(case), []
    for n in range(6):
        if n == 1:
            cuda.empty_cache()
            cuda.reset_peak_memory_stats()
        cuda.synchronize()
        started = time.perf_counter()
        for _ in range(case.accumulation):
            engine.forward_backward(micro.scaled(1 / micro.trained), LIKELIHOOD)
        torch.nn.utils.clip_grad_norm_([engine.master], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {
        "peak": cuda.max_memory_allocated(),
        "reserved": cuda.max_memory_reserved(),
        "seconds": seconds,
        "losses": document_losses(engine, micro),
    }


def on_gpu_fused(out: Path) -> None:
    """Memory and time of the fused engine on the GPU at hand, into `out`/plan_gpu_fused.json."""
    from bench.engine import random_base
    from veneer.engine.fused.engine import FusedEngine

    machine = find_machine()
    torch.zeros(1, device="cuda")
    ceilings = measure_ceilings(machine)
    target = replace(this_device(machine), ceilings=ceilings)
    results: dict[str, Any] = {
        "machine": machine.as_dict(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft", "triton")},
        "ceilings": asdict(ceilings),
        "cases": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, method in dict.fromkeys((case.model, case.method) for case in FUSED_CASES):
            config_of(name).save_pretrained(Path(folder) / name)
            base = random_base(name.lower(), None, method == "qlora")
            for case in [c for c in FUSED_CASES if (c.model, c.method) == (name, method)]:
                case = replace(case, engine="fused")
                budget = replace(target, budget_bytes=device_named(FUSED_BUDGET).budget_bytes) if case.fills else target
                forecast = predict(case, Path(folder) / name, budget)
                model = attach(base, Adapter(r=case.r, target_modules=TARGETS[case.targets]), 0)
                engine = FusedEngine(model, case.checkpointing)
                fitted = None
                if case.fills:
                    micro = batch(case)
                    fitted = engine.plan_within(BatchShapes(micro.lengths), budget.budget_bytes).as_dict()
                measured = fused_steps(engine, case)
                guess = max(forecast.phases[phase].bytes for phase in ("forward", "backward", "optimizer"))
                guess += forecast.placement.bytes
                step = statistics.median(measured["seconds"][3:])
                row = {
                    "case": asdict(case),
                    "predicted": {phase: peak.bytes for phase, peak in forecast.phases.items()} | {"peak": guess},
                    "components": forecast.phases["forward"].components,
                    "placement": forecast.placement.as_dict(),
                    "fitted": fitted,
                    "predicted_seconds": {"measured": forecast.step_seconds and forecast.step_seconds[1]},
                    "measured": measured,
                    "step_seconds": step,
                    "error": guess / measured["peak"] - 1,
                }
                print(
                    f"{name} {method:5} {case.rows}x{case.length} ckpt={case.checkpointing:d} fills={case.fills:d} "
                    f"predicted {guess / 2**30:.3f} peak {measured['peak'] / 2**30:.3f} {row['error']:+.2%} "
                    f"reserved {measured['reserved'] / 2**30:.3f} time {step:.3f} "
                    f"{row['predicted_seconds']['measured'] / step:.2f} {forecast.placement} {fitted}",
                    flush=True,
                )
                results["cases"].append(row)
                (out / "plan_gpu_fused.json").write_text(json.dumps(results))
                base = model.unload()
                base.requires_grad_(False)
                del model, engine
                gc.collect()
                torch.cuda.empty_cache()
            del base
            gc.collect()
            torch.cuda.empty_cache()


CPU_CASES: dict[str, tuple[str, ...]] = {
    "1 row": ("train.per_device_train_batch_size=1",),
    "4 rows": (),
    "8 rows": ("train.per_device_train_batch_size=8", "train.gradient_accumulation_steps=1"),
    "2 rows, nothing recomputed": ("train.per_device_train_batch_size=2", "train.gradient_checkpointing=false"),
    "4 rows, float32": ("model.dtype=float32",),
    "4 rows, 4-bit": ("quantization.bits=4",),
    "4 rows, r 64": ("adapter.r=64",),
    "packed to 2048": ("data.packing=true", "data.max_length=2048", "train.per_device_train_batch_size=1"),
}
CPU_RUN = """
model: {base: smollm2-135m-instruct}
data: {train: ROWS, validation: 0.2, limit: 40}
train: {output_dir: RUN, num_train_epochs: 1, per_device_train_batch_size: 4, gradient_accumulation_steps: 2}
"""


def on_cpu(rows: Path) -> None:
    """Runs `veneer train`, each case in a process of its own, over one epoch of real rows."""
    cases = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, (title, changes) in enumerate(CPU_CASES.items()):
            output = folder / str(number)
            written = folder / f"{number}.yaml"
            written.write_text(CPU_RUN.replace("ROWS", str(rows.resolve())).replace("RUN", str(output)))
            process = subprocess.Popen(
                [sys.executable, "-m", "veneer.cli.main", "train", str(written), *changes], stdout=subprocess.DEVNULL
            )
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise SystemExit(f"{title}: `veneer train` ended with status {status}")
            plan = json.loads((output / "plan.json").read_text())
            predicted = {phase: peak["bytes"] for phase, peak in plan["phases"].items() if phase != "generation"}
            peak = usage.ru_maxrss * 1024
            error = max(predicted.values()) / peak - 1
            cases.append({"case": title, "settings": changes, "predicted": predicted, "peak": peak, "error": error})
            print(f"{title:30} predicted {max(predicted.values()) >> 20:5} MiB, held {peak >> 20:5}, {error:+.1%}")
    keep("cpu", {"machine": find_machine().as_dict(), "versions": environment()["libraries"], "cases": cases})


def on_answer(runs: int) -> None:
    """Runs `veneer plan` for a 70B base that is nowhere on this machine."""
    taken = []
    with tempfile.TemporaryDirectory() as name:
        written = Path(name) / "run.yaml"
        written.write_text(
            "model: {base: meta-llama/Llama-3.1-70B-Instruct}\nquantization: {bits: 4}\n"
            f"data: {{train: rows.jsonl, max_length: 2048}}\ntrain: {{output_dir: {name}/run}}\n"
        )
        for _ in range(runs):
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "veneer.cli.main", "plan", str(written), "--gpu", "h100", "--no-data"],
                check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            taken.append(time.perf_counter() - started)
    result = {"seconds": [round(t, 2) for t in taken], "median": round(statistics.median(taken), 2)}
    print(result)
    keep("answer", {"machine": find_machine().as_dict(), "versions": environment()["libraries"]} | result)


def table() -> None:
    """Prints the errors of the GPU's and the CPU's cases, as docs/planning.md has them."""
    results = json.loads((Path(__file__).parent / "results" / "plan.json").read_text())
    print(
        "| base | method | rows x length x accumulation | recomputed | r | trained tokens | predicted | measured |",
        end="",
    )
    print(" error | time, predicted / measured |\n|---|---|---|---|---|---|---|---|---|---|")
    fused = results.get("gpu_fused", {"cases": []})
    for row in [*results["gpu"]["cases"], *fused["cases"]]:
        case = row["case"]
        print(
            f"| {case['model']} | {case['method']} | {case['rows']} x {case['length']} x {case['accumulation']} "
            f"| {'yes' if case['checkpointing'] else 'no'} | {case['r']} | {case['trained']:.0%} "
            f"| {row['predicted']['peak'] / 2**30:.3f} | {row['measured']['peak'] / 2**30:.3f} | {row['error']:+.2%} "
            f"| {row['predicted_seconds']['measured'] / row['step_seconds']:.2f} |"
        )
    print("\n| SmolLM2 on the CPU | predicted, MiB | held, MiB | error |\n|---|---|---|---|")
    for row in results["cpu"]["cases"]:
        predicted = max(row["predicted"].values())
        print(f"| {row['case']} | {predicted >> 20} | {row['peak'] >> 20} | {row['error']:+.1%} |")


def keep(part: str, result: dict[str, Any]) -> None:
    """Writes a part of the results."""
    path = Path(__file__).parent / "results" / "plan.json"
    whole = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(whole | {part: result}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["gpu", "cpu", "answer", "table"])
    parser.add_argument("--engine", choices=["reference", "fused"], default="reference", help="gpu: which")
    parser.add_argument("--rows", type=Path, help="cpu: rows to train on, such as gsm8k_train.jsonl")
    parser.add_argument("--runs", type=int, default=7, help="answer: how many")
    parser.add_argument("--models", type=Path, default=Path("/tmp/models"))
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--only", type=int, help="So many cases of each model and method.")
    arguments = parser.parse_args()
    if arguments.what == "gpu" and arguments.engine == "fused":
        on_gpu_fused(arguments.out)
    elif arguments.what == "gpu":
        on_gpu(arguments.models, arguments.out, arguments.only)
    elif arguments.what == "cpu":
        on_cpu(arguments.rows)
    elif arguments.what == "table":
        table()
    else:
        on_answer(arguments.runs)


if __name__ == "__main__":
    main()
