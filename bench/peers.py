"""Veneer against Unsloth on one GPU: the same weights, data and settings, in processes of their own, one after another.

Llama-3-8B's shapes with random weights, NF4 with double quantization, r = 16 on all linear layers, dropout 0, 8-bit
AdamW. Full-length random rows, so that nobody wins by skipping padding; and real rows (alpaca, gsm8k), packed to 2,048
tokens with a loss on the answers alone. Unsloth runs with and without recomputation, where
that fits; a ratio is against the better.

    python3 -m bench.peers tokens alpaca.json gsm8k.jsonl --out work/tokens.npz      # anywhere; SmolLM2's tokenizer
    python3 -m bench.peers compare --work work                                       # on the GPU

Needs unsloth, trl and datasets. Prints a JSON line a job, writes bench/results/peers.json.
"""

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"

RESULTS = Path(__file__).parent / "results" / "peers.json"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
AMPLE = 77.0
# Job: rows, length, accumulation; budgets in GiB that Veneer is measured in.
JOBS: dict[str, tuple[int, int, int, tuple[float, ...]]] = {
    "4x2048": (4, 2048, 1, (AMPLE, 9.0)),
    "2x1024x8": (2, 1024, 8, (AMPLE, 7.5)),
    "1x2048": (1, 2048, 1, (AMPLE,)),
    "2x8192": (2, 8192, 1, (13.0,)),
    "real": (4, 2048, 1, (AMPLE,)),
}
# Jobs that only bench/memory.py compares.
LONG: dict[str, tuple[int, int, int, tuple[float, ...]]] = {
    "1x32768": (1, 32768, 1, (AMPLE, 11.65)),
    "1x65536": (1, 65536, 1, (AMPLE, 17.4)),
}
STEPS, SKIPPED = 6, 3
# Unsloth's ways to recompute, and the jobs each is measured on.
WAYS = {"off": ("4x2048", "2x1024x8", "1x2048", "real"), "unsloth": ("4x2048", "2x8192")}


def steps_of(job: str) -> tuple[int, int]:
    """Steps that are measured, and steps before them."""
    return (2, 1) if job in LONG else (STEPS, SKIPPED)


def write_tokens(files: list[str], out: Path, rows: int) -> None:
    """Real rows as tokens, with what is trained."""
    import numpy as np

    from veneer.config import Data, Model
    from veneer.data.pipeline import prepare
    from veneer.data.render import Renderer
    from veneer.model.load import load_tokenizer
    from veneer.model.locate import locate

    source = locate(Model(base="smollm2-135m-instruct"))
    tokenizer = load_tokenizer(source)
    data = Data(train=tuple(files), validation=0, max_length=2048)
    part = prepare(data, Renderer(tokenizer, data), 42).train
    chosen = np.random.default_rng(0).permutation(len(part))[:rows]
    examples = [part[int(n)] for n in chosen]
    ids, weights = (np.concatenate([getattr(e, what) for e in examples]) for what in ("ids", "weights"))
    np.savez_compressed(out, ids=ids, weights=weights, lengths=[len(e.ids) for e in examples])
    tokenizer.save_pretrained(out.parent / "tokenizer")


def read_examples(path: Path) -> list[Any]:
    import numpy as np

    from veneer.data.batch import Example

    found = dict(np.load(path))  # read once: each access would unpack the whole array
    examples, start = [], 0
    for number, length in enumerate(found["lengths"].tolist()):
        part = slice(start, start + length)
        is_trained = np.flatnonzero(np.diff(np.concatenate([[0], found["weights"][part] > 0, [0]]).astype(np.int8)))
        spans = tuple((int(a), int(b), 1.0) for a, b in is_trained.reshape(-1, 2))
        examples.append(Example(found["ids"][part], spans, str(number)))
        start += length
    return examples


def real_steps(work: Path, steps: int) -> list[list[Any]]:
    """Micro-batches of packs."""
    import numpy as np

    from veneer.data.batch import Batches

    examples = read_examples(work / "tokens.npz")
    batches = Batches(examples, np.array([len(e.ids) for e in examples]), 4, 1, 0, 2048)
    return [batches.step(number) for number in range(steps)]


