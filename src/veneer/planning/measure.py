"""Measures the machine's ceilings by some twenty seconds of products, copies and small steps.

Sustained speed counts: a card at its power limit lowers its clock within seconds, so each measurement runs for a while,
and only its later half counts.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from veneer.config import Adapter
from veneer.data.batch import Batch, Example
from veneer.engine.dry_run import Step, run_dry
from veneer.engine.objective import LIKELIHOOD
from veneer.engine.reference import ReferenceEngine
from veneer.machine.device import Machine
from veneer.machine.speeds import Ceilings
from veneer.model.attach import attach
from veneer.model.shapes import build, shapes_of

SECONDS = 2.0  # of each measurement


def measure_ceilings(machine: Machine, seconds: float = SECONDS) -> Ceilings:
    """Measure this machine.

    Args:
        machine: this machine.
        seconds: duration of each of its measurements.
    """
    device = machine.device
    size = 8192 if device == "cuda" else 1536
    tokens = 2048 if device == "cuda" else 256
    heads = 32 if device == "cuda" else 8

    def product(dtype: torch.dtype, size: int) -> float:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        return 2 * size**3 / _sustained(lambda: a @ b, device, seconds)

    q, k, v = (torch.randn(4, heads, tokens, 64, device=device, dtype=machine.dtype, requires_grad=True) for _ in "qkv")
    gradient = torch.randn_like(q)
    once = _sustained(
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(gradient),  # type: ignore[no-untyped-call]
        device,
        seconds,
    )
    large = torch.empty(2**28 if device == "cuda" else 2**24, dtype=torch.float32, device=device)
    other = torch.empty_like(large)
    return Ceilings(
        half_flops=product(machine.dtype, size),
        single_flops=product(torch.float32, size // 2),
        attention_flops=7.0 * 4 * heads * tokens**2 * 64 / once,
        bandwidth=2 * large.nbytes / _sustained(lambda: other.copy_(large), device, seconds),
        start_seconds=3e-6 if device == "cuda" else 0.0,
        host_seconds=_host_seconds(machine, seconds),
        overlaps=device != "cpu",
        spread=(0.75, 1.35),
        source=f"measured on {machine.name}",
        **({"link": _link(seconds)} if device == "cuda" else {}),
    )


def _link(seconds: float) -> float:
    """Return the bytes a second of copies between pinned memory and the GPU, both ways at once."""
    host = [torch.empty(2**26, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    there = [torch.empty(2**26, dtype=torch.uint8, device="cuda") for _ in range(2)]
    back = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def copies() -> None:
        there[0].copy_(host[0], non_blocking=True)
        with torch.cuda.stream(back):
            host[1].copy_(there[1], non_blocking=True)

    return host[0].nbytes / _sustained(copies, "cuda", seconds)


def _sustained(work: Callable[[], object], device: str, seconds: float) -> float:
    """Return the median seconds of one call, once the clock is steady."""
    work()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 4 or time.perf_counter() - began < seconds:
        started = time.perf_counter()
        for _ in range(4):
            work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - started) / 4)
    return statistics.median(times[len(times) // 2 :])


def _host_seconds(machine: Machine, seconds: float) -> float:
    """Measure the host time of an operation: a tiny model's step, divided by its operations in a dry run."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=64
    )
    shapes = shapes_of(build(config, machine.dtype))
    step = Step(1, 16, 15, machine.dtype, "lora", shapes.targets("all-linear"))
    operations = sum(run_dry(lambda depth: build(config, machine.dtype, depth), 4, None, step).work.values())
    base = build(config, machine.dtype).to_empty(device=machine.device).requires_grad_(False)
    engine = ReferenceEngine(attach(base, Adapter(), 0, gradient_checkpointing=True))
    ids = torch.zeros(16, dtype=torch.int32).numpy()
    batch = Batch.of([Example(ids, ((1, 16, 1.0),), "")])
    return _sustained(lambda: engine.forward_backward(batch, LIKELIHOOD), machine.device, seconds) / operations
