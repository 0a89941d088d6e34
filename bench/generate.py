"""How fast answers are generated: in slots, and by Transformers' `generate` in batches of 16, in one process.

    python3 -m bench.generate                        # an H100: 8B shapes, random NF4 weights, LoRA r=16; 5 minutes
    python3 -m bench.generate --quick                # the same model, short answers; 2 minutes, most of it loading
    python3 -m bench.generate --cpu --rows 64 --generated 16    # the built-in SmolLM2 with LoRA r=16; 20 minutes

Prompts and answers have 64 to 512 tokens each, drawn uniformly with a fixed seed; random weights stop nowhere, so each
row's own limit ends its answer, for both. `generate` gets 16 rows as they come and goes on until the last of them has
ended. Counted are the tokens that were asked for, over all the time from the prompts to the answers. Before anything is
timed, answers are checked: recorded steps give the tokens of eager ones, twice the same, in any order, and no token is
further from the likeliest, by a pass over the whole row, than those that `generate` chooses. Prints a JSON line a case
at once and merges it into bench/results/generate.json; a case that fails is printed and the next one follows.
"""

import argparse
import gc
import json
import random
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.engine import kernels_of, random_base
from veneer.config import Adapter, Model
from veneer.config.sampling import Sampling
from veneer.evaluation.decoding import TokenChoice, generation_config
from veneer.evaluation.generation import contiguous_head_input
from veneer.evaluation.prefill import read_prompts
from veneer.evaluation.prefix import SharedPrefix, padded
from veneer.evaluation.slots import Row, SlotDecoder
from veneer.machine.device import find_machine
from veneer.model.attach import attach
from veneer.model.load import load_model
from veneer.model.locate import locate
from veneer.model.quiet import quiet

RESULTS = Path(__file__).parent / "results" / "generate.json"
BATCH = 16  # of Transformers' generate
GREEDY = Sampling()


def rows_of(count: int, shortest: int, longest: int, answers: tuple[int, int], vocabulary: int) -> list[Row]:
    """Random prompts, and the tokens of each answer."""
    draw = random.Random(0)
    lengths = [(draw.randint(shortest, longest), draw.randint(*answers)) for _ in range(count)]
    return [Row([draw.randrange(3, vocabulary) for _ in range(n)], limit, None) for n, limit in lengths]


@torch.no_grad()
def in_slots(model: Any, rows: Sequence[Row], slots: int, graphs: bool = True) -> tuple[list[list[int]], Any]:
    """Answers in slots, and the decoder that made them."""
    prompts = [row.prompt for row in rows]
    decoder = SlotDecoder(model, rows, slots, [], TokenChoice(GREEDY), graphs=graphs)
    found: dict[int, list[int]] = {}
    with quiet(), contiguous_head_input(model):
        for answers in decoder.answers(read_prompts(model, SharedPrefix(model, prompts), prompts, (), slots)):
            found |= answers
    return [found[n] for n in range(len(rows))], decoder


class AtLimits:
    """A stopping criterion of Transformers: each row ends at its own limit."""

    def __init__(self, limits: Sequence[int], start: int) -> None:
        self._limits, self._start = limits, start

    def __call__(self, ids_BL: torch.Tensor, scores: Any, **given: Any) -> torch.Tensor:
        made = ids_BL.shape[1] - self._start
        return torch.tensor([made >= limit for limit in self._limits], device=ids_BL.device)


@torch.no_grad()
def by_generate(model: Any, rows: Sequence[Row], size: int = BATCH) -> tuple[list[list[int]], int]:
    """Answers by Transformers' `generate`, batches as rows come, and the steps it took."""
    found, steps = [], 0
    device = model.get_input_embeddings().weight.device
    for start in range(0, len(rows), size):
        chosen = rows[start : start + size]
        ids_BL, mask_BL = padded([row.prompt for row in chosen], 0, 0)
        config = generation_config([], 0, max(row.limit for row in chosen), GREEDY)
        with quiet(), contiguous_head_input(model):
            output_BL = model.generate(
                input_ids=ids_BL.to(device),
                attention_mask=mask_BL.to(device),
                generation_config=config,
                stopping_criteria=[AtLimits([row.limit for row in chosen], ids_BL.shape[1])],
            )
        answers_BL = output_BL[:, ids_BL.shape[1] :].tolist()
        found += [answer[: row.limit] for answer, row in zip(answers_BL, chosen)]
        steps += config.max_new_tokens
    return found, steps


@torch.no_grad()
def regret(model: Any, rows: Sequence[Row], answers: Sequence[list[int]]) -> tuple[float, float]:
    """How far the chosen tokens' logits are below the highest ones in a pass over the whole row: largest, and mean."""
    found = []
    device = model.get_input_embeddings().weight.device
    for row, answer in zip(rows, answers):
        ids = torch.tensor([row.prompt + answer], device=device)
        logits_LV = model(input_ids=ids, logits_to_keep=len(answer) + 1).logits[0, :-1].float()
        chosen_L = logits_LV.gather(1, torch.tensor(answer, device=device)[:, None])[:, 0]
        found.append(logits_LV.amax(-1) - chosen_L)
    all_of = torch.cat(found)
    return round(all_of.max().item(), 4), round(all_of.mean().item(), 6)


