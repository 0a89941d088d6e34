"""Measures the fused engine: tokens/s, peak memory, and where a step's time goes, on random weights of real shapes.

Each case is forward, backward and the optimizer's step (clipping included) on full-length random sequences, r = 16 on
all linear layers, 8-bit AdamW, in one process, within a budget of GiB that the engine uses as it
likes: ROWSxLENGTH[xACCUMULATION]@BUDGET. Prints a JSON line a case, merges it into bench/results/engine.json.

    python3 bench/engine.py --shape 8b --profile --cases 4x2048@70 4x2048@9 2x1024x8@70 2x1024x8@7.5 1x2048@70 2x8192@13
"""

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from veneer.config import Adapter, Train
from veneer.data.batch import Batch
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.interface import BatchShapes
from veneer.engine.objective import LIKELIHOOD
from veneer.engine.placement import MemoryPlacement
from veneer.model.attach import attach
from veneer.planning.memory import optimizer_bytes
from veneer.training.optimizer import build_optimizer

COMMON = {"vocab_size": 128256, "max_position_embeddings": 2**20, "rms_norm_eps": 1e-5}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "8b": ("LlamaConfig", COMMON | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                                    "num_attention_heads": 32, "num_key_value_heads": 8}),
    "70b": ("LlamaConfig", COMMON | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                                     "num_attention_heads": 64, "num_key_value_heads": 8}),
    "1b": ("LlamaConfig", COMMON | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                                    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
                                    "tie_word_embeddings": True}),
    "qwen3-8b": ("Qwen3Config", {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
                                 "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
                                 "head_dim": 128, "max_position_embeddings": 40960}),
    "gemma2-9b": ("Gemma2Config", {"vocab_size": 256000, "hidden_size": 3584, "intermediate_size": 14336,
                                   "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8,
                                   "head_dim": 256, "query_pre_attn_scalar": 256}),
}  # fmt: skip


