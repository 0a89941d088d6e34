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
import json
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.support.engines import COVERED
from tests.support.exactness import BATCHES, LENGTHS, ratios, tiny_errors

from veneer.machine.device import find_machine

RESULTS = Path(__file__).parent / "results" / "exact.json"


def keys(device: str) -> dict[str, Any]:
    """Percentiles of the errors of Qwen2's matrices, by PEFT with either attention, and by the fused engine."""
    found: dict[str, list[float]] = {"PEFT, eager": [], "PEFT, sdpa": [], "fused": []}
    for seed in range(100, 116):
        for attention in ("eager", "sdpa"):
            both = tiny_errors("qwen2", LENGTHS[1], seed, device, attention).matrices.values()
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
            batches = [tiny_errors(family, lengths, seed, machine.device) for seed in range(BATCHES)]
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
