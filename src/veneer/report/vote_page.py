"""The page on which a person votes blindly: one file, with its own script, that loads and sends nothing."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources

from veneer.config.files import visible
from veneer.report.page import environment


def vote_page(name: str, criterion: str, ballot: str, pairs: Sequence[Mapping[str, str]]) -> str:
    """Render the page as HTML.

    Args:
        name: The run's name.
        criterion: Text that says what makes an answer the better one.
        ballot: Hash of the pairs, under which the browser keeps votes and with which they are saved.
        pairs: Texts to be shown, `prompt`, `left` and `right`, and an `id` that tells nothing.
    """
    from markupsafe import Markup

    shown = [{key: visible(text) for key, text in pair.items()} for pair in pairs]
    # Within a script element only the end of the element must not occur; without `<` it cannot.
    data = json.dumps({"name": visible(name), "ballot": ballot, "pairs": shown}).replace("<", "\\u003c")
    folder = resources.files("veneer.report")
    script = folder.joinpath("vote_page.js").read_text(encoding="utf-8")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    source = folder.joinpath("vote_page.html.jinja").read_text(encoding="utf-8")
    return (
        environment()
        .from_string(source)
        .render(name=name, criterion=criterion, data=Markup(data), script=Markup(script), allowed=f"sha256-{allowed}")
    )
