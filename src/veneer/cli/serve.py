"""veneer serve: an OpenAI-compatible server of many adapters over one base."""

from pathlib import Path
from typing import Annotated

import typer


def serve(
    models: Annotated[
        list[str], typer.Argument(help="Runs, adapters or a base, which share one base. NAME=PLACE names one.")
    ],
    base: Annotated[str | None, typer.Option(help="Another base than the adapters name.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; beyond this machine a key is needed.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="VENEER_API_KEY", help="Key that requests need; others may see it on the line.")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File that holds the key.")] = None,
    adapters: Annotated[
        list[Path] | None, typer.Option(help="Folder whose adapters requests may load; may be repeated.")
    ] = None,
    watch: Annotated[
        Path | None, typer.Option(help="Folder whose adapters are served as they come, change and go.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="veneer; or vllm: start vLLM with the adapters, or print how.")
    ] = "veneer",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 instead of training's.")] = None,
    slots: Annotated[int, typer.Option(min=1, help="Answers that are made at a time.")] = 32,
    queue: Annotated[int, typer.Option(min=0, help="Answers that may wait; further ones get 429.")] = 256,
    seconds: Annotated[float, typer.Option(min=1, help="Longest time of an answer, its wait included.")] = 600.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer where a request names none.")] = 1024,
    adapters_at_a_time: Annotated[int, typer.Option(min=1, help="Adapters that are loaded at a time.")] = 16,
    force: Annotated[
        bool, typer.Option("--force", help="Take adapters even on a base they were not trained on.")
    ] = False,
) -> None:
    """Serve runs, adapters and their base under OpenAI's API, each request with the adapter that it names as model.

    The prompt is rendered as in training; requests of different adapters share each step; Ctrl-C or SIGTERM finishes
    what is being answered. http://127.0.0.1:8000 shows a page to try the models side by side.

    Example: `veneer serve runs/tickets runs/mails`
    """
    from rich.markup import escape

    from veneer.cli import checks, show
    from veneer.serving.address import require_safe
    from veneer.serving.limits import Limits

    key = checks.api_key(api_key, api_key_file)
    require_safe(host, key)
    for model in models:
        checks.require_served(model, base)
    out = show.console()

    def on_ready(address: str, names: list[str]) -> None:
        waits.stop()
        named = escape(", ".join(names))
        out.print(f"[bold]{address}[/] answers as {named}", highlight=False, soft_wrap=True)
        out.print(f"page: {address}/   API: {address}/v1   Ctrl-C ends", highlight=False, soft_wrap=True)

    limits = Limits(slots, queue, seconds, max_tokens, adapters=adapters_at_a_time)
    with show.status(out, "loading") as waits:
        import veneer

        veneer.serve(
            models, base=base, force=force, host=host, port=port, api_key=key, dtype=dtype,
            adapter_folders=adapters or (), watch=watch, limits=limits, engine=engine, on_ready=on_ready,
        )  # fmt: skip
