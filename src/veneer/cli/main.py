"""The command `veneer`: its subcommands, and how it ends.

Exit status: 0 done; 1 the job or a gate failed; 2 the input is wrong; 130 interrupted. A traceback is shown only
with --debug, which may stand anywhere on the line.
"""

import contextlib
import errno
import io
import os
import re
import shlex
import sys
import threading
import warnings
from typing import Annotated

import typer

from veneer.cli import (
    certify,
    chat,
    data,
    demo,
    doctor,
    evaluate,
    export,
    generate,
    init,
    judge,
    merge,
    plan,
    predict,
    push,
    report,
    runs,
    serve,
    sweep,
    train,
    verify,
    watch,
)
from veneer.cli.lasting import lasting_output, polite_kills

CHECKPOINT = re.compile(r"(.*/)?step-\d+/?")
RESUMED = re.compile(r"--resume=[^=]+")
SHARED = {"train", "evaluate", "predict", "generate"}  # commands that several processes carry out together
SAVING = "veneer-checkpoint"  # name of the thread of training/saving.py, which is not imported for this
app = typer.Typer(
    name="veneer",
    help="Fine-tune large language models with LoRA and QLoRA, and prove each step.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    epilog="Try `veneer demo` first. --debug anywhere on the line shows the traceback of an error.",
)
for module in (
    demo,
    doctor,
    init,
    plan,
    data,
    verify,
    train,
    runs,
    watch,
    report,
    sweep,
    evaluate,
    predict,
    judge,
    generate,
    chat,
    export,
    certify,
    serve,
    push,
):
    name = module.__name__.rsplit(".", 1)[-1]
    app.command(name)(getattr(module, name))
app.command("merge")(merge.merge)
app.command("unmerge")(merge.unmerge)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from veneer import __version__

        print(f"veneer {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Entry point; never returns."""
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait for each other give way after a moment. By default they hold their core, and one busy
    # neighbour on a small machine makes training 25 times slower; this costs 5% where there is none.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # Memory that grows in place leaves no holes: what is allocated decides whether a run fits, not how it came about.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # Large buffers of the CPU in large pages: mapping them anew for each costs little then.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Compiled code that Transformers would fetch from a hub, where the package `kernels` is installed.
    os.environ["USE_HUB_KERNELS"] = "0"
    warnings.formatwarning = _format_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what its encoding does not have is shown as an escape
    if _is_later_rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process lives
    words = _spelled([argument for argument in given if argument != "--debug"])
    with lasting_output() as output, polite_kills(), contextlib.ExitStack() as stack:
        if words and "--help" not in words:  # help imports nothing of Veneer's
            from veneer.config.notify import collected

            stack.enter_context(collected())
        status = _run(words, debug) or output.status()
    if status == 130 and any(thread.name == SAVING for thread in threading.enumerate()):
        os._exit(status)  # a second Ctrl-C: a checkpoint that is half-written never gets its name
    sys.exit(status)


def _spelled(arguments: list[str]) -> list[str]:
    """Spell out `--suites` and `--resume [auto|step-N]`, since no option of the parser's may leave its value out."""
    words: list[str] = []
    left = [argument for given in arguments for argument in (given.split("=") if RESUMED.fullmatch(given) else [given])]
    while left:
        word, following = left.pop(0), left[0] if left else "-"
        words.append(word)
        if word == "--suites" and following.startswith("-"):
            words.append("all")
        elif word == "--resume" and following == "auto":
            words[-1] = "--resume-auto"
            left.pop(0)
        elif word == "--resume" and CHECKPOINT.fullmatch(following):
            words[-1] = "--resume-from"
    return words


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Format a warning for a person, without the line of code that gave it."""
    from veneer.config.files import visible

    return f"warning: {visible(str(message))}\n"


def _run(arguments: list[str], debug: bool) -> int:
    try:
        _require_one_process(arguments)
        result = app(arguments, standalone_mode=False, prog_name="veneer")
    except Exception as error:
        if debug:
            raise
        return _report(error)
    status = result if isinstance(result, int) else 0
    if status == 130:  # a Ctrl-C at any other moment; the parser turns it into this status
        print("stopped", file=sys.stderr)
        if arguments[:1] == ["train"]:  # before it could say more
            print(f"  start again with: veneer {shlex.join(arguments)}", file=sys.stderr)
    return status


def _report(error: Exception) -> int:
    """Say what ended the command, in one message; returns its exit status."""
    from veneer.config import Interrupted, JobError, UserError
    from veneer.config.files import visible

    if type(error).__module__.startswith(("click", "typer")) and hasattr(error, "show"):
        if hasattr(error, "message"):
            error.message = visible(error.message)
        error.show()  # a wrong call: the parser says what it expects
        return 2
    message, status = str(error), 1
    if isinstance(error, UserError):
        status = 2
    elif isinstance(error, Interrupted):
        status = 130
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}the disk became full ({error.strerror}); what was unfinished is gone\n  fix: free space"
    elif type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be there
        message = (
            f"{str(error).split('. ')[0]}\n  fix: end what else holds memory there (nvidia-smi shows it); "
            "`veneer plan` says what a run needs and what to change"
        )
    elif not isinstance(error, JobError):
        message = f"{type(error).__name__}: {error}\n  run it again with --debug for the traceback"
    if "RANK" in os.environ:
        from veneer.machine.launch import leave_error

        leave_error(visible(message), type(error).__name__ == "LostRankError")
    if not _is_later_rank():
        print(f"{'stopped' if status == 130 else 'error'}: {visible(message)}", file=sys.stderr)
    return status


def _require_one_process(arguments: list[str]) -> None:
    """Raise UserError for a command that torchrun runs in several processes, and that is made for one."""
    if os.environ.get("WORLD_SIZE", "1") != "1" and not SHARED & set(arguments[:1]):
        from veneer.config import UserError

        raise UserError(
            f"`veneer {shlex.join(arguments[:1])}` runs in one process, and torchrun has started several",
            f"call it without torchrun; several GPUs are used by {', '.join(sorted(SHARED))}",
        )


def _is_later_rank() -> bool:
    """Return whether this is a process of a run on several GPUs, and not its first: it prints nothing."""
    return os.environ.get("RANK", "0") != "0"


if __name__ == "__main__":
    main()
