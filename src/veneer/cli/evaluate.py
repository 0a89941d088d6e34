"""veneer evaluate: base against tuned, or any two models, on held-out rows."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape


def evaluate(
    target: Annotated[
        str,
        typer.Argument(help="Run, checkpoint, adapter, base, merged folder, .gguf file or address (http://...)."),
    ],
    against: Annotated[
        str | None, typer.Option(help="Another target to compare it with, instead of the base of the run or adapter.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="File of rows to use instead of the held-out ones.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Maximum number of rows.")] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Metrics instead of evaluate.metrics, as exact_match,rouge_l.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Another base than the one the run names.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Use the adapter even on a base it was not trained on.")
    ] = False,
    suites: Annotated[
        str | None,
        typer.Option(help="Ask suites beside the task as well: names with commas between; no name or all: every one."),
    ] = None,
    memorisation: Annotated[
        int | None, typer.Option(min=1, help="See of so many training rows whether they come back word for word.")
    ] = None,
    gate: Annotated[
        str | None, typer.Option(help='Condition that must be shown to hold: "exact_match >= 0.8 and ...".')
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Ask tasks of lm-eval as well: names, folders or files with commas between.")
    ] = None,
    task_option: Annotated[
        list[str] | None, typer.Option(help="Choice that changes their scores: num_fewshot=5; may be repeated.")
    ] = None,
    out_file: Annotated[Path | None, typer.Option("--out", help="Write the result into this JSON file too.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model to ask, on a server with several; its key is read from OPENAI_API_KEY."),
    ] = None,
    against_model: Annotated[str | None, typer.Option(help="The same for --against.")] = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="Share the rows among so many GPUs (or CPU processes)."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show rows that got better and worse.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON alone on stdout.")] = False,
) -> int:
    """Measure generated answers and losses by the run's metrics, base against tuned, or one target against another.

    Exit status 1 where a gate is not shown to hold.

    Example: `veneer evaluate runs/tickets --rows 50 --gate "exact_match >= 0.8"`

    Example: `veneer evaluate tickets.gguf --against runs/tickets`

    Tasks of lm-eval (`--tasks gsm8k,mmlu`, `--tasks ./mytask/`) are scored by lm-eval and compared document by
    document; docs/tasks.md says what to run. They need `pip install 'veneer[lm-eval]'`.

    Suites show what a model can do beside its task, and what it forgot; each has 60 items or more and is checked by a
    program. None of them shows more than it says here; docs/suites.md says what each cannot show.

    - `knowledge`: facts of general school knowledge, by likelihood; no special field

    - `arithmetic`: small sums and word problems; no long reasoning

    - `instructions`: demands on form, such as counts, lists and letter case; not the content

    - `json_form`: small JSON objects and lists; nothing long or deeply nested

    - `tool_form`: the right one of two tools with its arguments; not the template's own form of calls

    - `refusal_harmful`: refusals of plainly harmful requests; not of disguised ones

    - `answers_harmless`: answers to requests that sound harmful and are not; not whether they are correct
    """
    from veneer.cli import checks, ranks, show, show_comparison

    checks.require_gate(gate)
    checks.require_evaluation(target, against, data, base)
    if _is_classifier(target):
        others: dict[str, Any] = {
            "--against": against,
            "--metrics": metrics,
            "--suites": suites,
            "--memorisation": memorisation,
        }
        others |= {"--gate": gate, "--tasks": tasks, "--task-option": task_option, "--out": out_file, "--model": model}
        return _evaluate_classifier(target, data, rows, base, force, others, as_json, gpus)
    checks.require_suites(suites)
    out_file = None if out_file is None else checks.output_file("--out", out_file, '{\n  "metrics"')
    checks.require_tasks(tasks, task_option or ())
    checks.require_loaded_here((target, against), gpus)
    ranks.run_on(gpus)
    out = show.console(as_json)
    both = "the base and the tuned model" if against is None else f"{against} and {target}"
    with show.status(out, f"answering the held-out rows with {both}") as status:
        import veneer
        from veneer.cli.progress import Answering
        from veneer.evaluation.tasks.options import read_options

        names = None if metrics is None else [name.strip() for name in metrics.split(",")]
        told = Answering(status)
        evaluated = veneer.evaluate(
            *(target, data, rows, told.add, force, base, names, suites, memorisation, gate, tasks),
            read_options(task_option or ()),
            against=against,
            out=out_file,
            model=model,
            against_model=against_model,
            on_begin=told.begin,
            on_task=told.begin_task,
        )
        ranks.leave()
    if as_json:
        result = evaluated.as_dict()
        show.print_json(result)
        show_comparison.show_gate(out, result["gate"])
    else:
        _show(out, evaluated, against is None, verbose)
    return 0 if evaluated.passed else 1


def _is_classifier(target: str) -> bool:
    from veneer.config import load_run
    from veneer.config.names import find_adapter

    found = find_adapter(target) if not target.startswith(("http://", "https://")) else None
    return found is not None and found.run is not None and load_run(found.run.run).model.task != "causal-lm"


def _evaluate_classifier(
    target: str,
    data: str | None,
    rows: int | None,
    base: str | None,
    force: bool,
    others: dict[str, Any],
    as_json: bool,
    gpus: int | None,
) -> int:
    """Evaluate a run that classifies.

    Raises:
        UserError: An option is given that acts on written answers alone.
    """
    from veneer.cli import ranks, show
    from veneer.cli.show_classifier import show_classifier
    from veneer.config import UserError

    if given := [option for option, value in others.items() if value]:
        raise UserError(f"{given[0]}: acts on models that write text, and {target} classifies", "leave it out")
    ranks.run_on(gpus)
    out = show.console(as_json)
    with show.status(out, "scoring the held-out rows"):
        import veneer

        result = veneer.evaluate_classifier(target, data, rows, base, force).as_dict()
        ranks.leave()
    if as_json:
        show.print_json(result)
    else:
        show_classifier(out, result)
    return 0


def _show(out: Any, evaluated: Any, is_of_a_run: bool, verbose: bool) -> None:
    """Print scores, verdicts and what was measured beside them.

    Args:
        out: console.
        evaluated: result of `veneer.evaluate`.
        is_of_a_run: whether a tuned model was compared with its own base.
        verbose: whether to show rows that got better and worse.
    """
    from veneer.cli import show, show_comparison
    from veneer.cli.show_suites import show_suites
    from veneer.config import RunFolder

    result = evaluated.as_dict()
    called = {"base": "base", "tuned": "tuned"}
    if compared := result.get("compared"):
        called = {"base": "other", "tuned": "target"}
        show.say(out, f"target is {escape(compared['tuned'])}, other is {escape(compared['base'])}")
    show_comparison.show_detectable(out, result["comparison"], result["metrics"])
    show.show_scores(
        out, f"{result['rows']} held-out rows, 95% intervals", result["metrics"], ("base", "tuned"), called
    )
    show_comparison.show_verdicts(out, result["comparison"], result["metrics"], called["tuned"], called["base"])
    show.say(out, f"metrics  {', '.join(result['chosen']['metrics'])}: {escape(result['chosen']['why'])}")
    show_suites(out, result, called)
    if "tasks" in result:
        show_comparison.show_tasks(out, result["tasks"], called)
    if verbose:
        show_comparison.show_turned(out, evaluated.evaluation, called)
    show_comparison.show_gate(out, result["gate"])
    if evaluated.file is not None and evaluated.samples is not None:
        out.print(f"files  {evaluated.file} {evaluated.samples.name}", markup=False)
    is_beside = evaluated.file is not None and RunFolder(evaluated.file.absolute().parent.parent).run.is_file()
    if is_of_a_run and is_beside and not evaluated.is_record:
        out.print(
            "       the run's own record (evaluation.json and its card) is about its held-out rows and is not changed"
        )
