"""What each part of a run holds, in bytes, from shapes alone; and the fullest moment of each phase.

Frozen weights are counted in the bits they are stored in, the adapter and what the optimizer keeps of it exactly, each
tensor rounded up as the allocator rounds. What a step holds beside them is rehearsed by the engine that will run it
(`Rehearsed`), since only its own code knows. An engine that places tensors itself hands over a rehearsal of its own.
"""

import difflib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any

from veneer.config import Train, UserError
from veneer.plan.trace import BLOCK, Moment, Work

QUANT_BLOCK = 64  # weights that share a constant in bitsandbytes' 4-bit formats
CONSTANT_BLOCK = 256  # constants that share one of their own under double quantization
# 16-bit copies on the CPU may take one part in so many of the memory that is free: the run's own needs are to come.
COPIES_SHARE = 8
# Beside tensors: what cuBLAS takes of the allocator's; on a CPU the process, its code, and the holes in its heap.
LIBRARIES = {"cuda": 66 * 2**20, "cpu": 830 * 2**20, "mps": 0}


@dataclass(frozen=True)
class Shapes:
    """A base model's parameters, without the parameters.

    Attributes:
        architecture: Its class in Transformers.
        weights: Shape of every parameter, by name; tied ones once.
        other_bytes: Of its buffers.
        linears: Inputs and outputs of every linear layer, by path, the head included.
        embeddings: Rows and width of every embedding, by path.
        head: Path of the output layer.
        depth: Decoder layers.
        period: After so many layers they repeat; None: they do not.
        key_value_bytes: Of the generation cache, a token, in 16 bits.
        vocabulary: Tokens.
        positions: Longest sequence it can read; None: no limit known.
        beside: Paths of layers that text does not go through: those of a vision tower.
    """

    architecture: str
    weights: Mapping[str, tuple[int, ...]]
    other_bytes: int
    linears: Mapping[str, tuple[int, int]]
    embeddings: Mapping[str, tuple[int, int]]
    head: str | None
    depth: int
    period: int | None
    key_value_bytes: int
    vocabulary: int
    positions: int | None
    beside: frozenset[str] = frozenset()

    @property
    def total(self) -> int:
        """Parameters in all."""
        return sum(prod(shape) for shape in self.weights.values())

    @property
    def experts(self) -> float:
        """Share of the parameters that are experts' matrices, stacked in parameters that are no linear layers."""
        stacked = (prod(shape) for name, shape in self.weights.items() if len(shape) == 3 and "expert" in name)
        return sum(stacked) / self.total

    def quantizable(self) -> frozenset[str]:
        """Paths of the layers that bitsandbytes quantizes: all linear ones but the head."""
        return frozenset(path for path in self.linears if path != self.head)

    def targets(self, target_modules: str | tuple[str, ...]) -> frozenset[str]:
        """Paths of the modules that an adapter goes on, as PEFT matches them: a name, or the end of a path.

        Raises:
            UserError: An entry matches nothing.
        """
        if target_modules == "all-linear":
            return self.quantizable() - self.beside
        found: set[str] = set()
        for target in target_modules:
            matched = {p for p in (*self.linears, *self.embeddings) if p == target or p.endswith(f".{target}")}
            matched -= self.beside
            if not matched:
                near = difflib.get_close_matches(target, self.linear_names, n=3, cutoff=0.4) or self.linear_names
                raise UserError(
                    f"adapter.target_modules: `{target}` matches no module of this model; nearest: {', '.join(near)}",
                    f"choose from {', '.join(self.linear_names)}, or write all-linear",
                )
            found |= matched
        return frozenset(found)

    @property
    def linear_names(self) -> list[str]:
        """Last parts of the paths of all linear layers that text goes through, in order, the head left out."""
        adapted = (path for path in self.linears if path != self.head and path not in self.beside)
        return list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in adapted))

    def adapter(self, targets: frozenset[str], r: int) -> list[int]:
        """Sizes of the adapter's matrices, A and B of each target, in parameters."""
        sizes = []
        for path in sorted(targets):
            inputs, outputs = self.linears.get(path) or self.embeddings[path]
            sizes += [r * inputs, r * outputs]
        return sizes


