"""Refuses configurations with sizes that no model has, before anything is built from them.

Transformers makes lists as long as `num_hidden_layers` says as soon as it reads a configuration, and a model on no
device takes time for each of its layers: one wrong digit of a stranger's config.json would hang a plan for hours.
"""

import re
from pathlib import Path
from typing import Any

from veneer.config import UserError

# By names in Transformers' configurations and in GGUF files: the largest published models have about 130
# layers, 1,000 experts, vocabularies of 2**18 and contexts of 10 million.
LIMITS = (
    (re.compile(r"(num|n)_(\w+_)?layers?|depth|block_count"), 1000),
    (re.compile(r"(num|n)_(\w+_)?experts|expert_count"), 10_000),
    (re.compile(r"\w+_(size|dim|heads|rank)|n_(embd|head|inner|positions)|d_(model|ff|kv|inner)"), 2**24),
    (re.compile(r"max_position_embeddings|(embedding|feed_forward)_length|head_count"), 2**24),
)


def require_sizes(location: str | Path, name: str, revision: str | None = None, only_local: bool = False) -> None:
    """Refuse a model whose config.json has sizes that no model has.

    Args:
        location: folder or hub id.
        name: name in messages.
        revision: revision of a hub model.
        only_local: whether to read the hub's cache alone.

    Raises:
        UserError: a size is too large.
        OSError, ValueError: the configuration cannot be read.
    """
    from transformers import PreTrainedConfig

    config, _ = PreTrainedConfig.get_config_dict(str(location), revision=revision, local_files_only=only_local)
    require_possible(config, f"{name}: config.json")


def require_possible(config: dict[str, Any], where: str) -> None:
    """Raise UserError for the first size in a nested configuration that no model has; `where` names it."""
    for key, value in config.items():
        if isinstance(value, dict):
            require_possible(value, where)
        elif isinstance(value, int | float):
            most = next((most for names, most in LIMITS if names.fullmatch(key)), None)
            if most is not None and value > most:
                shown = f"{value:,}" if value < 10**18 else f"more than {10**18:,}"
                raise UserError(f"{where}: {key} = {shown}, and no model has more than {most:,}", "mend or restore it")