def make(folder: Path, tokenizer: Path) -> None:
    """The base, with the tokenizer that peers want to find beside it."""
    from bench.load import make as make_base

    if not folder.exists():
        make_base("8B", folder)
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)


def run_veneer(work: Path, folder: Path, jobs: list[str]) -> None:
    import torch

    from bench.engine import measure, train
    from veneer.config import Adapter, Model, Quantization
    from veneer.machine.device import find_machine
    from veneer.model.attach import attach
    from veneer.model.load import load_model
    from veneer.model.locate import locate

    started = time.perf_counter()
    model = Model(base=str(folder), dtype="bfloat16")
    base = load_model(locate(model), model, Quantization(), find_machine())
    peft = attach(base, Adapter(r=16, lora_alpha=32), 0)
    loaded = round(time.perf_counter() - started, 1)
    for job in jobs:
        rows, length, accumulation, budgets = (JOBS | LONG)[job]
        steps, skipped = steps_of(job)
        for gib in budgets:
            gc.collect()  # engines and their recorded passes hold each other
            torch.cuda.empty_cache()
            if job == "real":
                result = train(peft, real_steps(work, STEPS + SKIPPED), (length,) * rows, gib)
            else:
                result = measure(peft, f"{rows}x{length}x{accumulation}@{gib}", steps, False, skipped)
            tell({"who": "veneer", "job": job, "way": f"within {gib:g} GiB", "load_seconds": loaded} | result)


def run_unsloth(work: Path, folder: Path, way: str, jobs: list[str]) -> None:
    from unsloth import FastLanguageModel  # isort: skip  # must come before what it changes
    import torch
    from trl import SFTConfig, SFTTrainer

    started = time.perf_counter()
    recompute: Any = {"off": False, "unsloth": "unsloth"}[way]
    longest = max(8192, *((JOBS | LONG)[job][1] for job in jobs))
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=longest, load_in_4bit=True, dtype=torch.bfloat16
    )
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, lora_dropout=0, bias="none", target_modules=TARGETS,
        use_gradient_checkpointing=recompute, random_state=0, max_seq_length=longest,
    )  # fmt: skip
    loaded = round(time.perf_counter() - started, 1)
    clock = unsloth_clock()
    for job in jobs:
        rows, length, accumulation, _ = (JOBS | LONG)[job]
        steps, skipped = steps_of(job)
        for packing in (True, False) if job == "real" else (False,):
            data, tokens, trained = unsloth_data(work, job, packing, model.config.vocab_size)
            settings = SFTConfig(
                output_dir="/tmp/unsloth", per_device_train_batch_size=rows, gradient_accumulation_steps=accumulation,
                max_steps=steps + skipped, learning_rate=2e-4, bf16=True, optim="adamw_8bit", logging_steps=1,
                save_strategy="no", report_to="none", max_length=length, packing=packing,
                gradient_checkpointing=bool(recompute), dataloader_num_workers=0, seed=0, dataset_num_proc=None,
                remove_unused_columns=True,
            )  # fmt: skip
            del clock.times[:]
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            try:
                trainer = SFTTrainer(
                    model=model, args=settings, train_dataset=data, processing_class=tokenizer, callbacks=[clock]
                )
                trainer.train()
            except Exception as error:  # noqa: BLE001  # whatever it is, the other jobs are still worth measuring
                tell({"who": "unsloth", "job": job, "way": f"{way}, packing {packing}", "failed": repr(error)[:300]})
                continue
            gaps = [b - a for a, b in zip(clock.times, clock.times[1:])][skipped - 1 :]
            median = statistics.median(gaps)
            logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            tell({
                "who": "unsloth", "job": job, "way": way + (f", packing {packing}" if job == "real" else ""),
                "load_seconds": loaded, "tokens_per_second": round(tokens / median),
                "best": round(tokens / min(gaps)), "worst": round(tokens / max(gaps)),
                "trained_tokens_per_second": round(trained / median), "step_seconds": round(median, 4),
                "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
                "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2), "losses": logs[:4],
            })  # fmt: skip


def unsloth_clock() -> Any:
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            self.times.append(time.perf_counter())

    return Clock()


