"""JSON schema: the answer is JSON that the schema in the file `evaluate.json_schema` accepts.

The library jsonschema validates, by the draft that the schema names (2020-12 where it names none). References to other
files and addresses are not followed.
"""

from pathlib import Path
from typing import Any

from veneer.config import UserError
from veneer.config.files import read_json
from veneer.evaluation.metrics.json_values import json_value
from veneer.evaluation.metrics.metric import Metric, ScoredRows, ShareRight, needs_answers
from veneer.evaluation.metrics.reasoning import final_text


def measure(rows: ScoredRows) -> dict[str, ShareRight]:
    """Measure `json_schema`, where any row asks something.

    Raises:
        UserError: The file is missing, is no schema, or refers to another file.
    """
    if not rows.samples:
        return {}
    validator = _validator(rows.settings.json_schema)
    return {"json_schema": ShareRight([_accepts(validator, sample.answer) for sample in rows.samples])}


def _accepts(validator: Any, answer: str) -> bool:
    from referencing.exceptions import Unresolvable

    value = json_value(final_text(answer))
    if value is None and final_text(answer) != "null":
        return False
    try:
        return bool(validator.is_valid(value))
    except Unresolvable as error:
        raise UserError(
            f"evaluate.json_schema refers to {error.ref}, which is not in the file", "copy it into the schema's `$defs`"
        ) from None
    except RecursionError:  # nested deeper than Python follows
        return False


def _validator(file: str | None) -> Any:
    from jsonschema import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry

    if file is None:
        raise UserError("json_schema: no schema is named", "set evaluate.json_schema to a file that holds it")
    schema = read_json(Path(file).expanduser(), fix="name a file with a JSON schema in evaluate.json_schema")
    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise UserError(
            f"evaluate.json_schema = {file}: no JSON schema: {error.message} (at {error.json_path})", "correct the file"
        ) from None
    return kind(schema, registry=Registry())


def _needs_schema(rows: ScoredRows) -> str:
    """Return why rows cannot be judged by the schema: it refuses a right answer."""
    validator = _validator(rows.settings.json_schema)
    for sample in rows.samples:
        if not _accepts(validator, sample.reference):
            return f"the schema {rows.settings.json_schema} refuses the right answer of {sample.place}"
    return needs_answers(rows)


JSON_SCHEMA = Metric("json_schema", measure, _needs_schema, library="jsonschema")
