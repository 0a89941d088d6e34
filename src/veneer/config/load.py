"""Reads a run from YAML and command-line overrides; reports every mistake at once, each with its line.

YAML is read through PyYAML's node tree, because only nodes know their lines. Two of YAML 1.1's traps are
closed on the way: `2e-4` is a number here, and a key written twice is an error. The resolved run is written
back with every default spelled out, so that a run's folder never depends on a later version's defaults.

A file of a stranger costs no more than a file of one's own: size, nesting and what anchors stand for are counted
before anything is built.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from veneer.config.errors import UserError
from veneer.config.files import read_text, reason
from veneer.config.foreign import foreign, misspelt
from veneer.config.paths import require_path
from veneer.config.run import Run

Path_ = tuple[str, ...]
RUN_HEADER = "# The run as it was carried out, with every default spelled out.\n"
MOST_BYTES = 2**20  # of a run's file
MOST_VALUES = 20_000  # keys and values, counted as often as anchors repeat them; 64 characters of a text count as one
DEEPEST = 20
MOST_MISTAKES = 30  # that are listed
_Base: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader


class _Loader(_Base):
    """SafeLoader whose floats may do without a dot (YAML 1.2): 2e-4; a value that Python cannot hold has its line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, TypeError, LookupError, AttributeError) as error:
            problem = f"`{_show(node.value)}` is no value: {reason(error).split(';')[0]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which _Loader would take for a number."""


_FLOAT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


def load_run(path: str | Path, overrides: Iterable[str] = ()) -> Run:
    """Read a run from a YAML file and apply `section.key=value` overrides.

    Raises:
        UserError: with every mistake of file and overrides, each with its place and what to write instead.
    """
    require_path(str(path), "run")
    path = Path(path)
    values, places = parse_mapping(read_text(path, MOST_BYTES, "name an existing YAML file of a run"), path)
    if "train" not in values:
        values["train"] = {}
    if isinstance(values["train"], dict):
        values["train"].setdefault("output_dir", f"runs/{path.stem}")
    return _with_overrides(values, places, overrides, str(path))


def run_of(values: dict[str, dict[str, Any]], overrides: Iterable[str] = ()) -> Run:
    """Build a run from plain values, as the command line gives them, and apply overrides.

    Raises:
        UserError: As `load_run`.
    """
    return _with_overrides(values, {}, overrides, "command line")


def _with_overrides(values: dict[str, Any], places: dict[Path_, str], overrides: Iterable[str], source: str) -> Run:
    for override in overrides:
        _apply(override, values, places)
    return validate(values, places, source)


def validate(values: dict[str, Any], places: dict[Path_, str], source: str, run: Run | None = None) -> Run:
    """Build a run from plain values, or fill one that Python makes from objects.

    Args:
        values: settings by section.
        places: file and line of each setting, by its path.
        source: name of the settings' source, for those without a line.
        run: object to fill; only then may rows be objects.
    """
    try:
        made = Run.__new__(Run) if run is None else run
        Run.__pydantic_validator__.validate_python(values, self_instance=made, context={"is_text": run is None})
        return made
    except ValidationError as error:
        lines, seen = [], set()
        for problem in error.errors():
            line = _describe(problem, places, source)
            if line not in seen:
                seen.add(line)
                lines.append(line)
            if len(lines) == MOST_MISTAKES:
                lines.append("... and perhaps more")
                break
    count = f"{len(lines)} mistakes" if len(lines) > 1 else "1 mistake"
    raise UserError(f"{source}: {count} in the run\n  " + "\n  ".join(lines))


def to_yaml(run: Run) -> str:
    """The resolved run, every default spelled out; `load_run` reads it back to an equal object."""
    return RUN_HEADER + dump_yaml(run.model_dump(mode="json"))


def dump_yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML, which is read back here to the same values."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def scalar(value: str) -> str:
    """A text as it stands in YAML, quoted where it has to be."""
    return str(yaml.dump(value, Dumper=_Dumper, width=10_000, allow_unicode=True)).removesuffix("\n...\n").strip()


def yaml_values(text: str, where: str) -> Any:
    """Plain values of a YAML text that anyone may have written.

    Raises:
        UserError: It is not valid YAML, or is larger or deeper than any settings are.
    """
    return _document(text, where)[1]


