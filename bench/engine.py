"""Measures the fused engine: tokens/s, peak memory, and where a step's time goes, on random weights of real shapes.

Each case is forward, backward and the optimizer's step on full-length random sequences, in one process.

    python3 bench/engine.py --shape 8b --cases 4x2048:keep 4x2048:none --profile
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch

from veneer.config import Adapter, Train
from veneer.data import Batch
from veneer.engine.fused import FusedEngine
from veneer.engine.fused.block import TENSORS
from veneer.model import attach
from veneer.train.optimizer import build_optimizer

COMMON = {"vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "8b": ("LlamaConfig", COMMON | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                                    "num_attention_heads": 32, "num_key_value_heads": 8}),
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
SETTINGS = {"keep": frozenset(TENSORS), "none": frozenset(), "attention": frozenset({"attention"}),
            "most": frozenset({"qkv", "attention", "mid"})}  # fmt: skip


def random_base(shape: str, layers: int | None, quantized: bool) -> Any:
    """A model of random weights, quantized layer by layer on the GPU; nothing touches the disk."""
    import bitsandbytes as bnb
    import transformers

    name, settings = SHAPES[shape]
    if layers:
        settings = settings | {"num_hidden_layers": layers}
    config = getattr(transformers, name)(**settings)
    torch.manual_seed(0)
    with torch.device("meta"):
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for path, module in list(base.named_modules()):
        if isinstance(module, torch.nn.Linear) and "lm_head" not in path:
            weight = 0.02 * torch.randn(module.weight.shape, dtype=torch.bfloat16, device="cuda")
            new: Any = torch.nn.Linear(1, 1, bias=False)
            if quantized:
                new = bnb.nn.Linear4bit(1, 1, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(
                    weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=new
                ).to("cuda")
            else:
                new.weight = torch.nn.Parameter(weight, requires_grad=False)
            new.in_features, new.out_features = module.in_features, module.out_features
            parent, _, child = path.rpartition(".")
            setattr(base.get_submodule(parent), child, new)
    for path, parameter in list(base.named_parameters()):
        if parameter.is_meta:
            value = torch.ones(parameter.shape, dtype=torch.bfloat16, device="cuda")
            if "norm" not in path:
                value.normal_(0, 0.02)
            parent, _, child = path.rpartition(".")
            base.get_submodule(parent)._parameters[child] = torch.nn.Parameter(value, requires_grad=False)
    base.tie_weights()
    rotary = type(base.base_model.rotary_emb)(config)
    base.base_model.rotary_emb = rotary.to("cuda")
    if shape.startswith("gemma2"):
        base.base_model.embed_tokens.embed_scale = torch.tensor(config.hidden_size**0.5, device="cuda")
    return base.requires_grad_(False).eval()


def batch_of(rows: int, length: int, vocabulary: int) -> Batch:
    ids = torch.randint(3, vocabulary, (rows * length,))
    targets = ids.roll(-1)
    targets[length - 1 :: length] = -100
    weights = (targets >= 0).float()
    return Batch(ids, targets, weights, (length,) * rows, int(weights.sum()), float(weights.sum()))


def measure(model: Any, case: str, steps: int, profile: bool) -> dict[str, Any]:
    """One case: ROWSxLENGTH[xACCUMULATION]:SETTING[+bf16][+graph]."""
    sizes, setting = case.split(":")
    rows, length, *more = map(int, sizes.split("x"))
    accumulation = more[0] if more else 1
    keep, *more_settings = setting.split("+")
    engine = FusedEngine(
        model, SETTINGS[keep], keep_dequantized="bf16" in more_settings, graphs="graph" in more_settings
    )
    parameters = [engine.master]
    optimizer = build_optimizer(parameters, Train(optim="adamw_8bit"), "cuda")
    batches = [batch_of(rows, length, model.config.vocab_size) for _ in range(accumulation)]
    weight = sum(batch.weight for batch in batches)

    def step() -> float:
        total = torch.stack([engine.forward_backward(batch, 1 / weight) for batch in batches]).sum()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.item() / weight

    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    losses = [step()]
    first = time.perf_counter() - started
    losses += [step() for _ in range(2)]
    seconds = []
    for _ in range(steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    engine.forward_backward(batches[0], 1 / weight)
    launched = time.perf_counter() - started
    torch.cuda.synchronize()
    tokens = rows * length * accumulation
    result = {
        "case": case, "tokens_per_second": round(tokens / statistics.median(seconds)),
        "best": round(tokens / min(seconds)), "worst": round(tokens / max(seconds)),
        "step_seconds": round(statistics.median(seconds), 4), "first_step_seconds": round(first, 2),
        "host_seconds_a_pass": round(launched, 4),
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "losses": [round(loss, 4) for loss in losses[:4]],
    }  # fmt: skip
    if profile:
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as profiler

        with profiler(activities=[ProfilerActivity.CUDA]) as found:
            step()
            torch.cuda.synchronize()
        kernels = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)[:28]
        total = sum(e.self_device_time_total for e in found.key_averages())
        for e in kernels:
            spent = e.self_device_time_total
            print(f"{spent / 1e3:9.2f} ms {spent / total:6.1%} {e.count:6d}  {e.key[:90]}")
        print(f"{total / 1e3:9.2f} ms in all")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--cases", nargs="+", default=["4x2048:keep"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--profile", action="store_true")
    a = parser.parse_args()
    started = time.perf_counter()
    base = random_base(a.shape, a.layers, not a.bf16)
    model = attach(base, Adapter(r=16, lora_alpha=32), 0)
    print(
        f"built in {time.perf_counter() - started:.1f} s, {torch.cuda.memory_allocated() / 2**30:.2f} GiB", flush=True
    )
    for case in a.cases:
        torch.cuda.empty_cache()
        print("RESULT " + json.dumps(measure(model, case, a.steps, a.profile)), flush=True)


if __name__ == "__main__":
    main()
