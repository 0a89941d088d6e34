"""The tables of docs/memory.md are the planner's; of each, which takes a minute, one cell is made again."""

from tools import memory_page
from tools.memory_page import BASES, COLUMNS, LENGTHS, TIMED, short, with_table

CARD = "rtx 4060"


def cell_of(name: str, card: str) -> str:
    """A cell of the page by the name of its row."""
    line = next(line for line in memory_page.PAGE.read_text().splitlines() if line.startswith(f"| {name} |"))
    return dict(zip(COLUMNS, line.strip("| ").split(" | ")[1:], strict=True))[card]


def test_the_tables_are_what_the_planner_says() -> None:
    assert cell_of(short(BASES[0]), CARD) == memory_page.longest(BASES[0], CARD), "run `make docs`"
    name = f"{short(TIMED[0])}, {LENGTHS[0]:,}"
    assert cell_of(name, CARD) == memory_page.speed(TIMED[0], LENGTHS[0], CARD), "run `make docs`"


def test_the_page_has_a_row_for_every_base_and_length() -> None:
    names = [short(base) for base in BASES] + [f"{short(base)}, {n:,}" for base in TIMED for n in LENGTHS]
    assert all(cell_of(name, COLUMNS[-1]) for name in names)


def test_a_table_is_replaced_where_it_stands() -> None:
    page = "before\n<!-- a -->\n| old |\n<!-- end -->\nbetween\n<!-- b -->\n| other |\n<!-- end -->\nafter\n"
    assert with_table(page, "a", "| new |\n") == page.replace("| old |", "| new |")
    assert with_table(page, "b", "") == page.replace("| other |\n", "")
