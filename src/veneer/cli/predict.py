"""veneer predict: labels, tags, embeddings or rewards for the rows of a file."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def predict(
    name: Annotated[
        str,
        typer.Argument(help="Run whose model.task is not causal-lm, a checkpoint of it, or its adapter."),
    ],
    file: Annotated[str, typer.Argument(help="File of rows, as data.train takes it; it needs no labels.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSONL file to write; without it, standard output.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows at a time.")] = 32,
    base: Annotated[str | None, typer.Option(help="Another base than the one the adapter names.")] = None,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="Share the rows among so many GPUs (or CPU processes)."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Use the adapter even on a base it was not trained on.")
    ] = False,
) -> None:
    """Give each row of a file its label, tags, embedding or reward, with scores: a line of JSON a row.

    Example: `veneer predict runs/routing messages.csv --output labels.jsonl`
    """
    from veneer.cli import checks, ranks, show
    from veneer.config.folder import write_text
    from veneer.data.sources.find import find_sources

    checks.require_tuned(name, base)
    find_sources(file, "FILE")
    if output is not None:
        output = checks.output_file("--output", output, '{"place"')
    ranks.run_on(gpus)
    out = show.console(True)
    import veneer

    with show.status(out, "predicting"):
        lines = (
            json.dumps(row.as_dict(), ensure_ascii=False) + "\n"
            for row in veneer.predict(name, file, batch_size, base, force)
        )
        if output is not None:
            text = "".join(lines)
            if ranks.is_first():
                write_text(output, text)
        else:
            for line in lines:
                sys.stdout.write(line)
    ranks.leave()
