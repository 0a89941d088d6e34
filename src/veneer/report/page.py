"""The Jinja environment of all pages; it escapes HTML and control characters in rows, names and errors."""

from typing import TYPE_CHECKING, Any

from veneer.config.files import visible

if TYPE_CHECKING:
    from jinja2 import Environment


def environment() -> "Environment":
    """Make the Jinja environment of HTML pages."""
    from jinja2 import Environment

    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_shown)


def _shown(value: Any) -> Any:
    return visible(value) if type(value) is str else value  # Markup stays Markup
