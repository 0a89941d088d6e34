"""Measures what FlashAttention-4 gains in a step on packed documents of 1,000 to 4,000 tokens.

An 8B shape in NF4 trains on micro-batches of 8,192 tokens, each filled with documents of random lengths, once with
flash-attn-4 and once, in a process that cannot import it, with what torch brings. Both add in a fixed order.

    python3 -m bench.packed      # needs a Hopper GPU and flash-attn-4; writes bench/results/packed.json
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

from bench.engine import random_base, train
from veneer.config import Adapter
from veneer.data.batch import Batch
from veneer.model.attach import attach

RESULTS = Path(__file__).parent / "results" / "packed.json"
TOKENS, SHORTEST, LONGEST, STEPS, GIB = 8192, 1000, 4000, 13, 70.0


def lengths(draw: random.Random) -> tuple[int, ...]:
    """Lengths of documents that fill a micro-batch."""
    found: list[int] = []
    while (left := TOKENS - sum(found)) > LONGEST:
        found.append(draw.randint(SHORTEST, min(LONGEST, left - SHORTEST)))
    return (*found, left)


def packed(documents: tuple[int, ...], vocabulary: int) -> Batch:
    """A micro-batch of random tokens, of which each document's last has no target."""
    ids = torch.randint(3, vocabulary, (TOKENS,))
    targets = ids.roll(-1)
    targets[torch.tensor(documents).cumsum(0) - 1] = -100
    weights = (targets >= 0).float()
    return Batch(ids, targets, weights, documents, int(weights.sum()), float(weights.sum()))


def measure() -> dict[str, Any]:
    """Steps of one micro-batch each, in this process."""
    model = attach(random_base("8b", None, True, are_alike=True), Adapter(r=16, lora_alpha=32), 0)
    draw = random.Random(0)
    batches = [[packed(lengths(draw), model.config.vocab_size)] for _ in range(STEPS)]
    return train(model, batches, (SHORTEST,) * 4 + (LONGEST,), GIB)


def apart(hides: bool) -> dict[str, Any]:
    """The same in a process of its own; hides: whether flash-attn-4 is left off its path."""
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    found = util.find_spec("flash_attn.cute")
    if found is None or not found.origin:
        raise SystemExit("flash-attn-4 is not installed")
    root = str(Path(found.origin).parents[2])
    if hides and root not in path:
        raise SystemExit(f"flash-attn-4 lies in {root}, which is not a folder of PYTHONPATH that can be left out")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in path if not (hides and p == root))}
    command = [sys.executable, "-W", "ignore", "-m", "bench.packed", "--here"]
    lines = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return dict(json.loads(lines[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", action="store_true", help="measure in this process and print a JSON line")
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    if a.here:
        print(json.dumps(measure()))
        return
    flash4, flash = apart(hides=False), apart(hides=True)
    result = {
        "gpu": torch.cuda.get_device_name(),
        "versions": {name: metadata.version(name) for name in ("torch", "triton", "flash-attn-4")},
        "date": time.strftime("%Y-%m-%d"),
        "flash4": flash4,
        "flash": flash,
        "gain": round(flash4["tokens_per_second"] / flash["tokens_per_second"] - 1, 4),
    }
    print(json.dumps(result))
    a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
