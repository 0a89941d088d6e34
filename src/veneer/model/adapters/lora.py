"""LoRA (arXiv 2106.09685) computes y = W x + s B A x, with B zero at first and s = lora_alpha / r."""

import re
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from veneer.config import Adapter
from veneer.model.adapters.method import AdapterMethod

MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of init_lora_weights


class LowRank(NamedTuple):
    """A low-rank delta of a linear layer, scale * B A, with dropout on its input. R rank, I inputs, O outputs.

    `magnitude_O` are the norms that DoRA trains; None: it is plain LoRA.
    """

    a_RI: Any
    b_OR: Any
    scale: float
    dropout: float
    magnitude_O: Any = None


def low_rank(layer: Any, or_dora: bool = False) -> LowRank | None:
    """Return the low-rank delta of an adapted layer; None: it has more than one plain LoRA that is not merged.

    Args:
        layer: PEFT's layer.
        or_dora: whether DoRA is returned too, with its magnitude.
    """
    name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else None
    if name not in getattr(layer, "lora_A", ()) or layer.merged or layer.lora_bias.get(name):
        return None
    magnitudes = getattr(layer, "lora_magnitude_vector", None) or {}
    magnitude = magnitudes[name].weight if or_dora and name in magnitudes else None
    if layer.lora_variant and magnitude is None:
        return None
    if not isinstance(layer.lora_A[name], torch.nn.Linear):  # AdaLoRA's, for one
        return None
    dropout = getattr(layer.lora_dropout[name], "p", 0.0)
    a_RI, b_OR = layer.lora_A[name].weight, layer.lora_B[name].weight
    return LowRank(a_RI, b_OR, float(layer.scaling[name]), dropout, magnitude)


def lora_config(adapter: Adapter, targets: str | list[str]) -> Any:
    """Return PEFT's configuration."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules=targets,
        rank_pattern=dict(adapter.rank_pattern),
        alpha_pattern=dict(adapter.alpha_pattern),
        init_lora_weights=adapter.init_lora_weights if adapter.init_lora_weights in ("gaussian", "eva") else True,
    )


class LinearStandIn(torch.nn.Module):
    """A stand-in for PEFT's layer around a linear one: its operations, and the parts that `low_rank` reads."""

    def __init__(self, base_layer: Any, inputs: int, outputs: int, r: int, dropout: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.active_adapters, self.merged = ["default"], False
        self.lora_variant, self.lora_bias = dict[str, Any](), dict[str, bool]()
        self.scaling, self.lora_dropout = {"default": 2.0}, {"default": SimpleNamespace(p=dropout)}
        with torch.device("meta"):
            self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(inputs, r, bias=False)})
            self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(r, outputs, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base_layer(x)
        dtype = result.dtype
        is_4bit = hasattr(self.base_layer, "is_4bit")
        if is_4bit:
            result = result.clone()
        x = x.to(torch.float32)  # a variable, since PEFT holds it until the end too
        output: torch.Tensor = self.lora_B["default"](self.lora_A["default"](self._dropout(x))) * 2.0
        if is_4bit:
            output = output.to(dtype)
        result = result + output
        return result.to(dtype)

    def _dropout(self, x: torch.Tensor) -> torch.Tensor:
        # F.dropout takes this kernel on a GPU, and another one on meta tensors.
        p = self.lora_dropout["default"].p
        return torch.native_dropout(x, p, True)[0] if p and self.training else x


class _Embedding(torch.nn.Module):
    """A stand-in for PEFT's layer around an embedding."""

    def __init__(self, base: torch.nn.Embedding, r: int) -> None:
        super().__init__()
        self.base = base
        with torch.device("meta"):
            self.lora_embedding_A = torch.nn.Parameter(torch.empty(r, base.num_embeddings))
            self.lora_embedding_B = torch.nn.Parameter(torch.empty(base.embedding_dim, r))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        after_A = torch.nn.functional.embedding(ids, self.lora_embedding_A.T, self.base.padding_idx)
        result: torch.Tensor = self.base(ids) + (after_A @ self.lora_embedding_B.T) * 2.0
        return result.to(self.base.weight.dtype)


def _stand_in(base_layer: Any, inputs: int, outputs: int, r: int, dropout: float) -> torch.nn.Module:
    if isinstance(base_layer, torch.nn.Embedding):
        return _Embedding(base_layer, r)
    return LinearStandIn(base_layer, inputs, outputs, r, dropout)


LORA = AdapterMethod(
    name="LoRA",
    peft_type="LORA",
    applies=lambda options: True,
    configure=lora_config,
    stand_in=_stand_in,
    zeros=re.compile(r"\.(lora_B|lora_embedding_A)\."),  # of an adapter on embeddings it is A
    scale=lambda options: float(options.lora_alpha / options.r),
    usual_scale=(0.5, 4.0),
    is_low_rank=True,
)
