"""Makes the tables of docs/memory.md again, from the planner: `python -m tools.memory_page`, about a minute."""

from pathlib import Path

from veneer.config import Run
from veneer.machine.cards import CARDS
from veneer.planning.base import PlannedModel
from veneer.planning.model_sizes import least_memory, longest_row
from veneer.planning.planner import Planner
from veneer.planning.target import device_named

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
BASES = (
    *("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B", "Qwen/Qwen2.5-7B", "meta-llama/Llama-3.1-8B"),
    *("Qwen/Qwen2.5-14B", "Qwen/Qwen2.5-32B", "meta-llama/Llama-3.1-70B"),
)
TIMED = ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B")
LENGTHS = (2048, 8192, 32768)
COLUMNS = ("rtx 4060", "rtx 3060", "rtx 4080", "rtx 4090", "l40s", "h100")


def main() -> None:
    page = with_table(PAGE.read_text(), "longest", longest_rows())
    PAGE.write_text(with_table(page, "speeds", speeds()))


def longest_rows() -> str:
    """Return the table of the longest rows."""
    rows = [row(short(base), *(longest(base, card) for card in COLUMNS)) for base in BASES]
    return "".join([*head("base"), *rows])


def speeds() -> str:
    """Return the table of tokens a second."""
    asked = [(base, length) for base in TIMED for length in LENGTHS]
    rows = [row(f"{short(base)}, {n:,}", *(speed(base, n, card) for card in COLUMNS)) for base, n in asked]
    return "".join([*head("base, tokens of a row"), *rows])


def longest(base: str, card: str) -> str:
    """Return the longest row of a base on a card, as a cell."""
    run = run_of(base)
    tokens = longest_row(run, planner_of(run, card), "qlora")
    return f"{tokens:,}" if tokens else "-"


def speed(base: str, length: int, card: str) -> str:
    """Return tokens a second of rows of one length, as a cell."""
    run = run_of(base, length)
    forecast = planner_of(run, card).forecast(run)
    return f"{forecast.tokens_per_second:,.0f}" if forecast.verdict == "fits" else "-"


def run_of(base: str, length: int = 2048) -> Run:
    """Return the run of the tables, of one row at a time."""
    data = {"train": "-", "max_length": length, "validation": 0}
    return least_memory(Run.model_validate({"model": {"base": base}, "quantization": {}, "data": data}))


def planner_of(run: Run, card: str) -> Planner:
    """Return the planner of a base on a card."""
    return Planner(PlannedModel(run.model, "a table is made"), device_named(card))


def with_table(page: str, name: str, table: str) -> str:
    """Replace the table of a page that stands after the comment of that name."""
    before, begin, rest = page.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition("<!-- end -->\n")
    assert begin
    assert end
    return before + begin + table + end + after


def head(first: str) -> tuple[str, str]:
    """Return the two lines that begin a table of the cards."""
    names = [f"{card}, {CARDS[card].memory_mib / 1024:.0f} GiB" for card in COLUMNS]
    return row(first, *names), "|" + "---|" * (1 + len(names)) + "\n"


def row(*cells: str) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(cells)} |\n"


def short(base: str) -> str:
    """Return a base's name without its owner."""
    return base.rpartition("/")[2]


if __name__ == "__main__":
    main()