def random_base(shape: str, layers: int | None, quantized: bool, to_host: bool = False, are_alike: bool = False) -> Any:
    """Return a model of random weights, made layer by layer on the GPU; nothing touches the disk.

    Args:
        shape: name of SHAPES.
        layers: number of blocks; None: that of the shape.
        quantized: whether blocks are in NF4 with double quantization.
        to_host: whether 4-bit weights, embedding and head end up in host memory.
        are_alike: whether further blocks get the 4-bit weights of the first, rolled, which takes less time.
    """
    import bitsandbytes as bnb
    import transformers

    name, settings = SHAPES[shape]
    if layers:
        settings = settings | {"num_hidden_layers": layers}
    config = getattr(transformers, name)(**settings)
    torch.manual_seed(0)
    with torch.device("meta"):
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    first: dict[str, Any] = {}  # 4-bit weights of the first block
    for path, module in list(base.named_modules()):
        if isinstance(module, torch.nn.Linear) and "lm_head" not in path:
            number, _, within = path.partition("layers.")[2].partition(".")
            new: Any = torch.nn.Linear(1, 1, bias=False)
            if quantized:
                new = bnb.nn.Linear4bit(1, 1, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
                if within in first:
                    new.weight = _rolled(first[within], int(number))
                else:
                    new.weight = _random_nf4(module.weight.shape, to_host)
                if are_alike:
                    first.setdefault(within, new.weight)
            else:
                new.weight = torch.nn.Parameter(_random(module.weight.shape), requires_grad=False)
            new.in_features, new.out_features = module.in_features, module.out_features
            parent, _, child = path.rpartition(".")
            setattr(base.get_submodule(parent), child, new)
    for path, parameter in list(base.named_parameters()):
        if parameter.is_meta:
            value = torch.ones(parameter.shape, dtype=torch.bfloat16, device="cuda")
            if "norm" not in path:
                value.normal_(0, 0.02)
                value = value.cpu() if to_host else value
            parent, _, child = path.rpartition(".")
            base.get_submodule(parent)._parameters[child] = torch.nn.Parameter(value, requires_grad=False)
    base.tie_weights()
    rotary = type(base.base_model.rotary_emb)(config)
    base.base_model.rotary_emb = rotary.to("cuda")
    if shape.startswith("gemma2"):
        base.base_model.embed_tokens.embed_scale = torch.tensor(config.hidden_size**0.5, device="cuda")
    return base.requires_grad_(False).eval()


def _random(shape: torch.Size) -> torch.Tensor:
    return 0.02 * torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def _random_nf4(shape: torch.Size, to_host: bool) -> Any:
    from bitsandbytes.nn import Params4bit

    weight = Params4bit(_random(shape), requires_grad=False, quant_type="nf4", compress_statistics=True).to("cuda")
    return weight.to("cpu") if to_host else weight


def _rolled(weight: Any, number: int) -> Any:
    """Return a copy of a 4-bit weight with its bytes moved on by some rows' worth; two copies use all cores."""
    from bitsandbytes.nn import Params4bit

    data = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    shift = number * 32 * 1009 % len(data)
    data[shift:].copy_(weight.data[: len(data) - shift])
    data[:shift].copy_(weight.data[len(data) - shift :])
    state = copy.deepcopy(weight.quant_state)
    return Params4bit(data, requires_grad=False, quant_type="nf4", quant_state=state, bnb_quantized=True)


def batch_of(rows: int, length: int, vocabulary: int) -> Batch:
    ids = torch.randint(3, vocabulary, (rows * length,))
    targets = ids.roll(-1)
    targets[length - 1 :: length] = -100
    weights = (targets >= 0).float()
    return Batch(ids, targets, weights, (length,) * rows, int(weights.sum()), float(weights.sum()))


def measure(
    model: Any,
    case: str,
    steps: int,
    profile: bool,
    skipped: int = 3,
    on_placement: Callable[[MemoryPlacement], object] = lambda placement: None,
) -> dict[str, Any]:
    """One case, as the module says; the first `skipped` steps are not counted."""
    sizes, budget = case.split("@")
    rows, length, *more = map(int, sizes.split("x"))
    batches = [batch_of(rows, length, model.config.vocab_size) for _ in range(more[0] if more else 1)]
    return {"case": case} | train(
        model, [batches] * (steps + skipped), (length,) * rows, float(budget), profile, skipped, on_placement
    )


def train(
    model: Any,
    batches_of_steps: Sequence[Sequence[Batch]],
    largest: Sequence[int],
    gib: float,
    profile: bool = False,
    skipped: int = 3,
    on_placement: Callable[[MemoryPlacement], object] = lambda placement: None,
) -> dict[str, Any]:
    """Steps of training within a budget.

    Args:
        model: A PEFT model.
        batches_of_steps: The micro-batches of each step.
        largest: Lengths of the documents of the largest micro-batch.
        gib: What tensors may take, the optimizer's states included.
        profile: Whether a further step is profiled.
        skipped: Steps at the beginning that are not counted.
        on_placement: Callback that gets the placement before the first step.
    """
    engine = FusedEngine(model)
    optimizer = build_optimizer([engine.master], Train(optim="adamw_8bit"), "cuda")
    states = optimizer_bytes([engine.master.numel()], "adamw_8bit")
    placement = engine.plan_within(BatchShapes(tuple(largest)), int(gib * 2**30) - states)
    on_placement(placement)

    def step(batches: Sequence[Batch]) -> float:
        weight = sum(batch.weight for batch in batches)
        sums = [engine.forward_backward(batch.scaled(1 / weight), LIKELIHOOD).loss for batch in batches]
        total = torch.stack(sums).sum()
        torch.nn.utils.clip_grad_norm_([engine.master], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total.item()) / weight

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for batches in batches_of_steps:
        torch.cuda.synchronize()
        started = time.perf_counter()
        losses.append(step(batches))
        seconds.append(time.perf_counter() - started)
    tokens, trained = (
        [sum(getattr(batch, what) for batch in batches) for batches in batches_of_steps[skipped:]]
        for what in ("tokens", "trained")
    )
    speeds = sorted(n / s for n, s in zip(tokens, seconds[skipped:], strict=True))
    result = {
        "tokens_per_second": round(statistics.median(speeds)),
        "best": round(speeds[-1]),
        "worst": round(speeds[0]),
        "trained_tokens_per_second": round(sum(trained) / sum(seconds[skipped:])),
        "step_seconds": round(statistics.median(seconds[skipped:]), 4),
        "first_step_seconds": round(seconds[0], 2),
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "process_gib": round(process_bytes() / 2**30, 2),
        "process_peak_gib": round(process_peak_bytes() / 2**30, 2),
        "placement": placement.as_dict(),
        "losses": [round(loss, 4) for loss in losses[:4]],
    }
    result |= predicted_peak(placement, states)
    if profile:
        result["profile_ms"] = kernels_of(lambda: step(batches_of_steps[0]))
    return result


def predicted_peak(placement: MemoryPlacement, states: int) -> dict[str, float]:
    """The peak that a placement predicts beside the optimizer's states, in bytes, and its relative error."""
    if not placement.peak_bytes:
        return {}
    peak = placement.peak_bytes + states
    error = peak / torch.cuda.max_memory_allocated() - 1
    return {"predicted_peak_gib": round(peak / 2**30, 3), "peak_error": round(error, 4)}


def process_peak_bytes() -> int:
    """What the process has held at most since the allocator's statistics were reset, CUDA's context included."""
    return process_bytes() - torch.cuda.memory_reserved() + torch.cuda.max_memory_reserved()


def process_bytes() -> int:
    """What the device has given away in all, this process being its only one."""
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


PARTS = {
    "large products": ("nvjet", "gemm", "cutlass"), "attention": ("sdpa", "fmha", "cudnn", "flash", "flex"),
    "4-bit weights": ("_dequantize",), "gate's backward with adapters' gradients": ("_backward_adapters",),
    "adapters' own products": ("_project", "_outer", "_add_a", "_add_b"), "loss": ("_softmax_loss",),
    "norms, gate, rotation": ("_forward", "_backward", "_normalize"), "optimizer": ("Optimizer",),
}  # fmt: skip


def kernels_of(step: Callable[[], float]) -> dict[str, float]:
    """Milliseconds of a step by kind of kernel; prints the longest."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events)
    parts = dict.fromkeys([*PARTS, "other"], 0.0)
    for e in events:
        part = next((name for name, marks in PARTS.items() if any(mark in e.key for mark in marks)), "other")
        parts[part] += e.self_device_time_total / 1e3
    for e in events[:24]:
        spent = e.self_device_time_total
        print(f"{spent / 1e3:9.2f} ms {spent / total:6.1%} {e.count:6d}  {e.key[:90]}")
    return {name: round(spent, 1) for name, spent in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--bf16", action="store_true", help="16-bit base")
    parser.add_argument("--cases", nargs="+", default=["4x2048@70"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--profile", action="store_true", help="of the first case")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "engine.json")
    a = parser.parse_args()
    model = attach(random_base(a.shape, a.layers, not a.bf16), Adapter(r=16, lora_alpha=32, lora_dropout=a.dropout), 0)
    found = json.loads(a.out.read_text()) if a.out.exists() else {}
    for case in a.cases:
        gc.collect()
        torch.cuda.empty_cache()
        result = measure(model, case, a.steps, a.profile and case == a.cases[0])
        print("RESULT " + json.dumps(result), flush=True)
        name = a.shape + (" 16-bit" if a.bf16 else "") + (f" dropout {a.dropout}" if a.dropout else "")
        found.setdefault(name, {})[case] = result
        found["on"] = {
            "gpu": torch.cuda.get_device_name(),
            "versions": {name: metadata.version(name) for name in ("torch", "triton", "transformers", "bitsandbytes")},
            "date": time.strftime("%Y-%m-%d"),
        }
        a.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