@dataclass(frozen=True)
class Step:
    """A micro-batch to rehearse.

    Attributes:
        rows, length: Its padded shape: rows, and tokens of each.
        trained: Trained tokens in it.
        dtype: Of the compute.
        method: qlora, lora or full.
        targets: Paths of the modules the adapter is on.
        quantized: Paths of the modules whose weights are in 4 bits.
        r, dropout: Of the adapter.
        double_quant: Whether the constants of 4-bit blocks are quantized too.
        checkpointing: Whether the reference engine recomputes activations.
        engine: reference or fused.
        keep: What the fused engine keeps of each block from forward to backward; None: everything.
        keeps_last: Whether it keeps all of the last block even so.
        keeps_16_bits: Whether it holds 4-bit weights as 16-bit matrices too.
        even: Whether the rows are of one length; the fused engine has other kernels for those that are not.
        capability: Major compute capability of the GPU.
        accumulating: Whether gradients of an earlier micro-batch are there.
        training: False: the held-out loss alone.
        copies: Whether there are 16-bit copies of 4-bit weights beside them, as on a CPU with memory for them.
    """

    rows: int
    length: int
    trained: int
    dtype: Any
    method: str = "lora"
    targets: frozenset[str] = frozenset()
    quantized: frozenset[str] = frozenset()
    r: int = 16
    dropout: float = 0.0
    double_quant: bool = True
    checkpointing: bool = True
    engine: str = "reference"
    keep: frozenset[str] | None = None
    keeps_last: bool = False
    keeps_16_bits: bool = False
    even: bool = True
    capability: int = 9
    accumulating: bool = False
    training: bool = True
    copies: bool = False


@dataclass(frozen=True)
class Rehearsed:
    """What a micro-batch would hold beside weights, adapter, and optimizer; and the work it is.

    Attributes:
        moments: The fullest moment of each of its stretches: `forward`, `loss`, `backward ...`.
        work: Forward and backward.
        held: What the engine holds all the time in the place of adapter and gradients, and beside the weights: buffers
            it lays out itself; None: it has none.
        records: Whether passes of a shape that comes again are recorded and replayed without the host.
    """

    moments: dict[str, Moment]
    work: Work
    held: dict[str, int] | None = None
    records: bool = False

    def fullest(self, phase: str) -> Moment:
        """Of a phase: `forward` (with the loss) or `backward`."""
        found = [m for name, m in self.moments.items() if ("backward" in name) == (phase == "backward")]
        return max(found, key=lambda moment: moment.bytes)

    @property
    def recorded_bytes(self) -> int:
        """What a recording keeps to itself between its passes: all that one of them holds."""
        return max(moment.bytes for moment in self.moments.values()) if self.records else 0


@dataclass(frozen=True)
class Kept:
    """What an engine would keep from forward to backward of memory that is to spare.

    Attributes:
        bytes: What that adds to the peak.
        blocks: How many blocks keep each set of tensors.
        share_16_bits: Of the weights in 4 bits, that stay in 16 bits too.
    """

    bytes: int
    blocks: Mapping[frozenset[str], int]
    share_16_bits: float

    def as_dict(self) -> dict[str, Any]:
        """As JSON: bytes, how many blocks keep each tensor, and the share of weights."""
        names = sorted({name for kept in self.blocks for name in kept})
        counts = {name: sum(count for kept, count in self.blocks.items() if name in kept) for name in names}
        return {"bytes": self.bytes, "blocks": counts, "16_bit_weights": self.share_16_bits}


def phases(shapes: Shapes, step: Step, optim: str, train: Rehearsed, device: str) -> dict[str, Moment]:
    """The fullest moment of each phase of training, with all its components.

    Args:
        shapes: The base model.
        step: The micro-batch of training.
        optim: The optimizer, as `train.optim` resolves.
        train: `step` rehearsed.
        device: cuda, cpu or mps.
    """
    held, gradients = resting(shapes, step, optim, train, device)
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
    found["forward"] += Counter(train.fullest("forward").components)
    return {name: Moment(sum(parts.values()), dict(parts)) for name, parts in found.items()}


