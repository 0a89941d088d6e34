"""Finds the artifact to be certified by its name, and starts it as its users run it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from veneer.config import UserError
from veneer.config.files import read_optional_json, reading
from veneer.data.render import Renderer
from veneer.machine.device import find_machine
from veneer.model.gguf import open_gguf
from veneer.model.tuned import TunedModel
from veneer.release.certify.prompts import Prompt
from veneer.release.certify.runtimes import Folder, Runtime
from veneer.release.certify.servers import Endpoint, llama_server
from veneer.release.merge.plan import trained_on


@dataclass(frozen=True)
class Artifact:
    """An artifact to be certified.

    Attributes:
        name: Name as the user wrote it.
        kind: transformers, gguf or endpoint.
        precision: Key of LIMITS.
        path: Path of a folder or a file.
        on: Base that the adapter was merged into.
        model: Name of the model on a server; None: its only one.
    """

    name: str
    kind: str
    precision: str
    path: Path | None
    on: str
    model: str | None = None


def find_artifact(name: str, tuned: TunedModel, model: str | None = None) -> Artifact:
    """Find what a name stands for: an address, a GGUF file, or a folder that holds either.

    Raises:
        UserError: It is nothing that can be certified.
    """
    if name.startswith(("http://", "https://")):
        return Artifact(name, "endpoint", "endpoint", None, trained_on(tuned), model)
    if model is not None:
        raise UserError(f"--model {model}: {name} is not a server with several models", "leave --model out")
    path = Path(name).expanduser()
    files = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if len(files) > 1:
        raise UserError(f"{name}: holds {len(files)} GGUF files", f"name one of them, for example {files[0]}")
    if files and files[0].suffix.lower() == ".gguf" and files[0].is_file():
        precision, on = gguf_facts(files[0])
        return Artifact(name, "gguf", precision, files[0], on)
    if not (path / "config.json").is_file():
        raise UserError(
            f"{name}: neither a model's folder (no config.json), nor a GGUF file, nor an address (http://...)",
            "name what `veneer merge` or `veneer export` wrote, or a server",
        )
    kept, config = read_optional_json(path / "merge.json"), read_optional_json(path / "config.json")
    precision = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return Artifact(name, "transformers", precision, path, kept.get("on", "base"))


def running(
    artifact: Artifact, renderer: Renderer, prompts: Sequence[Prompt], max_new_tokens: int, batch: int
) -> AbstractContextManager[Runtime]:
    """Run the artifact as its users do, for a `with` block."""
    if artifact.kind == "transformers":
        assert artifact.path is not None
        return nullcontext(Folder(artifact.path, find_machine(), batch))
    if artifact.kind == "endpoint":
        return nullcontext(Endpoint(artifact.name, renderer.is_chat, model=artifact.model))
    assert artifact.path is not None
    fields = open_gguf(artifact.path).fields
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    with reading(artifact.path):
        stops = {int(fields[key].contents()) for key in keys if key in fields}
    context = max(len(prompt.ids) for prompt in prompts) + max_new_tokens + 16
    return llama_server(artifact.path, renderer.is_chat, stops, context)


def gguf_facts(file: Path) -> tuple[str, str]:
    """Return the precision of a GGUF file and what it was merged into.

    Raises:
        UserError: It is no whole GGUF file, or only an adapter.
    """
    from veneer.release.gguf.types import QUANTS

    fields = open_gguf(file).fields
    names = ("general.type", "general.file_type", "veneer.on")
    with reading(file, "name what `veneer export` wrote"):
        kind, number, on = (fields[name].contents() if name in fields else None for name in names)
        number = -1 if number is None else int(number)
    if kind == "adapter":
        raise UserError(
            f"{file}: this is only an adapter, which cannot answer without its base",
            "serve it (llama-server -m BASE --lora ADAPTER --jinja) and name the server's address",
        )
    known = {number: name for name, (number, _, _) in QUANTS.items()}
    return known.get(number, "q4_k_m"), str(on or "base")
