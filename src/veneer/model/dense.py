"""Keeps 16-bit copies of 4-bit weights on the CPU, where memory suffices.

bitsandbytes dequantizes each weight again in every forward and every backward; for a few tokens (each step of
generation) that is most of the work. Here each weight is dequantized once, by bitsandbytes itself, at its first use.
The same numbers are multiplied, so losses and gradients are the same to the bit, and what is trained is still an
adapter of the NF4 base: the 4-bit weight stays the module's parameter, and the copy is in no state dict.

Generation goes one step further (`adapter_in_copies`): the adapter is added to the copies, W + scale B A in float32 and
rounded once, as in a merge. A step of generation then has no small products beside the large ones, and the evaluated
model rounds like the merged one.

Training must keep the factors apart, and computes their products in 16 bits there (`adapter_beside_copies`). PEFT casts
a layer's input to float32 for them, and keeps that cast for the backward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from veneer.model.adapters.lora import low_rank

# 16-bit copies may take one part in so many of the free memory, since the run itself will need memory too.
COPIES_SHARE = 8


def add_dense_copies(base: Any, free_bytes: int) -> int:
    """Let a base's 4-bit linear layers keep 16-bit copies; in place, before adapters are attached.

    Args:
        base: model on the CPU; its 4-bit layers are replaced by ones that share their parameters.
        free_bytes: free memory.

    Returns:
        Bytes that the copies will take; 0 if there is no such layer or too little memory.
    """
    found = {name: module for name, module in base.named_modules() if _can_copy(module)}
    needed: int = sum(module.weight.quant_state.shape.numel() * _dtype(module).itemsize for module in found.values())
    if not found or needed > free_bytes // COPIES_SHARE:
        return 0
    make = _dense_linear()
    for name, module in found.items():
        parent, _, own = name.rpartition(".")
        setattr(base.get_submodule(parent), own, make(module))
    return needed


@contextmanager
def adapter_in_copies(model: Any) -> Iterator[None]:
    """Within the context, 16-bit copies include the adapter, and PEFT's layers add nothing to them.

    It does nothing if layers keep no copies, or the adapter is disabled or more than plain LoRA on these layers. The
    model may only be used for inference meanwhile, without switching adapters.
    """
    layers = _layers_with_copies(model)
    try:
        for layer, name in layers:
            base = layer.get_base_layer()
            with torch.no_grad():
                base.with_adapter = (base.dense().float() + layer.get_delta_weight(name).float()).to(_dtype(base))
            layer.merged_adapters = [name]
        yield
    finally:
        for layer, _ in layers:
            layer.merged_adapters = []
            layer.get_base_layer().with_adapter = None


@contextmanager
def adapter_beside_copies(model: Any) -> Iterator[None]:
    """Within the context, layers with copies compute W x + scale B A x in 16 bits, forward and backward.

    It does nothing where `adapter_in_copies` would do nothing, nor with dropout. The factors remain PEFT's parameters,
    and get their gradients in their own dtype.
    """
    layers = [] if _drops(model) else _layers_with_copies(model)
    try:
        for layer, name in layers:
            factors = low_rank(layer)
            assert factors is not None
            layer.get_base_layer().beside = factors[:3]
            layer.merged_adapters = [name]  # PEFT's layer adds nothing itself
        yield
    finally:
        for layer, _ in layers:
            layer.merged_adapters = []
            layer.get_base_layer().beside = None


class _LinearWithAdapter(torch.autograd.Function):
    """y = x W^T + s (x A^T) B^T of a frozen weight W, all products in its dtype. T tokens, I in, O out, R rank."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w_OI: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, s: float) -> Any:
        x_TI = x.reshape(-1, x.shape[-1])
        a_RI, b_OR = a_RI.to(x.dtype), (b_OR * s).to(x.dtype)
        down_TR = x_TI @ a_RI.t()
        y_TO = (x_TI @ w_OI.t()).addmm_(down_TR, b_OR.t())
        ctx.save_for_backward(x_TI, w_OI, a_RI, b_OR, down_TR)
        ctx.shape, ctx.scale = x.shape, s
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x_TI, w_OI, a_RI, b_OR, down_TR = ctx.saved_tensors
        y_TO = gradient.reshape(-1, gradient.shape[-1])
        up_TR = y_TO @ b_OR
        x_grad = (y_TO @ w_OI).addmm_(up_TR, a_RI).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return x_grad, None, (up_TR.t() @ x_TI).float(), (y_TO.t() @ down_TR).float() * ctx.scale, None


def _drops(model: Any) -> bool:
    return any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())


def _layers_with_copies(model: Any) -> list[tuple[Any, str]]:
    """Return the adapted layers with their adapter's name; none, unless all of them can hold it in a copy."""
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return [(layer, layer.active_adapters[0]) for layer in layers] if all(map(_holds_in_copy, layers)) else []


def _holds_in_copy(layer: Any) -> bool:
    """Return whether a layer is plain LoRA with one active adapter on a layer that keeps a copy."""
    keeps = hasattr(layer.get_base_layer(), "with_adapter")
    return keeps and not layer.disable_adapters and low_rank(layer) is not None


def _can_copy(module: Any) -> bool:
    """Return whether a copy would equal the weights that bitsandbytes multiplies by, forward and backward."""
    if type(module).__name__ != "Linear4bit":
        return False
    state = getattr(module.weight, "quant_state", None)
    return state is not None and module.weight.device.type == "cpu" and state.dtype == _dtype(module)


def _dtype(module: Any) -> torch.dtype:
    """Return the compute dtype of a layer."""
    dtype: torch.dtype = module.compute_dtype or module.weight.quant_state.dtype
    return dtype


def _dense_linear() -> Any:
    """Define the layer's class, on first use, since importing bitsandbytes takes a second."""
    import bitsandbytes as bnb

    class DenseLinear4bit(bnb.nn.Linear4bit):  # type: ignore[misc, name-defined, unused-ignore]
        """A 4-bit layer with a 16-bit copy of its weight.

        Args:
            of: layer whose parameters it shares.
        """

        def __init__(self, of: Any) -> None:
            torch.nn.Module.__init__(self)
            self.__dict__.update(of.__dict__)
            self.weight.module = self
            # The parameter that was copied, since merging replaces it; in a tuple, so that torch's module does not
            # register it.
            self._copied: tuple[Any, ...] = ()
            self._copy: Any = None
            self.with_adapter: Any = None  # replaces the copy within `adapter_in_copies`
            self.beside: Any = None  # A, B and scale within `adapter_beside_copies`

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.device.type != "cpu" or self.weight.device.type != "cpu":
                plain: torch.Tensor = super().forward(x)
                return plain
            dtype = _dtype(self)
            bias = None if self.bias is None else self.bias.to(dtype)
            if self.beside is not None:
                y: torch.Tensor = _LinearWithAdapter.apply(x.to(dtype), self.dense(), *self.beside)  # type: ignore[no-untyped-call]
                return (y if bias is None else y + bias).to(x.dtype)
            weight = self.dense() if self.with_adapter is None else self.with_adapter
            return F.linear(x.to(dtype), weight, bias).to(x.dtype)

        @torch.no_grad()
        def dense(self) -> torch.Tensor:
            """Return the weight in 16 bits, [out, in]; dequantized at the first call."""
            if not self._copied or self._copied[0] is not self.weight:
                copy = bnb.functional.dequantize_4bit(self.weight.data, self.weight.quant_state)
                self._copy, self._copied = copy.to(_dtype(self)), (self.weight,)
            dense: torch.Tensor = self._copy
            return dense

    return DenseLinear4bit
