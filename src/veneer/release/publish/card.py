"""The model card of an adapter: README.md with the Hub's metadata.

Everything in it is read from the files of the run (settings, ledger, passport, scores, certificate), so it is written
again whenever one of them appears, and says nothing that was not measured. A card that its owner has rewritten (the
last line is gone) is left alone. It ships: it names files without their paths, and quotes no row.

Its Python snippet gives the answer that was evaluated: the same weights in the same bits, template, system prompt and
stop tokens. A base that was dequantized from a GGUF file is never named by the hub id of the model that the file was
made from, since that has other weights.
"""

import contextlib
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from veneer.config import Model, Run, RunFolder, UserError, load_run
from veneer.config.files import read_optional_json, read_text
from veneer.config.folder import write_text
from veneer.config.load import yaml_values
from veneer.config.results import limit_text, value_text
from veneer.data.template import begin_ids
from veneer.machine.device import find_machine
from veneer.model.adapters import AdapterMethod, find_method
from veneer.model.lineage import GgufOrigin, gguf_origin
from veneer.model.load import compute_dtype, load_tokenizer
from veneer.model.locate import BaseSource, local_folder, locate
from veneer.model.passport import base_name, read_passport
from veneer.release.publish.classifier_card import classifier_card
from veneer.release.publish.vllm_lint import vllm_lint
from veneer.release.redact import failed_check, name_of, without_paths
from veneer.training.job import TrainingJob

if TYPE_CHECKING:
    from jinja2 import Template

MARK = "<!-- Written by Veneer from the files of the run; without this line it is never written again. -->"


def write_card(job: TrainingJob, folder: Path) -> None:
    """Write README.md into an adapter's folder, which holds everything else already, the passport too."""
    write_text(folder / "README.md", card(Facts.of(folder, job.run, job.source, job.folder.path.name, {}, {})))


def renew_card(folder: RunFolder, model: Model | None = None) -> None:
    """Write the card of a finished run again, with the scores and the certificate it has by now.

    Args:
        folder: Folder of the run.
        model: The base, where it is not where the run says.
    """
    path = folder.delivered / "README.md"
    if read_passport(folder.delivered) is None or (path.is_file() and MARK not in read_text(path)):
        return
    run = load_run(folder.run)
    run = run.model_copy(update={"model": model or run.model})
    certificate = read_optional_json(folder.path / "certificate.json")
    name = folder.path.name
    facts = Facts.of(folder.delivered, run, locate(run.model), name, read_optional_json(folder.evaluation), certificate)
    write_text(path, card(facts))


@dataclass(frozen=True)
class Facts:
    """The facts that a card states."""

    name: str
    run: Run
    passport: dict[str, Any]
    ledger: dict[str, Any]
    scores: dict[str, Any]
    certificate: dict[str, Any]
    base: str
    hub_id: str | None
    gguf: GgufOrigin | None
    licence: str | None
    lint: list[dict[str, Any]]
    dtype: str
    is_chat: bool
    begin_ids: list[int]
    stop_ids: list[int]

    @property
    def method(self) -> AdapterMethod | None:
        """The method of the adapter; None: all weights were trained."""
        return None if self.run.adapter is None else find_method(self.run.adapter)

    @property
    def kind(self) -> str:
        """What was trained, as the card's first words."""
        if self.method is None or self.method.setting == "lora":
            return "A LoRA adapter"
        return f"An adapter ({self.method.name})"

    @property
    def shape(self) -> list[str]:
        """Names of the settings that give the adapter's size and scale, of those that its method has."""
        return [name for name in ("r", "lora_alpha") if self.method is not None and self.method.has(name)]

    @staticmethod
    def of(
        folder: Path, run: Run, source: BaseSource, name: str, scores: dict[str, Any], certificate: dict[str, Any]
    ) -> "Facts":
        """Gather them from an adapter's folder."""
        passport = read_passport(folder) or {}
        is_chat = (folder / "chat_template.jinja").is_file()
        is_text = run.model.task == "causal-lm" and not is_chat
        generation = passport.get("generation") or {}
        return Facts(
            name=name,
            run=run,
            passport=passport,
            ledger=without_paths(read_optional_json(folder / "ledger.json")),
            scores=scores,
            certificate=certificate,
            base=base_name(source),
            hub_id=hub_id(source),
            gguf=gguf_origin(run.model),
            licence=licence(source),
            lint=[] if run.adapter is None else [check.as_dict() for check in vllm_lint(folder)],
            dtype=passport.get("dtype") or str(compute_dtype(run.model, find_machine())).removeprefix("torch."),
            is_chat=is_chat,
            begin_ids=begin_ids(load_tokenizer(BaseSource("folder", str(folder), str(folder)))) if is_text else [],
            stop_ids=generation.get("eos_token_id") or passport.get("stop_token_ids", []),
        )


