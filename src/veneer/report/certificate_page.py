"""The page of a certificate: the verdict, each check beside its limit, and every prompt with both answers. One file."""

from importlib import resources
from typing import Any

from veneer.config.results import limit_text, value_text
from veneer.report.page import environment

ORDER = ("right to wrong", "wrong to right", "still wrong", "still right", None)  # what a reader looks for first


def certificate_page(certificate: dict[str, Any]) -> str:
    """Render the page as HTML.

    Args:
        certificate: Content of `certificate.json`; the texts of its rows may be left out.
    """
    page = environment()
    page.filters |= {"value_text": value_text, "limit_text": limit_text}
    source = resources.files("veneer.report").joinpath("certificate_page.html.jinja").read_text(encoding="utf-8")
    rows = sorted(certificate["prompts"], key=lambda row: ORDER.index(row.get("turn")))
    same = sum(same_answer(row) for row in rows)
    page.tests["same_answer"] = same_answer
    return page.from_string(source).render(c=certificate, rows=rows, same=same)


def same_answer(row: dict[str, Any]) -> bool:
    """Return whether adapter and artifact answer in the same words; rows without texts carry the verdict."""
    return bool(row["same_answer"] if "same_answer" in row else row["adapter"] == row["artifact"])
