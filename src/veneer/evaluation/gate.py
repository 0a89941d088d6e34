"""Gates: conditions on what was measured, such as `exact_match >= 0.8 and difference(perplexity) < 0`.

    condition  = all { "or" all }
    all        = single { "and" single }
    single     = "not" single | "(" condition ")" | bound
    bound      = name operator number | number operator name          operator: >= > <= <
    name       = letters, digits, _ . - | any text in quotes | "difference" "(" name ")"
    number     = 0.8 | -2e-3 | 80%

A bound holds only if it is shown to: the end of the 95% interval that is nearest to it must satisfy it, so that a gate
passes neither by luck nor by few rows. `not` is resolved as the gate is parsed (not a >= 1 is a < 1), and must be shown
as well. There is no sign for equality, which no interval can show. Nothing is ever executed: the text is cut into
words, and the words are read by the rules above.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from veneer.config.errors import UserError
from veneer.config.results import Check
from veneer.training.intervals import Interval, Z

LONGEST = 2000  # characters of a gate
DEEPEST = 20  # parentheses and `not` within each other
MOST_ROWS = 100_000  # where more would be needed, no number is named
OPPOSITE = {">=": "<", ">": "<=", "<=": ">", "<": ">="}
MIRRORED = {">=": "<=", ">": "<", "<=": ">=", "<": ">"}
WORD = re.compile(
    r"""\s*(?: (?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?%?(?![\w.]))
             | (?P<name>[A-Za-z_][\w.-]*)
             | (?P<quoted>"[^"]*"|'[^']*')
             | (?P<operator>>=|<=|>|<)
             | (?P<mark>[()]) )""",
    re.VERBOSE | re.ASCII,
)


@dataclass(frozen=True)
class Measured:
    """A measured value that a gate may name.

    Attributes:
        interval: value with its 95% interval
        rows: number of rows that it was measured on
        unit: `share`: it is shown in percent
    """

    interval: Interval
    rows: int
    unit: str = ""


@dataclass(frozen=True)
class Bound:
    """A name, an operator and a limit; `at` is the position of the name in the gate's text, from 1."""

    name: str
    operator: str
    limit: float
    at: int

    @property
    def text(self) -> str:
        return f"{self.name} {self.operator} {self.limit:g}"

    @property
    def is_lower(self) -> bool:
        """Whether the value must lie above the limit."""
        return self.operator in (">=", ">")

    def holds(self, value: float) -> bool:
        """Whether a number satisfies it; NaN does not."""
        limit = self.limit
        return {">=": value >= limit, ">": value > limit, "<=": value <= limit, "<": value < limit}[self.operator]


@dataclass(frozen=True)
class Either:
    """Conditions of which one must be shown."""

    parts: tuple["Condition", ...]


@dataclass(frozen=True)
class Both:
    """Conditions that must all be shown."""

    parts: tuple["Condition", ...]


Condition = Bound | Either | Both


def parse_gate(text: str) -> Condition:
    """Parse a gate.

    Raises:
        UserError: It is no condition; the message names the position.
    """
    if len(text) > LONGEST:
        raise UserError(f"--gate: {len(text):,} characters; at most {LONGEST:,}", "write a shorter condition")
    return _Parser(text).parse()


def bounds_of(condition: Condition) -> list[Bound]:
    """Return all bounds of a condition, from left to right."""
    if isinstance(condition, Bound):
        return [condition]
    return [bound for part in condition.parts for bound in bounds_of(part)]


def require_names(condition: Condition, known: Iterable[str], prefixes: tuple[str, ...] = ()) -> None:
    """Raise UserError where a condition names what is not measured.

    Args:
        condition: condition of a gate
        known: names of all that is measured
        prefixes: beginnings of names that are known only once the rows are answered
    """
    names = sorted(known)
    for bound in bounds_of(condition):
        plain = bound.name.removeprefix("difference(").removesuffix(")")
        if bound.name in names or plain.startswith(prefixes or ("\0",)):
            continue
        near = difflib.get_close_matches(bound.name, names, n=1, cutoff=0.5)
        raise UserError(
            f"--gate, position {bound.at}: `{bound.name}` is not measured",
            (f"did you mean `{near[0]}`? " if near else "") + f"Known names: {', '.join(names) or 'none'}",
        )


