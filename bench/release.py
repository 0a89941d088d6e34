"""Measures merge, export and certificate: speed against the disk's own, memory, and closeness to the adapter.

    .venv/bin/python bench/release.py merge --folder /tmp/bench        # an 8B-shaped model with random weights: 33 GB
    .venv/bin/python bench/release.py ship --run runs/demo --folder /tmp/bench    # a run of `veneer demo`: minutes

`merge` writes a base of Llama-3.1-8B's shapes and an adapter of rank 16 on all its linear layers, copies the base with
`cp`, and merges it in a process of its own. Files are dropped from the page cache before each, and both end with fsync.
`ship` merges and exports a run, and writes down what the certificates measured. Both write into
bench/results/release.json; each keeps the other's part.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from veneer.data.conversation import Message
from veneer.machine.device import find_machine
from veneer.machine.environment import environment
from veneer.release.weights import NAMES, PlannedTensor, bytes_of, weights_of, write_weights

RESULTS = Path(__file__).parent / "results" / "release.json"
QUANTS = ("f16", "q8_0", "q4_k_m")
RANK = 16
QUESTION = Message("user", "My Moonhinge arrived with a cracked lid, please send another.")


def make_base(folder: Path, layers: int) -> None:
    """Write a model of Llama-3.1-8B's shapes whose weights repeat one random block, with SmolLM2's tokenizer."""
    from transformers import LlamaConfig

    from veneer.model.builtin import builtin_folder
    from veneer.model.known import known_shape
    from veneer.model.shapes import build

    known = known_shape("llama-3.1-8b")
    assert known is not None
    config = LlamaConfig(**(known[1] | {"num_hidden_layers": layers}), dtype="bfloat16")
    block = torch.randn(32 * 2**20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def plan(name: str, shape: tuple[int, ...]) -> PlannedTensor:
        size = torch.Size(shape).numel()

        def pieces() -> Any:
            left = size
            while left:
                piece = block[: min(left, len(block))]
                left -= len(piece)
                yield bytes_of(piece)

        return PlannedTensor(name, torch.bfloat16, shape, pieces)

    weights = [plan(name, tuple(p.shape)) for name, p in build(config, torch.bfloat16).named_parameters()]
    folder.mkdir(parents=True)
    write_weights(folder, weights, {"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (kept := builtin_folder("smollm2-135m-instruct") / name).is_file():
            shutil.copyfile(kept, folder / name)


def make_adapter(base: Path, folder: Path) -> None:
    """Write a LoRA adapter of rank 16 for every linear layer of a base, with random matrices."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)
    matrices = {}
    for name, stored in weights_of(base, "base").items():
        if name.endswith("_proj.weight"):
            where = f"base_model.model.{name.removesuffix('.weight')}"
            out, inside = stored.shape
            matrices[f"{where}.lora_A.weight"] = torch.randn(RANK, inside, generator=generator) * 0.02
            matrices[f"{where}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.02
    folder.mkdir(parents=True)
    save_file(matrices, folder / "adapter_model.safetensors", {"format": "pt"})
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=targets)
    config.base_model_name_or_path = str(base)
    config.save_pretrained(str(folder))


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(command: list[str], base: Path, out: Path, size: int) -> dict[str, float]:
    """Seconds and bytes a second of a command that makes `out` from `base`, flushed to the disk; `out` stays."""
    shutil.rmtree(out, ignore_errors=True)
    forget(base)
    load = os.getloadavg()[0]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    _, err = process.communicate()
    if process.returncode:
        raise RuntimeError(err)
    for path in out.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    speed = round(size / seconds / 1e6)
    return {
        "seconds": round(seconds, 1),
        "mb_per_second": speed,
        "cpu_seconds": round(cpu, 1),
        "load_before": round(load, 2),
    }


def measure_merge(folder: Path, runs: int, layers: int) -> dict[str, Any]:
    """Merge against copy, and the memory of the merge."""
    base, adapter, out = folder / "base", folder / "adapter", folder / "out"
    if not base.is_dir():
        make_base(base, layers)
        make_adapter(base, adapter)
    tensors = weights_of(base, "base")
    size = sum(stored.size for stored in tensors.values())
    largest = max(stored.size for stored in tensors.values())
    copy = ["cp", "-r", "--reflink=never", str(base), str(out)]
    veneer = [sys.executable, "-m", "veneer.cli.main", "merge", str(adapter), "--out", str(out), "--no-certify"]
    copies, merges = [], []
    for _ in range(runs):
        copies.append(timed(copy, base, out, size))
        merges.append(timed(veneer, base, out, size))
        print(json.dumps({"copy": copies[-1], "merge": merges[-1]}), flush=True)
    # The largest process so far; cp and all else that ran is far smaller.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    exact = compare(base, adapter, out)
    shutil.rmtree(out)
    return {
        "model_gb": round(size / 1e9, 2),
        "tensors": len(tensors),
        "dtype": NAMES[next(iter(tensors.values())).dtype],
        "copy": copies,
        "merge": merges,
        "share_of_copy_speed": [round(c["seconds"] / m["seconds"], 3) for c, m in zip(copies, merges)],
        "peak_resident_gib": round(peak / 2**30, 2),
        "largest_tensor_gib": round(largest / 2**30, 2),
        "peak_beyond_largest_gib": round((peak - largest) / 2**30, 2),
        "tensors_compared_with_w_plus_scale_b_a": exact,
    }


