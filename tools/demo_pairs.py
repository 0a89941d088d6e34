"""Writes the pairs of `veneer demo --dpo`, and the test messages with the answers that they ask for.

    python -m tools.demo_pairs

The demo's messages were labelled when no team had a rule of its own. Since then the desk wants messages about money and
access answered first: what goes to billing or account is always of high urgency. The pairs say so. A message for
one of these teams has the answer by the new rule as the chosen one, and the one by the old rule as the rejected one. As
many messages for other teams, a third of each urgency, have their old answer as the chosen one, and one of another
urgency as the rejected one: without these, training would learn to call everything urgent, or nothing else.
"""

import json
import random
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "src" / "veneer" / "data" / "demo"
URGENT = ("billing", "account")
WRONG = {"low": "normal", "normal": "high", "high": "normal"}  # urgency of the rejected answer, for other teams
PARTS = {"train": ("pairs.jsonl", 160), "dev": ("dev_pairs.jsonl", 50)}
SEED = 0
Row = tuple[str, dict[str, Any]]  # message and answer by the old rule


def read(part: str) -> list[Row]:
    """Return the rows of one of the demo's files."""
    turns = [json.loads(line)["messages"] for line in (FOLDER / f"{part}.jsonl").read_text("utf-8").splitlines()]
    return [(message["content"], json.loads(answer["content"])) for message, answer in turns]


def by_new_rule(answer: dict[str, Any]) -> dict[str, Any]:
    """Return the answer that the desk wants now."""
    return answer | {"urgency": "high"} if answer["team"] in URGENT else answer


def pairs_of(rows: list[Row], count: int) -> list[dict[str, Any]]:
    """Return so many pairs in an order that is drawn, half of them for the urgent teams."""
    rows = random.Random(SEED).sample(rows, len(rows))
    found = [row for row in rows if by_new_rule(row[1]) != row[1]][: count // 2]
    others = [row for row in rows if row[1]["team"] not in URGENT]
    by_urgency = [[row for row in others if row[1]["urgency"] == urgency] for urgency in WRONG]
    found += [row for rows in zip(*by_urgency, strict=False) for row in rows][: count - len(found)]
    pairs = []
    for message, answer in found:
        chosen = by_new_rule(answer)
        rejected = answer if chosen != answer else answer | {"urgency": WRONG[answer["urgency"]]}
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
