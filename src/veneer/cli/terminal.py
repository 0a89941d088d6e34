"""Writes text for a person: control characters are shown and never carried out, on any encoding.

Names of files, rows, templates, answers and errors are text of others. Rich's own control codes pass; those within a
text are escaped (`\\x1b`), so that no row moves the cursor, sets the clipboard or hides what stands before it.
"""

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from veneer.config.files import visible

# What bars and tables are drawn with, where the encoding is not a UTF.
_PLAIN = str.maketrans({"█": "#", "▓": "%", "▏": "|", "│": "|", "≥": ">=", "≤": "<=", "…": "..."})


class Terminal(Console):
    """A console that shows the control characters of a text and never carries them out."""

    def __init__(self, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, soft_wrap=True)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as Rich does, with the control characters of every text escaped."""
        is_plain = self.options.ascii_only
        for text, style, control in super().render(renderable, options):
            shown = text if control else visible(text)
            yield Segment(shown.translate(_PLAIN) if is_plain else shown, style, control)