def card(facts: Facts) -> str:
    """Write the card's text."""
    if facts.run.model.task != "causal-lm":
        return f"{classifier_card(facts, peft_tags(facts))}\n{MARK}\n"
    snippet, text = _templates()
    python = snippet.render(facts=facts, run=facts.run)
    body = text.render(facts=facts, run=facts.run, train=facts.run.train, snippet=python)
    head = yaml.safe_dump(metadata(facts), sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n{body.rstrip()}\n\n{MARK}\n"


@cache
def _templates() -> "tuple[Template, Template]":
    """Compile the templates of the snippet and of the card; a sweep writes a card for each of its runs."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {
        "value_text": value_text,
        "limit_text": limit_text,
        "literal": literal,
        "fenced": fenced,
        "cell": cell,
        "name_of": name_of,
        "failed_check": failed_check,
    }
    texts = resources.files("veneer.release")
    snippet, text = (texts.joinpath(name).read_text(encoding="utf-8") for name in ("snippet.py.jinja", "card.md.jinja"))
    return environment.from_string(snippet), environment.from_string(text)


def literal(text: str) -> str:
    """Format a text as a Python literal that no Markdown fence can end within."""
    return repr(text).replace("```", r"\x60\x60\x60")


def cell(value: str | tuple[Any, ...] | dict[str, Any]) -> str:
    """Format names or patterns for a cell of a Markdown table, which a bar would end."""
    pairs: Any = value
    if isinstance(value, dict):
        named = ((name, f"{held:g}" if isinstance(held, float) else held) for name, held in value.items())
        pairs = [f"{name}: {' '.join(map(str, held)) if isinstance(held, tuple) else held}" for name, held in named]
    text = pairs if isinstance(pairs, str) else ", ".join(map(str, pairs))
    return text.replace("|", "\\|").replace("*", "\\*")


def fenced(text: str, language: str = "text") -> str:
    """Format a text as a Markdown block, between fences longer than any in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def metadata(facts: Facts) -> dict[str, Any]:
    """Return the Hub's metadata: what its filters, its base model tree and its evaluation table read."""
    relation = "finetune" if facts.run.adapter is None else "adapter"
    tags = [*peft_tags(facts), "transformers", "veneer"]
    found: dict[str, Any] = {
        "library_name": "transformers" if facts.run.adapter is None else "peft",
        "pipeline_tag": "text-generation",
        "tags": [f"base_model:{relation}:{facts.hub_id}", *tags] if facts.hub_id else tags,
    }
    if facts.hub_id:
        found["base_model"] = facts.hub_id
        found["base_model_relation"] = relation
    if facts.licence:
        found["license"] = facts.licence
    if facts.scores:
        metrics = [
            {"type": name, "value": round(values["tuned"]["value"], 6), "name": name.replace("_", " ")}
            for name, values in facts.scores["metrics"].items()
        ]
        dataset = {"type": "held-out", "name": "held-out rows of the run"}
        task = {"type": "text-generation", "name": "Text Generation"}
        found["model-index"] = [
            {"name": facts.name, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}
        ]
    return found


def peft_tags(facts: Facts) -> list[str]:
    """Return the Hub's tag of an adapter's method."""
    if facts.method is None:
        return []
    return ["lora", "dora"] if facts.method.setting == "dora" else [facts.method.setting]


def hub_id(source: BaseSource) -> str | None:
    """Return the base's name on the Hub, if that name stands for the weights that were trained on."""
    return source.location if source.kind == "hub" else None


def licence(source: BaseSource) -> str | None:
    """Return the base's licence as its own files state it: README.md's metadata, or the .gguf file it came from."""
    folder = local_folder(source)
    if folder is None:
        return None
    stated = read_optional_json(folder / "source.json").get("license")
    readme = folder / "README.md"
    if readme.is_file():
        with contextlib.suppress(UserError, AttributeError):  # a card is prose: what cannot be read states nothing
            text = read_text(readme)
            if text.startswith("---") and (parts := text.split("---", 2))[2:]:
                stated = (yaml_values(parts[1], str(readme)) or {}).get("license", stated)
    return stated if isinstance(stated, str) and stated else None
