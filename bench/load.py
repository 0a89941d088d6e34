"""How long does a base take to load, to the first step? Streamed, from kept 4-bit weights, and by Transformers' loader.

    python bench/load.py --shape 8B --folder /tmp/load        # makes 16 GB of random weights there, and measures
    python bench/load.py --shape tiny --folder /tmp/tiny      # anywhere, in a minute

Each run is a fresh process that loads the folder in NF4, attaches an adapter and takes one step of 128 tokens. `warm`:
the files are in the page cache, as when they were just written or downloaded; `cold`: they were dropped from it. Every
process must come to the same weights. Imports take longer than the load itself, and depend on what else is installed
beside Veneer (Transformers imports sklearn and torchvision where it finds them) and on whether Python may keep bytecode
(not with PYTHONDONTWRITEBYTECODE), so run it in an environment of its own. Prints a JSON line a run, writes
bench/results/load.json.

imports_seconds    from the start of the process until torch, Transformers, PEFT and bitsandbytes are there
load_seconds       the load alone
ready_seconds      from the start of the process until the adapter is attached
first_step_seconds from the start of the process until the first loss is known
loaded_to_step     the last without the first: from the beginning of the load to the first loss
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the command sets it

BORN = "VENEER_BENCH_BORN"  # when the process was started, for the process
RESULTS = Path(__file__).parent / "results" / "load.json"
TIMES = ("imports_seconds", "load_seconds", "ready_seconds", "first_step_seconds", "loaded_to_step")
WAYS = ("files", "cache", "transformers")
SHAPES: dict[str, dict[str, Any]] = {
    "8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256),
    "1B": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, head_dim=64,
               num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True),
    "tiny": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=49152),
}  # fmt: skip


def make(shape: str, folder: Path) -> None:
    """A folder of random bf16 weights in shards of 4 GB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(
            LlamaConfig(**SHAPES[shape], max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=500000.0)
        )
    model.save_pretrained(folder, max_shard_size="4GB")


def load_once(way: str, folder: Path) -> dict[str, Any]:
    """Load, attach, one step; of this process, which has done nothing else."""
    born = float(os.environ.get(BORN, time.time()))
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401

    from veneer.config import Adapter, Model, Quantization
    from veneer.machine.device import find_machine, peak_resident_bytes
    from veneer.model.attach import attach
    from veneer.model.load import compute_dtype, keep_4bit_layout, load_base, load_plainly, settings_of
    from veneer.model.locate import locate
    from veneer.model.quiet import quiet

    machine, model = find_machine(), Model(base=str(folder), dtype="bfloat16")
    _wait(machine.device)
    imported = time.time() - born
    quantization = Quantization(cache=way == "cache")
    result: dict[str, Any] = {"way": way, "imports_seconds": round(imported, 3)}
    started = time.perf_counter()
    if way == "transformers":
        with quiet():
            base, _ = load_plainly(locate(model), settings_of(model, quantization, machine))
        base.requires_grad_(False)
        keep_4bit_layout(base)
        base.config.use_cache = False
    else:
        base, report = load_base(locate(model), model, quantization, machine)
        result |= {"way": report.way, "bytes_read": report.bytes_read, "load_base_seconds": round(report.seconds, 3)}
    _wait(machine.device)
    result["load_seconds"] = round(time.perf_counter() - started, 3)
    if machine.device == "cuda":
        result["load_peak_device_bytes"] = torch.cuda.max_memory_allocated()
    result["load_peak_resident_bytes"] = peak_resident_bytes()
    tuned = attach(base, Adapter(), 0)
    _wait(machine.device)
    result["ready_seconds"] = round(time.time() - born, 3)
    ids = torch.arange(1, 129, device=machine.device).view(1, -1)
    loss = tuned(input_ids=ids, labels=ids).loss
    loss.backward()
    result["loss"] = round(loss.item(), 4)
    result["first_step_seconds"] = round(time.time() - born, 3)
    result["loaded_to_step"] = round(time.time() - born - imported, 3)
    result["dtype"] = str(compute_dtype(model, machine))
    result["weights"] = _digest(base)
    return result


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def _digest(base: Any) -> str:
    """Of the sums of all tensors' bytes, frozen ones only, by name."""
    import torch

    sums = {
        name: int(tensor.detach().contiguous().reshape(-1).view(torch.uint8).sum(dtype=torch.int64))
        for name, tensor in base.state_dict().items()
        if "lora_" not in name
    }
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]


