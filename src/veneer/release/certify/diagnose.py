"""Explains in one sentence why an artifact tokenizes a prompt differently from training, and where."""

from pathlib import Path
from typing import Any

from veneer.data.drafts import shared_length
from veneer.data.render import Renderer
from veneer.model.gguf import open_gguf
from veneer.release.gguf.tokenizer import CONTROL, UNKNOWN, USER_DEFINED

AROUND = 24  # characters shown on each side of the first difference


def diagnose_prompt(renderer: Renderer, expected: list[int], found: list[int], artifact: Path | None) -> str:
    """Say in one sentence how an artifact's tokens differ from those of training."""
    tokenizer = renderer.tokenizer
    bos = tokenizer.bos_token_id
    if bos is not None and found[:2] == [bos, bos] and found[1:] == expected:
        return f"the begin token {tokenizer.bos_token} is doubled"
    lost = lost_tokens(tokenizer, artifact)
    if lost:
        return f"the tokenizer lacks {', '.join(lost[:3])}"
    one, other = _text(tokenizer, expected), _text(tokenizer, found)
    if one == other:
        at = shared_length(expected, found)
        shown = tokenizer.convert_ids_to_tokens(expected[at : at + 3])
        theirs = tokenizer.convert_ids_to_tokens([number for number in found[at : at + 3] if number < len(tokenizer)])
        return f"the tokenizer cuts the same text otherwise: {shown} in training, {theirs} here"
    at = shared_length(one, other)
    start = max(0, at - AROUND)
    shown, theirs = one[start : at + AROUND], other[start : at + AROUND]
    if bos is not None and found[:1] != [bos] and expected[:1] == [bos] and found == expected[1:]:
        return f"the begin token {tokenizer.bos_token} is missing"
    return f"the chat template differs: {shown!r} in training, {theirs!r} here"


def lost_tokens(tokenizer: Any, artifact: Path | None) -> list[str]:
    """Return added tokens of the training's tokenizer that the artifact's tokenizer lacks at their ids."""
    if artifact is None:
        return []
    held: dict[int, str] = {}
    if artifact.is_file():
        fields = open_gguf(artifact).fields
        tokens, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
        kinds = (UNKNOWN, CONTROL, USER_DEFINED)
        held = {number: text for number, (text, kind) in enumerate(zip(tokens, types)) if kind in kinds}
    else:
        from transformers import AutoTokenizer

        own = AutoTokenizer.from_pretrained(artifact, trust_remote_code=False)
        held = {number: str(token) for number, token in own.added_tokens_decoder.items()}
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    return [text for number, text in sorted(added.items()) if held.get(number, "").replace("▁", " ") != text]


def _text(tokenizer: Any, ids: list[int]) -> str:
    known = [number for number in ids if number < len(tokenizer)]
    return str(tokenizer.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False))
