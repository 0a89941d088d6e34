"""Writes the pairs of `veneer demo --dpo`: messages with their right answer, and a wrong one.

    veneer demo --output-dir runs/demo
    python -m tools.demo_pairs runs/demo

A run of the demo answers the training messages and those of dev.jsonl, greedily. Where it is wrong, its answer is the
rejected one. Of other messages as many as are wanted get a wrong team or urgency, one that the run confuses with the
right one. Held-out messages of test.jsonl are never read.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from veneer.api.load import load

FOLDER = Path(__file__).parents[1] / "src" / "veneer" / "data" / "demo"
PARTS = {"train": ("pairs.jsonl", 260), "dev": ("dev_pairs.jsonl", 120)}
NEAR = {
    "urgency": {"high": ("normal",), "normal": ("high", "low"), "low": ("normal",)},
    "team": {
        "shipping": ("sales",),
        "sales": ("shipping", "billing"),
        "billing": ("sales", "account"),
        "account": ("billing", "technical"),
        "technical": ("sales", "account"),
    },
}
SEED = 0
Row = tuple[str, str]  # message and right answer


def read(part: str) -> list[Row]:
    turns = [json.loads(line)["messages"] for line in (FOLDER / f"{part}.jsonl").read_text().splitlines()]
    return [(message["content"], answer["content"]) for message, answer in turns]


def pairs_of(rows: Sequence[Row], answers: Sequence[str], count: int) -> list[dict[str, str]]:
    """Pairs of wrong answers, and of as many right ones as are missing, in an order that is drawn."""
    rng = random.Random(SEED)
    both = list(zip(rows, answers, strict=True))
    wrong = [(message, right, answer) for (message, right), answer in both if answer != right]
    others = [row for row, answer in both if answer == row[1]]
    rng.shuffle(others)
    wrong += [
        (message, right, spoilt(right, ("urgency", "team")[n % 2], rng))
        for n, (message, right) in enumerate(others[: count - len(wrong)])
    ]
    rng.shuffle(wrong)
    return [{"prompt": message, "chosen": right, "rejected": answer} for message, right, answer in wrong[:count]]


def spoilt(answer: str, key: str, rng: random.Random) -> str:
    """The answer with another value of a key."""
    values = json.loads(answer)
    values[key] = rng.choice(NEAR[key][values[key]])
    return json.dumps(values)


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