def alike(some: Sequence[list[int]], others: Sequence[list[int]]) -> float:
    """Share of rows with the same tokens."""
    return sum(one == other for one, other in zip(some, others, strict=True)) / len(some)


def check(model: Any, rows: Sequence[Row], slots: int) -> dict[str, Any]:
    """What must hold of answers, as the module says."""
    answers, decoder = in_slots(model, rows, slots)
    order = random.Random(1).sample(range(len(rows)), len(rows))
    shuffled, _ = in_slots(model, [rows[n] for n in order], slots)
    found = {
        "recorded_widths": sorted(decoder.recorded),
        "twice": alike(answers, in_slots(model, rows, slots)[0]),
        "eager": alike(answers, in_slots(model, rows, slots, graphs=False)[0]),
        "in_another_order": alike(answers, [shuffled[order.index(n)] for n in range(len(rows))]),
        "in_other_slots": alike(answers, in_slots(model, rows, 2 * slots)[0]),
    }
    by_it = by_generate(model, rows)[0]
    found["as_generate"] = alike(answers, by_it)
    found["regret"], found["regret_of_generate"] = regret(model, rows, answers), regret(model, rows, by_it)
    return found


def timed(work: Callable[[], int], rows: Sequence[Row]) -> dict[str, Any]:
    """Speed and peak of work that answers rows and returns its steps."""
    on_gpu = torch.cuda.is_available()
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() if on_gpu else 0
    started, cpu = time.perf_counter(), time.process_time()
    steps = work()
    if on_gpu:
        torch.cuda.synchronize()
    seconds, tokens = time.perf_counter() - started, sum(row.limit for row in rows)
    found = {
        "rows": len(rows),
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "tokens_per_second": round(tokens / seconds, 1),
        "steps": steps,
        "steps_per_second": round(steps / seconds, 2),
    }
    if on_gpu:
        found["peak_allocated_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        found["beside_weights_gib"] = round((torch.cuda.max_memory_allocated() - held) / 2**30, 2)
        found["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    return found


def slots_case(model: Any, rows: Sequence[Row], slots: int, graphs: bool = True) -> Callable[[], int]:
    def work() -> int:
        answers, decoder = in_slots(model, rows, slots, graphs)
        assert [len(answer) for answer in answers] == [row.limit for row in rows]
        return int(decoder.steps)

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--profile", action="store_true", help="of some steps of each kind")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--generated", type=int, default=32, help="rows that `generate` answers, the first ones")
    parser.add_argument("--slots", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose names begin so")
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    if a.cpu:
        source = locate(Model(base="smollm2-135m-instruct"))
        base = load_model(source, Model(base="smollm2-135m-instruct"), None, find_machine())
        a.slots = [BATCH]
    else:
        base = random_base(a.shape, a.layers, quantized=True)
    model = attach(base, Adapter(r=16, lora_alpha=32), 0).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)  # an adapter that changes something
    vocabulary = model.config.vocab_size
    longest = (160, 160) if a.quick else (512, 512)
    rows = rows_of(32 if a.quick else a.rows, 64, longest[0], (64, longest[1]), vocabulary)
    few = rows_of(8, 8, 100, (8, 24), vocabulary)
    where = f"{a.shape} NF4" if not a.cpu else "SmolLM2-135M on a CPU"
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "check": lambda: check(model, few, 4),
        **{f"slots {n}": partial(timed, slots_case(model, rows, n), rows) for n in a.slots},
        f"generate {BATCH}": lambda: timed(lambda: by_generate(model, rows[: a.generated])[1], rows[: a.generated]),
    }
    if a.quick:
        cases[f"generate {BATCH}"] = lambda: timed(lambda: by_generate(model, rows[:BATCH])[1], rows[:BATCH])
        cases["eager slots 16"] = lambda: timed(slots_case(model, rows, 16, graphs=False), rows)
    if a.profile:
        short = [row._replace(limit=12) for row in rows[:16]]
        cases["profile"] = lambda: kernels_of(lambda: float(slots_case(model, short, 16, graphs=False)()))
    found = json.loads(a.out.read_text()) if a.out.exists() else {}
    for name, case in cases.items():
        if not name.startswith(tuple(a.only)):
            continue
        try:
            result = case()
        except Exception:  # noqa: BLE001 - the next case may go well, and device time is short
            result = {"failed": traceback.format_exc(limit=-4)}
        print("RESULT " + json.dumps({"on": where, "case": name} | result), flush=True)
        found.setdefault(where + (", quick" if a.quick else ""), {})[name] = result
        found["on"] = {
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
            "date": time.strftime("%Y-%m-%d"),
        }
        a.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
