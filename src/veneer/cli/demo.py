"""veneer demo: the whole job on this machine, on a real model, in minutes.

A 135M model learns to route customer messages to a small JSON object (team, urgency, product). The held-out rows
use other wordings, names and products than the training rows.
"""

import shlex
import time
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

SYSTEM_PROMPT = (
    'Route this message as JSON: {"team": "billing|shipping|technical|account|sales", '
    '"urgency": "low|normal|high", "product": "name", or null if none is named}'
)


def demo(
    output_dir: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON alone on stdout.")] = False,
) -> int:
    """Fine-tune a real model with QLoRA on this machine and see on held-out data that it got better.

    Example: `veneer demo`
    """
    from veneer.cli import show
    from veneer.config import RunFolder

    started = time.perf_counter()
    out = show.console(as_json)
    run = demo_run(_free(output_dir))
    out.print("[bold]1  What is here[/bold]")
    from veneer import api
    from veneer.engine.temporary import adapter_off
    from veneer.evaluate import compare, score
    from veneer.plan.machine import peak_resident_bytes
    from veneer.train import TrainingJob

    job = TrainingJob(run)
    out.print(f"   machine  {job.machine.describe()}")
    trainable, total = job.parameters["trainable"], job.parameters["total"]
    out.print(f"   model    {run.model.base}, dequantized to bfloat16 from a Q4_1 GGUF file")
    out.print(f"            {total:,} parameters in 4 bits, {trainable:,} trained in an adapter")
    show.show_engine(out, job.choice, "   ")
    out.print("[bold]2  The data[/bold]: customer messages to be routed to a team, an urgency and a product")
    show.show_ledger(out, job.data.ledger.as_dict())

    held_out = job.data.held_out(run.evaluate.rows)

    def scored(what: str, measure: Any) -> Any:
        progress, on_done = show.answer_progress(out, len(held_out), what)
        with progress:
            return measure(on_done)

    out.print(f"[bold]3  The base model[/bold] answers {len(held_out)} messages it has never seen")
    parts = (job.model, job.engine, job.renderer, held_out, run.evaluate)
    with adapter_off(job.model, job.engine):
        base = scored("   answering", lambda on_done: score(*parts, on_done))
    out.print(f"   exactly right: {show.interval('exact_match', base.metrics['exact_match'].as_dict())}")
    out.print(f"[bold]4  Training[/bold] {job.steps} steps")
    trained = api.finish(job, [show.LiveProgress(out)])
    out.print("[bold]5  The tuned model[/bold] answers the same messages")
    evaluation = scored("   answering", lambda on_done: compare(*parts, on_done, base=base))
    folder = RunFolder(run.train.output_dir)
    api.save_evaluation(folder, evaluation)
    result = evaluation.as_dict()
    show.show_evaluation(out, result)
    _show_examples(out, evaluation.samples())
    _show_next(out, folder.path, evaluation.samples()[0]["prompt"])
    seconds = time.perf_counter() - started
    peak = peak_resident_bytes()
    out.print(f"{seconds:.0f} s, at most {show.size(peak)} of memory")
    if as_json:
        show.print_json(
            result
            | trained.as_dict()
            | {"wall_seconds": round(seconds, 1), "peak_resident_bytes": peak, "run_dir": str(folder.path)}
        )
    if not evaluation.is_better:
        out.print("[red]the tuned model is not better than its base[/red]")
        return 1
    return 0


def demo_run(output_dir: Path) -> Any:
    """The run of the demo: recipes/smollm2-demo.yaml says the same."""
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
            "evaluate": {"max_new_tokens": 48, "rows": 120, "batch_size": 24},
        }
    )


def _free(output_dir: Path) -> Path:
    """The folder, or the first numbered one beside it that is free, so that the demo can be run again."""
    from veneer.config import RunFolder

    folder, number = output_dir, 1
    while RunFolder(folder).holds_run():
        number += 1
        folder = output_dir.with_name(f"{output_dir.name}-{number}")
    return folder


def _show_examples(out: Any, samples: list[dict[str, Any]]) -> None:
    """Three rows side by side, from the beginning, the middle and the end: not picked."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="three of them", title_justify="left", show_lines=True)
    for column in ("message", "base", "tuned", "right answer"):
        table.add_column(column, overflow="fold", ratio=1)
    step = max(1, len(samples) // 3)
    for sample in samples[::step][:3]:
        base = sample["base"] if len(sample["base"]) < 160 else sample["base"][:157] + "..."
        table.add_row(*(escape(text) for text in (sample["prompt"], base, sample["tuned"], sample["reference"])))
    out.print(table)


def _show_next(out: Any, folder: Path, prompt: str) -> None:
    from veneer.cli import show

    veneer = show.command_name()
    out.print(f"[bold]files[/bold]  {folder}: adapter/ loss.png evaluation.json samples.jsonl metrics.jsonl run.yaml")
    out.print("[bold]next[/bold]")
    out.print(f"  {veneer} generate {folder} --compare --prompt {shlex.quote(prompt)}", markup=False)
    out.print(f"  {veneer} evaluate {folder} --rows 20", markup=False)
    out.print(
        f"  {veneer} train {folder}/run.yaml train.num_train_epochs=2 train.output_dir={folder}-longer", markup=False
    )
