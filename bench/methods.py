"""What does each adapter method cost? Step time, planned against measured peak, and exactness, on random weights.

    python3 -m bench.methods                            # on a GPU, at 4 x 2048 of 8B shapes
    python3 -m bench.methods --tiny --out /tmp/m.json   # the same code on a CPU, at a tiny shape; no figure counts

Cases are LoRA, DoRA, and LoRA with a rank pattern of the same total rank on the fused engine, in turn and more than
once in one process, so that their ratios are of one card at one temperature; then PEFT's LoRA and DoRA by the
reference engine, which recomputes activations since they do not fit otherwise. A step is forward, backward, clipping
and 8-bit AdamW, r = 16 on all linear layers of an NF4 base. A plan is made by `veneer plan`'s own code from the shapes.

Exactness of DoRA is that of docs/engine.md: errors of gradients against float32, by the fused engine and by PEFT in
bfloat16. PiSSA and OLoRA are saved as plain LoRA and loaded in plain PEFT: the largest difference of a logit, in
float32. All is merged into bench/results/methods.json.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tests.support.engines import COVERED, model_of
from tests.support.exactness import LENGTHS, ratios, tiny_errors

from bench.engine import COMMON, SHAPES, batch_of, random_base
from veneer.config import Adapter, Model, Run, Train
from veneer.data.batch import Batch
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.interface import BatchShapes
from veneer.engine.objective import LIKELIHOOD
from veneer.engine.reference import ReferenceEngine
from veneer.machine.device import find_machine
from veneer.model.attach import attach, detach, write_adapter
from veneer.planning.base import PlannedModel
from veneer.planning.batch_shapes import Padded, RowShapes
from veneer.planning.memory import optimizer_bytes
from veneer.planning.planner import Planner
from veneer.planning.target import device_named, this_device
from veneer.training.optimizer import build_optimizer

RESULTS = Path(__file__).parent / "results" / "methods.json"
TINY = COMMON | {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
                 "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
RANKS = {"q_proj": 32, "k_proj": 8, "v_proj": 8, "gate_proj": 24, "up_proj": 8}  # and 16 each on o_proj and down_proj
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("fused", {}),
    "dora": ("fused", {"method": "dora"}),
    "lora, rank pattern": ("fused", {"rank_pattern": RANKS}),
    "lora, PEFT": ("reference", {}),
    "dora, PEFT": ("reference", {"method": "dora"}),
}
SKIPPED = 3  # steps before those that count: compiling, recording
LIMITS = {"dora": 1.10, "lora, rank pattern": 1.02}  # of the step time, as LoRA's
MOST_ERROR, MOST_PLANNED, MOST_LOGIT = 2.0, 0.08, 1e-5


def tiny_base() -> Any:
    """Return the base of a trial on a CPU."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TINY)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False).eval()


def planned_bytes(case: str, rows: int, length: int, gib: float, folder: Path, on_gpu: bool) -> int:
    """Return the peak of a case's steps as `veneer plan` predicts it, knowing the shapes of the rows."""
    engine, settings = CASES[case]
    full = Padded(rows, length, rows * (length - 1))
    shapes = RowShapes(full, full, 1, rows * length, 1, None, 0, None, None)
    train = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1, "engine": engine,
             "optim": "adamw_8bit", "gradient_checkpointing": "auto" if engine == "fused" else True}  # fmt: skip
    run = Run.model_validate({
        "model": {"base": str(folder), "dtype": "bfloat16"}, "quantization": {"bits": 4},
        "adapter": {"r": 16} | settings, "data": {"train": "-", "max_length": length}, "train": train,
    })  # fmt: skip
    target = this_device() if on_gpu else device_named("80GiB")
    target = replace(target, budget_bytes=int(gib * 2**30))
    forecast = Planner(PlannedModel(Model(base=str(folder)), shapes), target).forecast(run)
    peak = max(forecast.phases[phase].bytes for phase in ("forward", "backward", "optimizer"))
    return peak + forecast.placement.bytes


def measure(base: Any, case: str, batch: Batch, gib: float, steps: int, on_gpu: bool) -> dict[str, Any]:
    """Return step times of a case in seconds, and the peak of its steps."""
    name, settings = CASES[case]
    model = attach(base, Adapter(r=16, lora_alpha=32, **settings), 0, gradient_checkpointing=name == "reference")
    device = "cuda" if on_gpu else "cpu"
    engine: Any = FusedEngine(model, False) if name == "fused" else ReferenceEngine(model)
    updated = [engine.master] if name == "fused" else [p for p in model.parameters() if p.requires_grad]
    kind = "adamw_8bit" if on_gpu else "adamw_torch"
    optimizer = build_optimizer(updated, Train(optim=kind, learning_rate=1e-5), device)
    if name == "fused" and on_gpu:
        states = optimizer_bytes([engine.master.numel()], kind)
        engine.plan_within(BatchShapes(batch.lengths), int(gib * 2**30) - states)
    seconds, losses = [], []
    for number in range(steps + SKIPPED):
        if on_gpu:
            torch.cuda.synchronize()
        if on_gpu and number == 1:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        loss = engine.forward_backward(batch.scaled(1 / batch.weight), LIKELIHOOD).loss
        torch.nn.utils.clip_grad_norm_(updated, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(loss.item() / batch.weight, 5))
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    found = {"seconds": [round(s, 4) for s in seconds[SKIPPED:]], "peak_bytes": peak, "losses": losses[:3]}
    if name == "fused":
        found["placement"] = engine.placement.as_dict()
    del engine, optimizer, updated
    detach(model)
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return found


