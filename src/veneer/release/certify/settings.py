"""Checks the settings of an artifact that change its answers but not its weights: architecture and decoding.

A rope_theta or a norm's epsilon that changed on the way leaves every tensor as it was and every answer worse. Each
setting of config.json, or of a GGUF file's header, is compared with the base's. generation_config.json must choose
tokens as the run was judged: greedily. A server or `model.generate()` takes its sampling settings from there.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from veneer.config import UserError
from veneer.config.files import read_json, reading
from veneer.config.results import Check
from veneer.data.render import Renderer
from veneer.model.gguf import open_gguf
from veneer.model.quiet import quiet
from veneer.model.remote import read_config
from veneer.model.tuned import TunedModel
from veneer.release.gguf.tensor_layout import TensorLayout

# Of config.json: what a merge writes anew, other checks compare, or Transformers notes for itself.
NOT_COMPARED = {
    *("_name_or_path", "dtype", "torch_dtype", "transformers_version", "quantization_config", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "output_attentions", "return_dict"),
    *("_attn_implementation", "_attn_implementation_internal", "architectures", "id2label", "label2id"),
}
# Keys of generation_config.json that change which token is chosen, and the value at which they do nothing.
NEUTRAL: dict[str, Any] = {
    **{"do_sample": False, "num_beams": 1, "num_beam_groups": 1, "penalty_alpha": None, "diversity_penalty": 0.0},
    **{"repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0},
    **{"bad_words_ids": None, "force_words_ids": None, "forced_bos_token_id": None, "forced_eos_token_id": None},
    **{"suppress_tokens": None, "begin_suppress_tokens": None, "sequence_bias": None, "guidance_scale": None},
    **{"min_length": 0, "min_new_tokens": None, "max_new_tokens": None, "max_length": 20, "max_time": None},
    **{"stop_strings": None, "exponential_decay_length_penalty": None, "watermarking_config": None},
}
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# What llama.cpp takes where a file leaves a key out, as files of other converters may.
OPTIONAL = ("vocab_size", "rope.dimension_count", "attention.key_length", "attention.value_length")


def setting_checks(tuned: TunedModel, path: Path, unties: bool) -> list[Check]:
    """Check architecture and decoding settings of a merged folder, or the architecture settings of a GGUF file.

    Args:
        tuned: The adapter and its base.
        path: The folder or the file.
        unties: Whether embeddings and head are two tensors in the merged model, whatever the base's file says.
    """
    if path.is_file():
        return [_architecture(list(_gguf_settings(tuned, path)), len(_layout(tuned).metadata()))]
    config, found = _plain(tuned.config), _own_config(path)
    config["tie"] = bool(config.get("tie_word_embeddings")) and not unties
    found["tie"] = bool(found.get("tie_word_embeddings"))
    names = sorted((config.keys() | found.keys()) - NOT_COMPARED)
    return [_architecture(list(_differences(config, found, names)), len(names)), _decoding(path)]


def stop_token_checks(stops: set[int] | None, renderer: Renderer) -> list[Check]:
    """Check that an artifact knows every token at which an answer ends; no check where it reports none."""
    if stops is None:
        return []
    missing = sorted(set(renderer.stop_ids) - stops)
    names = ", ".join(str(renderer.tokenizer.convert_ids_to_tokens(number)) for number in missing)
    detail = f"{names} is not among its stop tokens: its answers would go on" if missing else ""
    known = f"{len(renderer.stop_ids) - len(missing)} of {len(renderer.stop_ids)} known"
    return [Check("stop_tokens", not missing, known, "all", "stop tokens", detail)]


def _architecture(differences: list[str], count: int) -> Check:
    same = f"{count - len(differences)} of {count} equal"
    return Check("settings", not differences, same, "all", "architecture settings", "; ".join(differences[:3]))


def _own_config(path: Path) -> dict[str, Any]:
    with quiet(), reading(f"{path / 'config.json'}: Transformers cannot read it", "merge again"):
        return _plain(read_config(path, str(path)))


def _plain(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    return found


def _differences(expected: dict[str, Any], found: dict[str, Any], names: list[str]) -> Iterator[str]:
    for name in names:
        was, now = expected.get(name), found.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            for key in sorted(was.keys() | now.keys()):
                if not _same(was.get(key), now.get(key)):
                    yield f"{name}.{key} is {now.get(key)}, trained with {was.get(key)}"
        elif not _same(was, now):
            yield f"{name} is {now}, trained with {was}"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, int | float) and isinstance(other, int | float) and not isinstance(one, bool):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def _decoding(path: Path) -> Check:
    """Check that generation_config.json chooses tokens greedily, as evaluation did."""
    try:
        kept = read_json(path / "generation_config.json")
    except UserError:
        kept = {}
    name, limit = "decoding settings", "greedy, as judged"
    if "eos_token_id" not in kept:
        why = "generation_config.json is missing, cut or empty: servers would take settings of their own"
        return Check("decoding", False, "not stated", limit, name, why)
    neutral = dict(NEUTRAL)
    if kept.get("do_sample"):
        neutral |= dict.fromkeys(SAMPLING)
    wrong = [f"{key} = {kept[key]}" for key, value in neutral.items() if kept.get(key) not in (None, value)]
    detail = "the run was judged greedily" if wrong else ""
    return Check("decoding", not wrong, ", ".join(wrong) or "greedy", limit, name, detail)


def _layout(tuned: TunedModel) -> TensorLayout:
    return TensorLayout(tuned.config, tuned.model.base)


def _gguf_settings(tuned: TunedModel, file: Path) -> Iterator[str]:
    """Yield differences between a GGUF file's header, or tensors that stand for settings, and the base's settings."""
    layout, reader = _layout(tuned), open_gguf(file)
    for key, value in layout.metadata().items():
        if key in reader.fields:
            found = reader.fields[key].contents()
            if not _same(value, found):
                yield f"{key} is {found}, trained with {value}"
        elif not key.endswith(OPTIONAL):
            yield f"{key} is missing, trained with {value}"
    held = {tensor.name: tensor for tensor in reader.tensors}
    for name, expected in layout.extra_tensors().items():
        if name not in held or not np.allclose(held[name].data.reshape(-1), expected.numpy(), rtol=1e-5):
            yield f"{name} {'differs' if name in held else 'is missing'}: rotary frequencies are others"
