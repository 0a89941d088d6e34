"""Measures long rows and small cards on one GPU: speed, peak and prediction within limits of memory, and the targets.

Random weights of Llama-3's shapes in NF4 with double quantization, r = 16 on all linear layers, 8-bit AdamW, random
rows of full length, the engine alone as in bench/engine.py. A limit is one of two:

    @G         tensors take at most G GiB (the allocator's peak); `@ample`: all that 80 GB leave
    @G-total   the process takes at most G GiB, CUDA's context included. The allocator refuses more, and the model
               begins in host memory, as on a card that it never fits

    python3 -m bench.memory --list                                  # names of the cases, by group
    python3 -m bench.memory --group unsloth long usual              # in one run, so that Unsloth is measured beside
    python3 -m bench.memory --cases 8b-4x2048@8-total 70b-4x2048@24-total
    python3 -m bench.memory --table                                 # targets against what was reached; needs no GPU

Prints a JSON line a case as soon as it is measured, and merges it by name into bench/results/memory.json. A case that
fails is printed as such, and the next one runs. Unsloth needs what bench/peers.py says; its base is made if need be.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the command sets it

import torch
import transformers
from tests.support.offload import OFFLOADS, RESIDENT, fill_adapters, placement_of

from bench.engine import SHAPES, batch_of, measure, random_base
from bench.peers import AMPLE, LONG, make_in_a_process, results_of, tell
from veneer.config import Adapter, Data, Model, Quantization, Run, Train
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.objective import LIKELIHOOD
from veneer.engine.placement import MemoryPlacement
from veneer.machine.device import find_machine
from veneer.machine.speeds import Ceilings
from veneer.model.attach import attach
from veneer.planning.base import PlannedModel
from veneer.planning.measure import measure_ceilings
from veneer.planning.planner import Planner
from veneer.planning.target import CONTEXT, device_named

RESULTS = Path(__file__).parent / "results" / "memory.json"


class Case(NamedTuple):
    """A job within a limit.

    Attributes:
        group: Name to select it by.
        shape: Name of bench.engine.SHAPES.
        job: ROWSxLENGTH, and xACCUMULATION.
        tensors_gib: What tensors may take; 0: no such limit.
        total_gib: What the process may take; 0: no such limit.
        layers: Blocks; None: all.
    """

    group: str
    shape: str
    job: str
    tensors_gib: float = 0.0
    total_gib: float = 0.0
    layers: int | None = None

    @property
    def name(self) -> str:
        limit = f"{self.total_gib:g}-total" if self.total_gib else f"{self.tensors_gib:g}"
        shape = self.shape + (f"-{self.layers}-layers" if self.layers else "")
        return f"{shape}-{self.job}@{limit}".replace(f"@{AMPLE:g}", "@ample")

    @property
    def steps(self) -> tuple[int, int]:
        """Steps that are measured, and steps before them; a pass is recorded in the second."""
        rows, length, *_ = map(int, self.job.split("x"))
        if length > 300_000:
            return 1, 0
        if length > 65536:
            return 1, 2
        is_slow = self.shape == "70b" or self.group == "placements" or rows * length > 16384
        return (2, 2) if is_slow else (6, 3)


def _placements() -> Iterator[Case]:
    """Jobs within budgets from streamed to resident, with few blocks, which take less time."""
    budgets = {
        "1x2048": (2.2, 3, 3.5, 4.5, 6, 12),
        "4x2048": (3, 4, 5, 6.5, 9, 16),
        "2x8192": (4, 5, 6, 8, 12, 24),
        "1x32768": (6, 7, 9, 12, 20, 40),
    }
    for job, gibs in budgets.items():
        for gib in gibs:
            yield Case("placements", "8b", job, gib, layers=8)


CASES = (
    *(Case("long", "8b", "1x32768", gib) for gib in (AMPLE, 11.65)),
    *(Case("long", "8b", "2x8192", gib) for gib in (13.0, 8.8)),
    *(Case("long", "8b", "1x65536", gib) for gib in (AMPLE, 17.4)),
    Case("long", "8b", "1x131072", 24.0),
    *(Case("usual", "8b", "4x2048", gib) for gib in (AMPLE, 7.43)),
    Case("usual", "8b", "2x1024x8", 6.42),
    *(Case("longest", "8b", f"1x{n}", total_gib=gib) for n, gib in ((32768, 8), (98304, 16), (163840, 24))),
    Case("longest80", "8b", "1x327680", total_gib=80),
    *(Case("small", "8b", "4x2048", total_gib=gib) for gib in (24, 8)),
    *(Case("small", "8b", job, tensors_gib=3, total_gib=4) for job in ("1x2048", "4x2048")),
    *(Case("70b", "70b", job, total_gib=gib) for gib in (80, 48, 24) for job in ("1x2048", "4x2048")),
    Case("70b", "70b", "4x2048", total_gib=12),
    Case("70b", "70b", "1x2048", total_gib=8),
    *_placements(),
)
UNSLOTH = ("4x2048", "2x1024x8", "2x8192", *LONG)  # at its default: blocks' inputs on the host, the rest recomputed
EQUAL = "equal-8b-1x8192"
GROUPS = ("unsloth", *dict.fromkeys(case.group for case in CASES), "equal")


class Target(NamedTuple):
    """What a case has to reach; with no number, two steps on the same rows and a loss that falls.

    Attributes:
        speed: Tokens/s.
        share, of: Share of another case's speed.
        unsloth: Times Unsloth's speed on the same job.
    """

    speed: float = 0.0
    share: float = 0.0
    of: str = ""
    unsloth: float = 0.0


TARGETS: dict[str, Target] = {
    "8b-1x32768@ample": Target(9000, unsloth=1.4),
    "8b-1x32768@11.65": Target(7800, unsloth=1.2),
    "8b-2x8192@13": Target(12000),
    "8b-2x8192@8.8": Target(unsloth=1.25),
    "8b-1x65536@ample": Target(5900),
    "8b-1x65536@17.4": Target(5300),
    "8b-1x131072@24": Target(3000),
    "8b-4x2048@7.43": Target(unsloth=1.25),
    "8b-2x1024x8@6.42": Target(unsloth=1.25),
    "8b-1x32768@8-total": Target(),
    "8b-1x98304@16-total": Target(),
    "8b-1x163840@24-total": Target(),
    "8b-4x2048@8-total": Target(share=0.85, of="8b-4x2048@24-total"),
    "8b-1x2048@4-total": Target(),
    "8b-4x2048@4-total": Target(share=0.6, of="8b-4x2048@24-total"),
    "70b-1x2048@80-total": Target(1950),
    "70b-4x2048@80-total": Target(1800),
    "70b-1x2048@48-total": Target(),
    "70b-4x2048@48-total": Target(),
    "70b-1x2048@24-total": Target(share=0.7, of="70b-1x2048@80-total"),
    "70b-4x2048@24-total": Target(share=0.7, of="70b-4x2048@80-total"),
    "70b-4x2048@12-total": Target(share=0.5, of="70b-4x2048@80-total"),
    "70b-1x2048@8-total": Target(),
}
PEAK_ERRORS, STEP_ERROR = (0.05, 0.08), 0.15  # of the peak in the median and at worst, of the step's time at worst


class LastModel:
    """The model of the case before, for a next case that needs the same, if it lies on the GPU as it began."""

    def __init__(self) -> None:
        self._key: Any = None
        self._model: Any = None

    def get(self, case: Case) -> Any:
        key = (case.shape, case.layers, bool(case.total_gib))
        if key != self._key or case.total_gib:
            self.drop()
            base = random_base(case.shape, case.layers, True, bool(case.total_gib), are_alike=bool(case.total_gib))
            self._model = attach(base, Adapter(r=16, lora_alpha=32), 0)
            self._key = key
        return self._model

    def drop(self) -> None:
        self._key = self._model = None
        free()


def free() -> None:
    """Free the engines of earlier cases: they and their recorded passes hold each other."""
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def small_card(gib: float) -> Iterator[float]:
    """Within the context the allocator gets no more than a card of that size has; yields GiB for tensors.

    The context counts for what it takes at most, since its last part comes with the first kernels.
    """
    free()
    available, memory = torch.cuda.mem_get_info()
    context = max(memory - available - torch.cuda.memory_reserved(), CONTEXT)
    limit = min(int(gib * 2**30), memory) - context
    torch.cuda.set_per_process_memory_fraction(limit / memory)
    try:
        yield limit / 2**30
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


class Prediction(NamedTuple):
    """What a plan needs to foresee the time of a case's step."""

    case: Case
    placement: MemoryPlacement
    ceilings: Ceilings

    def seconds(self) -> float:
        """The time that `veneer plan` foresees."""
        rows, length, *more = map(int, self.case.job.split("x"))
        name, settings = SHAPES[self.case.shape]
        settings = settings | ({"num_hidden_layers": self.case.layers} if self.case.layers else {})
        with TemporaryDirectory() as folder:
            getattr(transformers, name)(**settings, dtype="bfloat16").save_pretrained(folder)
            base, target = Model(base=folder), replace(device_named("h100"), ceilings=self.ceilings)
            train = Train(
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=more[0] if more else 1,
                optim="adamw_8bit",
            )
            data = Data(train="-", max_length=length, validation=0)
            asked = Run(model=base, data=data, train=train, quantization=Quantization())
            times = Planner(PlannedModel(base, "random rows"), target).forecast(asked, self.placement).step_seconds
        assert times is not None
        return times[1]


