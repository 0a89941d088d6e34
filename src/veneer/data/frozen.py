"""Freezes today's date in a chat template: the date that a run was trained with stands in every later prompt.

Llama 3's templates and others write the date of the rendering into the system turn. Trained today and asked
tomorrow, a model would see another prompt, and the rows another hash. So a macro of the name that such templates call
is written before them, with the run's date in each form that they ask for; it ships with them.
"""

import json
import re
from datetime import date

CALL = "strftime_now"
FROZEN = f"{{%- macro {CALL}("
# Forms that a template may ask for: directives without a width, which may ask for gigabytes.
FORM = re.compile(r"(?:[^%]|%-?[A-Za-z%])*")
LONGEST = 100  # characters of a form


def freeze_date(source: str, day: date | None) -> str:
    """The template with a date in the place of today's; as it is where it asks for none, or is frozen already.

    Args:
        source: The Jinja text.
        day: The date; its time is midnight. None: today.
    """
    if CALL not in source or FROZEN in source:
        return source
    forms = {form for form in _strings(source) if "%" in form and len(form) <= LONGEST and FORM.fullmatch(form)}
    dates = json.dumps({form: (day or date.today()).strftime(form) for form in sorted(forms)})
    # The line break behind the macro goes with trim_blocks, under which chat templates are rendered.
    return (
        f"{FROZEN}form) -%}}{{%- set dates = {dates} -%}}"
        "{%- if form not in dates -%}{{ raise_exception('asks for a date in a form that cannot be frozen: ' ~ form) }}"
        "{%- endif -%}{{ dates[form] }}{%- endmacro %}\n" + source
    )


def _strings(source: str) -> list[str]:
    """The string literals of a Jinja text; none where it is none."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        return [value[1:-1] for _, kind, value in Environment().lex(source) if kind == "string"]
    except TemplateSyntaxError:
        return []
