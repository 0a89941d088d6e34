"""The page of a certificate: the verdict, each check beside its limit, and every prompt with both answers. One file."""

from importlib import resources
from typing import Any


def certificate_page(certificate: dict[str, Any]) -> str:
    """The page as HTML.

    Args:
        certificate: As `certificate.json` has it, or without the texts of its rows, as `veneer push` sends it.
    """
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    source = resources.files("veneer.report").joinpath("certificate_page.html.jinja").read_text(encoding="utf-8")
    differing = sum(not same_answer(row) for row in certificate["prompts"])
    environment.tests["same_answer"] = same_answer
    return environment.from_string(source).render(c=certificate, differing=differing)


def same_answer(row: dict[str, Any]) -> bool:
    """Whether adapter and artifact answer in the same words; rows without their texts say so themselves."""
    return bool(row["same_answer"] if "same_answer" in row else row["adapter"] == row["artifact"])


def number(value: Any) -> str:
    """A number for a person; words as they are."""
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.4g}"
