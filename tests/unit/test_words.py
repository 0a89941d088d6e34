"""Word by word gives the tokens of whole texts, for every kind of tokenizer that is said to fit."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from tests.support.tiny import TEXT, tiny_tokenizer
from veneer.data.tokens.words import PATTERNS, WordEncoder

ROOT = Path(__file__).parents[2]
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
AFTER_SPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
# Real prose to learn merges from, so that tokens reach as far as they may.
PROSE = (ROOT / "README.md").read_text() + (ROOT / "CHANGELOG.md").read_text() + " ".join(TEXT) * 3


def trained(pre_tokenizer: Any, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROSE, "  a   b\n\n c\t\t d 12 345 6789 it's  don't\r\n"], trainer)
    return tokenizer


SPLITS = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS]
KINDS: dict[str, tuple[Any, Any]] = {
    "gpt-2": (BYTES, None),
    "smollm": (pre_tokenizers.Sequence([DIGITS, BYTES]), None),
    "gpt-2 split": (pre_tokenizers.Sequence([SPLITS[0], AFTER_SPLIT]), None),
    "llama-3": (pre_tokenizers.Sequence([SPLITS[1], AFTER_SPLIT]), None),
    "qwen": (pre_tokenizers.Sequence([SPLITS[2], AFTER_SPLIT]), normalizers.NFC()),
}
CHARACTERS = [*" \n\t\r\u00a0\u2003\u3000\x1c'\u0301.,!0123456789abcABC", "é", "猫", "🦉", "'s", "'LL", "ß"]
WORDS = [*PROSE.split()[:300], "<|im_end|>", "<|im_start|>user\n", "  ", "\n"]
TEXTS = (
    st.text(max_size=30)
    | st.lists(st.sampled_from(CHARACTERS), max_size=25).map("".join)
    | st.lists(st.sampled_from(WORDS), max_size=20).map(" ".join)
)


@pytest.mark.parametrize("kind", KINDS)
def test_word_by_word_gives_the_tokens_of_the_whole_text(kind: str) -> None:
    backend = trained(*KINDS[kind])
    words = made(backend)
    assert words is not None

    @settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(TEXTS, max_size=4))
    def check(texts: list[str]) -> None:
        assert words.encode(texts) == [e.ids for e in backend.encode_batch(texts, add_special_tokens=False)]

    check()
    whole = [PROSE, PROSE.replace(" ", "  "), PROSE.replace("\n", " \n ")]
    assert words.encode(whole) == [e.ids for e in backend.encode_batch(whole, add_special_tokens=False)]


def made(backend: Tokenizer) -> WordEncoder | None:
    return WordEncoder.of(backend, backend.to_str())


def changed(**facts: Any) -> Tokenizer:
    description = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    return Tokenizer.from_str(json.dumps(description | facts))


@pytest.mark.parametrize(
    "facts",
    [
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"normalizer": {"type": "Lowercase"}},
        {"normalizer": {"type": "Prepend", "prepend": "▁"}},
        {"added_tokens": []},
    ],
)
def test_other_tokenizers_are_left_alone(facts: dict[str, Any]) -> None:
    assert not made(changed(**facts))


def test_added_tokens_that_take_white_space_are_left_alone() -> None:
    description = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    added = [token | {"rstrip": True} for token in description["added_tokens"]]
    assert not made(changed(added_tokens=added))
    assert made(tiny_tokenizer().backend_tokenizer)


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.data.tokens.words.MOST", 50)
    words = made(tiny_tokenizer().backend_tokenizer)
    assert words is not None
    for n in range(20):
        text = f"{'x' * 100} {n}a {n}b {n}c {n}d"
        assert words.encode([text])[0] == tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]
        assert len(words._known) <= 50
        assert not any(len(word) > 64 for word in words._known)
