"""What the fault bench calls on its broken inputs, and the numbers that come of them.

A call gives a `Found`: the numbers (a hash of the tokens, weights or logits that come out) and what the product itself
would tell them apart by (fingerprints that a resume, a passport or a cache compares). An input whose numbers are not
those of the undamaged one, and where the product would see no difference, is *silent*: what must never be.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

TEXTS = ("what does the cat say please", "name 7: the dog and the owl, 12 hens")


class Found(NamedTuple):
    """What came of an input: its numbers, and what the product knows it by (empty: it must be as it was)."""

    numbers: str = ""
    known_by: str = ""


def config(path: str) -> Found:
    """Read a run file; what is written back must be the same settings."""
    from veneer.config import load_run
    from veneer.config.load import to_yaml

    run = load_run(path)
    again = Path(path).with_name("again.yaml")
    again.write_text(to_yaml(run), encoding="utf-8")
    assert load_run(again) == run, "the settings are not those that were written"
    return Found()


def weights(path: str) -> Found:
    """Read a safetensors file as a load does."""
    from veneer.config import UserError
    from veneer.model.reader import Reader
    from veneer.model.shards import DamagedError, UnknownTypeError, read_headers

    try:
        pieces = read_headers([Path(path)])
        with Reader(pieces, "cpu") as reader:
            tensors = {piece.name: reader.take(piece.name) for piece in pieces}
    except (DamagedError, UnknownTypeError) as error:
        raise UserError(str(error)) from None
    return _weights(path, tensors)


def merge(path: str) -> Found:
    """Read a safetensors file as a merge does."""
    from veneer.release.weights import read_header

    return _weights(path, {name: stored.read() for name, stored in read_header(Path(path)).items()})


def _weights(path: str, tensors: dict[str, Any]) -> Found:
    from veneer.model.fingerprint import fingerprint
    from veneer.model.locate import BaseSource

    folder = str(Path(path).parent)
    names = sorted(tensors)
    numbers = _hash([(name, list(tensors[name].shape)) for name in names], *(tensors[name] for name in names))
    return Found(numbers, str(fingerprint(BaseSource("folder", folder, folder))))


def gguf(path: str) -> Found:
    """Read a GGUF file's facts; it carries no checksum, and its conversion is kept by the hash of all its bytes."""
    from veneer.model.gguf import config_of, weight_type

    weight_type(Path(path))
    config_of(Path(path))
    return Found()


def base(path: str) -> Found:
    """Build, load and tokenize with a base; a resume knows it by weights, configuration and tokens."""
    import torch

    import veneer
    from veneer.config import Model
    from veneer.model.fingerprint import config_sha256, fingerprint
    from veneer.model.locate import locate
    from veneer.model.shapes import build, find_config

    model = Model(base=path, dtype="float32")
    build(find_config(model), torch.bfloat16)
    loaded, source = veneer.load(path), locate(model)
    ids = _ids(loaded.renderer)
    return Found(_logits(loaded.model, ids), _hash([fingerprint(source), config_sha256(source), ids]))


def run(path: str) -> Found:
    """Use a finished run: its page, what a push packs, and the tuned model, which must be the one that was trained."""
    import veneer
    from veneer.config import RunFolder
    from veneer.release.publish.push import pack
    from veneer.report.run_page import write_run_page

    write_run_page(RunFolder(Path(path)))
    pack(path, "me/name", True)
    loaded = veneer.load(path)
    return Found(_logits(loaded.model, _ids(loaded.renderer)))


def resume(path: str) -> Found:
    """Go on with a run that was stopped; the adapter that comes must be that of the run that was not."""
    import veneer
    from veneer.config import load_run

    veneer.train(
        load_run(Path(path) / "asked.yaml", [f"train.output_dir={path}/run", f"model.base={path}/base"]), resume=True
    )
    return Found(hashlib.sha256((Path(path) / "run/adapter/adapter_model.safetensors").read_bytes()).hexdigest())


def cache(path: str) -> Found:
    """Prepare data and load 4-bit weights with a cache that is damaged: both are made anew."""
    import os

    from veneer.config import load_run
    from veneer.data.pipeline import prepare
    from veneer.data.render import Renderer
    from veneer.machine.device import find_machine
    from veneer.model.load import load_model, load_tokenizer
    from veneer.model.locate import locate

    settings = load_run(Path(path) / "asked.yaml", [f"model.base={path}/base"])
    kept, os.environ["VENEER_CACHE"] = os.environ["VENEER_CACHE"], f"{path}/cache"
    try:
        renderer = Renderer(load_tokenizer(locate(settings.model)), settings.data)
        prepared = prepare(settings.data, renderer, 0)
        rows = [[row.ids.tolist(), row.spans] for row in (*prepared.train, *prepared.validation)]
        model = load_model(locate(settings.model), settings.model, settings.quantization, find_machine())
    finally:
        os.environ["VENEER_CACHE"] = kept
    return Found(_hash([rows, prepared.ledger.sha256, prepared.ledger.rows, _logits(model, _ids(renderer))]))


def _ids(renderer: Any) -> list[list[int]]:
    """Tokens of prompts as the template renders them."""
    from veneer.data.conversation import Message

    return [renderer.prompt_ids([Message("user", text)]) for text in TEXTS]


def _logits(model: Any, ids: list[list[int]]) -> str:
    import torch

    with torch.no_grad():
        return _hash([], *(model(torch.tensor([row[:64]])).logits for row in ids))


def _hash(facts: list[Any], *tensors: Any) -> str:
    import torch

    digest = hashlib.sha256(json.dumps(facts, default=str).encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


CALLS: dict[str, Callable[[str], Found]] = {
    "config": config, "weights": weights, "merge": merge, "gguf": gguf, "base": base, "run": run,
    "resume": resume, "cache": cache,
}  # fmt: skip
