"""Writes the pairs of `veneer demo --dpo`, and the test messages with the answers that they ask for.

    python -m tools.demo_pairs

The demo's messages were labelled with `"product": null` where none is named. Since then the desk's software wants text
in every field: `"product": "none"`. The pairs say so. A message that names no product has the answer by the new rule as
the chosen one, and the one by the old rule as the rejected one. As many messages that name one have their old answer as
the chosen one, and one with "none" as the rejected one: without these, training would learn to say "none" always.
"""

import json
import random
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "src" / "veneer" / "data" / "demo"
NONE = "none"
PARTS = {"train": ("pairs.jsonl", 160), "dev": ("dev_pairs.jsonl", 50)}
SEED = 0
Row = tuple[str, dict[str, Any]]  # message and answer by the old rule


def read(part: str) -> list[Row]:
    """Return the rows of one of the demo's files."""
    turns = [json.loads(line)["messages"] for line in (FOLDER / f"{part}.jsonl").read_text("utf-8").splitlines()]
    return [(message["content"], json.loads(answer["content"])) for message, answer in turns]


def by_new_rule(answer: dict[str, Any]) -> dict[str, Any]:
    """Return the answer that the desk wants now."""
    return answer | {"product": answer["product"] or NONE}


def pairs_of(rows: list[Row], count: int) -> list[dict[str, Any]]:
    """Return so many pairs in an order that is drawn, half of them of messages that name no product."""
    rows = random.Random(SEED).sample(rows, len(rows))
    without = [row for row in rows if row[1]["product"] is None][: count // 2]
    named = [row for row in rows if row[1]["product"] is not None][: count - len(without)]
    pairs = []
    for message, answer in without + named:
        chosen = by_new_rule(answer)
        rejected = answer if chosen != answer else answer | {"product": NONE}
        pairs.append({"prompt": message, "chosen": json.dumps(chosen), "rejected": json.dumps(rejected)})
    random.Random(SEED).shuffle(pairs)
    return pairs


def main() -> None:
    for part, (name, count) in PARTS.items():
        _write(name, pairs_of(read(part), count))
    turns = (
        [{"role": "user", "content": message}, {"role": "assistant", "content": json.dumps(by_new_rule(answer))}]
        for message, answer in read("test")
    )
    _write("rule_test.jsonl", [{"messages": messages} for messages in turns])


def _write(name: str, rows: list[dict[str, Any]]) -> None:
    (FOLDER / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