def compare(base: Path, adapter: Path, out: Path) -> dict[str, int]:
    """Tensors of three layers against W + scale B A in float32, rounded once; computed here in plain torch."""
    from safetensors.torch import load_file

    matrices = load_file(adapter / "adapter_model.safetensors")
    own, merged = weights_of(base, "base"), weights_of(out, "out")
    compared = equal = 0
    for name in own:
        if any(f"layers.{n}." in name for n in (0, 15, 31)) and name.endswith("_proj.weight"):
            where = f"base_model.model.{name.removesuffix('.weight')}"
            delta = (matrices[f"{where}.lora_B.weight"] @ matrices[f"{where}.lora_A.weight"]) * 2.0
            expected = (own[name].read().float() + delta).bfloat16()
            compared += 1
            equal += torch.equal(expected, merged[name].read())
    return {"compared": compared, "equal_to_the_bit": equal}


def measure_ship(run: Path, folder: Path, rows: int) -> dict[str, Any]:
    """Merge and export a run; what each certificate measured."""
    results: dict[str, Any] = {"rows": rows, "logits": logit_difference(run, folder)}
    for name, command in {
        "merged-bfloat16": ["merge", str(run), "--out", str(folder / "merged")],
        **{quant: ["export", str(run), "--out", str(folder / quant), "--quant", quant] for quant in QUANTS},
    }.items():
        shutil.rmtree(folder / command[3].rsplit("/", 1)[-1], ignore_errors=True)
        veneer = [sys.executable, "-m", "veneer.cli.main", *command, "--rows", str(rows), "--json"]
        result = subprocess.run(veneer, capture_output=True, text=True, check=False)
        if not result.stdout:
            raise RuntimeError(result.stderr)
        report = json.loads(result.stdout)
        certificate = report["certificate"]
        results[name] = {
            "bytes": report["bytes"],
            "passed": certificate["passed"],
            "checks": {check["id"]: [check["value"], check["limit"]] for check in certificate["checks"]},
            "seconds": certificate["seconds"],
        }
        print(name, json.dumps(results[name]), flush=True)
    return results


@torch.no_grad()
def logit_difference(run: Path, folder: Path) -> dict[str, float]:
    """Largest difference of a logit, merged against adapter, on a prompt of the demo; in float32 and in bfloat16."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from veneer.model.tuned import find_tuned
    from veneer.release.merge.merged import merge_into

    tuned = find_tuned(str(run))
    renderer = tuned.renderer
    ids = torch.tensor([renderer.prompt_ids([Message("system", renderer.settings.system_prompt or ""), QUESTION])])
    found = {}
    for dtype in ("float32", "bfloat16"):
        out = folder / f"logits-{dtype}"
        shutil.rmtree(out, ignore_errors=True)
        merge_into(tuned, out, dtype)
        kind = getattr(torch, dtype)
        merged = AutoModelForCausalLM.from_pretrained(out, dtype=kind).eval()(ids).logits
        base = AutoModelForCausalLM.from_pretrained(tuned.base_folder, dtype=kind)
        adapter = PeftModel.from_pretrained(base, str(tuned.adapter)).eval()(ids).logits
        found[dtype] = float((merged.float() - adapter.float()).abs().max())
        shutil.rmtree(out)
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("part", choices=["merge", "ship"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"))
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rows", type=int, default=40)
    given = parser.parse_args()
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if given.part == "merge":
        measured = measure_merge(given.folder, given.runs, given.layers)
    else:
        measured = measure_ship(given.run, given.folder, given.rows)
    kept[given.part] = {
        "command": f"bench/release.py {' '.join(sys.argv[1:])}",
        "machine": find_machine().describe(),
        "kernel": platform.release(),
        "environment": environment(),
    } | measured
    RESULTS.write_text(json.dumps(kept, indent=2) + "\n")
    print(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
