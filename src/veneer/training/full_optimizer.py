"""The optimizer of whole weights: AdamW, one weight at a time.

It is that of full fine-tuning, and of an adapter beside which biases or modules are trained in 16 bits.

Weights in bfloat16 have 8 bits of precision, so that most updates of a fine-tuning round to nothing. Either a copy in
float32 is updated (`train.master_weights: float32`), or the weight is rounded up or down by chance, as often as its
distance to both says (none): then an update that is too small for one step counts on average. Random bits are drawn
from the run's seed, the step and the weight, so that neither the order of updates nor a resume changes them.

A weight may be updated as soon as it has its gradient, which is then dropped (`released`): gradients of the whole model
are never held together. That leaves no way back, so nothing may be computed again after a step has begun.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from veneer.config import Train
from veneer.planning.full_states import BLOCK, LEAST_8BIT, SLICE, has_low_rank
from veneer.training.update_rules import Adam, Adam8bit, Apollo, Coefficients, Galore, State, UpdateRule

assert SLICE % BLOCK == 0


class FullOptimizer(torch.optim.Optimizer):
    """AdamW over whole weights.

    Args:
        parameters: the weights, by name.
        groups: the same in groups of the optimizer, or in one.
        linear: names of those of linear layers, whose moments may have a low rank.
        has_masters: whether 16-bit weights have a float32 copy.
        train: settings.
        optim: name of the optimizer, as `train.optim` resolves.
        betas, eps: AdamW's coefficients.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        groups: Sequence[Any],
        linear: frozenset[str],
        has_masters: bool,
        train: Train,
        optim: str,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        defaults = {"lr": train.learning_rate, "weight_decay": train.weight_decay, "betas": betas, "eps": eps}
        super().__init__(groups, defaults)
        self._has_masters = has_masters
        self._seed = train.seed
        self._number: dict[torch.Tensor, int] = {
            parameter: number for number, parameter in enumerate(parameters.values())
        }
        self._group = {parameter: group for group in self.param_groups for parameter in group["params"]}
        device = next(iter(self._number)).device
        plain, rank = Adam(), train.optim_rank
        compact: UpdateRule = Adam8bit(device) if optim == "adamw_8bit" else plain
        low_rank: UpdateRule = Galore(rank) if optim == "galore_adamw" else Apollo(rank)
        self._rules: dict[torch.Tensor, UpdateRule] = {}
        for name, parameter in parameters.items():
            if has_low_rank(name, tuple(parameter.shape), linear, optim, rank):
                self._rules[parameter] = low_rank
            else:
                self._rules[parameter] = compact if parameter.numel() >= LEAST_8BIT else plain

    def init_state(self, group: dict[str, object], parameter: torch.Tensor, gindex: int, pindex: int) -> None:
        """Allocate the state of a weight."""
        state: State = {"step": 0} | self._rules[parameter].allocate(parameter)
        if self._has_masters and parameter.dtype != torch.float32:
            state["master"] = parameter.detach().float()
        self.state[parameter] = state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all weights that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter)

    @torch.no_grad()
    def update(self, parameter: torch.Tensor) -> None:
        """Update a weight by its gradient."""
        group = self._group[parameter]
        if not self.state[parameter]:
            self.init_state(group, parameter, 0, self._number[parameter])
        state, rule = self.state[parameter], self._rules[parameter]
        assert parameter.grad is not None
        state["step"] += 1
        seed = (self._seed << 32) + (self._number[parameter] << 20)
        by = Coefficients(state["step"], group["lr"], group["weight_decay"], group["betas"], group["eps"], seed % 2**62)
        bits = torch.Generator(parameter.device).manual_seed((seed * 2**10 + state["step"]) % 2**62)
        if not rule.by_element:
            self._update(rule, parameter.data, parameter.grad, state, by, bits)
            return
        weight, gradient, count = parameter.data.view(-1), parameter.grad.view(-1), parameter.numel()
        for start in range(0, count, SLICE):
            held = {name: _part(value, start, count) for name, value in state.items() if name != "step"}
            part = slice(start, start + SLICE)
            self._update(rule, weight[part], gradient[part], held, by, bits)

    def _update(
        self,
        rule: UpdateRule,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        state: State,
        by: Coefficients,
        bits: torch.Generator,
    ) -> None:
        """Update a weight, or a slice of one, in float32, and round it to what it is stored in."""
        if weight.dtype == torch.float32:
            rule.update(weight, gradient.float(), state, by)
            return
        master = state["master"].view_as(weight) if self._has_masters else weight.float()
        rule.update(master, gradient.float(), state, by)
        weight.copy_(master if self._has_masters else round_by_chance(master, bits))

    @contextmanager
    def released(self, gradients: "ReleasedGradients") -> Iterator[None]:
        """Within the context, a backward updates each weight as soon as it has its gradient, and drops that."""

        def release(parameter: torch.Tensor) -> None:
            gradients.note(parameter)
            if gradients.updates:
                self.update(parameter)
            parameter.grad = None

        handles = [
            parameter.register_post_accumulate_grad_hook(release)  # type: ignore[no-untyped-call]
            for parameter in self._number
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class ReleasedGradients:
    """What is known of gradients that are not held any more.

    Args:
        updates: whether weights are updated; else gradients are only dropped, to try how much memory a step takes.
    """

    def __init__(self, updates: bool = True) -> None:
        self.updates = updates
        self._norms: dict[torch.Tensor, torch.Tensor] = {}
        self._largest: dict[torch.Tensor, torch.Tensor] = {}

    def note(self, parameter: torch.Tensor) -> None:
        """Keep norm and largest magnitude of a gradient."""
        assert parameter.grad is not None
        norm = partial(torch.linalg.vector_norm, parameter.grad, dtype=torch.float32)
        self._norms[parameter], self._largest[parameter] = norm(), norm(torch.inf)

    def norm(self) -> torch.Tensor:
        """Return the norm of all gradients together."""
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack([*self._norms.values()]))
        return norm

    def largest(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the largest magnitude in a weight's gradient; 0: it had none."""
        return self._largest.get(parameter, torch.zeros(()))


def round_by_chance(weight: torch.Tensor, bits: torch.Generator) -> torch.Tensor:
    """Round float32 numbers to those of bfloat16, in place: up or down, with the chance that keeps the mean.

    bfloat16 is the upper half of float32, so a random lower half is added, and what is left there is cut off.
    """
    whole = weight.view(torch.int32)
    whole += torch.randint(0, 2**16, whole.shape, dtype=torch.int32, device=weight.device, generator=bits)
    whole &= -(2**16)
    return weight


def _part(value: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """Return the part of a state that belongs to a slice: it has a value an element, or one a block."""
    flat = value.view(-1)
    each = 1 if len(flat) == count else BLOCK
    return flat[start // each : (start + SLICE) // each]
