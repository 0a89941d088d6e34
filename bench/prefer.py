"""Measures preference training (DPO) at 8B shapes on one GPU: pairs/s and peak, against SFT, TRL and Unsloth.

Random weights of Llama-3-8B's shapes in NF4 with double quantization, r = 16 on all linear layers, 8-bit AdamW, 4 pairs
x 2 micro-batches a step, real pairs of at most 2,048 tokens an answer; the engine with its objective, its clipping and
its optimizer's step. The same steps in every case, so that two cases differ by nothing else:

    dpo-once          each pair's prompt goes through the model once; `dpo-twice`: in both documents of its pair
    ...-live          the reference's log-probabilities are computed in each step, by the starting adapter; else before
    sft-...           supervised training on the very tokens that go through the model in the case of that name
    ...@9.9           tensors take at most so many GiB; else all that 80 GB leave
    long-...          random pairs whose prompts are four times as long as either answer
    equal             one micro-batch, prompt once against twice: the loss, and the gradient's relative difference

    python3 -m bench.prefer tokens dpo_en_demo.json --work work          # anywhere; SmolLM2's tokenizer
    python3 -m bench.prefer gpu --work work                              # or --group usual limits long
    python3 -m bench.prefer peers --work work --folder /tmp/base-8b      # TRL and Unsloth, a process each
    python3 -m bench.prefer table                                        # targets against results; needs no GPU
    python3 -m bench.prefer curve                                        # see bench/prefer_curve.py; needs no GPU

`gpu --data FILE.json` makes the tokens itself where SmolLM2 can be fetched, or is named by --smollm2. Prints a JSON
line a case, and merges it by name into bench/results/prefer.json. A case that fails is printed as such, and the next
one runs.

Predicted on an H100 before the first run, from 17,400 tokens/s of SFT at 4 x 2,048 and 1,560 tokens a pair with the
prompt twice, 1,107 with it once: dpo-twice 10 pairs/s, dpo-once 13.5 (1.35 times), dpo-once-live 10.5 (a third of the
passes more), dpo-once@9.9 9.5 (SFT makes 12,850 tokens/s in 8.9 GiB), long 1.6 times, SFT's speed 1.03 times that of
DPO, its peak equal within 1%.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the command sets it

import numpy as np
import torch

from bench.engine import predicted_peak, process_peak_bytes, random_base
from bench.memory import Results, free, shortened
from bench.peers import AMPLE, make_in_a_process
from veneer.config import Adapter, Data, Model, Train
from veneer.data.batch import Batch, Batches, Example
from veneer.data.pipeline import prepare
from veneer.data.render import Renderer
from veneer.engine.fused.engine import FusedEngine
from veneer.engine.interface import BatchShapes, document_losses
from veneer.engine.objective import LIKELIHOOD
from veneer.model.attach import attach
from veneer.model.load import load_tokenizer
from veneer.model.locate import locate
from veneer.planning.memory import optimizer_bytes
from veneer.training.objectives import DirectPreference
from veneer.training.optimizer import build_optimizer

RESULTS = Path(__file__).parent / "results" / "prefer.json"
PAIRS, ACCUMULATION, MAX_LENGTH, RATE = 4, 2, 2048, 5e-6
STEPS, SKIPPED = 20, 3  # steps that are measured, and steps before them
PEERS = ("trl", "unsloth")
LONG = (1024, 256)  # mean tokens of prompt and answer
Pair = tuple[Example, Example]


class Case(NamedTuple):
    """A way to train on pairs.

    Attributes:
        group: Name to select it by.
        what: dpo or sft.
        prompt: How often a pair's prompt goes through the model: once or twice.
        is_live: Whether the reference is computed in each step.
        gib: What tensors may take.
        is_long: Whether the pairs are random ones with long prompts.
    """

    group: str
    what: str
    prompt: str
    is_live: bool = False
    gib: float = AMPLE
    is_long: bool = False

    @property
    def name(self) -> str:
        live = "-live" if self.is_live else ""
        limit = "" if self.gib == AMPLE else f"@{self.gib:g}"
        return ("long-" if self.is_long else "") + f"{self.what}-{self.prompt}{live}{limit}"


CASES = (
    *(Case("usual", what, prompt) for prompt in ("twice", "once") for what in ("sft", "dpo")),
    *(Case("usual", "dpo", prompt, is_live=True) for prompt in ("twice", "once")),
    *(Case("limits", what, prompt, gib=9.9) for prompt in ("twice", "once") for what in ("sft", "dpo")),
    *(Case("long", "dpo", prompt, is_long=True) for prompt in ("twice", "once")),
)
EQUAL = "equal"
GROUPS = (*dict.fromkeys(case.group for case in CASES), EQUAL)


def write_tokens(file: str, work: Path, base: str) -> None:
    """Write pairs as tokens, with the text for peers and the tokenizer beside it."""
    work.mkdir(parents=True, exist_ok=True)
    source = Model(base=base)
    tokenizer = load_tokenizer(locate(source))
    data = Data(train=file, validation=0, max_length=MAX_LENGTH)
    part = prepare(data, Renderer(tokenizer, data), 42).train
    examples = [part[n] for n in range(len(part))]
    spans = np.array([example.spans[0][:2] for example in examples])
    lengths = [len(example.ids) for example in examples]
    np.savez_compressed(work / "pairs.npz", ids=np.concatenate([e.ids for e in examples]), lengths=lengths, spans=spans)
    rows = json.loads(Path(file).read_text())
    used = [int(e.place.rpartition("[")[2].rstrip("]")) - 1 for e in examples[::2]]  # peers get the same pairs
    (work / "pairs.json").write_text(json.dumps([rows[n] for n in used]))
    tokenizer.save_pretrained(work / "tokenizer")


def read_pairs(work: Path) -> list[Pair]:
    found = dict(np.load(work / "pairs.npz"))
    starts = np.cumsum(found["lengths"]) - found["lengths"]
    examples = [
        Example(found["ids"][start : start + length].astype(np.int32), ((int(first), int(last), 1.0),), str(n))
        for n, (start, length, (first, last)) in enumerate(zip(starts, found["lengths"], found["spans"], strict=True))
    ]
    return list(zip(examples[::2], examples[1::2], strict=True))


def long_pairs(count: int) -> list[Pair]:
    """Random pairs with prompts four times as long as either answer, each a quarter longer or shorter."""
    rng = np.random.default_rng(0)
    pairs = []
    for n in range(count):
        prompt = rng.integers(3, 128_000, int(LONG[0] * rng.uniform(0.75, 1.25)))
        answers = [rng.integers(3, 128_000, int(LONG[1] * rng.uniform(0.75, 1.25))) for _ in range(2)]
        both = [np.concatenate([prompt, answer]).astype(np.int32) for answer in answers]
        chosen, rejected = (Example(ids, ((len(prompt), len(ids), 1.0),), str(n)) for ids in both)
        pairs.append((chosen, rejected))
    return pairs


def micro_batches(pairs: Sequence[Pair]) -> list[list[list[Pair]]]:
    """The pairs of each micro-batch of each step of an epoch, of full steps alone."""
    examples = [example for pair in pairs for example in pair]
    batches = Batches(examples, [len(e.ids) for e in examples], PAIRS, ACCUMULATION, 0, documents_per_row=2)
    steps = [batches.members_of_step(n) for n in range(len(pairs) // (PAIRS * ACCUMULATION))]
    return [[[pairs[n // 2] for n in members[::2]] for members in step] for step in steps]


def batch_of(pairs: Sequence[Pair], case: Case) -> Batch:
    """Lay pairs out as a case has it."""
    if case.what == "sft":
        return Batch.of([example for chosen, other in pairs for example in (chosen, _alone(other, case.prompt))])
    return Batch.of([example for pair in pairs for example in pair], 2, shares=case.prompt == "once")


def _alone(example: Example, prompt: str) -> Example:
    """Return the rejected document, without its prompt where that goes through the model once."""
    if prompt == "twice":
        return example
    (first, last, weight), *_ = example.spans
    return Example(example.ids[first:], ((1, last - first, weight),), example.place)


def measure(model: Any, case: Case, steps: Sequence[Sequence[Sequence[Pair]]]) -> dict[str, Any]:
    """Steps of training; the first ones are made before those that are measured."""
    engine = FusedEngine(model)
    optimizer = build_optimizer([engine.master], Train(optim="adamw_8bit", learning_rate=RATE), "cuda")
    states = optimizer_bytes([engine.master.numel()], "adamw_8bit")
    objective = DirectPreference() if case.what == "dpo" else LIKELIHOOD
    laid = [[batch_of(pairs, case) for pairs in step] for step in steps]
    largest = max((batch for step in laid for batch in step), key=lambda batch: batch.tokens)
    shapes = BatchShapes(largest.lengths, varies=True, shared=largest.shared)
    placement = engine.plan_within(shapes, int(case.gib * 2**30) - states)
    begin = engine.master.detach().cpu()  # where the next case begins as well
    start = begin.cuda() if case.is_live else None
    reference_seconds = 0.0
    if case.what == "dpo" and not case.is_live:
        torch.cuda.synchronize()
        started = time.perf_counter()
        laid = [[known(engine, batch) for batch in step] for step in laid]
        reference_seconds = time.perf_counter() - started

    def step(batches: Sequence[Batch]) -> float:
        weight, total = sum(map(objective.weight, batches)), torch.zeros((), dtype=torch.float64, device="cuda")
        for batch in batches:
            asked = batch if start is None else live(engine, batch, start)
            total += engine.forward_backward(asked.scaled(1 / weight), objective).loss
        torch.nn.utils.clip_grad_norm_([engine.master], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total.item()) / weight

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for batches in (*laid[:SKIPPED], *laid):
        torch.cuda.synchronize()
        started = time.perf_counter()
        losses.append(step(batches))
        seconds.append(time.perf_counter() - started)
    result = figures(seconds[SKIPPED:], laid)
    engine.master.data.copy_(begin)
    return result | {
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "process_peak_gib": round(process_peak_bytes() / 2**30, 2),
        "within": torch.cuda.max_memory_allocated() <= case.gib * 2**30,
        "reference_seconds": round(reference_seconds, 2),
        "placement": shortened(placement.as_dict()),
        "losses": [round(loss, 4) for loss in losses],
        **predicted_peak(placement, states),
    }


def figures(seconds: Sequence[float], laid: Sequence[Sequence[Batch]]) -> dict[str, Any]:
    """Speeds over all measured steps, and the spread of the speeds of single ones, which differ in length."""
    tokens = [sum(batch.tokens for batch in step) for step in laid]
    pairs = PAIRS * ACCUMULATION
    low, median, high = statistics.quantiles((n / s for n, s in zip(tokens, seconds, strict=True)), n=4)
    return {
        "pairs_per_second": round(pairs * len(seconds) / sum(seconds), 2),
        "tokens_per_second": round(sum(tokens) / sum(seconds)),
        "tokens_per_second_of_a_step": {"low": round(low), "median": round(median), "high": round(high)},
        "tokens_of_a_pair": round(sum(tokens) / pairs / len(tokens)),
        "steps": len(seconds),
        "step_seconds": [round(second, 4) for second in seconds],
    }


def known(engine: FusedEngine, batch: Batch) -> Batch:
    """Return the batch with the reference's log-probabilities: those of the adapter as it is."""
    sums = [-loss for loss in document_losses(engine, batch)]
    value_T = torch.zeros(len(batch.ids_T))
    ends = np.cumsum(batch.lengths)
    trained = batch.targets_T >= 0
    for end, length, value in zip(ends.tolist(), batch.lengths, sums, strict=True):
        value_T[end - length + int(trained[end - length : end].nonzero()[0])] = value
    return replace(batch, values={"reference": value_T})


