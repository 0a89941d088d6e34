"""Writes docs/settings.md from the settings themselves: `python -m tools.settings_page > docs/settings.md`."""

import types
import typing
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from veneer.config.foreign import names_of_others
from veneer.config.load import sections
from veneer.config.run import Run
from veneer.config.section import Section

HEAD = """\
# Settings of a run

A run is one YAML file with these sections; any setting can be overridden on the command line (`train.seed=1`). Unknown
keys and values out of range are errors. The run's folder keeps the resolved file, every default spelled out.
"""


OTHERS = """\
## Names of other tools

What TRL, PEFT, Transformers, Axolotl, LLaMA-Factory and Unsloth call a setting, and what to write here. A run with such
a name is refused with the same words.

| there | here |
|---|---|"""


def settings_page() -> str:
    """The page: a table for each section, and one of other tools' names."""
    parts = [HEAD]
    for name, section in sections().items():
        optional = "" if Run.model_fields[name].default is not None else " May be left out."
        parts.append(f"## {name}\n\n{(section.__doc__ or '').splitlines()[0]}{optional}\n")
        parts.append("| setting | default | values | what it does |\n|---|---|---|---|")
        parts += [_row(key, field) for key, field in section.model_fields.items()]
        parts.append("")
    return "\n".join([*parts, OTHERS, *_rows_of_others(), ""])


def _rows_of_others() -> list[str]:
    """A row for each answer, with the names that get it."""
    called, instead = names_of_others()
    answers: dict[str, list[str]] = {}
    for name in (*called, *instead):
        answer = f"`{called[name]}`" if name in called else instead[name].replace("nothing: ", "none: ")
        answers.setdefault(answer, []).append(f"`{name}`")
    return [f"| {', '.join(names)} | {answer} |" for answer, names in answers.items()]


def _row(key: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else _value(field.default)
    limits = ", ".join(_limit(item) for item in field.metadata if _limit(item))
    values = _kind(field.annotation) + (f", {limits}" if limits else "")
    return f"| `{key}` | {default} | {values} | {field.description} |"


def _value(value: Any) -> str:
    return "null" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _limit(item: Any) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return ", ".join(f"{sign} {getattr(item, name)}" for name, sign in signs.items() if hasattr(item, name))


def _kind(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_kind(part) for part in get_args(annotation))
    if origin is typing.Literal:
        return ", ".join(_value(part) for part in get_args(annotation))
    if origin is typing.Annotated:
        base, *fields = get_args(annotation)
        limits = ", ".join(
            _limit(item) for field in fields if isinstance(field, FieldInfo) for item in field.metadata if _limit(item)
        )
        return f"{_kind(base)} ({limits})" if base in (int, float) else _kind(base)
    if origin is tuple:
        kind = _kind(get_args(annotation)[0])
        return "list of names" if kind == "text" else f"list of {kind.replace('number', 'numbers', 1)}"
    if origin is dict:
        return "pairs"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "{" + ", ".join(annotation.model_fields) + "}"
    names = {str: "text", int: "number", float: "number", bool: "`true`, `false`", type(None): "null"}
    return names.get(annotation, "path")


if __name__ == "__main__":
    print(settings_page(), end="")
