"""Converts a Transformers tokenizer to GGUF's vocabulary.

llama.cpp has tokenizers of its own, chosen by a name; the file only carries the vocabulary. Two kinds are known here:

byte-level BPE (Llama 3, Qwen, SmolLM, Mistral NeMo): the name is that of its splitting rule, recognised from the rule
itself in tokenizer.json, never from the model's name; a rule that is not known is refused, because a model that sees
other tokens than it was trained on is silently worse.

SentencePiece BPE (Llama 2, Mistral, Gemma 2, Phi-3): there the pair whose union has the best score is joined first;
tokenizer.json has the order of the joins instead, and gives the scores back: minus the rank.
"""

import json
from dataclasses import dataclass
from typing import Any

from veneer.config import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types of the format
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# Splitting rules, by their pattern in tokenizer.json.
RULES = {
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"\p{N}" + _REST: "qwen2",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CASED}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_CASED}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}


@dataclass(frozen=True)
class Vocabulary:
    """The parts of a tokenizer that GGUF stores.

    Attributes:
        model: gpt2 for byte-level BPE, llama for SentencePiece.
        pre: Name of the splitting rule.
        tokens, types: Text and type of each, by id.
        scores: Scores of a SentencePiece vocabulary.
        merges: Merges of a byte-level vocabulary.
        special: Ids by GGUF's names: bos, eos, eot, eom, unknown, padding.
        flags: add_bos_token and the like.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    special: dict[str, int]
    flags: dict[str, bool]


def vocabulary(tokenizer: Any, size: int, stop_ids: list[int]) -> Vocabulary:
    """Convert a tokenizer's vocabulary for a model with `size` rows of embeddings.

    Args:
        tokenizer: A fast Transformers tokenizer.
        size: Rows of the embeddings; ids beyond the tokenizer's get unused placeholders.
        stop_ids: Every token at which an answer ends.

    Raises:
        UserError: llama.cpp has no such tokenizer, or it has tokens without embeddings.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    if spec["model"]["type"] != "BPE":
        raise _unknown(f"of the kind {spec['model']['type']}")
    is_pieces = bool(spec["model"].get("byte_fallback"))
    tokens, types = _tokens(tokenizer, spec, size, is_pieces)
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in spec["model"]["merges"]]
    puts_bos = _puts(tokenizer, tokenizer.bos_token_id, 0)
    flags = {"add_bos_token": puts_bos, "add_eos_token": _puts(tokenizer, tokenizer.eos_token_id, -1)}
    if is_pieces:
        flags["add_space_prefix"] = _prefixes(tokenizer)
    return Vocabulary(
        model="llama" if is_pieces else "gpt2",
        pre="default" if is_pieces else _rule(spec),
        tokens=tokens,
        types=types,
        scores=_scores(spec, merges, size) if is_pieces else None,
        merges=None if is_pieces else [" ".join(merge) for merge in merges],
        special=_special(tokenizer, stop_ids),
        flags=flags,
    )


def _tokens(tokenizer: Any, spec: dict[str, Any], size: int, is_pieces: bool) -> tuple[list[str], list[int]]:
    by_id = {number: text for text, number in tokenizer.get_vocab().items()}
    beyond = sorted(number for number in by_id if number >= size)
    if beyond:
        raise UserError(
            f"the tokenizer has {len(by_id):,} tokens, the model embeddings for {size:,}: "
            f"{by_id[beyond[0]]!r} and {len(beyond) - 1} more have none",
            "resize the model's embeddings before training, or leave the added tokens out",
        )
    added = {entry["id"]: entry for entry in spec["added_tokens"]}
    tokens, types = [], []
    for number in range(size):
        text = by_id.get(number)
        if text is None:
            tokens.append(f"[PAD{number}]")
            types.append(UNUSED)
            continue
        kind = NORMAL
        if number in added:
            kind = CONTROL if added[number]["special"] else USER_DEFINED
        elif is_pieces and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            kind = BYTE
        if is_pieces and text == spec["model"].get("unk_token"):
            kind = UNKNOWN
        if kind == USER_DEFINED and is_pieces:
            text = text.replace("▁", " ")
        tokens.append(text)
        types.append(kind)
    return tokens, types


def _scores(spec: dict[str, Any], merges: list[tuple[str, ...]], size: int) -> list[float]:
    """Return minus the rank of the first merge that makes each token; tokens that no merge makes get the lowest."""
    vocabulary = spec["model"]["vocab"]
    scores = [float(-len(merges) - 1)] * size
    for rank in range(len(merges) - 1, -1, -1):
        number = vocabulary.get("".join(merges[rank]))
        if number is not None:
            scores[number] = float(-rank)
    return scores


def _rule(spec: dict[str, Any]) -> str:
    """Return llama.cpp's name of a byte-level splitting rule."""
    found = spec["pre_tokenizer"] or {}
    steps = found.get("pretokenizers", [found])
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if kinds == ["ByteLevel"] and last.get("use_regex", True) and not last.get("add_prefix_space"):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and last.get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        pattern = steps[0]["pattern"].get("Regex", "")
        if pattern in RULES and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
            return RULES[pattern]
        raise _unknown(f"that splits text by {pattern[:60]!r}...")
    raise _unknown(f"that splits text by {', '.join(map(str, kinds))}")


def _unknown(what: str) -> UserError:
    known = ", ".join(sorted({*RULES.values(), "gpt-2", "smollm"}))
    return UserError(
        f"the tokenizer cannot be exported to GGUF: it is one {what}; known: SentencePiece BPE, and the rules {known}",
        "serve the folder that `veneer merge` writes",
    )


def _special(tokenizer: Any, stop_ids: list[int]) -> dict[str, int]:
    named = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    others = [number for number in stop_ids if number != tokenizer.eos_token_id]
    if len(others) > 2:
        raise UserError(
            f"an answer of this model may end in {len(others) + 1} tokens ({', '.join(map(str, sorted(stop_ids)))}), "
            "GGUF can store 3",
            "remove those that end no answer from eos_token_id in the base's generation_config.json",
        )
    named |= dict(zip(("eot", "eom"), others))
    return {name: number for name, number in named.items() if number is not None}


def _puts(tokenizer: Any, number: int | None, place: int) -> bool:
    ids = tokenizer("a")["input_ids"]
    return number is not None and bool(ids) and ids[place] == number


def _prefixes(tokenizer: Any) -> bool:
    """Return whether the tokenizer puts a space before text that follows a control token."""
    control = tokenizer.bos_token or tokenizer.eos_token
    ids = tokenizer(f"{control}a", add_special_tokens=False)["input_ids"]
    return bool(tokenizer.convert_ids_to_tokens(ids)[1].startswith("▁"))
