"""How much faster are several GPUs, and are they the same training? Speed by number of GPUs; killed ranks.

    python3 -m bench.many lengths rows.jsonl --out work/lengths.json   # tokens of real rows, by SmolLM2's tokenizer
    python3 -m bench.many speed --gpus 2 --lengths work/lengths.json   # 1, 2, ... GPUs of one machine, each in a run
    python3 -m bench.many sharded --gpus 2                             # 70B: whole on 1 GPU, spread over 2, ...
    python3 -m bench.many plot                                         # docs/images/many.png, from the results
    python3 -m bench.many killed --runs 20 --gpus 2                    # CPU: a tiny run of two ranks, one is killed
    python3 -m bench.many resumed --gpus 8                             # CPU: begun on 8 ranks, resumed on 4 and on 2

Speed: an 8B shape in NF4, r = 16 on all linear layers, 8-bit AdamW, the engine with the exchange that `veneer train`
makes (training/parallel.py). Even rows of 4 x 2,048 tokens a GPU; and packs of 2,048 tokens with real rows' lengths, 4
a GPU, dealt as a run deals them. Tokens/s are those of all GPUs, in the median step; the ratio is to one GPU of the
same machine. `exchange_seconds` is the median of a step's exchange alone, after all ranks have come to it.

Sharded: a 70B shape of random weights, 4 x 2,048 tokens a GPU, on one GPU as `veneer train` places it there, and with
`train.shard: layers` on several. `weights_gib` are a GPU's frozen weights, buffers for two layers included;
`waits_for_links` is the share of a step's time that is gone where the same steps copy nothing.

Killed: the last rank gets SIGKILL once the run has made steps; the seconds until `veneer train --gpus 2` has ended, and
whether its message names the rank.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results" / "many.json"
ROWS, LENGTH, STEPS, SKIPPED, GIB = 4, 2048, 10, 3, 70.0
TARGETS = {"speed": {2: 1.94, 4: 3.8, 8: 7.5}, "sharded": {2: 1.8}}
LARGE = {"70b": (5, 2)}  # shapes whose steps take seconds: steps that are measured, and before them
PACKED = (30, 20)  # the same of packed rows, whose first steps record passes of shapes that are new


def lengths(file: Path, out: Path) -> None:
    """Write the tokens of each row of a file, as SmolLM2 would be trained on it."""
    from veneer.config import Data, Model
    from veneer.data.pipeline import prepare
    from veneer.data.render import Renderer
    from veneer.model.load import load_tokenizer
    from veneer.model.locate import locate

    data = Data(train=str(file), validation=0, max_length=LENGTH)
    tokenizer = load_tokenizer(locate(Model(base="smollm2-135m-instruct")))
    part = prepare(data, Renderer(tokenizer, data), 0).train
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(part.lengths.tolist()))


def rank(shape: str, layers: int | None, file: Path | None, shards: bool) -> None:
    """Measure as one rank of those that torchrun has started; the first one prints."""
    from bench.engine import random_base
    from veneer.config import Adapter, Train
    from veneer.data.batch import Batches, Example
    from veneer.engine.fused.engine import FusedEngine
    from veneer.engine.fused.shards import shard_bytes
    from veneer.engine.fused.streaming import buffer_bytes
    from veneer.engine.interface import BatchShapes
    from veneer.machine.ranks import join_ranks, leave_ranks
    from veneer.model.attach import attach
    from veneer.planning.memory import optimizer_bytes
    from veneer.training.optimizer import build_optimizer
    from veneer.training.parallel import begin_alike

    ranks = join_ranks()
    shards = shards and ranks.size > 1
    model = attach(random_base(shape, layers, True, to_host=shards, are_alike=True), Adapter(r=16, lora_alpha=32), 0)
    vocabulary = model.config.vocab_size
    engine = FusedEngine(model, ranks=ranks if shards else None)
    begin_alike(ranks, engine, model)
    assert engine.master is not None
    optimizer = build_optimizer([engine.master], Train(optim="adamw_8bit"), "cuda")
    states = optimizer_bytes([engine.master.numel()], "adamw_8bit")
    real = json.loads(file.read_text()) if file is not None else []
    draw = np.random.default_rng(0)

    def example(length: int) -> Example:
        return Example(draw.integers(3, vocabulary, length, dtype=np.int32), ((1, length, 1.0),), "")

    found: dict[str, Any] = {}
    for name, rows, pack in (("even", [LENGTH] * 4096, None), ("packed", real, LENGTH)):
        if not rows:
            continue
        measured, before = LARGE.get(shape, (STEPS, SKIPPED) if pack is None else PACKED)
        count = ROWS * (measured + before) * ranks.size
        chosen = rows[:count] if pack is None else rows * (1 + count * LENGTH // sum(rows))
        batches = Batches([example(n) for n in chosen], chosen, ROWS, 1, 0, pack, ranks=ranks.size)
        documents = batches.most_documents() if pack else ()
        shapes = BatchShapes((LENGTH,) * ROWS, varies=pack is not None, documents=documents)
        budget = int(GIB * 2**30) if shape not in LARGE else _free_bytes()
        engine.plan_within(shapes, budget - states)
        steps, exchanges, tokens = train_some(engine, optimizer, ranks, batches, range(measured + before))
        speeds = sorted(n / s for n, s in zip(tokens[before:], steps[before:], strict=True))
        found[name] = {
            "tokens_per_second": round(statistics.median(speeds)), "worst": round(speeds[0]), "best": round(speeds[-1]),
            "steps": [round(step, 3) for step in steps],
            "exchange_seconds": round(statistics.median(exchanges[before:]), 5),
            "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "process_gib": round((torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0]) / 2**30, 2),
        }  # fmt: skip
        if shards:
            weights = shard_bytes(engine.blocks) + buffer_bytes(engine.blocks)
            weights += 0 if engine.placement.streams_ends else engine.ends.bytes
            vars(engine._weights)["_copy"] = lambda turn: None
            without = train_some(engine, optimizer, ranks, batches, range(before))[0]
            found[name]["weights_gib"] = round(weights / 2**30, 2)
            found[name]["waits_for_links"] = round(1 - without[-1] / statistics.median(steps[before:]), 4)
    if ranks.is_first:
        print("RESULT " + json.dumps(found), flush=True)
    ranks.gather(None)  # a rank that leaves takes its shards along
    leave_ranks()


def _free_bytes() -> int:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - 2**30


def train_some(
    engine: Any, optimizer: Any, ranks: Any, batches: Any, numbers: range
) -> tuple[list[float], list[float], list[int]]:
    """Make steps as a run does; returns the seconds of each, those of its exchange, and its tokens."""
    from veneer.engine.objective import LIKELIHOOD
    from veneer.training.parallel import StepExchange

    exchange = StepExchange(ranks, batches, 0)
    steps, exchanges, tokens = [], [], []
    for number in numbers:
        torch.cuda.synchronize()
        began = time.perf_counter()
        micro_batches, own = exchange.step(number)
        weight = sum(batch.weight for batch in micro_batches)
        sums = [engine.forward_backward(batch.scaled(1 / weight), LIKELIHOOD).loss for batch in micro_batches[own]]
        total = torch.stack(sums).sum()
        exchange.meet(number)
        torch.cuda.synchronize()
        there = time.perf_counter()
        exchange.add([engine.master], [total])
        torch.cuda.synchronize()
        exchanges.append(time.perf_counter() - there)
        torch.nn.utils.clip_grad_norm_([engine.master], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total.item()
        exchange.agree(0)
        steps.append(time.perf_counter() - began)
        tokens.append(sum(batch.tokens for batch in micro_batches))
    return steps, exchanges, tokens


def speed(a: argparse.Namespace) -> None:
    """Measure 1, 2, 4, ... GPUs, up to those that are asked for; of `sharded`, beside the figures that are there."""
    shape = a.shape or ("70b" if a.what == "sharded" else "8b")
    known = json.loads(a.out.read_text()).get(a.what, {}) if a.out.is_file() else {}
    found: dict[str, Any] = known | {
        "gpu": torch.cuda.get_device_name(),
        "versions": {name: metadata.version(name) for name in ("torch", "triton", "bitsandbytes")},
        "date": time.strftime("%Y-%m-%d"),
    }
    for gpus in a.only or [n for n in (1, 2, 4, 8) if n <= a.gpus]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
        command += ["-m", "bench.many", "rank", "--shape", shape]
        command += ["--layers", str(a.layers)] if a.layers else []
        command += ["--lengths", str(a.lengths)] if a.lengths and a.what == "speed" else []
        command += ["--shards"] if a.what == "sharded" else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=a.limit)
        results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        result: dict[str, Any] = json.loads(results[-1].removeprefix("RESULT ")) if results else {"failed": True}
        found[str(gpus)] = result
        for name, values in result.items() if results and "1" in found else ():
            values["ratio"] = round(values["tokens_per_second"] / found["1"][name]["tokens_per_second"], 3)
        print(gpus, json.dumps(result), f"asked: {TARGETS[a.what].get(gpus, 1)}", flush=True)
        save(a.out, a.what, found)


def tiny(root: Path) -> list[str]:
    """Write a tiny base and rows; return the command that trains on them."""
    from tests.support.tiny import FAMILIES, save_tiny_model

    save_tiny_model(FAMILIES["llama"], root / "base")
    rows = [{"prompt": f"what is {n}", "completion": str(n)} for n in range(64)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "veneer", "train", "--model", str(root / "base"), "--data"]
    return [*command, str(root / "rows.jsonl"), "train.logging_steps=1", "model.dtype=float32"]


def killed(a: argparse.Namespace) -> None:
    """Kill the last rank of a tiny run, again and again."""
    import psutil

    draw, found, victim = random.Random(0), [], str(a.gpus - 1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        command = tiny(root)
        for number in range(a.runs):
            run = root / f"run{number}"
            more = ["-o", str(run), "--gpus", str(a.gpus), "train.max_steps=100000"]
            process = subprocess.Popen([*command, *more], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            metrics = run / "metrics.jsonl"
            while process.poll() is None and not (metrics.exists() and metrics.stat().st_size > 0):
                time.sleep(0.05)
            time.sleep(draw.random())
            children = psutil.Process(process.pid).children()
            next(child for child in children if child.environ().get("RANK") == victim).kill()
            began = time.monotonic()
            _, said = process.communicate(timeout=120)
            found.append({"seconds": round(time.monotonic() - began, 1), "status": process.returncode,
                          "named": f"rank {victim}" in said})  # fmt: skip
            print(json.dumps(found[-1]), flush=True)
    save(a.out, f"killed, {a.gpus} ranks", {
        "runs": len(found), "named": sum(one["named"] for one in found),
        "most_seconds": max(one["seconds"] for one in found),
        "median_seconds": statistics.median(one["seconds"] for one in found),
        "statuses": sorted({one["status"] for one in found}), "date": time.strftime("%Y-%m-%d"),
        "versions": {"torch": metadata.version("torch")},
    })  # fmt: skip


def resumed(a: argparse.Namespace) -> None:
    """Train a tiny run on so many ranks, and go on from its fourth step on half of them, and half of these."""
    steps, from_step = 8, 4
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        command, run = tiny(root), root / "run"
        more = ["-o", str(run), f"train.max_steps={steps}", f"train.save_steps={from_step}"]
        more += [
            "train.per_device_train_batch_size=1",
            "train.gradient_accumulation_steps=1",
            "train.save_total_limit=9",
        ]

        def losses() -> list[float]:
            records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            return [record["loss"] for record in records if record["kind"] == "train"]

        subprocess.run([*command, *more, "--gpus", str(a.gpus)], check=True, stdout=subprocess.DEVNULL)
        whole, found = losses(), dict[str, float]()
        for fewer in (a.gpus // 2, a.gpus // 4):
            (run / "adapter").rename(root / f"before-{fewer}")
            again = [*command, *more, "--gpus", str(fewer), "--resume", f"step-{from_step:06}"]
            subprocess.run(again, check=True, stdout=subprocess.DEVNULL)
            found[str(fewer)] = max(abs(now - then) / then for now, then in zip(losses(), whole, strict=True))
            print(fewer, found[str(fewer)], flush=True)
    save(a.out, f"begun on {a.gpus} ranks", {
        "steps": steps, "resumed_from": from_step, "losses_apart_at_most_by_ranks": found,
        "date": time.strftime("%Y-%m-%d"), "versions": {"torch": metadata.version("torch")},
    })  # fmt: skip


def plot(results: Path) -> None:
    """Draw tokens/s by the number of GPUs, relative to one."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    found = json.loads(results.read_text())
    lines = {
        "8B, rows of 2,048 tokens": ("speed", "even"),
        "8B, packed real rows": ("speed", "packed"),
        "70B, layers sharded": ("sharded", "even"),
    }
    figure, axes = plt.subplots(figsize=(5.5, 4), layout="constrained")
    for name, (group, kind) in lines.items():
        numbers = [int(gpus) for gpus in found[group] if gpus.isdigit()]
        ratios = [found[group][str(gpus)][kind]["ratio"] for gpus in numbers]
        axes.plot(numbers, ratios, marker="o", label=name)
    axes.plot(numbers, numbers, color="gray", linestyle=":", label="as many times as GPUs")
    axes.set(xlabel="GPUs", ylabel="tokens/s, relative to one GPU", xticks=numbers, xlim=(0.8, None), ylim=(0, None))
    axes.set_title(f"{found['speed']['gpu']}, 4 x 2,048 tokens a GPU")
    axes.legend(frameon=False)
    figure.savefig(RESULTS.parents[2] / "docs" / "images" / "many.png", dpi=110)


def save(out: Path, name: str, result: dict[str, Any]) -> None:
    """Merge a group into the file of results."""
    kept = json.loads(out.read_text()) if out.is_file() else {}
    out.write_text(json.dumps(kept | {name: result}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["lengths", "speed", "sharded", "rank", "plot", "killed", "resumed"])
    parser.add_argument("file", nargs="?", type=Path, help="of lengths: the rows")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of GPUs to measure; else 1, 2, ... of --gpus")
    parser.add_argument("--shape", help="8b, and of sharded 70b")
    parser.add_argument("--shards", action="store_true", help="of rank: spread the base over the GPUs")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--lengths", type=Path, help="of speed: tokens of real rows")
    parser.add_argument("--limit", type=int, default=280, help="seconds that a number of GPUs may take")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    if a.what == "lengths":
        lengths(a.file, a.out)
    elif a.what == "plot":
        plot(a.out)
    elif a.what == "rank":
        rank(a.shape, a.layers, a.lengths, a.shards)
    else:
        {"speed": speed, "sharded": speed, "killed": killed, "resumed": resumed}[a.what](a)


if __name__ == "__main__":
    main()
