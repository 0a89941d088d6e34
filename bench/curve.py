"""Does the fused engine learn what the reference engine learns? SmolLM2 on gsm8k, the same batches for both.

    python3 -m bench.curve gsm8k_train.jsonl --steps 200          # writes bench/results/curve.json and curve.png
    python3 -m bench.curve gsm8k_train.jsonl --smollm2 FILE.gguf  # where the built-in model cannot be fetched

Three runs on the same 4-bit weights: the reference engine in float32, the same in bfloat16, the fused engine in
bfloat16. The yardstick is float32: PEFT rounds a layer's output to bfloat16 and then adds what the adapter makes, so
that an update smaller than half a unit in the last place, as all are in the first steps, is lost. Losses are smoothed
over 20 steps; the figure is the largest difference of smoothed losses, relative to those in float32. Beside it: one
batch in float32, by PEFT in bfloat16, and fused, on 16-bit weights, and the errors of the two.
"""

import argparse
import json
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.support.exactness import adapted, base_errors

from veneer.config import Data, Model, Train
from veneer.data.batch import Batches
from veneer.data.pipeline import prepare
from veneer.data.render import Renderer
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.objective import LIKELIHOOD
from veneer.engine.reference import ReferenceEngine
from veneer.machine.device import find_machine
from veneer.model.load import load_tokenizer
from veneer.model.locate import locate
from veneer.training.optimizer import build_optimizer
from veneer.training.schedule import learning_rate

RESULTS = Path(__file__).parent / "results"
WAYS = ("reference, float32", "reference, bfloat16", "fused, bfloat16")
SMOOTHED = 20
RATE = 2e-4


def curve(way: str, name: str, batches: Batches, steps: int) -> tuple[list[float], float]:
    """Loss of each step, and the seconds they took."""
    engine_name, dtype = way.split(", ")
    model = adapted(name, dtype, quantized=True)
    engine: Any = FusedEngine(model) if engine_name == "fused" else ReferenceEngine(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    train = Train(optim="adamw_torch", learning_rate=RATE)
    optimizer = build_optimizer(parameters, train, find_machine().device)
    losses, started = [], time.perf_counter()
    for number in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, steps, RATE, 0.03, "cosine")
        micro_batches = batches.step(number)
        weight = sum(batch.weight for batch in micro_batches)
        sums = [engine.forward_backward(batch.scaled(1 / weight), LIKELIHOOD).loss.item() for batch in micro_batches]
        total = sum(sums)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total / weight)
        if number % 20 == 0:
            print(f"{way} {number + 1}/{steps} loss {losses[-1]:.4f}", flush=True)
    return losses, time.perf_counter() - started


def plot(losses: dict[str, list[float]], differences: dict[str, float], where: str, out: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (way, values), style in zip(losses.items(), ("-", ":", "--"), strict=True):
        label = f"{way} ({differences[way]:.2%} off at most)" if way in differences else way
        axes.plot(range(SMOOTHED, len(values) + 1), smooth(values), style, label=label)
    axes.set(xlabel="step", ylabel=f"loss, mean of {SMOOTHED} steps", title=f"SmolLM2 on gsm8k, 4 bits, {where}")
    axes.legend()
    figure.savefig(out / "curve.png", dpi=120)


def smooth(values: list[float]) -> Any:
    return np.convolve(values, np.ones(SMOOTHED) / SMOOTHED, mode="valid")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=2, help="of a step")
    parser.add_argument("--smollm2", default="smollm2-135m-instruct")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder")
    a = parser.parse_args()
    data = Data(train=a.data, validation=0, max_length=512)
    part = prepare(data, Renderer(load_tokenizer(locate(Model(base=a.smollm2))), data), 42).train
    batches = Batches(part, part.lengths, a.rows, 1, 42)
    first = base_errors(a.smollm2, batches.step(0)[0])
    print(json.dumps(first), flush=True)
    runs = {way: curve(way, a.smollm2, batches, a.steps) for way in WAYS}
    exact, *others = ({way: smooth(losses)} for way, (losses, _) in runs.items())
    differences = {
        way: float(np.max(np.abs(values / exact[WAYS[0]] - 1))) for other in others for way, values in other.items()
    }
    where = find_machine().name
    plot({way: losses for way, (losses, _) in runs.items()}, differences, where, a.out)
    found = {
        "on": where,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "date": time.strftime("%Y-%m-%d"),
        "steps": a.steps,
        "rows_of_a_step": a.rows,
        "largest_difference_from_float32": differences,
        "one_batch": first,
        "seconds": {way: round(seconds, 1) for way, (_, seconds) in runs.items()},
        "losses": {way: [round(loss, 5) for loss in losses] for way, (losses, _) in runs.items()},
    }
    (a.out / "curve.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(differences))


if __name__ == "__main__":
    main()
