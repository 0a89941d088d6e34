"""Writes the files by which sentence-transformers loads a model that embeds texts, an adapter's folder included.

They say what is done with the hidden states: pooled, then made to have length 1.
"""

import json
from pathlib import Path

from veneer.config.folder import write_json
from veneer.model.pooling import NAMES, POOLING


def write_sentence_transformers(folder: Path, pooling: str, dimension: int, max_length: int) -> None:
    """Write them beside the weights.

    Args:
        folder: folder of an adapter or a model.
        pooling: mean, cls or last.
        dimension: numbers of an embedding.
        max_length: most tokens of a text.
    """
    parts = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{name}"}
        for n, (name, path) in enumerate(parts)
    ]
    (folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    (folder / POOLING).parent.mkdir(exist_ok=True)
    chosen = {key: name == pooling for name, key in NAMES.items()}
    write_json(folder / POOLING, {"word_embedding_dimension": dimension, **chosen})
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    write_json(folder / "config_sentence_transformers.json", {"prompts": {}, "similarity_fn_name": "cosine"})
