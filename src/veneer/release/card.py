"""The model card of an adapter: README.md with the Hub's metadata.

Everything in it is read from the files of the run (settings, ledger, passport, scores, certificate), so it is written
again whenever one of them appears, and says nothing that was not measured. A card that its owner has rewritten (the
last line is gone) is left alone.
"""

import contextlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from veneer.config import Run, RunFolder, load_run
from veneer.config.folder import write_text
from veneer.model import Source, locate
from veneer.model.builtin import BUILTIN
from veneer.release.lint import vllm_lint
from veneer.release.passport import local_folder, read_passport, write_passport
from veneer.train.job import TrainingJob

MARK = "<!-- Written by Veneer from the files of the run; without this line it is never written again. -->"


def write_card(job: TrainingJob, folder: Path, steps: int, final_loss: float) -> None:
    """Write passport.json and README.md into an adapter's folder, which holds everything else already."""
    training = {"steps": steps, "final_loss": final_loss, "parameters": job.parameters}
    write_passport(job, folder, training)
    write_text(folder / "README.md", card(Facts.of(folder, job.run, job.source, job.folder.path.name, None, None)))


def renew_card(folder: RunFolder) -> None:
    """Write the card of a finished run again, with the scores and the certificate it has by now."""
    path = folder.adapter / "README.md"
    if read_passport(folder.adapter) is None or (path.is_file() and MARK not in path.read_text(encoding="utf-8")):
        return
    run = load_run(folder.run)
    certificate = _json(folder.path / "certificate.json")
    name = folder.path.name
    facts = Facts.of(folder.adapter, run, locate(run.model), name, _json(folder.evaluation), certificate)
    write_text(path, card(facts))


@dataclass(frozen=True)
class Facts:
    """What a card is made of."""

    name: str
    run: Run
    passport: dict[str, Any]
    ledger: dict[str, Any]
    scores: dict[str, Any] | None
    certificate: dict[str, Any] | None
    base: str
    hub_id: str | None
    licence: str | None
    lint: list[dict[str, Any]]

    @staticmethod
    def of(
        folder: Path, run: Run, source: Source, name: str, scores: dict[str, Any] | None, certificate: Any
    ) -> "Facts":
        """Gather them from an adapter's folder."""
        return Facts(
            name=name,
            run=run,
            passport=read_passport(folder) or {},
            ledger=_json(folder / "ledger.json") or {},
            scores=scores,
            certificate=certificate,
            base=run.model.base,
            hub_id=hub_id(source),
            licence=licence(source),
            lint=[check.as_dict() for check in vllm_lint(folder)],
        )


def card(facts: Facts) -> str:
    """The card's text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["share"] = lambda value: f"{value:.1%}"
    source = resources.files("veneer.release").joinpath("card.md.jinja").read_text(encoding="utf-8")
    body = environment.from_string(source).render(facts=facts, run=facts.run, train=facts.run.train)
    head = yaml.safe_dump(metadata(facts), sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n{body.rstrip()}\n\n{MARK}\n"


def metadata(facts: Facts) -> dict[str, Any]:
    """The Hub's metadata: what its filters, its base model tree and its evaluation table read."""
    found: dict[str, Any] = {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:" + facts.hub_id, "lora", "transformers", "veneer"]
        if facts.hub_id
        else ["lora", "transformers", "veneer"],
    }
    if facts.hub_id:
        found["base_model"] = facts.hub_id
        found["base_model_relation"] = "adapter"
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


def hub_id(source: Source) -> str | None:
    """The base's name on the Hub, where it has one."""
    if source.kind == "builtin":
        return BUILTIN[source.name.lower()].hub_id
    return source.location if source.kind == "hub" else None


def licence(source: Source) -> str | None:
    """The base's licence as its own files state it: README.md's metadata, or the .gguf file it came from."""
    folder = local_folder(source)
    if folder is None:
        return None
    stated = (_json(folder / "source.json") or {}).get("license")
    readme = folder / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8", errors="replace")
        if text.startswith("---") and (parts := text.split("---", 2))[2:]:
            with contextlib.suppress(yaml.YAMLError, AttributeError):
                stated = (yaml.safe_load(parts[1]) or {}).get("license", stated)
    return str(stated) if stated else None


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
