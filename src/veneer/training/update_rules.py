"""Rules by which a whole weight is updated from its gradient, all of them AdamW's with other states.

A rule gets weight and gradient in float32, whatever they are stored in, and keeps what it needs between steps in a dict
of tensors. `Adam` and `Adam8bit` take each element by itself; `Galore` and `Apollo` keep the moments of a linear layer
in few dimensions:

- GaLore (arXiv 2403.03507) projects the gradient on its own leading directions, found anew every `INTERVAL` steps, and
  the update back from there.
- APOLLO (arXiv 2412.05270) projects it on random directions, and takes from the moments there only how much each
  channel of the gradient is scaled. Random directions show the r-th part of a channel's squared length, so its scale
  is multiplied by sqrt(side / r): a learning rate then means about what it means for AdamW.

The libraries of both papers are not kept up; each method is a few lines.

Shapes: S smaller and L larger side of a weight, R rank.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Protocol

import torch
from torch.optim.adam import adam

from veneer.model.quiet import quiet
from veneer.planning.full_states import BLOCK, low_rank_sides

INTERVAL = 200  # steps between new directions
GROWTH = 1.01  # of an update's norm from step to step, at most (APOLLO, section 4)
State = dict[str, Any]


class Coefficients(NamedTuple):
    """The numbers of one update; `step` counts from 1, and `seed` is the parameter's own."""

    step: int
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    seed: int


class UpdateRule(Protocol):
    """A rule of update.

    Attributes:
        by_element: whether slices of a weight can be updated by themselves.
    """

    by_element: bool

    def allocate(self, parameter: torch.Tensor) -> State:
        """Return the state that training begins with."""
        ...

    def update(self, weight: torch.Tensor, gradient: torch.Tensor, state: State, by: Coefficients) -> None:
        """Update a float32 weight and its state, in place."""
        ...


class Adam:
    """AdamW with both moments in float32."""

    by_element = True

    def allocate(self, parameter: torch.Tensor) -> State:
        shape, device = (parameter.numel(),), parameter.device
        return {name: torch.zeros(shape, device=device) for name in ("exp_avg", "exp_avg_sq")}

    def update(self, weight: torch.Tensor, gradient: torch.Tensor, state: State, by: Coefficients) -> None:
        steps = [torch.full((), by.step - 1.0, device=weight.device)]
        adam(
            [weight], [gradient], [state["exp_avg"]], [state["exp_avg_sq"]], [], steps, amsgrad=False,
            beta1=by.betas[0], beta2=by.betas[1], lr=by.lr, weight_decay=by.weight_decay, eps=by.eps, maximize=False,
            fused=weight.device.type != "mps", decoupled_weight_decay=True,
        )  # fmt: skip


class Adam8bit:
    """AdamW with moments in 8 bits and a constant for each block, by bitsandbytes' own kernels."""

    by_element = True

    def __init__(self, device: torch.device) -> None:
        with quiet():
            from bitsandbytes.functional import create_dynamic_map

            self._maps = [create_dynamic_map(signed=signed).to(device) for signed in (True, False)]

    def allocate(self, parameter: torch.Tensor) -> State:
        count, device = parameter.numel(), parameter.device
        sizes = {"exp_avg": (count, torch.uint8), "exp_avg_sq": (count, torch.uint8)}
        sizes |= {f"absmax{n}": (-(-count // BLOCK), torch.float32) for n in (1, 2)}
        return {name: torch.zeros(size, dtype=dtype, device=device) for name, (size, dtype) in sizes.items()}

    def update(self, weight: torch.Tensor, gradient: torch.Tensor, state: State, by: Coefficients) -> None:
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        optimizer_update_8bit_blockwise(
            "adam", gradient, weight, state["exp_avg"], state["exp_avg_sq"], *by.betas, 0.0, 0.0, by.eps, by.step,
            by.lr, *self._maps, state["absmax1"], state["absmax2"], by.weight_decay,
        )  # fmt: skip


class _LowRank(ABC):
    by_element = False

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def allocate(self, parameter: torch.Tensor) -> State:
        _, larger = low_rank_sides(tuple(parameter.shape))
        shape, device = (self._rank, larger), parameter.device
        return {name: torch.zeros(shape, device=device) for name in ("exp_avg", "exp_avg_sq")}

    def update(self, weight: torch.Tensor, gradient: torch.Tensor, state: State, by: Coefficients) -> None:
        is_wide = weight.shape[0] <= weight.shape[1]
        update_SL = self._update(gradient if is_wide else gradient.T, state, by)
        weight.mul_(1 - by.lr * by.weight_decay).add_(update_SL if is_wide else update_SL.T, alpha=-by.lr)

    @abstractmethod
    def _update(self, g_SL: torch.Tensor, state: State, by: Coefficients) -> torch.Tensor:
        """Return the update, before the learning rate."""


class Galore(_LowRank):
    """AdamW in the leading directions of the gradient."""

    def allocate(self, parameter: torch.Tensor) -> State:
        smaller, _ = low_rank_sides(tuple(parameter.shape))
        return super().allocate(parameter) | {
            "directions": torch.zeros((smaller, self._rank), device=parameter.device),
        }

    def _update(self, g_SL: torch.Tensor, state: State, by: Coefficients) -> torch.Tensor:
        if by.step % INTERVAL == 1:
            state["directions"].copy_(torch.linalg.eigh(g_SL @ g_SL.T)[1][:, -self._rank :])
        p_SR = state["directions"]
        update_SL: torch.Tensor = p_SR @ _adam(p_SR.T @ g_SL, state, by)
        return update_SL


class Apollo(_LowRank):
    """The gradient with each channel scaled as AdamW would in random directions."""

    def allocate(self, parameter: torch.Tensor) -> State:
        return super().allocate(parameter) | {"norm": torch.zeros(1, device=parameter.device)}

    def _update(self, g_SL: torch.Tensor, state: State, by: Coefficients) -> torch.Tensor:
        # Drawn again from its seed at each step, which costs less memory than keeping it.
        generator = torch.Generator(g_SL.device).manual_seed(by.seed + (by.step - 1) // INTERVAL)
        p_SR = torch.randn((len(g_SL), self._rank), device=g_SL.device, generator=generator)
        low_RL = (p_SR.T @ g_SL).div_(math.sqrt(self._rank))
        length_L = low_RL.norm(dim=0)
        scale_L = _adam(low_RL, state, by).norm(dim=0).div_(length_L).mul_(math.sqrt(len(g_SL) / self._rank))
        update_SL: torch.Tensor = g_SL * scale_L.masked_fill_(length_L == 0, 0.0)
        norm, before = update_SL.norm(), state["norm"]
        limited = torch.where(before > 0, norm.clamp(max=before * GROWTH), norm)
        state["norm"].copy_(limited)
        update_SL *= limited / norm.clamp(min=1e-30)
        return update_SL


def _adam(gradient: torch.Tensor, state: State, by: Coefficients) -> torch.Tensor:
    """Update both moments in place; return the gradient that Adam makes of them."""
    first, second = state["exp_avg"], state["exp_avg_sq"]
    first.lerp_(gradient, 1 - by.betas[0])
    second.lerp_(gradient.square(), 1 - by.betas[1])
    root = (second / (1 - by.betas[1] ** by.step)).sqrt_().add_(by.eps)
    adapted: torch.Tensor = (first / (1 - by.betas[0] ** by.step)).div_(root)
    return adapted
