"""veneer export: a GGUF file for llama.cpp and Ollama."""

from pathlib import Path
from typing import Annotated

import typer

from veneer.cli.merge import BaseOption, ForceOption, JsonOption, OnOption, RowsOption, RunArgument


def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="The new folder.")],
    file_format: Annotated[str, typer.Option("--format", help="gguf.")] = "gguf",
    quant: Annotated[
        str, typer.Option(help="f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q4_k_m, q4_k_s, q4_0, q3_k_..., q2_k.")
    ] = "q8_0",
    on: OnOption = "trained",
    adapter_only: Annotated[bool, typer.Option("--adapter-only", help="Write the adapter alone, a GGUF LoRA.")] = False,
    imatrix: Annotated[
        bool, typer.Option(help="For 2 to 6 bits: measure on the run's own training rows which weights matter.")
    ] = True,
    base: BaseOption = None,
    force: ForceOption = False,
    certify: Annotated[bool, typer.Option(help="Compare it in llama.cpp with the evaluated model.")] = True,
    rows: RowsOption = None,
    as_json: JsonOption = False,
) -> int:
    """Export base and adapter as one GGUF file, with tokenizer, template, stop tokens and a Modelfile for Ollama.

    Example: `veneer export runs/tickets --out models/tickets-gguf --quant q4_k_m`
    """
    from veneer.cli import checks

    checks.require_options({"--format": file_format, "--quant": quant, "--on": on})
    checks.require_tuned(run, base)
    out = out.expanduser()
    checks.require_new_folder(out)
    from rich.markup import escape

    import veneer
    from veneer.cli import show, show_release
    from veneer.release.certify.servers import require_llama_cpp

    console = show.console(as_json)
    if certify and not adapter_only:
        require_llama_cpp()
    with show.byte_progress(console, "exporting") as on_done:
        report = veneer.export(run, out, file_format, quant, on, adapter_only, base, force, on_done, imatrix)
    types = ", ".join(f"{count} {kind}" for kind, count in report.types.items())
    console.print(f"[bold]written[/bold]  {escape(str(out / report.file))}: {report.bytes / 1e9:.2f} GB ({types})")
    console.print(f"[bold]written[/bold]  {escape(str(out / 'Modelfile'))}: for `ollama create`")
    show_release.show_choice(console, report.choice)
    show_release.show_warnings(console, report.warnings)
    if adapter_only:
        console.print("  not certified: an adapter cannot answer without its base; certify a server that has both")
    result = report.as_dict()
    status = 0
    if certify and not adapter_only:
        result["certificate"], status = show_release.certified(console, str(out / report.file), run, base, force, rows)
    if as_json:
        show.print_json(result)
    return status
