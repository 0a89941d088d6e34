"""Writes a first run file for some data: small, commented, and accepted by `plan` and `train` as it stands."""

from importlib import resources
from pathlib import Path
from typing import Any

from veneer.config import Data, Run, UserError, load_run
from veneer.config.files import read_json
from veneer.config.load import dump_yaml, scalar
from veneer.config.names import BUILTIN_NAMES, require_adapter, require_run
from veneer.data.row_parser import recognise_source
from veneer.data.sources.find import find_sources

FEW = 200  # rows; of fewer, a twentieth says little
# Settings of data that decide how a row becomes tokens, which a run takes over from the one that it starts from.
RENDERING = (
    *("max_length", "chat_template", "template_date", "unrendered", "system_prompt", "special_tokens_in_text"),
    "add_special_tokens",
)


def starter_page(named: str, model: str | None, file: str) -> tuple[str, dict[str, str]]:
    """The YAML of a first run, and the format that was recognised of each file with the reason.

    Args:
        named: Files, glob, folder or hub dataset, as `data.train` takes them.
        model: The base; None: the built-in one.
        file: Name of the YAML file, for its comments.

    Raises:
        UserError: There are no such data, or their rows are none that training can learn from.
    """
    setting = "DATA"
    sources = find_sources(named, setting)
    found = {source.name: recognise_source(source, setting, Data(train=named)) for source in sources}
    formats = sorted({name for name, _ in found.values()})
    lines = _format_lines(formats, named) + _template_lines(model, formats)
    stem = Path(named.rstrip("/")).name.split(".")[0].strip("*?[]") or "run"
    page = _template("starter.yaml.txt").format(
        file=file,
        base=scalar(model or BUILTIN_NAMES[0]),
        about_base="" if model else "  # small, to try things with; name a hub id, a folder or a .gguf file",
        quantize="# " if _is_quantized(model or BUILTIN_NAMES[0]) else "",
        train=scalar(named),
        recognised=", ".join(formats) + ": recognised by " + next(iter(found.values()))[1],
        longer="longer text is cut into pieces" if formats == ["text"] else "longer rows are left out and counted",
        data_lines="".join(f"  {line}\n" for line in lines),
        **_held_out(named),
        output_dir=scalar(f"runs/{stem}"),
    )
    return page, {name: f"{kind} ({why})" for name, (kind, why) in found.items()}


