"""What all pages share: the Jinja environment, and the style, script and charts of those that draw with Vega-Lite.

Nothing that a row, a name or an error holds may act in a page. Jinja escapes HTML; `_shown` escapes control
characters; data for scripts is JSON without `<`, `>` or `&`, so that no `</script>` ends it; and a policy in the page
lets only its own scripts run, by their SHA-256, and nothing be fetched. Vega interprets expressions and compiles none.
"""

import base64
import hashlib
import json
import math
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from veneer.config.files import visible

if TYPE_CHECKING:
    from jinja2 import Environment

LIBRARIES = ("vega", "vega-lite", "vega-embed")  # in the order in which they need each other


def environment() -> "Environment":
    """Make the Jinja environment of HTML pages; templates are files beside this one."""
    from jinja2 import Environment, FunctionLoader

    return Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_shown, loader=FunctionLoader(_text)
    )


def chart_parts(charts: dict[str, Any], config: dict[str, Any], reload: dict[str, Any] | None) -> dict[str, Any]:
    """Return what the template `charts.html.jinja` is given.

    Args:
        charts: specifications by the `id` of the elements that they are drawn in.
        config: configuration of all of them.
        reload: seconds between two loadings of the page, and when it was written (report.js); None: it is loaded once.
    """
    from markupsafe import Markup

    data = script_json({"charts": charts, "config": config, "reload": reload})
    scripts = [*_libraries(), _text("report.js")]
    hashes = " ".join(f"'sha256-{_hash(script)}'" for script in scripts)
    return {
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {hashes}",
        "style": Markup(_text("report.css")),
        "scripts": [Markup(script) for script in scripts],
        "page_data": Markup(data),
    }


def script_json(value: Any) -> str:
    """Return JSON that can stand in a script element; numbers that are not finite are null."""
    text = json.dumps(_finite(value), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


@cache
def _libraries() -> tuple[str, ...]:
    """The libraries' text, without the comments that name their source maps."""
    texts = (_text(f"vendor/{name}.min.js") for name in LIBRARIES)
    return tuple(text.rpartition("//# sourceMappingURL=")[0] if "sourceMappingURL=" in text else text for text in texts)


@cache
def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _text(name: str) -> str:
    return resources.files("veneer.report").joinpath(name).read_text(encoding="utf-8")


def _shown(value: Any) -> Any:
    return visible(value) if type(value) is str else value  # Markup stays Markup
