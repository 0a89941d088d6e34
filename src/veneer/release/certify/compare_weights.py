"""Compares the tensors of an artifact with base and adapter, merged anew, one tensor at a time.

A model's answers hide small damage; its tensors do not. For each tensor of a merged folder or a GGUF file the right
value is computed again in float32 and compared within the error of the artifact's precision. What is wrong has a
shape, and the shape has a name: numbers that are not finite are an overflow, tensors without an adapter that differ
are another base, an adapter that is in with half its strength has lost its alpha, and a few tensors that differ are
damaged.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from veneer.model.gguf import open_gguf
from veneer.model.tuned import TunedModel
from veneer.release.gguf.importance import importance_of, read_importance
from veneer.release.gguf.tensor_layout import COMPUTED, TensorLayout
from veneer.release.gguf.types import encoded
from veneer.release.merge.adapter_delta import AdapterDelta
from veneer.release.merge.plan import MergePlan
from veneer.release.merge.stored_4bit import base_weights
from veneer.release.weights import weights_of

# Largest error of a tensor in proportion to its largest value, that a precision explains.
ERRORS = {
    **{"F32": 1e-6, "BF16": 2**-8, "F16": 2**-10, "Q8_0": 0.01, "Q6_K": 0.06, "Q5_K": 0.09, "Q5_1": 0.09, "Q5_0": 0.12},
    **{"Q4_K": 0.16, "Q4_1": 0.16, "Q4_0": 0.25, "Q3_K": 0.45, "Q2_K": 0.9, "Q8_K": 0.01},
}
STRENGTH = 0.1  # how far from 1 the adapter's measured strength may be


@dataclass(frozen=True)
class Compared:
    """The result of a comparison of weights.

    Attributes:
        tensors: Number of tensors compared.
        wrong: Names of those beyond the error of their precision.
        worst: Largest error found, in units of what the precision explains.
        strength: Share of the adapter that is in the weights; None: it changes nothing measurable.
        diagnosis: Sentence that says what is wrong; empty: nothing.
        unties: Whether embeddings and head are two tensors, whatever the base's configuration says.
    """

    tensors: int
    wrong: list[str]
    worst: float
    strength: float | None
    diagnosis: str
    unties: bool = False


@dataclass(frozen=True)
class _Pair:
    """A tensor of the artifact, the expected tensor, both float32, and the base's."""

    name: str
    kind: str
    found: torch.Tensor | None
    expected: torch.Tensor
    base: torch.Tensor | None


def compare_weights(tuned: TunedModel, artifact: Path, on: str) -> Compared:
    """Compare a merged folder, or a GGUF file, with its base and adapter.

    Args:
        tuned: The adapter and its base.
        artifact: The folder or the file.
        on: Base that the adapter was merged into: base, or nf4.
    """
    tensors = base_weights(tuned)
    delta = AdapterDelta(tuned, tensors)
    merge_plan = MergePlan(tuned, delta, on)
    read = _gguf_reader(tuned, artifact, delta) if artifact.is_file() else _folder_reader(artifact)
    wrong_own: list[str] = []
    wrong_changed: list[str] = []
    count = changed = 0
    worst, along, squared = 0.0, 0.0, 0.0
    infinite: list[str] = []
    for pair in _pairs(tensors | delta.untied, delta, merge_plan, read):
        count += 1
        changed += pair.base is not None
        if pair.found is None or pair.found.shape != pair.expected.shape:
            (wrong_changed if pair.base is not None else wrong_own).append(pair.name)
            worst = float("inf")
            continue
        if not pair.found.isfinite().all():
            infinite.append(pair.name)
            worst = float("inf")
            continue
        error = float((pair.found - pair.expected).abs().max())
        explained = ERRORS.get(pair.kind, 0.01) * max(float(pair.expected.abs().max()), 1e-12)
        worst = max(worst, error / explained)
        if error > explained:
            (wrong_changed if pair.base is not None else wrong_own).append(pair.name)
        if pair.base is not None:
            # As the precision holds them: a change below its resolution is rounded away in the right values too.
            was, right = (_as_stored(value, pair.kind) for value in (pair.base, pair.expected))
            change = (right - was).double()
            along += float(((pair.found - was).double() * change).sum())
            squared += float((change * change).sum())
    strength = along / squared if squared > 0 else None
    added = _added(tuned, artifact, tensors | delta.untied)
    wrong = wrong_own + wrong_changed + infinite + added
    diagnosis = _diagnose(wrong_own, wrong_changed, infinite, count - changed, strength)
    if added and not diagnosis:
        diagnosis = f"{', '.join(added[:3])}: not in base or adapter"
    return Compared(count + len(added), wrong, worst, strength, diagnosis, delta.unties)