def parse_mapping(
    text: str,
    path: Path,
    form: str = "a run is a mapping of sections (model:, data:, ...)",
    least: str = "model.base and data.train",
) -> tuple[dict[str, Any], dict[Path_, str]]:
    """Plain values of a YAML mapping, and the place of every key.

    Args:
        text: the YAML.
        path: file that it stands in.
        form: sentence about what it should be, for messages.
        least: keys that it needs, for messages.
    """
    node, values = _document(text, str(path))
    if node is None:
        raise UserError(f"{path}: the file is empty", f"name at least {least}")
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: {form}")
    places: dict[Path_, str] = {}
    _collect(node, (), path, places)
    return values, places


def _document(text: str, where: str) -> tuple[yaml.Node | None, Any]:
    """The node of a YAML text and its plain values."""
    try:
        _require_bounded(text, where)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return node, None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, UnicodeEncodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UserError(f"{place}: not valid YAML: {problem}") from None


def _require_bounded(text: str, where: str) -> None:
    """Raises UserError for a YAML text that is too large or too deep, by its events alone: nothing is built."""
    loader = _Loader(text)
    sizes: dict[str, int] = {}  # of anchors
    inside: list[tuple[str | None, int]] = []  # collections that are open, and what stands in them so far
    try:
        while loader.check_event():
            event = loader.get_event()
            place = f"{where}:{event.start_mark.line + 1}"
            anchor, size = getattr(event, "anchor", None), 1
            if isinstance(event, yaml.CollectionStartEvent):
                if len(inside) == DEEPEST:
                    raise UserError(f"{place}: nested more than {DEEPEST} deep", "a run has sections with keys")
                inside.append((anchor, 1))
                continue
            if isinstance(event, yaml.AliasEvent):
                if any(anchor == name for name, _ in inside):
                    raise UserError(f"{place}: the anchor `{anchor}` stands within itself", "write the values out")
                size, anchor = sizes.get(str(anchor), 1), None
            elif isinstance(event, yaml.ScalarEvent):
                size += len(event.value) // 64
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, size = inside.pop()
            else:
                continue
            if anchor is not None:
                sizes[anchor] = size
            if inside:
                inside[-1] = (inside[-1][0], inside[-1][1] + size)
                if inside[-1][1] > MOST_VALUES:
                    raise UserError(
                        f"{place}: more than {MOST_VALUES:,} keys and values, with what its anchors stand for",
                        "a run has fewer than 100 settings; name many files by a glob",
                    )
    finally:
        loader.dispose()


def _collect(node: yaml.MappingNode, prefix: Path_, path: Path, places: dict[Path_, str]) -> None:
    for key_node, value_node in node.value:
        here = (*prefix, str(key_node.value))
        place = f"{path}:{key_node.start_mark.line + 1}"
        if here in places:
            raise UserError(f"{place}: `{'.'.join(here)}` is set twice (first at {places[here]})", "remove one")
        places[here] = place
        if isinstance(value_node, yaml.MappingNode):
            _collect(value_node, here, path, places)


def _apply(override: str, values: dict[str, Any], places: dict[Path_, str]) -> None:
    key, separator, text = override.partition("=")
    parts = tuple(key.strip().split("."))
    if not separator or not all(parts) or len(parts) > 2:
        raise UserError(f"override `{override}` is not of the form section.key=value", "for example train.seed=1")
    try:
        value = _document(text, f"override `{_show(override)}`")[1]
    except UserError as error:
        if "not valid YAML" not in str(error):
            raise
        value = text
    if not (isinstance(value, int | float) and (_takes(parts, int) or _takes(parts, float))):
        value = _text_value(parts, text, value)
    places[parts] = f"override `{override}`"
    target = values
    if len(parts) == 2:
        if isinstance(given := values.get(parts[0]), str):
            raise UserError(
                f"override `{_show(override)}`: the run has `{parts[0]}: {given}`", "leave one of the two out"
            )
        if not isinstance(given, dict):
            values[parts[0]] = {}
        target = values[parts[0]]
    target[parts[-1]] = value