def compare(a: argparse.Namespace, on_gpu: bool) -> dict[str, Any]:
    """Measure all cases in turn; return their figures by name."""
    base = random_base(a.shape, a.layers, True, are_alike=True) if on_gpu else tiny_base()
    batch = batch_of(a.rows, a.length, base.config.vocab_size)
    fused, reference = ([name for name in CASES if CASES[name][0] == kind] for kind in ("fused", "reference"))
    found: dict[str, Any] = {}
    for case in (*fused * a.rounds, *reference):
        result = measure(base, case, batch, a.gib, a.steps if case in fused else a.reference_steps, on_gpu)
        so_far = found.setdefault(case, result | {"seconds": []})
        so_far["seconds"] += result["seconds"]
        print("RESULT " + json.dumps({"case": case} | result), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        base.config.save_pretrained(folder)
        for case, result in found.items():
            result["planned_bytes"] = planned_bytes(case, a.rows, a.length, a.gib, Path(folder), on_gpu)
    for case, result in found.items():
        spread = sorted(result["seconds"])
        of = found["lora" if case in fused else "lora, PEFT"]["seconds"]
        result["step_seconds"] = {"median": statistics.median(spread), "best": spread[0], "worst": spread[-1]}
        result["times_lora"] = round(result["step_seconds"]["median"] / statistics.median(of), 4)
        result["tokens_per_second"] = round(a.rows * a.length / result["step_seconds"]["median"])
        if result["peak_bytes"]:
            result["plan_error"] = round(result["planned_bytes"] / result["peak_bytes"] - 1, 4)
    return found


def errors(device: str, batches: int) -> dict[str, Any]:
    """Return how many times PEFT's error DoRA's is on the fused engine, by family: that of the worst matrix."""
    found = {}
    for family in COVERED:
        for lengths in LENGTHS:
            drawn = [tiny_errors(family, lengths, seed, device, method="dora") for seed in range(batches)]
            over_all = ratios(drawn)
            found[f"{family}, {' '.join(map(str, lengths))}"] = {
                "median": round(statistics.median(over_all.values()), 3), "worst": round(max(over_all.values()), 3),
            }  # fmt: skip
    print(json.dumps(found), flush=True)
    return found


def saved_as_lora() -> dict[str, float]:
    """Return the largest difference of a logit between a live model and its saved adapter in plain PEFT, by kind."""
    import copy

    from peft import PeftModel

    ids, found = torch.arange(128).reshape(2, 64) + 3, {}
    for kind in ("pissa", "olora"):
        model = model_of("llama", changes={"hidden_size": 256, "intermediate_size": 512}, init_lora_weights=kind, r=16)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            write_adapter(model, Path(folder))
            live, plain = model(ids).logits, detach(copy.deepcopy(model))
            saved = PeftModel.from_pretrained(plain, folder)(ids).logits
        found[kind] = float((saved - live).abs().max())
    print(json.dumps(found), flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    """A line a target, in Markdown."""
    cases = found["cases"]
    lines = [(f"{name}: step time, times LoRA's", cases[name]["times_lora"], most) for name, most in LIMITS.items()]
    planned = [(f"{name}: plan's error", abs(of["plan_error"]), MOST_PLANNED) for name, of in cases.items()
               if "plan_error" in of]  # fmt: skip
    worst = max(one["worst"] for one in found["dora_errors"].values())
    lines += [*planned, ("dora: error of the worst matrix, times PEFT's", worst, MOST_ERROR)]
    lines += [(f"{kind}: largest difference of a logit", value, MOST_LOGIT) for kind, value in found["saved"].items()]
    shown = [f"| {name} | {most:g} | {value:.3g}{'' if value <= most else ' (not met)'} |"
             for name, value, most in lines]  # fmt: skip
    return "\n".join(["| figure | at most | reached |", "|---|---|---|", *shown])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--gib", type=float, default=70.0, help="memory budget")
    parser.add_argument("--rounds", type=int, default=2, help="times that the fused engine's cases are measured")
    parser.add_argument("--steps", type=int, default=8, help="of the fused engine that count, a round")
    parser.add_argument("--reference-steps", type=int, default=3)
    parser.add_argument("--batches", type=int, default=2, help="of each family, for exactness")
    parser.add_argument("--tiny", action="store_true", help="a trial on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    machine = find_machine()
    if a.tiny:
        a.rows, a.length, a.steps, a.reference_steps, a.rounds, a.batches = 2, 64, 1, 1, 1, 1
    names = ("torch", "triton", "transformers", "peft", "bitsandbytes")
    found: dict[str, Any] = {
        "on": {"gpu": machine.name, "versions": {name: metadata.version(name) for name in names},
               "date": time.strftime("%Y-%m-%d")},
        "shape": {"shape": "tiny" if a.tiny else a.shape, "rows": a.rows, "length": a.length},
        "cases": compare(a, not a.tiny),
    }  # fmt: skip
    a.out.write_text(json.dumps(found, indent=1) + "\n")  # in case that what follows fails
    found |= {"dora_errors": errors("cpu" if a.tiny else machine.device, a.batches), "saved": saved_as_lora()}
    a.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
