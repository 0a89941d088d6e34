"""How far the fused engine and PEFT, both in bfloat16, are from float32, in the loss and in the adapters' gradients."""

import copy
import math
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from tests.support.engines import batch_of, gradients, model_of
from veneer.config import Adapter, Model, Quantization
from veneer.data.batch import Batch
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.objective import LIKELIHOOD
from veneer.engine.reference import ReferenceEngine
from veneer.engine.temporary import fill_zeros
from veneer.machine.device import find_machine
from veneer.model.attach import attach
from veneer.model.load import load_model
from veneer.model.locate import locate

Gradients = dict[str, torch.Tensor]
LENGTHS = ((37, 5, 21), (256, 256))
BATCHES = 6


class Errors(NamedTuple):
    """Of one batch.

    Attributes:
        losses: In float32, by PEFT and by the fused engine.
        matrices: Relative errors of each gradient, by PEFT and by the fused engine.
    """

    losses: tuple[float, float, float]
    matrices: dict[str, tuple[float, float]]


def tiny_errors(
    family: str, lengths: tuple[int, ...], seed: int, device: str, attention: str = "sdpa", method: str = "lora"
) -> Errors:
    """Of one tiny model and one batch; `attention`: PEFT's, as Transformers names it."""
    exact, batch = model_of(family, seed, {"hidden_size": 128}, method=method).to(device), batch_of(lengths, seed=seed)
    loss, wanted = gradients(ReferenceEngine(exact), exact, batch)
    peft, fused = in_16_bits(exact), in_16_bits(exact)
    if not getattr(exact.config, "attn_logit_softcapping", None):
        peft.set_attn_implementation(attention)
    with torch.autocast(device, torch.bfloat16):
        peft_loss, by_peft = gradients(ReferenceEngine(peft), peft, batch)
    fused_loss, found = gradients(FusedEngine(fused), fused, batch)

    def error(gradient: torch.Tensor, right: torch.Tensor) -> float:
        return float((gradient - right).norm() / right.norm())

    matrices = {name: (error(by_peft[name], right), error(found[name], right)) for name, right in wanted.items()}
    return Errors((loss, peft_loss, fused_loss), matrices)


def in_16_bits(model: Any) -> Any:
    """A copy whose base is bfloat16."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.bfloat16()
    return model


def ratios(batches: list[Errors]) -> dict[str, float]:
    """How many times PEFT's error ours is, over all batches, for each matrix."""

    def size(name: str, who: int) -> float:
        return math.sqrt(statistics.fmean(batch.matrices[name][who] ** 2 for batch in batches))

    return {name: size(name, 1) / size(name, 0) for name in batches[0].matrices}


def adapted(name: str, dtype: str, quantized: bool) -> Any:
    """A base with an adapter, as it begins."""
    model = Model(base=name, dtype=dtype)
    base = load_model(locate(model), model, Quantization() if quantized else None, find_machine())
    return attach(base, Adapter(r=16, lora_alpha=32), 0)


def base_errors(name: str, *batches: Batch) -> dict[str, Any]:
    """Of PEFT and of the fused engine in bfloat16 against PEFT in float32, in the loss and the adapters' gradients.

    Errors are root mean squares over the batches: that of one batch's loss has either sign, and may be near 0.
    """
    found: dict[str, list[Any]] = {}
    for way, dtype in (("exact", "float32"), ("peft", "bfloat16"), ("fused", "bfloat16")):
        model = adapted(name, dtype, quantized=False)
        fill_zeros(model)
        engine: Any = FusedEngine(model) if way == "fused" else ReferenceEngine(model)
        found[way] = []
        for batch in batches:
            model.zero_grad(set_to_none=True)
            loss = engine.forward_backward(batch.scaled(1 / batch.weight), LIKELIHOOD).loss.item() / batch.weight
            grads = {n: p.grad.float().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}
            found[way].append((loss, grads))
    exact = found["exact"]
    names = [*exact[0][1]]
    result: dict[str, Any] = {"loss_float32": statistics.fmean(loss for loss, _ in exact)}
    relative: dict[str, dict[str, float]] = {}
    for way in ("peft", "fused"):
        pairs = list(zip(found[way], exact, strict=True))

        def over(names: list[str], pairs: list[Any] = pairs) -> float:
            return _rms(_relative(own, wanted, names) for (_, own), (_, wanted) in pairs)

        relative[way] = {name: over([name]) for name in names}
        result[way] = {
            "loss_error": _rms(own - loss for (own, _), (loss, _) in pairs),
            "gradient_error": over(names),
            "worst_matrix_error": max(relative[way].values()),
        }
    result["largest_ratio_of_a_matrix"] = max(relative["fused"][n] / relative["peft"][n] for n in names)
    return result


def _rms(values: Iterable[float]) -> float:
    return math.sqrt(statistics.fmean(value**2 for value in values))


def _relative(found: Gradients, wanted: Gradients, names: list[str]) -> float:
    """The error of some gradients together, relative to their size."""
    error = torch.cat([(found[name] - wanted[name]).flatten() for name in names]).norm()
    return float(error / torch.cat([wanted[name].flatten() for name in names]).norm())
