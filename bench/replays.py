"""How many passes over real rows are replayed, and what that gives: tokens/s, padding, memory.

    python3 -m bench.peers tokens alpaca.json gsm8k.jsonl --out tokens.npz        # anywhere
    python3 -m bench.replays tokens.npz --count                                   # anywhere: replays and padding alone
    python3 -m bench.replays tokens.npz --shape 8b --cases rows1x8 rows2x8 packed1x8 packed4x2     # on the GPU

A case is rows as they are, or packed to 2,048 tokens, with so many to a pass and so many passes to a step. Random
weights, NF4, r = 16 on all linear layers, memory ample. Each case runs twice: every pass launched, and with recordings
as `veneer train` has them. Times are of all steps but the first, recording included, and of the second half
of the steps. Prints a JSON line a case, merges it into bench/results/replays.json.
"""

import argparse
import gc
import json
import re
import time
from collections import Counter
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from bench.engine import process_bytes, random_base
from bench.peers import read_examples
from veneer.config import Adapter, Train
from veneer.data.batch import Batches
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.fused.graphs import MAX_GRAPHS, PassShape
from veneer.engine.interface import BatchShapes
from veneer.engine.objective import LIKELIHOOD
from veneer.model.attach import attach
from veneer.training.optimizer import build_optimizer

RESULTS = Path(__file__).parent / "results" / "replays.json"
GIB = 70
PACKED = 2048


def steps_of(case: str, examples: list[Any], steps: int) -> tuple[list[Any], list[int], tuple[int, ...]]:
    """Micro-batches of each step, tokens of the rows of the largest, and of the documents of that with most of them."""
    kind, size, passes = re.findall(r"^(rows|packed)(\d+)x(\d+)$", case)[0]
    lengths = np.array([len(example.ids) for example in examples])
    batches = Batches(examples, lengths, int(size), int(passes), 0, PACKED if kind == "packed" else None)
    largest = sorted(batches.sizes.tolist(), reverse=True)[: int(size)]
    documents = batches.most_documents() if kind == "packed" else ()
    return [batches.step(n) for n in range(min(steps, batches.steps_per_epoch))], largest, documents


def count(steps: list[Any]) -> dict[str, Any]:
    """Passes that are replayed by the engine's rule, and what padding adds."""
    seen: Counter[PassShape] = Counter()
    recorded, replayed, tokens, padded = set[PassShape](), 0, 0, 0
    for batch in (batch for batches in steps for batch in batches):
        size = PassShape.of(batch.lengths, batch.trained)
        seen[size] += 1
        if size not in recorded and seen[size] > 1 and len(recorded) < MAX_GRAPHS:
            recorded.add(size)
        replayed += size in recorded
        tokens, padded = tokens + batch.tokens, padded + size.tokens
    passes = seen.total()
    return {
        "passes": passes, "sizes": len(seen), "replayed": round(replayed / passes, 3),
        "padding": round(padded / tokens - 1, 4),
    }  # fmt: skip


def train(
    model: Any, steps: list[Any], largest: list[int], documents: tuple[int, ...], records: bool
) -> dict[str, Any]:
    engine = FusedEngine(model)
    optimizer = build_optimizer([engine.master], Train(optim="adamw_8bit"), "cuda")
    shapes = BatchShapes(tuple(largest), varies=True, documents=documents)
    placement = engine.plan_within(shapes, GIB * 2**30)
    if not records:
        engine.apply(replace(placement, records_passes=False))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    replays = mock.patch.object(torch.cuda.CUDAGraph, "replay", autospec=True, side_effect=torch.cuda.CUDAGraph.replay)
    with replays as replay:
        for batches in steps:
            torch.cuda.synchronize()
            started = time.perf_counter()
            weight = sum(batch.weight for batch in batches)
            sums = [engine.forward_backward(batch.scaled(1 / weight), LIKELIHOOD).loss for batch in batches]
            total = torch.stack(sums).sum()
            torch.nn.utils.clip_grad_norm_([engine.master], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(total.item()) / weight)
            seconds.append(time.perf_counter() - started)
    tokens = [sum(batch.tokens for batch in batches) for batches in steps]
    half, recorded = len(steps) // 2, getattr(engine._graphs, "_recorded", {})
    return {
        "tokens_per_second": round(sum(tokens[1:]) / sum(seconds[1:])),
        "second_half": round(sum(tokens[half:]) / sum(seconds[half:])),
        "replayed": round(replay.call_count / sum(map(len, steps)), 3),
        "recordings": len(recorded),
        "records": placement.records_passes,
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "process_gib": round(process_bytes() / 2**30, 2),
        "losses": [round(loss, 4) for loss in losses[:3]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--shape", default="8b", choices=["8b", "1b"])
    parser.add_argument("--cases", nargs="+", default=["rows1x8", "rows2x8", "packed1x8", "packed4x2"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--count", action="store_true", help="replays and padding alone, without a GPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    examples = read_examples(a.tokens)
    found: dict[str, Any]
    if a.count:
        found = {case: count(steps_of(case, examples, a.steps)[0]) for case in a.cases}
        print(json.dumps(found, indent=1))
        whole = json.loads(a.out.read_text()) if a.out.exists() else {}
        counted = whole.get("counted", {}) | {a.tokens.stem: found}
        a.out.write_text(json.dumps(whole | {"counted": counted}, indent=1) + "\n")
        return
    base = random_base(a.shape, None, True)
    for case in a.cases:
        steps, largest, documents = steps_of(case, examples, a.steps)
        found = {"largest": largest, "steps": len(steps)}
        for name, records in (("launched", False), ("recorded", True)):
            model = attach(base, Adapter(r=16), 0)
            found[name] = train(model, steps, largest, documents, records)
            base = model.unload().requires_grad_(False)
            del model
            gc.collect()
            torch.cuda.empty_cache()
        print("RESULT", json.dumps({"shape": a.shape, "case": case} | found), flush=True)
        keep(a.out, a.shape, {case: found})


def keep(path: Path, shape: str, found: dict[str, Any]) -> None:
    """Merges a case into the results."""
    whole = json.loads(path.read_text()) if path.exists() else {}
    versions = {name: metadata.version(name) for name in ("torch", "triton", "transformers")}
    whole["on"] = {"gpu": torch.cuda.get_device_name(), "versions": versions, "date": time.strftime("%Y-%m-%d")}
    whole[shape] = whole.get(shape, {}) | found
    path.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
