"""Published shapes of common base models, so that planning one needs no network.

The numbers come from the models' own config.json on the hub, and are in model/families/. Only repositories of their
makers, and faithful copies (unsloth, NousResearch), are known by name; any other base is planned from its own
configuration. Training does not read this.
"""

from collections.abc import Iterator
from typing import Any

from veneer.model.families import FAMILIES
from veneer.model.families.family import Family

MAKERS = {
    *("meta-llama", "huggingfacetb", "qwen", "mistralai", "google", "microsoft", "facebook", "openai-community"),
    *("tinyllama", "unsloth", "nousresearch"),
}
# From small to large: one architecture in every common size, and a smaller one.
_SIZES = ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")
MODEL_SIZES = ("HuggingFaceTB/SmolLM2-135M", *(f"Qwen/Qwen2.5-{size}" for size in _SIZES))
_ASIDE = {"meta", "instruct", "chat", "hf", "it", "base", "bnb", "4bit", "unsloth", "v0.1", "v0.2", "v1.0"}


def known_shape(name: str) -> tuple[str, dict[str, Any]] | None:
    """Return model type and settings of a base by its hub id, or by its name alone; None: not known."""
    key = _key(name)
    return next(((family.model_type, settings[key]) for family, settings in _series() if key in settings), None)


def smaller_siblings(name: str) -> list[str]:
    """Return hub ids of smaller models of a base's family, kind (base, instruct, chat) and owner, the largest first."""
    key = _key(name)
    names = next((list(series) for _, series in _series() if key in series), [])
    return [_renamed(name, key, other) for other in reversed(names[: names.index(key)])] if names else []


def _series() -> Iterator[tuple[Family, dict[str, dict[str, Any]]]]:
    """Return every series of published models, with its family."""
    return ((family, series) for family in FAMILIES.values() for series in family.published)


def _key(name: str) -> str:
    """Return the key of a hub id in a family's series; empty if its owner is not a maker."""
    owner, _, last = name.lower().rpartition("/")
    if owner and owner not in MAKERS:
        return ""
    return "-".join(word for word in last.split("-") if word not in _ASIDE)


def _renamed(name: str, key: str, other: str) -> str:
    """Replace one model of a family by another in a hub id, in the maker's spelling."""
    owner, slash, last = name.rpartition("/")
    words = last.split("-")
    at = next(n for n, word in enumerate(words) if word.lower() not in _ASIDE)
    before, old, after = words[:at], words[at : at + len(key.split("-"))], words[at + len(key.split("-")) :]
    spelled = {word.lower(): word for word in old}
    in_capitals = any(word[0].isdigit() and word != word.lower() for word in old)
    new = [spelled.get(word, word.upper() if in_capitals and word[0].isdigit() else word) for word in other.split("-")]
    if other.startswith("llama-3.2"):  # only earlier ones are called Meta-Llama
        before = []
    return owner + slash + "-".join([*before, *new, *after])