def resting(shapes: Shapes, step: Step, optim: str, train: Rehearsed, device: str) -> tuple[Counter[str], int]:
    """What a run holds between its passes, and the bytes of its gradients beside that; arguments as for `phases`."""
    frozen, libraries = Counter(_frozen(shapes, step)), Counter({"libraries": LIBRARIES[device]})
    itemsize = step.dtype.itemsize
    if step.method == "full":
        sizes = [prod(shape) for shape in shapes.weights.values()]
        # The optimizer steps a float32 copy of weights in 16 bits.
        states = sum(rounded(4 * n) for n in sizes) if itemsize < 4 else 0
        gradients = sum(rounded(itemsize * n) for n in sizes)
    else:
        sizes = shapes.adapter(step.targets, step.r)
        states, gradients = 0, adapter_bytes(sizes)
    states += 0 if optim.startswith("paged") else optimizer_bytes(sizes, optim)
    optimizer = Counter({"optimizer": states})
    if train.held is not None:  # adapter and gradients among it, for good
        return frozen + libraries + optimizer + Counter(train.held), 0
    return loaded(shapes, step, device) + optimizer, gradients


def loaded(shapes: Shapes, step: Step, device: str) -> Counter[str]:
    """What a base with its adapter holds, ready to answer."""
    adapter = 0 if step.method == "full" else adapter_bytes(shapes.adapter(step.targets, step.r))
    return Counter(_frozen(shapes, step)) + Counter({"adapter": adapter, "libraries": LIBRARIES[device]})


def _frozen(shapes: Shapes, step: Step) -> dict[str, int]:
    parts = frozen_bytes(shapes, step.quantized, step.double_quant, step.dtype.itemsize)
    return parts | (
        {"16-bit copies": copies_bytes(shapes, step.quantized, step.dtype)} if step.copies and step.quantized else {}
    )


def copies_bytes(shapes: Shapes, quantized: frozenset[str], dtype: Any) -> int:
    """Bytes of copies of the weights in 4 bits, in the dtype of compute."""
    named = ((name.removesuffix(".weight"), shape) for name, shape in shapes.weights.items())
    return sum(dtype.itemsize * prod(shape) for name, shape in named if name in quantized)


def rounded(count: float) -> int:
    """Bytes that the allocator takes for a tensor."""
    return ceil(count / BLOCK) * BLOCK


def frozen_bytes(shapes: Shapes, quantized: frozenset[str], double_quant: bool, itemsize: int) -> dict[str, int]:
    """The base's weights by where they are and how they are stored."""
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
    """A 4-bit matrix with its constants: 4.127 bits a weight with double quantization, else 4.5."""
    blocks = ceil(weights / QUANT_BLOCK)
    table = rounded(16 * 4)
    if not double_quant:
        return rounded(weights / 2) + rounded(blocks * 4) + table
    groups = ceil(blocks / CONSTANT_BLOCK)
    return rounded(weights / 2) + rounded(blocks) + rounded(groups * 4) + rounded(256 * 4) + rounded(4) + table


def optimizer_bytes(sizes: list[int], name: str) -> int:
    """What AdamW keeps of parameters of these sizes: two moments, in 32 bits or in 8 with a constant a 256."""
    if not name.endswith("8bit"):
        return sum(2 * rounded(4 * n) + (rounded(4) if name == "adamw_torch" else 0) for n in sizes)
    small, large = [n for n in sizes if n < 4096], [n for n in sizes if n >= 4096]
    tables = 2 * rounded(256 * 4) if large else 0
    return (
        tables
        + sum(2 * (rounded(n) + rounded(ceil(n / 256) * 4)) for n in large)
        + 2 * sum(rounded(4 * n) for n in small)
    )


def adapter_bytes(sizes: list[int]) -> int:
    """The adapter's matrices in float32."""
    return sum(rounded(4 * n) for n in sizes)


def run_disk_bytes(trainable: int, steps: int | None, train: Train) -> int:
    """Adapter and checkpoints (adapter and two moments each) in float32, and some room for the rest."""
    kept = min(train.save_total_limit, steps or train.save_total_limit) + 1
    return trainable * 4 * (1 + 3 * kept) + 16 * 2**20
