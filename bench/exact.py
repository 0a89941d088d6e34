"""How far is each adapter's gradient from float32's, by the fused engine and by PEFT, both in bfloat16?

    python3 -m bench.exact            # on a GPU, or on a CPU by the kernels' twins; writes bench/results/exact.json
    python3 -m bench.exact --keys     # what a bias of the keys does to attention, added to the same file

Every covered family with small random weights, packed rows of uneven length and of one length. One batch is a single
draw of what rounding may do to a matrix, so several models and batches are taken: the figure is the ratio of the roots
of mean squares of both errors, matrix by matrix. The largest ratio of any one batch stands beside it.

PEFT's attention is the one that Transformers takes by default: torch's own, but where scores are capped. Attention
written out errs less where keys have a bias (Qwen2), since the others take sums over scores from a rounded output.
"""

import argparse
import copy
import json
import math
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tests.unit.test_fused import COVERED, batch_of, gradients, model_of

from veneer.engine import ReferenceEngine
from veneer.engine.fused import FusedEngine
from veneer.machine import find_machine

RESULTS = Path(__file__).parent / "results" / "exact.json"
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


def errors(family: str, lengths: tuple[int, ...], seed: int, device: str, attention: str = "sdpa") -> Errors:
    """Of one model and one batch; `attention`: PEFT's, as Transformers names it."""
    exact, batch = model_of(family, seed, changes={"hidden_size": 128}).to(device), batch_of(lengths, seed=seed)
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


def keys(device: str) -> dict[str, Any]:
    """Percentiles of the errors of Qwen2's matrices, by PEFT with either attention, and by the fused engine."""
    found: dict[str, list[float]] = {"PEFT, eager": [], "PEFT, sdpa": [], "fused": []}
    for seed in range(100, 116):
        for attention in ("eager", "sdpa"):
            both = errors("qwen2", LENGTHS[1], seed, device, attention).matrices.values()
            found[f"PEFT, {attention}"] += [peft for peft, _ in both]
            found["fused"] += [fused for _, fused in both] if attention == "sdpa" else []
    shares = (0.5, 0.9, 0.99, 1.0)
    return {
        who: {f"{share:.0%}": round(sorted(values)[int(share * (len(values) - 1))], 4) for share in shares}
        for who, values in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--keys", action="store_true", help="Qwen2 alone, with PEFT's attention of either kind")
    a = parser.parse_args()
    machine, cases = find_machine(), []
    if a.keys:
        found = json.loads(a.out.read_text()) if a.out.exists() else {}
        found["keys with a bias"] = {"on": machine.name, "batches": 16} | keys(machine.device)
        print(json.dumps(found["keys with a bias"]))
        a.out.write_text(json.dumps(found, indent=1) + "\n")
        return
    for family in COVERED:
        for lengths in LENGTHS:
            batches = [errors(family, lengths, seed, machine.device) for seed in range(BATCHES)]
            over_all, single = ratios(batches), [max(ratios([batch]).values()) for batch in batches]
            cases.append({
                "family": family, "lengths": lengths, "median": round(statistics.median(over_all.values()), 3),
                "worst": round(max(over_all.values()), 3), "worst_of_each_batch": [round(n, 3) for n in single],
            })  # fmt: skip
            print(json.dumps(cases[-1]), flush=True)
    names = ("torch", "transformers", "peft")
    found = (json.loads(a.out.read_text()) if a.out.exists() else {}) | {
        "what": "error of an adapter's gradient, fused over PEFT, both in bfloat16 against float32",
        "on": machine.name, "date": time.strftime("%Y-%m-%d"), "batches": BATCHES,
        "versions": {name: metadata.version(name) for name in names}, "cases": cases,
    }  # fmt: skip
    a.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
