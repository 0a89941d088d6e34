"""The model card of a classifier: its labels, how plain PEFT loads it, and its scores where they were measured."""

from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING

import yaml

from veneer.model.head_tasks import HEAD_TASKS

if TYPE_CHECKING:
    from veneer.release.publish.card import Facts

PIPELINES = {  # the hub's names
    "sequence-classification": "text-classification",
    "reward": "text-classification",
    "token-classification": "token-classification",
    "embedding": "sentence-similarity",
}


def classifier_card(facts: "Facts", tags: Sequence[str]) -> str:
    """Return the text of the card, without its last line; `tags` are the Hub's of the adapter's method."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = lambda text: text.replace("|", "\\|")
    text = resources.files("veneer.release").joinpath("classifier_card.md.jinja").read_text(encoding="utf-8")
    passport, run = facts.passport, facts.run
    pad = passport["classifier"]["pad_token_id"]
    assert run.adapter is not None, "a classifier's head is trained beside an adapter"
    body = environment.from_string(text).render(
        name=facts.name,
        kind=facts.kind,
        shape=facts.shape,
        base=facts.base,
        task=run.model.task,
        pooling=passport["classifier"].get("pooling"),
        prefix=HEAD_TASKS[run.model.task].auto,
        labels=passport["classifier"]["labels"],
        head=passport["classifier"]["head"],
        base_literal=repr(facts.hub_id or facts.base),
        name_literal=repr(facts.name),
        pad="" if pad is None else f", pad_token_id={pad}",
        max_length=run.data.max_length - 1,
        rows=facts.ledger["rows"],
        training=passport["training"],
        learning_rate=run.train.learning_rate,
        r=run.adapter.r,
        alpha=run.adapter.lora_alpha,
        metrics=facts.scores.get("metrics"),
        scored=facts.scores.get("rows"),
    )
    head = {
        "library_name": "peft",
        "pipeline_tag": PIPELINES[run.model.task],
        "tags": [*tags, "transformers", "veneer"],
    }
    if facts.hub_id:
        head |= {"base_model": facts.hub_id, "base_model_relation": "adapter"}
    if facts.licence:
        head["license"] = facts.licence
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n{body.rstrip()}\n"