def _text_value(parts: Path_, text: str, value: Any) -> Any:
    """For a setting that takes text, what was typed: `#` and `: ` have no meaning of their own there."""
    if isinstance(value, list) and _takes(parts, tuple):
        return value
    is_text = (_takes(parts, str) or _takes(parts, Path)) and text.strip() not in ("", "null", "~")
    return text if is_text and not text.startswith(("'", '"')) else value


def _takes(parts: Path_, kind: type) -> bool:
    """Whether a setting may be of a kind."""
    _, field = _section_and_field(parts)
    return field is not None and kind in _kinds(field.annotation)


def _kinds(annotation: Any) -> set[Any]:
    if annotation in (str, int, float, bool, Path):
        return {annotation}
    if get_origin(annotation) is tuple:
        return {tuple}
    if get_origin(annotation) in (UnionType, Union, Annotated):
        return set().union(*(_kinds(part) for part in get_args(annotation)))
    return set()


def _describe(problem: Any, places: dict[Path_, str], source: str) -> str:
    """One mistake in one line: place, setting, value, what it should be, what to do."""
    if isinstance(told := problem.get("ctx", {}).get("error"), UserError):
        return str(told)
    location = [str(part) for part in problem["loc"]]
    # Alternatives of a union carry extra parts (`data.validation.float`): cut to the setting itself.
    setting = tuple(location[:2])
    place = next((places[setting[:n]] for n in range(len(setting), 0, -1) if setting[:n] in places), source)
    name = ".".join(setting)
    section, field = _section_and_field(setting)
    if field is not None and any(map(_is_section, get_args(field.annotation))):
        name = ".".join(location)
        if problem["type"] == "extra_forbidden":
            return f"{place}: unknown key `{name}`; {field.json_schema_extra['fix']}"
    if problem["type"] == "extra_forbidden":
        hint = _hint(setting[-1], list(section.model_fields) if section else [])
        return f"{place}: unknown key `{name}`; {hint}"
    if problem["type"] == "missing":
        return f"{place}: `{name}` is missing"
    extra = getattr(field, "json_schema_extra", None)
    fix = f"; fix: {extra['fix']}" if isinstance(extra, dict) and "fix" in extra else ""
    expected = "" if fix and len(location) > 2 else ": " + _expected(problem["msg"])
    if problem["type"] in ("model_type", "model_attributes_type") or section is None:
        expected = ": should be a section with keys of its own"
    return f"{place}: {name} = {_show(problem['input'])}{expected}{fix}"


def _expected(message: str) -> str:
    """Pydantic's words for a wrong value, as they stand behind a setting."""
    return message.replace("Input should be", "should be").removeprefix("Value error, ")


def _hint(key: str, known: list[str]) -> str:
    """Advice on what to write instead of a key that a section does not have; `known` are those it has."""
    if (instead := foreign(key)) is not None:
        return instead
    if (near := misspelt(key, known)) is not None:
        return f"did you mean `{near}`?"
    elsewhere = {name: section.model_fields for name, section in sections().items()}
    for name, fields in elsewhere.items():
        if key in fields:
            return f"it belongs in the section `{name}`: {fields[key].description}"
    for name, fields in elsewhere.items():
        if (near := misspelt(key, fields)) is not None:
            return f"did you mean `{name}.{near}`?"
    return f"known here: {', '.join(known)}"


def _section_and_field(setting: Path_) -> tuple[type[BaseModel] | None, Any]:
    """The section class that a setting's key stands in, and its field."""
    if len(setting) == 1:
        return Run, Run.model_fields.get(setting[0])
    section = sections().get(setting[0])
    return section, section.model_fields.get(setting[1]) if section else None


def sections() -> dict[str, type[BaseModel]]:
    """The sections of a run by name."""
    found: dict[str, type[BaseModel]] = {}
    for name, field in Run.model_fields.items():
        candidates = getattr(field.annotation, "__args__", (field.annotation,))
        found[name] = next(filter(_is_section, candidates))
    return found


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _show(value: Any) -> str:
    if isinstance(value, int) and abs(value) >= 2**63:
        return f"a number of {value.bit_length():,} bits"  # Python does not write numbers of thousands of digits
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