def check_gate(condition: Condition, measured: Mapping[str, Measured]) -> list[Check]:
    """Return a check for each part of a gate that must hold; the gate holds if all have passed.

    Args:
        condition: parsed gate
        measured: measured values by name; differences from the base as `difference(NAME)`

    Raises:
        UserError: It names what was not measured.
    """
    require_names(condition, measured)
    parts = condition.parts if isinstance(condition, Both) else (condition,)
    return [_check(part, measured) for part in parts]


def rows_needed(bound: Bound, measured: Measured) -> int | None:
    """Estimate how many rows would settle a bound that these rows leave open, if they came out like these.

    Returns:
        Number of rows after which the interval ends before the limit, on whichever side the value lies; None: more than
        `MOST_ROWS`, or the value is the limit.
    """
    value, rows, limit = measured.interval.value, measured.rows, bound.limit
    gap = abs(value - limit)
    if not gap or not math.isfinite(gap):
        return None
    if measured.unit == "share" and 0 <= limit <= 1 and not bound.name.startswith("difference("):
        needed = Z * Z * limit * (1 - limit) / gap**2  # Wilson's interval ends where the score test does
    else:
        end = measured.interval.low if value > limit else measured.interval.high
        needed = rows * ((value - end) / gap) ** 2
    found = max(rows + 1, math.ceil(needed))
    return found if found <= MOST_ROWS else None


def _check(condition: Condition, measured: Mapping[str, Measured]) -> Check:
    """Check a bound, or a condition of several."""
    if isinstance(condition, Bound):
        found = measured[condition.name]
        low, high = found.interval.low, found.interval.high
        end = low if condition.is_lower else high
        passed = condition.holds(end)
        return Check(
            condition.text,
            passed,
            end if math.isfinite(end) else None,
            condition.limit,
            f"{'lower' if condition.is_lower else 'upper'} end of {condition.name}'s 95% interval",
            "" if passed else _why_not(condition, found),
            "at least" if condition.is_lower else "at most",
            found.unit,
        )
    parts = [_check(part, measured) for part in condition.parts]
    passed = (any if isinstance(condition, Either) else all)(part.passed for part in parts)
    joint = " or " if isinstance(condition, Either) else " and "
    text = f"({joint.join(part.id for part in parts)})"
    failed = [f"{part.id}: {part.detail}" for part in parts if not part.passed]
    return Check(text, passed, "shown" if passed else "not shown", None, "", "" if passed else "; ".join(failed))


def _why_not(bound: Bound, measured: Measured) -> str:
    """Say why a bound is not shown, and how many rows would settle it."""
    interval = measured.interval
    if not measured.rows:
        return f"{_shown(interval.value, measured.unit)}: its interval is not known, so nothing is shown"
    low, value, high = (_shown(number, measured.unit) for number in (interval.low, interval.value, interval.high))
    found = f"{value} ({low} to {high}) on {measured.rows:,} rows"
    if not bound.holds(interval.high if bound.is_lower else interval.low):
        return f"{found}: shown not to hold"
    needed = rows_needed(bound, measured)
    if needed is None:
        return f"{found}: too near to the bound for {MOST_ROWS:,} rows"
    outcome = "show it" if bound.holds(interval.value) else "show that it does not hold"
    return f"{found}: not shown; about {needed:,} rows like these would {outcome}"


def _shown(number: float, unit: str) -> str:
    return f"{number:.1%}" if unit == "share" else f"{number:.4g}"


