"""What watching and saving cost a run: seconds in the way of the training, by the product's own path.

SmolLM2-135M-Instruct with LoRA (r=16) on the CPU, or a random 1B Llama with QLoRA on CUDA, trains by `veneer train` in
this process, with a checkpoint every few steps. Timed are the calls that the loop makes for a checkpoint (the copy, and
waits for a write) and for a logged step (metrics.jsonl, the page, the display). The step after a checkpoint runs while
that is written, and is compared with the other ones of the same run. Shares are of one checkpoint a minute, and of a
step.
"""

import contextlib
import functools
import io
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS, EVERY = 25, 4
ROWS = {"cpu": 1, "cuda": 4}
FIRST = 4  # steps that are left out: caches and memory are new to them


def measure_cost(folder: Path, device: str) -> dict[str, Any]:
    """Train with checkpoints, and return what a checkpoint and a logged step cost."""
    from bench.forked import status_of
    from veneer.training import loop, saving

    os.environ["VENEER_CACHE"] = str(folder / "cost-cache")
    base = "smollm2-135m-instruct" if device == "cpu" else _random_base(folder / "1b")
    draw = random.Random(0)
    words = ("cat", "dog", "owl", "hen", "sat", "looked", "on", "near", "a", "the", "tree", "mat", "while", "two")
    with (folder / "cost.jsonl").open("w") as file:
        for _ in range(STEPS * 4):
            prompt, answer = (" ".join(draw.choices(words, k=30 if device == "cuda" else 8)) for _ in range(2))
            file.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")
    seconds: dict[str, list[float]] = {"save": [], "log": []}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def run(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*given, **named)
            finally:
                seconds[name].append(time.perf_counter() - began)

        return run

    # For the bench alone: the two calls that stand in the way of the training.
    saving.Saver.save = timed("save", saving.Saver.save)  # type: ignore[method-assign]
    loop._report = timed("log", loop._report)
    run = folder / "cost"
    arguments = [
        *("train", "--model", base, "--data", str(folder / "cost.jsonl"), "-o", str(run)),
        *(f"train.max_steps={STEPS}", f"train.save_steps={EVERY}", "train.gradient_accumulation_steps=1"),
        f"train.per_device_train_batch_size={ROWS[device]}",
        *("data.validation=0", "adapter.r=16", "data.max_length=256", "train.learning_rate=1e-4"),
        *(["quantization.bits=4"] if device == "cuda" else []),
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        assert status_of(arguments) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    taken = {line["step"]: line["seconds"] for line in lines if line["kind"] == "train" and line["step"] > FIRST}
    beside = [value for step, value in taken.items() if step % EVERY == 1]
    others = [value for step, value in taken.items() if step % EVERY != 1]
    size = sum(file.stat().st_size for file in max((run / "checkpoints").iterdir()).iterdir())
    saved = seconds["save"][1:]
    step, save, log = statistics.median(others), statistics.median(saved), statistics.median(seconds["log"])
    slower = max(0.0, statistics.median(beside) - step)
    return {
        "base": base if device == "cpu" else "random Llama, 1B, 4 bits",
        "checkpoint_MiB": round(size / 2**20, 1),
        "step_seconds": round(step, 4),
        "save_seconds_in_the_way": round(save, 4),
        "save_seconds_in_the_way_most": round(max(saved), 4),
        "next_step_seconds_longer": round(slower, 4),
        "save_share_at_one_a_minute": round((save + slower) / 60, 5),
        "log_seconds": round(log, 6),
        "log_share_of_a_step": round(log / step, 5),
        "steps": STEPS,
        "checkpoints": len(saved),
    }


def _random_base(folder: Path) -> str:
    """Write a random Llama of 1B parameters with a tiny tokenizer; returns its folder."""
    from tests.support.tiny import FAMILIES, save_tiny_model

    name, settings = FAMILIES["llama"]
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    sizes |= {"num_key_value_heads": 8, "max_position_embeddings": 2048}
    save_tiny_model((name, settings | sizes), folder)
    return str(folder)
