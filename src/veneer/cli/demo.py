"""veneer demo: the whole job on this machine, on a real model, in minutes.

A 135M model learns to route customer messages to a small JSON object (team, urgency, product). The held-out rows
use other wordings, names and products than the training rows, and no setting was chosen on them. Three models answer
them: the base, the base with examples in its prompt, and the tuned one; and then the tuned one as it ships.
"""

import time
from collections.abc import Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

SYSTEM_PROMPT = (
    'Route this message as JSON: {"team": "billing|shipping|technical|account|sales", '
    '"urgency": "low|normal|high", "product": "name", or null if none is named}'
)
EXAMPLES = 3  # training rows in the base's prompt


def demo(
    output_dir: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/demo"),
    dpo: Annotated[
        bool,
        typer.Option("--dpo", help="Go on from the run there by DPO, into a folder beside it."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON alone on stdout.")] = False,
) -> int:
    """Fine-tune a real model with QLoRA on this machine and see on held-out data that it got better.

    Example: `veneer demo`

    Example: `veneer demo --dpo` then goes on by direct preference optimization, and shows the win rate.
    """
    from veneer.cli import show

    if dpo:
        return _dpo(output_dir.expanduser(), as_json)
    started = time.perf_counter()
    out = show.console(as_json)
    run = demo_run(_free(output_dir.expanduser()))
    out.print("[bold]1  What is here[/bold]")
    from veneer.cli import show_demo
    from veneer.config import RunFolder
    from veneer.machine.device import peak_resident_bytes
    from veneer.training.job import TrainingJob

    job = TrainingJob(run)
    _show_start(out, job)
    folder = RunFolder(run.train.output_dir)
    evaluation, trained = _train_and_score(out, job)
    _save(folder, evaluation)
    show_demo.show_results(out, evaluation.as_dict())
    evaluation, exported = _export(out, job, evaluation)
    page, rule, shown = _save(folder, evaluation)
    show_demo.show_examples(out, shown, rule)
    show_demo.show_next(out, folder.path, shown[0]["prompt"])
    seconds, peak = time.perf_counter() - started, peak_resident_bytes()
    out.print(f"{seconds:.0f} s, at most {show.size(peak)} of memory")
    if as_json:
        show.print_json(
            evaluation.as_dict()
            | trained.as_dict()
            | {"gguf": exported, "report": str(page), "wall_seconds": round(seconds, 1), "peak_resident_bytes": peak}
            | {"run_dir": str(folder.path)}
        )
    if not evaluation.is_better:
        out.print("[red]the tuned model is not better than its base with examples[/red]")
        return 1
    return 0


def _dpo(sft: Path, as_json: bool) -> int:
    """Go on from the demo's run, which is made first where it is not there."""
    from veneer.cli import show
    from veneer.cli.demo_dpo import demo_dpo
    from veneer.config import RunFolder

    out = show.console(as_json)
    if not RunFolder(sft).adapter.is_dir():
        from veneer.api.train import finish
        from veneer.training.job import TrainingJob

        out.print(f"[bold]0  The demo's run[/bold] is not in {sft}, so it is trained first")
        job = TrainingJob(demo_run(sft), resume="auto")
        with show.LiveProgress(out, job.steps) as progress:
            finish(job, [progress])
        del job
    result = demo_dpo(out, sft, _free(sft.with_name(f"{sft.name}-dpo")))
    if as_json:
        show.print_json(result)
    if result["win_rate"]["verdict"] != "better":
        out.print("[red]the win rate does not show that DPO made it better[/red]")
        return 1
    return 0


def _show_start(out: Any, job: Any) -> None:
    """Print machine, model, engine and data."""
    from veneer.cli import show

    trainable, total = job.parameters["trainable"], job.parameters["total"]
    out.print(f"   machine  {job.machine.describe()}")
    out.print(f"   model    {job.run.model.base}, dequantized to bfloat16 from a Q4_1 GGUF file")
    out.print(f"            {total:,} parameters in 4 bits, {trainable:,} trained in an adapter")
    show.show_engine(out, job.choice, "   ")
    out.print("[bold]2  The data[/bold]: customer messages to be routed to a team, an urgency and a product")
    show.show_ledger(out, job.data.ledger.as_dict())


def _train_and_score(out: Any, job: Any) -> tuple[Any, Any]:
    """Score base and base with examples, train, score the tuned model; returns the evaluation and the run's report."""
    from veneer.api.train import finish
    from veneer.cli import show, show_demo
    from veneer.data.pipeline import read_held_out
    from veneer.evaluation.compare import Evaluation, Scorer
    from veneer.evaluation.examples import examples_of
    from veneer.evaluation.generation import generate
    from veneer.evaluation.responder import ModelResponder

    run = job.run
    held_out = job.data.held_out(run.evaluate.rows)
    responder = ModelResponder(job.model, job.engine, job.renderer, run.evaluate.batch_size)
    scorer = Scorer(responder, held_out, run.evaluate)

    def scored(examples: Sequence[Any] = ()) -> Any:
        with show.answer_progress(out, len(held_out), "   answering") as on_done:
            # The loss of the held-out rows is measured at the end of the training.
            found = scorer.score(on_done, examples, with_losses=False)
        show_demo.show_right(out, found.results)
        return found

    out.print(f"[bold]3  The base model[/bold] answers {len(held_out)} messages")
    with job.engine.adapter_off():
        base = scored()
        out.print(f"   and with {EXAMPLES} training rows as examples in its prompt")
        rows = read_held_out(run.data.train, "data.train", run.data, job.renderer)
        shown = scored(examples_of([row.conversation for row in rows], EXAMPLES))
    first = held_out[0].conversation.prompt()
    ids = [job.renderer.prompt_ids(first)]
    out.print(f"[bold]4  Training[/bold] {job.steps} steps; before it, the first held-out message")
    show_demo.paragraph(out, first[-1].content)
    out.print("   the base answers it with")
    show_demo.paragraph(out, base.samples[0].answer)
    answer = partial(generate, job.model, job.renderer, ids, run.evaluate.max_new_tokens)
    with show.LiveProgress(out, job.steps) as progress:
        trained = finish(job, [progress, show_demo.LiveAnswers(out, job.steps, lambda: answer()[0])])
    out.print("[bold]5  The tuned model[/bold] answers the same messages")
    return Evaluation(base, scored(), shown), trained


def _export(out: Any, job: Any, evaluation: Any) -> tuple[Any, dict[str, Any]]:
    """Export the model and score the file in llama.cpp; returns the evaluation with it, and facts of the file."""
    from dataclasses import replace

    import veneer
    from veneer.cli import show, show_demo
    from veneer.config import UserError
    from veneer.evaluation.compare import judge, questions
    from veneer.evaluation.metrics.metric import ScoredRows
    from veneer.release.certify.answers import gguf_answers
    from veneer.release.certify.servers import require_llama_cpp

    out.print("[bold]6  Exported[/bold] as a GGUF file, answered by llama.cpp")
    try:
        require_llama_cpp()
    except UserError as error:
        reason = str(error).splitlines()[0]
        out.print(f"   left out: {reason}; pip install 'veneer[llamacpp]'")
        return evaluation, {"left_out": reason}
    folder = job.folder.path
    made = veneer.export(str(folder), folder / "gguf", quant="q8_0")
    file = folder / "gguf" / made.file
    held_out = job.data.held_out(job.run.evaluate.rows)
    began = time.perf_counter()
    with show.answer_progress(out, len(held_out), "   answering") as on_done:
        answers = gguf_answers(file, job.renderer, questions(held_out), job.run.evaluate.max_new_tokens, on_done)
    seconds = time.perf_counter() - began
    rows = ScoredRows((), settings=job.run.evaluate)
    evaluation = replace(evaluation, exported=judge(job.renderer, held_out, answers, rows))
    exported = evaluation.as_dict()["exported"]
    show_demo.show_exported(out, file, made.bytes, seconds, exported)
    return evaluation, {"file": str(file), "bytes": made.bytes, "quant": made.quant, "seconds": round(seconds, 1)}


def _save(folder: Any, evaluation: Any) -> tuple[Path, str, list[dict[str, Any]]]:
    """Write scores, answers and the run's page; returns the page's path, and the answers to show with their rule."""
    from veneer.api.evaluated import save_evaluation
    from veneer.report.scores import SHOWN_BY, shown_of

    save_evaluation(folder, evaluation)
    return folder.report, SHOWN_BY, shown_of(evaluation.samples())


def demo_run(output_dir: Path) -> Any:
    """Make the run of the demo; recipes/smollm2-demo.yaml has the same settings.

    Its settings were chosen on data/demo/dev.jsonl; test.jsonl is for the scores alone.
    """
    from veneer.config import Run

    data = resources.files("veneer.data").joinpath("demo")
    return Run.model_validate(
        {
            "model": {"base": "smollm2-135m-instruct"},
            "quantization": {"bits": 4},
            "data": {
                "train": str(data / "train.jsonl"),
                "validation": str(data / "test.jsonl"),
                "system_prompt": SYSTEM_PROMPT,
                "max_length": 512,
            },
            "train": {
                "output_dir": output_dir,
                "num_train_epochs": 1,
                "per_device_train_batch_size": 8,
                "gradient_accumulation_steps": 1,
                "learning_rate": 2e-3,
                "warmup_ratio": 0.05,
                "gradient_checkpointing": False,
                "eval_steps": None,
            },
            "evaluate": {"max_new_tokens": 32, "rows": 120, "batch_size": 60},
        }
    )


def _free(output_dir: Path) -> Path:
    """Return the folder, or the first free numbered one beside it, so that the demo can be run again."""
    from veneer.config import RunFolder

    folder, number = output_dir, 1
    while RunFolder(folder).holds_run():
        number += 1
        folder = output_dir.with_name(f"{output_dir.name}-{number}")
    return folder
