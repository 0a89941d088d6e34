"""Computes the bytes of each part of a run from shapes alone, and the peak of each phase.

Frozen weights are counted in the bits they are stored in, the adapter and its optimizer states exactly, each tensor
rounded up as the allocator rounds. Activations and workspace come from a dry run (`DryRun`) of the engine that will
run, since only its own code knows them.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import ceil, prod
from typing import Any

from veneer.config import Train
from veneer.engine.dry_run import CONSTANT_BLOCK, QUANT_BLOCK, DryRun, Step
from veneer.engine.fused.streaming import BUFFERS
from veneer.engine.placement import MemoryPlacement
from veneer.engine.trace import Peak, rounded
from veneer.model.shapes import Shapes
from veneer.planning.full_states import SLICE, USUAL, FullStates, master_bytes, moment_bytes

# Numbers in float32 while a matrix of n inputs and m outputs, k the less, is decomposed: the matrix with LAPACK's copy
# of it, both factors, and LAPACK's workspace; for LoftQ the weight, what it was rounded to and their difference.
FIRST_VALUES: dict[object, Callable[[int, int, int], int]] = {
    "pissa": lambda n, m, k: 2 * n * m + k * (n + m) + 4 * k * k,
    "olora": lambda n, m, k: 2 * n * m + k * k,
    "loftq": lambda n, m, k: 3 * n * m,
}
# Memory beside tensors: cuBLAS' workspace; on a CPU the process, its code, and fragmentation of its heap.
LIBRARIES = {"cuda": 66 * 2**20, "cpu": 830 * 2**20, "mps": 0}


def phases(
    shapes: Shapes, step: Step, optim: str, train: DryRun, device: str, full: FullStates = USUAL
) -> dict[str, Peak]:
    """Return the peak of each phase of training, by component.

    Args:
        shapes: shapes of the base model.
        step: the micro-batch of training.
        optim: the optimizer, as `train.optim` resolves.
        train: dry run of `step`.
        device: cuda, cpu or mps.
        full: rank and float32 copy of full fine-tuning.
    """
    held, gradients = persistent(shapes, step, optim, train, device, full)
    quantized = [
        prod(shape) for name, shape in shapes.weights.items() if name.removesuffix(".weight") in step.quantized
    ]
    largest = max(quantized, default=0) * step.dtype.itemsize
    found = {
        "load": Counter(_frozen(shapes, replace(step, copies=False))) + Counter({"weights on their way": largest}),
        "forward": held + Counter({"gradients": gradients if step.accumulating else 0}),
        "optimizer": held + Counter({"gradients": gradients}),
    }
    found["backward"] = found["forward"] + Counter(train.fullest("backward").components)
    if step.method == "full":
        update = Counter({"update": full.workspace_bytes(shapes, optim, step.dtype.itemsize)})
        found["optimizer"] += update
        if step.releases:
            found["backward"] += update
    elif whole := step.sizes_in_16_bits(shapes):
        found["optimizer"]["update"] = 4 * min(max(whole), SLICE)  # a gradient in float32
    found["forward"] += Counter(train.fullest("forward").components)
    return {name: Peak(sum(parts.values()), dict(parts)) for name, parts in found.items()}


def with_start(load: Peak, shapes: Shapes, step: Step, kind: object) -> Peak:
    """Return the peak of loading with the computation of an adapter's first values, where that needs more.

    Args:
        load: peak of loading the base.
        shapes: shapes of the base model.
        step: micro-batch of training.
        kind: value of `adapter.init_lora_weights`.
    """
    if kind not in FIRST_VALUES:
        return load
    sides = [shapes.linears[path] for path in step.targets if path in shapes.linears]
    workspace = max((4 * FIRST_VALUES[kind](*side, min(side)) for side in sides), default=0)
    parts = Counter(load.components)
    parts["first values of the adapter"] = adapter_bytes(step.adapter_sizes(shapes)) + workspace
    del parts["weights on their way"]
    return max(load, Peak(sum(parts.values()), dict(parts)), key=lambda peak: peak.bytes)


def off_device(phase: str, peak: Peak, placement: MemoryPlacement) -> Peak:
    """Return the peak of a phase without what the placement has on the host; answers are not generated with it."""
    if phase == "generation" or not placement.needs_host:
        return peak
    parts = Counter(peak.components)
    if placement.streams:
        del parts["recorded passes"]  # such passes are not recorded
    for choice in placement.choices:
        if choice.tensor == "4-bit weights":
            parts["4-bit weights"] -= choice.host_bytes
            parts["streamed weights"] += BUFFERS * choice.host_bytes // choice.blocks
        elif choice.tensor == "embedding and head":
            parts["embeddings and head"] -= choice.host_bytes if phase != "forward" else choice.host_bytes // 2
        elif choice.tensor == "x" and choice.state == "host" and phase in ("forward", "backward"):
            parts["activations"] -= choice.host_bytes - 2 * choice.host_bytes // choice.blocks
    parts = +parts  # nothing is below zero
    return Peak(sum(parts.values()), dict(parts))


def persistent(
    shapes: Shapes, step: Step, optim: str, train: DryRun, device: str, full: FullStates = USUAL
) -> tuple[Counter[str], int]:
    """Return the bytes that a run holds between passes, and those of its gradients; arguments as for `phases`."""
    frozen, libraries = Counter(_frozen(shapes, step)), Counter({"libraries": LIBRARIES[device]})
    itemsize = step.dtype.itemsize
    if step.method == "full":
        gradients = 0 if step.releases else sum(rounded(itemsize * prod(shape)) for shape in shapes.weights.values())
        optimizer = Counter(full.bytes(shapes, optim, itemsize))
    else:
        sizes, whole = step.adapter_sizes(shapes), step.sizes_in_16_bits(shapes)
        gradients = trained_bytes(shapes, step)
        if whole:
            states = sum(moment_bytes(count, optim) for count in sizes)
            optimizer = Counter({"optimizer": states, "float32 weights": master_bytes(whole)})
        else:
            optimizer = Counter({"optimizer": optimizer_bytes(sizes, optim)})
    if train.held is not None:  # includes adapter and gradients
        return frozen + libraries + optimizer + Counter(train.held), 0
    return loaded(shapes, step, device) + optimizer, gradients


def loaded(shapes: Shapes, step: Step, device: str) -> Counter[str]:
    """Return the bytes of a base with its adapter, ready to answer."""
    adapter = 0 if step.method == "full" else trained_bytes(shapes, step)
    return Counter(_frozen(shapes, step)) + Counter({"adapter": adapter, "libraries": LIBRARIES[device]})


def _frozen(shapes: Shapes, step: Step) -> dict[str, int]:
    parts = frozen_bytes(shapes, step.quantized, step.double_quant, step.dtype.itemsize)
    if step.shards > 1:
        whole = parts["4-bit weights"]
        parts |= {"4-bit weights": whole // step.shards, "gathered weights": BUFFERS * whole // shapes.depth}
    return parts | (
        {"16-bit copies": copies_bytes(shapes, step.quantized, step.dtype)} if step.copies and step.quantized else {}
    )


def copies_bytes(shapes: Shapes, quantized: frozenset[str], dtype: Any) -> int:
    """Return the bytes of copies of 4-bit weights in the compute dtype."""
    named = ((name.removesuffix(".weight"), shape) for name, shape in shapes.weights.items())
    return sum(dtype.itemsize * prod(shape) for name, shape in named if name in quantized)


def frozen_bytes(shapes: Shapes, quantized: frozenset[str], double_quant: bool, itemsize: int) -> dict[str, int]:
    """Return the bytes of the base's weights, by their kind."""
    parts = {"4-bit weights": 0, "embeddings and head": 0, "other weights": rounded(shapes.other_bytes)}
    ends = {f"{path}.weight" for path in (*shapes.embeddings, shapes.head) if path}
    for name, shape in shapes.weights.items():
        if name.removesuffix(".weight") in quantized and name.endswith(".weight"):
            parts["4-bit weights"] += quantized_bytes(prod(shape), double_quant)
        else:
            part = "embeddings and head" if name in ends else "other weights"
            parts[part] += rounded(prod(shape) * itemsize)
    return {name: count for name, count in parts.items() if count}


