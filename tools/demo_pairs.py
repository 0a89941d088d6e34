"""Writes the pairs of `veneer demo --dpo`: messages with their right answer, and a wrong one.

    veneer demo --output-dir runs/demo
    python -m tools.demo_pairs runs/demo

A run of the demo answers the training messages and those of dev.jsonl, greedily. Where it is wrong, its answer is
the rejected one. Each such pair has a mirror image: where the run took X for Y, a message of which it knows that it is
Y gets X as the wrong answer. Without these, training would learn to say X, since the run's mistakes lean to one side.
Messages of test.jsonl are never read.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from veneer.api.load import load

FOLDER = Path(__file__).parents[1] / "src" / "veneer" / "data" / "demo"
PARTS = {"train": ("pairs.jsonl", 80), "dev": ("dev_pairs.jsonl", 25)}  # mistakes of each
KEYS = ("team", "urgency")
SEED = 0
Row = tuple[str, str]  # message and right answer


def read(part: str) -> list[Row]:
    turns = [json.loads(line)["messages"] for line in (FOLDER / f"{part}.jsonl").read_text().splitlines()]
    return [(message["content"], answer["content"]) for message, answer in turns]


def pairs_of(rows: Sequence[Row], answers: Sequence[str], count: int) -> list[dict[str, str]]:
    """Pairs of so many wrong answers and of their mirror images, in an order that is drawn."""
    rng = random.Random(SEED)
    both = list(zip(rows, answers, strict=True))
    rng.shuffle(both)
    known = [row for row, answer in both if answer == row[1]]
    pairs: list[tuple[str, str, str]] = []
    for (message, right), answer in both:
        if answer == right or len(pairs) == 2 * count:
            continue
        if (found := mirrored(json.loads(right), json.loads(answer), known)) is not None:
            pairs += [(message, right, answer), found]
    rng.shuffle(pairs)
    return [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs]


def mirrored(right: dict[str, str], wrong: dict[str, str], known: list[Row]) -> tuple[str, str, str] | None:
    """A known message of what was answered wrongly, with what would have been right as the wrong answer.

    It is taken out of those that are known. None: there is no such message, or another key is wrong.
    """
    changed = {key: right[key] for key in KEYS if right[key] != wrong[key]}
    for row in known if changed else ():
        message, answer = row
        values = json.loads(answer)
        if all(values[key] == wrong[key] for key in changed):
            known.remove(row)
            return message, answer, json.dumps(values | changed)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of the demo's run")
    model = load(parser.parse_args().run)
    for part, (name, count) in PARTS.items():
        rows = read(part)
        answers = model.generate([message for message, _ in rows], None, 32)
        pairs = pairs_of(rows, answers, count)
        lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        (FOLDER / name).write_text(lines, encoding="utf-8")
        print(f"{name}: {len(pairs)} pairs")


if __name__ == "__main__":
    main()
