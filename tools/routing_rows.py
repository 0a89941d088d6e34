"""Writes the demo's messages with their team alone, as CSV files of text and label, for recipes/minilm-routing.yaml.

Run from the repository: `python -m tools.routing_rows`
"""

import csv
import json
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "src/veneer/data/demo"


def rows(part: str) -> list[tuple[str, str]]:
    """Return message and team of each row of a part of the demo's data."""
    found = []
    for line in (FOLDER / f"{part}.jsonl").read_text(encoding="utf-8").splitlines():
        user, assistant = json.loads(line)["messages"]
        found.append((user["content"], json.loads(assistant["content"])["team"]))
    return found


def main() -> None:
    for part in ("train", "test"):
        with (FOLDER / f"routing_{part}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([("text", "label"), *rows(part)])


if __name__ == "__main__":
    main()