def quantized_bytes(weights: int, double_quant: bool) -> int:
    """Return the bytes of a 4-bit matrix with constants: 4.127 bits a weight with double quantization, else 4.5."""
    blocks = ceil(weights / QUANT_BLOCK)
    table = rounded(16 * 4)
    if not double_quant:
        return rounded(weights / 2) + rounded(blocks * 4) + table
    groups = ceil(blocks / CONSTANT_BLOCK)
    return rounded(weights / 2) + rounded(blocks) + rounded(groups * 4) + rounded(256 * 4) + rounded(4) + table


def optimizer_bytes(sizes: list[int], name: str) -> int:
    """Return the bytes of AdamW's states on the device: two moments, in 32 bits or in 8 with a constant for each 256.

    Args:
        sizes: elements of each tensor that the optimizer updates; bitsandbytes keeps small ones in 32 bits.
        name: name of the optimizer, as `train.optim` resolves; paged states are on the host.
    """
    if name.startswith("paged"):
        return 0
    if not name.endswith("8bit"):
        return sum(2 * rounded(4 * n) + (rounded(4) if name == "adamw_torch" else 0) for n in sizes)
    small, large = [n for n in sizes if n < 4096], [n for n in sizes if n >= 4096]
    tables = 2 * rounded(256 * 4) if large else 0
    return (
        tables
        + sum(2 * (rounded(n) + rounded(ceil(n / 256) * 4)) for n in large)
        + 2 * sum(rounded(4 * n) for n in small)
    )


def trained_bytes(shapes: Shapes, step: Step) -> int:
    """Return the bytes of the adapter and of what is trained beside it; as many have the gradients."""
    whole = step.sizes_in_16_bits(shapes)
    in_16_bits = sum(rounded(step.dtype.itemsize * count) for count in whole)
    return adapter_bytes(step.adapter_sizes(shapes)) - adapter_bytes(whole) + in_16_bits


def adapter_bytes(sizes: list[int]) -> int:
    """Return the bytes of the adapter's matrices in float32."""
    return sum(rounded(4 * n) for n in sizes)


def run_disk_bytes(weights: int, states: int, steps: int | None, train: Train) -> int:
    """Return the bytes of what is delivered and of checkpoints, and 16 MiB more.

    Args:
        weights, states: bytes of the trained weights as they are saved, and of the optimizer's states.
        steps: steps of the run; None: not known.
        train: settings.
    """
    checkpoints = min(train.save_total_limit, steps or train.save_total_limit) + 1 + (train.keep == "best")
    return weights + (weights + states) * checkpoints + 16 * 2**20