def live(engine: FusedEngine, batch: Batch, start: torch.Tensor) -> Batch:
    """Return the batch with the log-probabilities of the starting adapter, which takes the other one's place."""
    now = engine.master.detach().clone()
    engine.master.data.copy_(start)
    batch = known(engine, batch)
    engine.master.data.copy_(now)
    return batch


def equal(model: Any, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Loss and gradient of one micro-batch, with the prompt once and twice."""
    from tests.support.offload import fill_adapters

    fill_adapters(model)
    engine: Any = FusedEngine(model, gradient_checkpointing=True, graphs=False)
    found = {}
    for prompt in ("twice", "once"):
        engine.master.grad = None
        batch = batch_of(pairs, Case("", "dpo", prompt))
        reference = {"reference": torch.zeros(len(batch.ids_T))}  # so far off that a usual beta would saturate the loss
        loss = engine.forward_backward(replace(batch, values=reference).scaled(1.0), DirectPreference(beta=1e-4)).loss
        found[prompt] = (loss.item(), engine.master.grad.double().clone())
    difference = (found["once"][1] - found["twice"][1]).norm() / found["twice"][1].norm()
    losses = {prompt: loss for prompt, (loss, _) in found.items()}
    return {"losses": losses, "gradient_difference": float(difference)}


def gpu(a: argparse.Namespace) -> None:
    """All cases that are asked for."""
    if a.data is not None:
        write_tokens(a.data, a.work, a.smollm2)
    results = Results(a.out)
    of_data = read_pairs(a.work)
    steps = {False: micro_batches(of_data)[: a.steps or STEPS], True: micro_batches(long_pairs(8 * 12))}
    model = attach(random_base("8b", None, True), Adapter(r=16, lora_alpha=32), 0)
    wanted = set(a.cases or ())
    groups = set(() if wanted and not a.group else a.group or GROUPS)
    for case in CASES:
        if case.group in groups or case.name in wanted:
            results.add(_tried(case.name, partial(measure, model, case, steps[case.is_long])))
    if EQUAL in groups | wanted:  # last, since it fills the adapters
        results.add(_tried(EQUAL, partial(equal, model, steps[False][0][0])))


def _tried(name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    free()
    try:
        return {"case": name} | run()
    except Exception as error:  # noqa: BLE001  # the other cases are still worth measuring
        return {"case": name, "failed": f"{type(error).__name__}: {error}"[:400]}


def peers(a: argparse.Namespace) -> None:
    """TRL and Unsloth, each in a process of its own, on the base that bench/peers.py makes."""
    results = Results(a.out)
    make_in_a_process(a.work, a.folder)
    for who in a.cases or PEERS:
        for result in _lines([sys.executable, "-m", "bench.prefer_peers", who, str(a.work), str(a.folder)]):
            results.add(result | {"case": who})


def _lines(command: list[str]) -> Iterator[dict[str, Any]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("RESULT "):
                yield json.loads(line.removeprefix("RESULT "))
    if child.returncode:
        print(f"{' '.join(command[2:4])} failed: {child.returncode}", flush=True)


def table(cases: dict[str, Any]) -> str:
    """A line a target, in Markdown; peers count where they were measured on the same card on the same day."""

    def value(name: str, key: str = "pairs_per_second") -> float | None:
        found: float | None = cases.get(name, {}).get(key)
        return found

    def ratio(name: str, of: str, key: str) -> float | None:
        one, other = cases.get(name, {}), cases.get(of, {})
        is_beside = all(one.get(what) == other.get(what) for what in ("card", "date"))
        return one[key] / other[key] if is_beside and key in one and key in other else None

    def times_twice(name: str, of: str) -> float | None:
        """The ratio of two ways by their median steps, of which one may have compiled a kernel."""
        found = [ratio(name, of, key) for key in ("tokens_per_second", "tokens_of_a_pair")]
        if None in found:
            return None
        one, other = (cases[case]["tokens_per_second_of_a_step"]["median"] for case in (name, of))
        return float(one / other / found[1])

    speed, tokens, peak = "pairs_per_second", "tokens_per_second", "peak_allocated_gib"
    limits = [
        ("pairs/s, reference cached", value("dpo-once"), 7.0, None),
        ("pairs/s, reference live", value("dpo-once-live"), 5.5, None),
        ("times Unsloth", ratio("dpo-once", "unsloth", speed), 2.3, None),
        ("times TRL", ratio("dpo-once", "trl", speed), None, None),
        ("pairs/s within 10 GiB", value("dpo-once@9.9"), 5.0, None),
        ("peak there, GiB", value("dpo-once@9.9", peak), None, 10.0),
        ("peak, times SFT's", ratio("dpo-once", "sft-once", peak), None, 1.05),
        ("tokens/s, times SFT's", ratio("dpo-once", "sft-once", tokens), 0.9, None),
        ("prompt once, times twice", times_twice("dpo-once", "dpo-twice"), 1.25, None),
        ("the same with long prompts", times_twice("long-dpo-once", "long-dpo-twice"), 1.6, None),
    ]
    lines = ["| figure | at least | at most | reached |", "|---|---|---|---|"]
    for name, found, least, most in limits:
        is_met = found is not None and (least is None or found >= least) and (most is None or found <= most)
        reached = "not measured" if found is None else f"**{found:.2f}**" if is_met else f"{found:.2f} (not met)"
        lines.append(f"| {name} | {least or ''} | {most or ''} | {reached} |")
    failed = [f"{name}: {case['failed']}" for name, case in cases.items() if "failed" in case]
    return "\n".join([*lines, *failed])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tokens", "gpu", "peers", "table", "curve"])
    parser.add_argument("file", nargs="?", help="of tokens: rows with chosen and rejected")
    parser.add_argument("--data", help="the same for gpu, where no tokens are in --work")
    parser.add_argument("--smollm2", default="smollm2-135m-instruct", help="base whose tokenizer is used")
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder of pairs and tokenizer")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/base-8b"), help="folder of the peers' base")
    parser.add_argument("--group", nargs="+", choices=GROUPS)
    parser.add_argument("--cases", nargs="+", choices=[*(case.name for case in CASES), EQUAL, *PEERS])
    parser.add_argument("--steps", type=int, help="that are measured")
    parser.add_argument("--start", type=Path, default=Path("runs/demo"), help="of curve: run of the demo")
    parser.add_argument("--python", type=Path, help="of curve: Python that has TRL")
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    if a.what == "tokens":
        write_tokens(a.file, a.work, a.smollm2)
    elif a.what == "gpu":
        gpu(a)
    elif a.what == "peers":
        peers(a)
    elif a.what == "table":
        print(table(json.loads(a.out.read_text())["cases"]))
    else:
        from bench.prefer_curve import compare

        compare(a.start, a.python, a.steps or 200)


if __name__ == "__main__":
    main()
