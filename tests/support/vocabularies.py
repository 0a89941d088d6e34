"""Tiny tokenizers that cut text as the real ones of each family do, with the control tokens of their templates."""

import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.support.tiny import TEXT, copied
from veneer.release.gguf.tokenizer import RULES

TEMPLATES = Path(__file__).parents[1] / "unit" / "templates"
CORPUS = [
    *TEXT,
    "Hello! How can I help?",
    "two  spaces,\n\n\nthree lines",
    "it's 12 or 345 isn't it",
    "Grüße aus Zürich",
]
# Family: template, begin token, end token, further control tokens.
CONTROL: dict[str, tuple[str, str | None, str, tuple[str, ...]]] = {
    "llama": (
        *("llama-3.1", "<|begin_of_text|>", "<|eot_id|>"),
        ("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    ),
    "mistral": ("mistral-v3", "<s>", "</s>", ("[INST]", "[/INST]")),
    "qwen2": ("qwen-2.5", None, "<|im_end|>", ("<|endoftext|>", "<|im_start|>")),
    "qwen3": ("qwen-3", None, "<|im_end|>", ("<|endoftext|>", "<|im_start|>")),
    "gemma2": ("gemma-2", "<bos>", "<eos>", ("<pad>", "<start_of_turn>", "<end_of_turn>")),
    "phi3": (
        *("phi-3", "<s>", "<|endoftext|>"),
        ("</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    ),
    "smollm": ("smollm2", "<|im_start|>", "<|im_end|>", ("<|endoftext|>",)),
}
_RULE_OF = {"llama": "llama-bpe", "qwen2": "qwen2", "qwen3": "qwen2"}


@copied
def family_vocabulary(family: str) -> Any:
    """A tokenizer of a family's kind with its template."""
    from transformers import PreTrainedTokenizerFast

    template, bos, eos, others = CONTROL[family]
    control = [token for token in (bos, eos, *others) if token]
    make = _pieces if family in ("mistral", "gemma2", "phi3") else _bytes
    tokenizer = make(family, control)
    strips = family == "phi3"
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, rstrip=strips and token != bos) for token in control]
    )
    if bos and family != "smollm":
        _put_first(tokenizer, bos)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        unk_token="<unk>" if make is _pieces else None,
        chat_template=_template(template),
    )


def _template(name: str) -> str:
    """A template in words that llama.cpp's Jinja knows too: it has no `%` for text."""
    text = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    text = text.replace("{%- set head = '<|start_header_id|>%s<|end_header_id|>\\n\\n' -%}\n", "")
    return re.sub(r"head % ('\w+'|message\.role)", r"'<|start_header_id|>' + \1 + '<|end_header_id|>\\n\\n'", text)


def _bytes(family: str, control: list[str]) -> Tokenizer:
    """Byte-level BPE with a family's splitting rule."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=family == "llama"))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=family not in _RULE_OF)
    if family in _RULE_OF:
        pattern = next(pattern for pattern, name in RULES.items() if name == _RULE_OF[family])
        first: Any = pre_tokenizers.Split(Regex(pattern), "isolated")
    else:
        first = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, level])  # type: ignore[no-untyped-call, unused-ignore]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=control,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _pieces(family: str, control: list[str]) -> Tokenizer:
    """SentencePiece BPE as Transformers converts it: the merges hold every way to join a token, best token first."""
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    special = ["<unk>", *control, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=372, special_tokens=special, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    vocabulary = trained.get_vocab()
    merges = [
        (token[:at], token[at:])
        for token in sorted(vocabulary, key=lambda token: vocabulary[token])
        if token not in special
        for at in range(1, len(token))
        if token[:at] in vocabulary and token[at:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    replace = normalizers.Replace(" ", "▁")
    steps = [replace] if family == "gemma2" else [normalizers.Prepend("▁"), replace]
    tokenizer.normalizer = normalizers.Sequence(steps)  # type: ignore[no-untyped-call, unused-ignore]
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if family != "gemma2":
        parts.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(parts)  # type: ignore[no-untyped-call, unused-ignore]
    return tokenizer


def _put_first(tokenizer: Tokenizer, bos: str) -> None:
    from tokenizers.processors import TemplateProcessing

    number = tokenizer.token_to_id(bos)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, number)]
    )