def child(*arguments: str) -> dict[str, Any]:
    """A fresh process of this script; its last line is its result."""
    command = [sys.executable, __file__, *arguments]
    born = {BORN: str(time.time())}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | born)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    lines = done.stdout.strip().splitlines()
    return dict(json.loads(lines[-1])) if lines else {}


def drop_from_page_cache(folder: Path) -> None:
    """Have the system forget the files' contents; needs no rights, but the files must be on the disk."""
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(folder: Path, way: str) -> None:
    """Read the files that a way reads, so that they are in the page cache."""
    files = folder.glob(".veneer/*/*.safetensors" if way == "cache" else "*.safetensors")
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while handle.read(64 * 2**20):
                pass


def measure(folder: Path, runs: int, peer_runs: int) -> dict[str, Any]:
    """All runs, the medians, and whether all processes had the same weights."""
    shutil.rmtree(folder / ".veneer", ignore_errors=True)
    plan = [("cache", "first", 1), ("files", "warm", runs), ("cache", "warm", runs)]
    plan += [("transformers", "warm", peer_runs), ("files", "cold", 2), ("cache", "cold", 2)]
    results = []
    for way, state, times in plan:
        for _ in range(times):
            if state == "cold":
                drop_from_page_cache(folder)
            elif state == "warm":
                warm(folder, way)
            results.append({"state": state} | child("--child", way, "--folder", str(folder)))
            print(json.dumps(results[-1]), flush=True)
    found = summary(results)
    if not found["same_weights"]:
        print("THE WEIGHTS DIFFER between ways of loading", file=sys.stderr)
    return found


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of each way, and whether all had the same weights."""
    medians: dict[str, dict[str, float]] = {}
    for row in results:
        label = f"{row['way']} {row['state']}" + (" and kept" if row["state"] == "first" else "")
        same = [r for r in results if (r["way"], r["state"]) == (row["way"], row["state"])]
        medians[label] = {key: statistics.median(r[key] for r in same) for key in TIMES}
    equal = len({row["weights"] for row in results}) == 1
    return {"medians": medians, "same_weights": equal, "runs": results}


def main() -> None:
    """Make the folder if need be, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8B")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3, help="of Veneer's ways, warm")
    parser.add_argument("--peer-runs", type=int, default=2, help="of Transformers' loader")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", choices=[*WAYS, "make"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child == "make":
        return make(arguments.shape, arguments.folder)
    if arguments.child:
        return print(json.dumps(load_once(arguments.child, arguments.folder)))
    if not (arguments.folder / "config.json").exists():
        started = time.perf_counter()
        child("--child", "make", "--shape", arguments.shape, "--folder", str(arguments.folder))
        print(f"made {arguments.folder} in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    found = measure(arguments.folder, arguments.runs, arguments.peer_runs)

    from veneer.machine.device import find_machine
    from veneer.machine.environment import environment

    size = sum(file.stat().st_size for file in arguments.folder.glob("*.safetensors"))
    head = {
        "command": f"bench/load.py --shape {arguments.shape} --runs {arguments.runs}",
        "base_bytes": size,
        "machine": find_machine().describe(),
        "environment": environment(),
    }
    whole = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    key = f"{arguments.shape} on {find_machine().name}"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(whole | {key: head | found}, indent=1) + "\n")
    print(json.dumps({key: found["medians"], "same_weights": found["same_weights"]}))
    sys.exit(0 if found["same_weights"] else 1)


if __name__ == "__main__":
    main()