class Predictor:
    """Foresees steps in a process of its own, beside the measurement, by ceilings measured on this machine."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, get_context("spawn"))
        self.ceilings = measure_ceilings(find_machine())
        self._asked: Future[float] | None = None

    def ask(self, case: Case, placement: MemoryPlacement) -> None:
        """Begin to foresee a case."""
        self._asked = self._pool.submit(Prediction(case, placement, self.ceilings).seconds)

    def answer(self, measured: float) -> dict[str, float]:
        """What was foreseen, and its error."""
        assert self._asked is not None
        predicted = self._asked.result()
        return {"predicted_step_seconds": round(predicted, 4), "step_error": round(predicted / measured - 1, 4)}

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown(cancel_futures=True)


def run(case: Case, last: LastModel, predictor: Predictor) -> dict[str, Any]:
    """One case."""
    started = time.perf_counter()
    model = last.get(case)
    made = time.perf_counter()
    steps, skipped = case.steps
    ask = partial(predictor.ask, case)
    if case.total_gib:
        with small_card(case.total_gib) as left:
            gib = min(left, case.tensors_gib or left)
            result = measure(model, f"{case.job}@{gib}", steps, False, skipped, ask)
        within = result["process_peak_gib"] <= case.total_gib and result["peak_allocated_gib"] <= gib
    else:
        gib = case.tensors_gib
        result = measure(model, f"{case.job}@{gib}", steps, False, skipped, ask)
        within = result["peak_allocated_gib"] <= gib
    losses = result["losses"]
    result |= predictor.answer(result["step_seconds"])
    return result | {
        "case": case.name,
        "budget_gib": round(gib, 3),
        "within": within,
        "loss_falls": losses[-1] < losses[0] if len(losses) > 1 else None,
        "placement": shortened(result["placement"]),
        "making_seconds": round(made - started, 1),
        "case_seconds": round(time.perf_counter() - made, 1),
    }


def shortened(placement: dict[str, Any]) -> dict[str, Any]:
    """A placement with the number of blocks in each state instead of the blocks themselves."""
    counts: dict[str, Counter[str]] = {}
    for some in placement["blocks"]:
        for suffix, kind in (("", "activations"), (" weights", "weights")):
            for name, state in some[kind].items():
                counts.setdefault(name + suffix, Counter())[str(state)] += some["count"]
    return placement | {"blocks": {name: dict(states) for name, states in counts.items()}}


def streams(placement: dict[str, Any]) -> bool:
    """Whether a shortened placement has moved weights to the host."""
    kinds = [states for kind, states in placement["blocks"].items() if kind.endswith(" weights")]
    return bool(placement.get("streams_ends")) or any("streamed" in states for states in kinds)


def equal() -> dict[str, Any]:
    """Loss and all gradients of one step of an 8B by several placements: equal to the resident one's, bit for bit?"""
    model = attach(random_base("8b", None, True), Adapter(r=16, lora_alpha=32), 0)
    fill_adapters(model)
    engine: Any = FusedEngine(model, graphs=False)
    batch = batch_of(1, 8192, model.config.vocab_size)
    found: dict[str, dict[str, Any]] = {}
    wanted: tuple[float, torch.Tensor] | None = None
    names = ("nothing kept", "x and attention on the host", "all streamed with the ends")
    for name, offload in {"resident": RESIDENT, **{name: OFFLOADS[name] for name in names}}.items():
        engine.apply(placement_of(engine, offload))
        free()
        torch.cuda.reset_peak_memory_stats()
        engine.master.grad = None
        loss = engine.forward_backward(batch.scaled(1 / batch.weight), LIKELIHOOD).loss.item()
        gradient = engine.master.grad.clone()
        wanted = wanted or (loss, gradient)
        found[name] = {
            "loss": loss / batch.weight,
            "loss_equal": loss == wanted[0],
            "gradients_that_differ": int((gradient != wanted[1]).sum()),
            "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        }
    equals = all(one["loss_equal"] and not one["gradients_that_differ"] for one in found.values())
    return {"case": EQUAL, "equal": equals, "gradients": engine.master.numel(), "placements": found}


def unsloth(jobs: Sequence[str], work: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """Unsloth's side, in a process of its own."""
    make_in_a_process(work, folder)
    for result in results_of("unsloth", "unsloth", jobs, work, folder):
        yield result | {"case": f"unsloth-{result['job']}"}


def summary(cases: dict[str, Any]) -> dict[str, Any]:
    """Predicted against measured, over all placements that were measured."""
    names = [case.name for case in CASES]
    rows = [cases[name] for name in names if "peak_error" in cases.get(name, {})]
    found: dict[str, Any] = {"case": "placements", "count": len(rows)}
    found["failed"] = sum("failed" in cases.get(name, {}) for name in names)
    found["beyond_the_budget"] = sum(not row["within"] for row in rows)
    for what in ("peak_error", "step_error"):
        errors = sorted((row[what] for row in rows if what in row), key=abs)
        if errors:
            found[what] = {"median": round(statistics.median(map(abs, errors)), 4), "worst": errors[-1]}
    return found


class Results:
    """The file of results, in which each case stands by its name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cases": {}}

    def add(self, result: dict[str, Any]) -> None:
        """Print a result and write it."""
        card = torch.cuda.get_device_properties(0)
        result |= {"gpu": card.name, "card": str(card.uuid), "date": time.strftime("%Y-%m-%d")}
        tell(result)
        self.found["cases"][result["case"]] = result
        names = ("torch", "triton", "transformers", "bitsandbytes", "flash-attn-4", "unsloth")
        installed = {dist.name.lower() for dist in metadata.distributions() if dist.name}
        versions = {name: metadata.version(name) for name in names if name in installed}
        self.found["versions"] = self.found.get("versions", {}) | versions
        self._path.write_text(json.dumps(self.found, indent=1) + "\n")


def table(cases: dict[str, Any]) -> str:
    """A line a target, in Markdown; speeds are set against Unsloth's of the same card on the same day."""
    lines = [
        "| job@limit | target, tokens/s | reached | times Unsloth | peak predicted, GiB | measured | process |",
        "|---|---|---|---|---|---|---|",
        *(_line(name, target, cases) for name, target in TARGETS.items()),
    ]
    found = summary(cases)
    for what, limits in (("peak_error", PEAK_ERRORS), ("step_error", (STEP_ERROR, STEP_ERROR))):
        if what in found:
            limit = f"at most {limits[0]:.0%} in the median, {limits[1]:.0%} at worst"
            reached = f"{found[what]['median']:.1%}, {found[what]['worst']:+.1%} over {found['count']}"
            lines.append(f"| placements, {what.replace('_', ' ')} | {limit} | {reached} | | | | |")
    if EQUAL in cases:
        lines.append(f"| {EQUAL} | all placements equal bit for bit | {cases[EQUAL].get('equal', 'failed')} | | | | |")
    return "\n".join(lines)


def _line(name: str, target: Target, cases: dict[str, Any]) -> str:
    row, of = cases.get(name, {}), cases.get(target.of, {}).get("tokens_per_second")
    wanted = [f"{target.speed:,.0f}"] if target.speed else []
    wanted += [f"{target.unsloth:g} x Unsloth"] if target.unsloth else []
    if target.of:
        wanted.append(f"{target.share:.0%} of {target.of}" + (f": {target.share * of:,.0f}" if of else ""))
    shape, _, job = name.partition("@")[0].partition("-")
    theirs = cases.get(f"unsloth-{job}", {}) if shape == "8b" else {}
    is_beside = all(theirs.get(key) == row.get(key) for key in ("card", "date"))
    ratio = None
    if "failed" in row:
        reached = f"failed: {row['failed'].splitlines()[0][:80]}"
    elif row:
        speed = row["tokens_per_second"]
        ratio = speed / theirs["tokens_per_second"] if is_beside and "tokens_per_second" in theirs else None
        is_met = row["within"] and speed >= target.speed and (bool(wanted) or bool(row["loss_falls"]))
        is_met = is_met and (not target.of or (of is not None and speed >= target.share * of))
        if target.unsloth:
            is_met = is_met and ratio is not None and ratio >= target.unsloth
        reached = f"**{speed:,}**" if is_met else f"{speed:,} (not met)"
    else:
        reached = "not measured"
    cells = [name, "; ".join(wanted) or "trains, the loss falls", reached, f"{ratio:.2f}" if ratio else ""]
    peaks = ("predicted_peak_gib", "peak_allocated_gib", "process_peak_gib")
    return f"| {' | '.join(cells + [str(row.get(key, '')) for key in peaks])} |"


def measure_all(groups: Sequence[str], names: Sequence[str], results: Results, work: Path, folder: Path) -> None:
    """The cases of some groups and those of some names, Unsloth's first: its process needs the card for itself."""
    jobs = [job for job in UNSLOTH if "unsloth" in groups or f"unsloth-{job}" in names]
    if jobs:
        for result in unsloth(jobs, work, folder):
            results.add(result)
    last, predictor = LastModel(), Predictor()
    chosen = [case for case in CASES if case.group in groups or case.name in names]
    for case in chosen:
        try:
            result = run(case, last, predictor)
        except Exception as error:  # noqa: BLE001  # whatever it is, the other cases are still worth measuring
            result = {"case": case.name, "failed": f"{type(error).__name__}: {error}"[:400]}
        if "failed" in result or streams(result["placement"]):
            last.drop()
        free()
        results.add(result)
    last.drop()
    predictor.close()
    if chosen:
        results.add(summary(results.found["cases"]))
    if "equal" in groups or EQUAL in names:
        try:
            result = equal()
        except Exception as error:  # noqa: BLE001  # as above
            result = {"case": EQUAL, "failed": f"{type(error).__name__}: {error}"[:400]}
        results.add(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", nargs="+", choices=GROUPS, default=[])
    parser.add_argument("--cases", nargs="+", default=[], help="names, as --list prints them")
    parser.add_argument("--list", action="store_true", help="print the cases")
    parser.add_argument("--table", action="store_true", help="print targets and results, in Markdown")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder of the tokenizer, for Unsloth's base")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/base-8b"), help="Unsloth's base")
    a = parser.parse_args()
    by_group = {"unsloth": [f"unsloth-{job}" for job in UNSLOTH], "equal": [EQUAL]}
    for case in CASES:
        by_group.setdefault(case.group, []).append(case.name)
    unknown = set(a.cases) - {name for names in by_group.values() for name in names}
    if unknown:
        sys.exit(f"{', '.join(sorted(unknown))}: no such case; see --list")
    if a.list:
        print("\n".join(f"{group}: {' '.join(by_group[group])}" for group in GROUPS))
    elif a.table:
        print(table(Results(a.out).found["cases"]))
    else:
        measure_all(a.group, a.cases, Results(a.out), a.work, a.folder)


if __name__ == "__main__":
    main()
