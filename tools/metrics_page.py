"""Writes docs/metrics.md from the records themselves: `python -m tools.metrics_page > docs/metrics.md`."""

import types
import typing
from typing import Annotated, Any, Literal, NotRequired, get_args, get_origin, get_type_hints

from veneer.config.records import RECORDS

HEAD = """\
# metrics.jsonl

A run's `metrics.jsonl` is the source of all that is said of its course: listeners, `loss.png`, `veneer runs`,
`veneer watch` and the page of a run read these records. Each line is a JSON object of `kind` train, eval or divergence,
in the order in which they came. Lines are only appended. A run that is resumed, or goes back to a checkpoint
(`train.on_divergence: rollback`), first replaces the file by one that ends with its checkpoint's step; a reader takes
whole lines alone, since the last one may be cut. Keys may be added; none changes its meaning. A key without "always" is
left out where it does not apply, and null stands for a number that was not finite.

From Python the records are `TrainRecord`, `EvalRecord` and `DivergenceRecord` of `config/records.py`.
"""

TAIL = """\
A step whose update was left out, or that ended the run, has a divergence record and no train record. The record of a
rollback stands in place of those after the checkpoint's step, which it drops.

An eval record also holds the metrics of `evaluate.during`, each by its name ([evaluation.md](evaluation.md)), as a
number.
"""
JSON_NAMES = {int: "integer", float: "number", str: "text", type(None): "null"}


def metrics_page() -> str:
    """The page: a table for each kind of record."""
    parts = [HEAD]
    for kind, record in RECORDS.items():
        required = record.__required_keys__  # type: ignore[attr-defined]
        parts.append(f"## {kind}\n\n{record.__doc__}\n\n| key | type | | meaning |\n|---|---|---|---|")
        hints = get_type_hints(record, include_extras=True)
        for key in sorted(hints, key=lambda key: key not in required):
            type_, meaning = _parts(hints[key])
            parts.append(f"| `{key}` | {_name(type_)} | {'always' if key in required else ''} | {meaning} |")
        parts.append("")
    return "\n".join([*parts, TAIL])


def _parts(hint: Any) -> tuple[Any, str]:
    """A key's type and meaning."""
    if get_origin(hint) is NotRequired:
        (hint,) = get_args(hint)
    assert get_origin(hint) is Annotated, hint
    type_, meaning = get_args(hint)
    return type_, meaning


def _name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(f'"{value}"' for value in get_args(hint))
    if get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(map(_name, get_args(hint)))
    if get_origin(hint) is dict:
        return f"object of {_name(get_args(hint)[1])}"
    if get_origin(hint) is tuple:
        return "[low, high]"
    if get_origin(hint) is list:
        return f"array of {_name(get_args(hint)[0])}"
    return JSON_NAMES[hint]


if __name__ == "__main__":
    print(metrics_page(), end="")