class _Parser:
    """Reads one gate, word by word."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.depth = 0
        self.kind, self.word, self.start = "", "", 0
        self._next()

    def parse(self) -> Condition:
        condition = self._either(is_negated=False)
        if self.kind:
            self._fail(f"`{self.word}` is one word too many", "join bounds with `and` or `or`")
        return condition

    def _either(self, is_negated: bool) -> Condition:
        parts = [self._both(is_negated)]
        while self._take("name", "or"):
            parts.append(self._both(is_negated))
        return _joined(Both if is_negated else Either, parts)

    def _both(self, is_negated: bool) -> Condition:
        parts = [self._single(is_negated)]
        while self._take("name", "and"):
            parts.append(self._single(is_negated))
        return _joined(Either if is_negated else Both, parts)

    def _single(self, is_negated: bool) -> Condition:
        self.depth += 1
        if self.depth > DEEPEST:
            self._fail(f"more than {DEEPEST} parentheses and `not` within each other", "write it with fewer")
        if self._take("name", "not"):
            condition = self._single(not is_negated)
        elif self._take("mark", "("):
            condition = self._either(is_negated)
            self._expect("mark", ")", "`)`")
        else:
            condition = self._bound(is_negated)
        self.depth -= 1
        return condition

    def _bound(self, is_negated: bool) -> Bound:
        if self.kind == "number":
            limit = self._number()
            operator = MIRRORED[self._operator()]
            name, at = self._name()
        else:
            name, at = self._name()
            operator = self._operator()
            limit = self._number()
        return Bound(name, OPPOSITE[operator] if is_negated else operator, limit, at)

    def _name(self) -> tuple[str, int]:
        at = self.start + 1
        if self.kind == "name" and self.word == "difference":
            self._next()
            if self._take("mark", "("):
                name, _ = self._plain_name()
                self._expect("mark", ")", "`)`")
                return f"difference({name})", at
            return "difference", at
        return self._plain_name()

    def _plain_name(self) -> tuple[str, int]:
        at, name = self.start + 1, self.word.strip("\"'") if self.kind == "quoted" else self.word
        if self.kind not in ("name", "quoted") or self.word in ("and", "or", "not"):
            self._fail(f"{self._found()} stands where a name should", "write NAME >= NUMBER")
        self._next()
        return name, at

    def _operator(self) -> str:
        operator = self.word
        if self.kind != "operator":
            self._fail(f"{self._found()} stands where an operator should", "write one of >= > <= <")
        self._next()
        return operator

    def _number(self) -> float:
        word = self.word
        if self.kind != "number":
            self._fail(
                f"{self._found()} stands where a number should",
                "a bound compares a name with a number; difference(NAME) compares it with the base",
            )
        number = float(word.rstrip("%")) / (100 if word.endswith("%") else 1)
        if not math.isfinite(number):
            self._fail(f"{word} is no finite number", "write a smaller one")
        self._next()
        return number

    def _take(self, kind: str, word: str) -> bool:
        """Go on if this is the next word."""
        is_next = (self.kind, self.word) == (kind, word)
        if is_next:
            self._next()
        return is_next

    def _expect(self, kind: str, word: str, what: str) -> None:
        if not self._take(kind, word):
            self._fail(f"{self._found()} stands where {what} should", "close the parenthesis")

    def _next(self) -> None:
        """Read the next word; at the end its kind is empty."""
        self.start = self.at + len(self.text[self.at :]) - len(self.text[self.at :].lstrip())
        if self.start == len(self.text):
            self.kind, self.word = "", ""
            return
        match = WORD.match(self.text, self.at)
        if match is None:
            sign = self.text[self.start]
            fix = "an interval never shows equality: write >= or <=" if sign in "=!" else "write NAME >= NUMBER"
            self._fail(f"`{sign}` means nothing here", fix)
        self.kind = match.lastgroup or ""
        self.word = match[self.kind]
        self.start, self.at = match.start(self.kind), match.end()

    def _found(self) -> str:
        return f"`{self.word}`" if self.kind else "the end"

    def _fail(self, what: str, fix: str) -> NoReturn:
        raise UserError(f"--gate, position {self.start + 1}: {what}\n  {self.text}\n  {' ' * self.start}^", fix)


def _joined(kind: type[Either] | type[Both], parts: list[Condition]) -> Condition:
    """Join conditions; those of the same kind within become its own parts."""
    if len(parts) == 1:
        return parts[0]
    flat = [inner for part in parts for inner in (part.parts if isinstance(part, kind) else (part,))]
    return kind(tuple(flat))
