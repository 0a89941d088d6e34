"""Placements that move tensors to the host, small models in real NF4, and steps that are compared bit for bit."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import transformers

from tests.support.engines import batch_of
from tests.support.tiny import FAMILIES
from veneer.config import Adapter
from veneer.data.batch import Batch
from veneer.engine.fused.block import ACTIVATIONS
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.fused.policy import block_placement
from veneer.engine.objective import LIKELIHOOD
from veneer.engine.placement import MemoryPlacement
from veneer.model.attach import attach

BLOCKS = 4


class Offload(NamedTuple):
    """What a placement moves.

    Attributes:
        keep: Activations that are kept; those that are neither kept nor on the host are recomputed.
        host: Activations on the host.
        streams_every: Weights of every so-manieth block are streamed; 0: of none.
        streams_ends: Whether embedding and head live on the host.
    """

    keep: tuple[str, ...] = ()
    host: tuple[str, ...] = ()
    streams_every: int = 0
    streams_ends: bool = False


ON_HOST = ("x", "attention", "qkv", "mid")
RESIDENT = Offload(ACTIVATIONS)
OFFLOADS: dict[str, Offload] = {
    "nothing kept": Offload(),
    "x on the host": Offload(ACTIVATIONS, ("x",)),
    "attention on the host": Offload(host=("attention",)),
    "qkv on the host": Offload(host=("qkv",)),
    "mid on the host": Offload(host=("mid",)),
    "x and attention on the host": Offload(host=("x", "attention")),
    "all on the host": Offload(host=ON_HOST),
    "all on the host but gate and up": Offload(("gate_up",), ON_HOST),
    "half streamed": Offload(ACTIVATIONS, streams_every=2),
    "all streamed": Offload(ACTIVATIONS, streams_every=1),
    "ends streamed": Offload(ACTIVATIONS, streams_ends=True),
    "all streamed with the ends": Offload(streams_every=1, streams_ends=True),
    "everything at once": Offload((), ON_HOST, 1, True),
}


def placement_of(engine: FusedEngine, offload: Offload) -> MemoryPlacement:
    """The placement of a fused engine that moves this."""
    every = offload.streams_every
    kept = [name for name in offload.keep if name not in offload.host]
    blocks = tuple(
        block_placement(kept, block=block, host=offload.host, streams=every > 0 and block.number % every == 0)
        for block in engine.blocks
    )
    return replace(engine.placement, blocks=blocks, streams_ends=offload.streams_ends)


def nf4_model(
    family: str = "llama",
    changes: dict[str, Any] | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    to_host: bool = False,
    **adapter: Any,
) -> Any:
    """A small model in NF4 with double quantization; the same arguments give the same weights and adapter.

    Args:
        family: Name of FAMILIES.
        changes: Settings of its configuration.
        device: Where it is made.
        dtype: Of the other weights.
        to_host: Whether 4-bit weights, embedding and head end up in host memory.
        adapter: Settings of the adapter.
    """
    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**(settings | {"num_hidden_layers": BLOCKS} | (changes or {})))
    with torch.device(device):
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for parameter_name, parameter in base.named_parameters():
        if "norm" in parameter_name or parameter_name.endswith("bias"):
            parameter.data += 0.3 * torch.randn_like(parameter)
    head = base.get_output_embeddings()
    for path, module in list(base.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not head:
            parent, _, child = path.rpartition(".")
            setattr(base.get_submodule(parent), child, _in_nf4(module, to_host))
    if to_host:
        for end in (base.get_input_embeddings(), head):
            end.weight.data = end.weight.data.cpu()
    model = attach(base, Adapter(**({"r": 4, "lora_alpha": 12} | adapter)), 0)
    fill_adapters(model)
    return model


def _in_nf4(module: torch.nn.Linear, to_host: bool) -> Any:
    import bitsandbytes as bnb

    weight = module.weight.data
    new = bnb.nn.Linear4bit(module.in_features, module.out_features, False, weight.dtype, device="meta")
    packed = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    new.weight, new.bias = packed.to(weight.device), module.bias
    if to_host:
        new.weight = new.weight.to("cpu")
    return new


def fill_adapters(model: Any) -> None:
    """Make each adapter count: B begins as zeros, with which an adapter that is lost changes no loss."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


class Step(NamedTuple):
    """Losses of a step's micro-batches, and the gradient of all adapters."""

    losses: list[float]
    gradient: torch.Tensor


# Lengths of the documents of each step's micro-batches: shapes come again, with other tokens, after other shapes.
STEPS: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((64, 64),),
    ((64, 64), (64, 64), (64, 64)),
    ((40, 37, 60, 5),),
    ((64, 64), (130, 20), (64, 64)),
    ((40, 37, 60, 5), (9,), (64, 64), (40, 37, 60, 5)),
)


def course(
    engine: Any,
    steps: Sequence[Sequence[tuple[int, ...]]] = STEPS,
    placements: Sequence[MemoryPlacement] = (),
    make: Callable[..., Batch] = batch_of,
) -> list[Step]:
    """Train for some steps.

    Micro-batches are queued one behind the other: nothing waits for the device before the last step's gradient is read.

    Args:
        engine: A fused engine.
        steps: Lengths of the documents of each step's micro-batches.
        placements: Placements to apply before the steps, one each; none: the engine keeps its own.
        make: Makes a batch of lengths and a seed.
    """
    losses, gradients = [], []
    for number, micro_batches in enumerate(steps):
        if placements:
            engine.apply(placements[number % len(placements)])
        torch.manual_seed(number)  # of the masks
        batches = [make(some, seed=100 * number + n).scaled(0.01) for n, some in enumerate(micro_batches)]
        losses.append([engine.forward_backward(batch, LIKELIHOOD).loss for batch in batches])
        gradients.append(engine.master.grad.clone())
        engine.master.data -= 0.1 * gradients[-1]
        engine.master.grad = None
    read = [torch.stack(of_step).tolist() for of_step in losses]
    return [Step(*both) for both in zip(read, (gradient.cpu() for gradient in gradients), strict=True)]


def assert_same(found: Sequence[Step], wanted: Sequence[Step]) -> None:
    """Require equality to the last bit, of gradients that are worth comparing."""
    assert len(found) == len(wanted)
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert other.gradient.isfinite().all()
        assert (other.gradient != 0).float().mean() > 0.9
        assert one.losses == other.losses, f"step {number}"
        differing = int((one.gradient != other.gradient).sum())
        assert not differing, (
            f"step {number}: {differing:,} of {other.gradient.numel():,} values of the gradient differ"
        )
