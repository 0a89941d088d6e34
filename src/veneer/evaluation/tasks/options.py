"""Options of tasks that change scores, as lm-eval's own runner names them, and what can be refused without it."""

import difflib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, ValidationError

from veneer.config import UserError
from veneer.config.section import Section

YAML = ".yaml"  # lm-eval reads files of no other name


class TaskOptions(Section):
    """Choices that change scores, with lm-eval's names and defaults.

    Attributes:
        apply_chat_template: whether a document is asked as a turn of a chat; None: if the model has a chat template
        num_fewshot: examples before each document; None: as the task says
        fewshot_as_multiturn: whether these examples are turns of the chat, instead of one text
        system_instruction: system prompt; None: none
        confirm_run_unsafe_code: whether tasks may run code: that a model has written, or that a hub gives
    """

    apply_chat_template: bool | None = None
    num_fewshot: int | None = Field(None, ge=0)
    fewshot_as_multiturn: bool = True
    system_instruction: str | None = None
    confirm_run_unsafe_code: bool = False


DEFAULT_OPTIONS = TaskOptions()


def read_options(words: Sequence[str]) -> TaskOptions:
    """Read options from the command line.

    Args:
        words: each one option, as `num_fewshot=5`.

    Raises:
        UserError: One is not known, or has no such value.
    """
    values = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--task-option {word}: no value", "write NAME=VALUE, as num_fewshot=5")
        if name not in TaskOptions.model_fields:
            near = difflib.get_close_matches(name, TaskOptions.model_fields, n=1, cutoff=0.4)
            raise UserError(
                f"--task-option {name}: not known" + (f"; the nearest is {near[0]}" if near else ""),
                f"write one of {', '.join(TaskOptions.model_fields)}",
            )
        values[name] = value
    try:
        return TaskOptions.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise UserError(f"--task-option {name}={values[name]}: {first['msg']}", "write such a value") from None


def task_names(text: str) -> list[str]:
    """Return the names in a list with commas between, each once; folders and files among them exist.

    Raises:
        UserError: lm-eval is not installed, there is no name, or no such folder or file.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks: lm-eval is not installed", "pip install 'veneer[lm-eval]'")
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UserError(f"--tasks {text!r}: names no task", "name tasks of lm-eval, as gsm8k,mmlu, or a folder of them")
    for name in names:
        if name.endswith(".yml"):
            raise UserError(f"--tasks {name}: lm-eval reads .yaml files alone", "give it that name")
        if is_path(name) and not Path(name).expanduser().exists():
            raise UserError(f"--tasks {name}: no such folder or file", "name a folder of task YAML files, or one file")
    return names


def is_path(name: str) -> bool:
    """Whether a name means a folder or a YAML file, and not a task of lm-eval."""
    return "/" in name or name.endswith(YAML)