def unsloth_data(work: Path, job: str, packing: bool, vocabulary: int) -> tuple[Any, float, float]:
    """Rows for its trainer, and the tokens and trained tokens of a usual step.

    Without its own packing, real rows are laid one behind the other here, into full rows: the best that packing can do.
    """
    import torch
    from datasets import Dataset

    rows, length, accumulation, _ = (JOBS | LONG)[job]
    count = rows * accumulation * sum(steps_of(job))
    if job != "real":
        ids = torch.randint(3, vocabulary, (count, length), generator=torch.Generator().manual_seed(1)).tolist()
        columns = {"input_ids": ids, "labels": ids, "attention_mask": [[1] * length] * count}
        return Dataset.from_dict(columns), rows * accumulation * length, rows * accumulation * (length - 1)
    examples = read_examples(work / "tokens.npz")
    share = sum(e.trained for e in examples) / sum(len(e.ids) for e in examples)
    labels = [[int(i) if w else -100 for i, w in zip(e.ids, e.weights)] for e in examples]
    lines = [e.ids.tolist() for e in examples]
    if not packing:
        flat_ids, flat_labels = list(chain(*lines)), list(chain(*labels))
        lines = [flat_ids[n : n + length] for n in range(0, len(flat_ids) - length, length)]
        labels = [flat_labels[n : n + length] for n in range(0, len(flat_ids) - length, length)]
    columns = {"input_ids": lines, "labels": labels, "attention_mask": [[1] * len(line) for line in lines]}
    tokens = rows * length * (0.985 if packing else 1.0)
    return Dataset.from_dict(columns), tokens, tokens * share


def tell(result: dict[str, Any]) -> None:
    print("RESULT " + json.dumps(result), flush=True)


def results_of(who: str, way: str, jobs: Sequence[str], work: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """Run jobs in a process of their own; yield each result as soon as it is printed."""
    command = [sys.executable, "-m", "bench.peers", who, "--way", way, "--work", str(work), "--folder", str(folder)]
    with subprocess.Popen([*command, "--jobs", *jobs], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("RESULT "):
                yield json.loads(line.removeprefix("RESULT "))
    if child.returncode:
        print(f"{who} {way} failed: {child.returncode}", flush=True)


def make_in_a_process(work: Path, folder: Path) -> None:
    """Make the base, so that this process needs no GPU memory."""
    command = [sys.executable, "-m", "bench.peers", "make", "--work", str(work), "--folder", str(folder)]
    subprocess.run(command, check=True)


def compare(work: Path, folder: Path) -> None:
    """Everything, one process after the other; then the ratios."""
    make_in_a_process(work, folder)
    runs = [("veneer", "-", list(JOBS)), *(("unsloth", way, list(jobs)) for way, jobs in WAYS.items())]
    results: list[dict[str, Any]] = []
    for who, way, jobs in runs:
        for result in results_of(who, way, jobs, work, folder):
            tell(result)
            results.append(result)
    import torch

    best = {}
    for job in JOBS:
        key = "trained_tokens_per_second" if job == "real" else "tokens_per_second"
        theirs = [r[key] for r in results if r["who"] == "unsloth" and r["job"] == job and key in r]
        ours = {r["way"]: r[key] for r in results if r["who"] == "veneer" and r["job"] == job}
        if theirs:
            best[job] = {way: round(speed / max(theirs), 2) for way, speed in ours.items()}
    names = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "unsloth")
    found = {
        "gpu": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d"),
        "versions": {name: metadata.version(name) for name in names},
        "times_the_best_of_unsloth": best, "runs": results,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(best))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tokens", "make", "compare", "veneer", "unsloth"])
    parser.add_argument("files", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("work/tokens.npz"))
    parser.add_argument("--rows", type=int, default=1600)
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder of tokens.npz and the tokenizer")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/base-8b"))
    parser.add_argument("--way", default="-")
    parser.add_argument("--jobs", nargs="+", default=list(JOBS))
    a = parser.parse_args()
    if a.what == "tokens":
        write_tokens(a.files, a.out, a.rows)
    elif a.what == "make":
        make(a.folder, a.work / "tokenizer")
    elif a.what == "veneer":
        run_veneer(a.work, a.folder, a.jobs)
    elif a.what == "unsloth":
        run_unsloth(a.work, a.folder, a.way, a.jobs)
    else:
        compare(a.work, a.folder)


if __name__ == "__main__":
    main()
