"""RMS norms of a model, each in one launch while it answers.

Transformers' modules launch seven kernels for each norm, and a step of decoding has two norms a block: with few tokens
that is launches and little else. A module is taken for an RMS norm by what it computes, not by its name; others keep
their own forward. The kernel is the fused engine's: float32 throughout and one rounding, where Transformers rounds
before it multiplies by the weight.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from veneer.kernels.launch import compiles
from veneer.kernels.rms_norm import rms_norm


class KernelNorm(torch.nn.Module):
    """Stands in for a norm, whose weight it shares.

    Args:
        norm: Module that `epsilon` takes for an RMS norm.
        eps: Its epsilon.
    """

    def __init__(self, norm: torch.nn.Module, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, eps
        self._other_dtypes = norm.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the norm of the last dimension."""
        weight_D: Any = self.weight
        if x.dtype != weight_D.dtype:
            other: torch.Tensor = self._other_dtypes(x)
            return other
        x = x.contiguous()
        y = torch.empty_like(x)
        width = x.shape[-1]
        rms_norm(x.view(-1, width), None, weight_D, self.eps, 0.0, y.view(-1, width))
        return y


@torch.no_grad()
def epsilon(module: torch.nn.Module) -> float | None:
    """Return the epsilon of a module that computes x / root mean square * weight; None: it computes something else."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight: Any = getattr(module, "weight", None)
    names = [name for name, _ in module.named_parameters()]
    if not isinstance(eps, float) or names != ["weight"] or weight.dim() != 1 or weight.is_meta:
        return None
    # Small numbers, so that epsilon counts, whose mean is not zero, so that it would count.
    x = torch.linspace(0.5e-3, 1.5e-3, len(weight), device=weight.device).to(weight.dtype)
    wide = x.float()
    wanted = wide * torch.rsqrt(wide.square().mean() + eps) * weight.float()
    found = module(x[None])[0]
    tolerance = 8 * torch.finfo(weight.dtype).eps
    is_same = found.dtype == x.dtype and torch.allclose(found.float(), wanted, rtol=tolerance, atol=tolerance)
    return eps if is_same else None


@contextmanager
def norms_by_kernel(model: Any) -> Iterator[None]:
    """Within the context, a model's RMS norms are computed by the kernel, where Triton compiles for its device.

    The model may only be used for inference meanwhile.
    """
    found = []
    if compiles(model.get_input_embeddings().weight.device):
        modules = [(path, module) for path, module in model.named_modules() if not list(module.children())]
        found = [(path, module, eps) for path, module in modules if (eps := epsilon(module)) is not None]
    try:
        for path, module, eps in found:
            model.set_submodule(path, KernelNorm(module, eps))
        yield
    finally:
        for path, module, _ in found:
            model.set_submodule(path, module)
