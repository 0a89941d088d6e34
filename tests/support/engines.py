"""Tiny models with adapters at work, batches of random tokens, and the gradients that an engine gives them."""

from typing import Any

import torch
import transformers

from tests.support.tiny import FAMILIES
from veneer.config import Adapter
from veneer.data.batch import Batch
from veneer.engine.objective import LIKELIHOOD
from veneer.model.attach import attach

COVERED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2")


def model_of(family: str, seed: int = 0, changes: dict[str, Any] | None = None, **adapter: Any) -> Any:
    """A tiny model whose adapters, biases and norms are not what they begin as, so that each one matters."""
    name, settings = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**(settings | {"attn_implementation": "eager"} | (changes or {})))
    base = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter_name, parameter in base.named_parameters():
        if "norm" in parameter_name or parameter_name.endswith("bias"):
            parameter.data += 0.3 * torch.randn_like(parameter)
    model = attach(base, Adapter(**({"r": 4, "lora_alpha": 12} | adapter)), seed)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    return model


def batch_of(lengths: tuple[int, ...] = (37, 5, 21), vocabulary: int = 384, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ids = torch.randint(3, vocabulary, (total,), generator=generator)
    targets = torch.where(torch.rand(total, generator=generator) < 0.6, ids.roll(-1), -100)
    weights = torch.where(targets >= 0, torch.rand(total, generator=generator) + 0.5, 0.0)
    return Batch(ids, targets, weights, lengths, int((targets >= 0).sum()), float(weights.sum()))


def gradients(engine: Any, model: Any, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = engine.forward_backward(batch.scaled(0.01), LIKELIHOOD).loss.item()
    return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def worst(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> tuple[float, str]:
    return max((((found[n] - wanted[n]).norm() / wanted[n].norm()).item(), n) for n in wanted)