def _added(tuned: TunedModel, artifact: Path, every: dict[str, Any]) -> list[str]:
    """Return tensors that neither base nor adapter has, such as a head that is loaded in place of a tied one."""
    if not artifact.is_file():
        return sorted(name for name in weights_of(artifact, str(artifact)).keys() - every.keys())
    layout = TensorLayout(tuned.config, tuned.model.base)
    known = {layout.name(name) for name in every if not name.endswith(COMPUTED)} | layout.extra_tensors().keys()
    return sorted(tensor.name for tensor in open_gguf(artifact).tensors if tensor.name not in known)


def _as_stored(value: torch.Tensor, kind: str) -> torch.Tensor:
    """Round float32 values as a 16-bit artifact holds them; leave others as they are."""
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get(kind)
    return value if dtype is None else value.to(dtype).float()


def _diagnose(own: list[str], changed: list[str], infinite: list[str], owned: int, strength: float | None) -> str:
    if infinite:
        return f"{infinite[0]} holds numbers that are not finite: an overflow of its precision"
    if owned and len(own) > max(2, owned // 3):
        return f"{len(own)} of {owned} tensors that the adapter does not touch differ: it was merged into another base"
    if strength is not None and abs(strength - 1) > STRENGTH:
        return f"the adapter is in with {strength:.2f} of its strength: its scale (lora_alpha / r) was lost or changed"
    if own or changed:
        names = own + changed
        return f"{len(names)} tensor{'s' if len(names) > 1 else ''} differ: {', '.join(names[:3])}"
    return ""


def _pairs(every: dict[str, Any], delta: AdapterDelta, merge_plan: MergePlan, read: Any) -> Iterator[_Pair]:
    for name, stored in every.items():
        if not stored.is_float or name.endswith(COMPUTED):
            continue
        found, kind, lay_out, same = read(name)
        if kind is None:  # an artifact may leave out what is tied
            if delta.is_tied and name not in delta.changed and name.endswith("lm_head.weight"):
                continue
            kind = "F32"
        value = merge_plan.value(name, stored)
        expected = lay_out(value).float()
        if same is not None and same(expected):
            found = expected.clone()
        elif found is not None:
            found = found()
        base = None
        if name in delta.changed:
            base = lay_out(merge_plan.base_value(name, stored)).float()
        yield _Pair(name, kind, found, expected, base)


def _folder_reader(folder: Path) -> Callable[[str], Any]:
    tensors = weights_of(folder, str(folder))
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

    def read(name: str) -> Any:
        stored = tensors.get(name)
        if stored is None:
            return None, None, lambda value: value, None
        return lambda: stored.read().float(), kinds.get(stored.dtype, "F32"), lambda value: value, None

    return read


def _gguf_reader(tuned: TunedModel, file: Path, delta: AdapterDelta) -> Callable[[str], Any]:
    from gguf import quants

    layout = TensorLayout(tuned.config, tuned.model.base)
    tensors = {tensor.name: tensor for tensor in open_gguf(file).tensors}
    importance = read_importance(file)

    def read(name: str) -> Any:
        tensor = tensors.get(layout.name(name))
        transform = layout.transform(name) or (lambda value: value)
        if tensor is None:
            return None, None, transform, None
        kind = tensor.tensor_type.name
        shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))

        def found() -> torch.Tensor:
            values = np.array(quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            return torch.from_numpy(values).reshape(shape)

        def same(expected: torch.Tensor) -> bool:
            """Return whether the bytes are those that an export writes; then the quantization is right."""
            if kind in ("F32", "F16", "BF16") or tuple(expected.shape) != shape:
                return False
            at, own = 0, np.asarray(tensor.data).view(np.uint8).reshape(-1)
            for piece in encoded(expected, kind, importance=importance_of(importance, delta, name)):
                if not np.array_equal(own[at : at + piece.size], piece):
                    return False
                at += piece.size
            return True

        return found, kind, transform, same

    return read