def preference_page(named: str, start: str, file: str) -> tuple[str, dict[str, str]]:
    """The YAML of a run on pairs of answers that starts from another run, and what was recognised of each file.

    Args:
        named: Files, glob, folder or hub dataset of pairs, as `data.train` takes them.
        start: Folder of the run that training starts from, which is the reference.
        file: Name of the YAML file, for its comments.

    Raises:
        UserError: There is no such run, it has no adapter yet, or the data are no pairs.
    """
    before = load_run(require_run(start).run)
    same = _same_model(before, start, require_adapter(start).path)
    setting = "DATA"
    sources = find_sources(named, setting)
    found = {source.name: recognise_source(source, setting, Data(train=named)) for source in sources}
    for name, (kind, _) in found.items():
        if kind != "preference":
            raise UserError(
                f"{setting} = {named}: {name} holds rows of the format {kind}, and --from takes pairs of answers",
                "name rows with chosen and rejected answers, or leave --from out",
            )
    train = before.train
    halved = max(1, train.per_device_train_batch_size // 2)
    page = _template("starter_dpo.yaml.txt").format(
        file=file,
        run=start,
        same=dump_yaml(same),
        train=scalar(named),
        recognised="preference: recognised by " + next(iter(found.values()))[1],
        data_lines="".join(f"  {line}\n" for line in dump_yaml(_same_rendering(before)).splitlines()),
        **_held_out(named),
        output_dir=scalar(f"runs/{Path(start).resolve().name}-dpo"),
        batch_size=halved,
        accumulation=train.gradient_accumulation_steps * train.per_device_train_batch_size // halved,
    )
    return page, {name: f"{kind} ({why})" for name, (kind, why) in found.items()}


def _same_model(before: Run, start: str, folder: Path) -> dict[str, Any]:
    """Base, quantization and shape of the adapter of a run, to start from it: its own, or what it was delivered as."""
    model = before.model.model_dump(mode="json", exclude_defaults=True) | {"adapter": start}
    if before.adapter is None:
        raise UserError(
            f"--from {start}: all weights were trained, so it has no adapter",
            f"leave --from out, and name its model as the base: --model {folder}",
        )
    if before.model.task != "causal-lm":
        raise UserError(
            f"--from {start}: its model.task is {before.model.task}, and pairs of answers are for models that write "
            "text",
            "name a run of model.task: causal-lm, or leave --from out",
        )
    if before.adapter.method not in ("lora", "dora"):
        raise UserError(
            f"--from {start}: it was trained with adapter.method = {before.adapter.method}, and training goes on from "
            "an adapter of lora or dora alone",
            "merge it (`veneer merge`), leave --from out, and name that folder with --model",
        )
    shape = before.adapter.model_dump(mode="json", exclude={"lora_dropout"})
    if (began := before.adapter.init_lora_weights) is not True:
        delivered = (
            "r",
            "lora_alpha",
            "rank_pattern",
            "alpha_pattern",
            *(("target_modules",) if began == "eva" else ()),
        )
        config = read_json(folder / "adapter_config.json", *delivered)
        shape |= {"init_lora_weights": True} | {name: config[name] for name in delivered}
    quantization = {"quantization": before.quantization.model_dump(mode="json")} if before.quantization else {}
    return {"model": model, **quantization, "adapter": shape}


def _same_rendering(before: Run) -> dict[str, Any]:
    """What decides how a row becomes tokens, where it is no default; the length in any case."""
    data = before.data.model_dump(mode="json", include=set(RENDERING), exclude_defaults=True)
    return {"max_length": before.data.max_length} | data


def _template(name: str) -> str:
    return resources.files("veneer.data").joinpath(name).read_text(encoding="utf-8")


def _held_out(named: str) -> dict[str, Any]:
    """The held-out part for some data, and the comment on it."""
    rows = _count(named)
    if rows is not None and rows < FEW // 4:
        return {"validation": min(rows // 5, 5), "about_validation": "  # rows"}
    share = 0.05 if rows is None or rows >= FEW else 0.1
    return {"validation": share, "about_validation": "  # share of the rows that is held out"}


def _format_lines(formats: list[str], named: str) -> list[str]:
    if not {"preference", "rated"} & set(formats):
        return []
    if len(formats) > 1:
        raise UserError(
            f"DATA = {named}: holds rows of several formats: {', '.join(formats)}", "name them one at a time"
        )
    return [] if formats == ["rated"] else ["format: chosen  # pairs of answers: learn the preferred ones"]


def _template_lines(model: str | None, formats: list[str]) -> list[str]:
    """A named template where a base's folder has none of its own and the rows are conversations."""
    folder = Path(model or "").expanduser()
    config = folder / "tokenizer_config.json"
    if model is None or formats == ["text"] or not config.is_file():
        return []
    try:
        settings = read_json(config)
    except ValueError:
        return []  # loading the tokenizer will say so
    has_own = (folder / "chat_template.jinja").is_file() or bool(settings.get("chat_template"))
    return [] if has_own else ["chat_template: chatml  # the base has no template of its own"]


def _is_quantized(model: str) -> bool:
    """Whether a base comes from a GGUF file, which is quantized already as a rule; to do it again errs twice."""
    return model.lower().endswith(".gguf") or model.lower() == BUILTIN_NAMES[0]


def _count(named: str) -> int | None:
    """Lines of a small file; None: many, or not known."""
    path = Path(named).expanduser()
    if not path.is_file() or path.stat().st_size > 1 << 20:
        return None
    return len([line for line in path.read_bytes().splitlines() if line.strip()])
