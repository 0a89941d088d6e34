"""Reads prompts from a file or from standard input: one a line, or a conversation a line as JSON."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from veneer.config.errors import UserError
from veneer.config.files import read_text

Question = str | list[dict[str, Any]]  # a question, or the turns of a conversation


def read_prompts(path: Path) -> list[Question]:
    """The prompts of a file: `.jsonl` holds an object a line, with `prompt` or `messages`; any other a prompt a line.

    Raises:
        UserError: The file cannot be read, or a line is no prompt.
    """
    text = read_text(path.expanduser(), fix="name a file of prompts in --prompts-file")
    lines = text.removeprefix("\ufeff").splitlines()
    is_json = path.suffix.lower() in (".jsonl", ".ndjson")
    prompts = _objects(lines, str(path)) if is_json else plain_prompts(lines)
    if not prompts:
        raise UserError(f"--prompts-file {path}: holds no prompt", "write one prompt a line")
    return prompts


def plain_prompts(lines: Iterable[str]) -> list[Question]:
    """Every line that is not blank."""
    return [line.strip() for line in lines if line.strip()]


def require_text(given: Iterable[Any]) -> None:
    """Raises UserError for a prompt with half of a surrogate pair, which no tokenizer takes."""
    for prompt in given:
        if re.search("[\ud800-\udfff]", json.dumps(prompt, ensure_ascii=False)):
            raise UserError(f"prompt {ascii(prompt)[:60]}: not UTF-8 text", "write it in UTF-8")


def _objects(lines: list[str], name: str) -> list[Question]:
    prompts: list[Question] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{name}:{number}: not JSON", 'write an object a line, as {"prompt": "..."}') from None
        prompts.append(_prompt(row, f"{name}:{number}"))
    return prompts


def _prompt(row: Any, place: str) -> Question:
    given = [key for key in ("prompt", "messages") if isinstance(row, dict) and key in row]
    if len(given) != 1:
        raise UserError(
            f"{place}: should have either `prompt` or `messages`",
            'write {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}',
        )
    value = row[given[0]]
    if isinstance(value, str) and given == ["prompt"] and value.strip():
        return value
    turns = value if isinstance(value, list) else []
    if not turns or not all(isinstance(turn, dict) and isinstance(turn.get("content"), str) for turn in turns):
        raise UserError(
            f"{place}: `{given[0]}` holds no text to answer", "write a text, or turns with role and content"
        )
    if turns[-1].get("role") == "assistant":
        raise UserError(f"{place}: the last turn is the assistant's: nothing is left to answer", "leave that turn out")
    return turns
