"""Docstrings name a thing before they describe it: an entry begins with its noun."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "veneer"
SECTION = re.compile(r"^( *)(Args|Attributes):\n((?:\1 +.*\n|\n)*)", re.MULTILINE)
ENTRY = re.compile(r"^[\w*, ]+: (Of|What|How|Where|If|As|When)\b.*", re.IGNORECASE)


def wrong_entries(docstring: str) -> Iterator[str]:
    """Yield entries of a docstring's Args and Attributes that begin with a preposition or an interrogative."""
    for section in SECTION.finditer(f"{docstring}\n"):
        entries = [line.strip() for line in section[3].splitlines()]
        yield from (entry for entry in entries if ENTRY.match(entry))


def docstrings(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield every docstring of a folder's modules, classes and functions, with its place."""
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                where = f"{file.relative_to(folder)}:{getattr(node, 'lineno', 1)}"
                if (text := ast.get_docstring(node)) is not None:
                    yield where, text


def test_an_entry_that_describes_before_it_names_is_found() -> None:
    text = (
        "Do it.\n\nArgs:\n    a: Of it.\n    b, c: whether;\n        as it goes.\n    d: offset.\n\nRaises:\n    E: If."
    )
    assert list(wrong_entries(text)) == ["a: Of it."]
    assert list(wrong_entries(text.replace("Args", "Attributes").replace("off", "as "))) == ["a: Of it.", "d: as set."]


def test_entries_of_docstrings_begin_with_their_noun() -> None:
    found = {f"{where} {entry}" for where, text in docstrings(SOURCE) for entry in wrong_entries(text)}
    assert not found, "\n".join(sorted(found))
