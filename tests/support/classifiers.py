"""Tiny random bases for classification, with a tokenizer of words, and rows whose labels follow from a word."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import veneer
from tests.support.runs import tiny_run, write_rows
from tests.support.tiny import tiny_tokenizer

GOOD, BAD = ("great", "lovely", "superb"), ("awful", "boring", "poor")
WORDS = ("the", "film", "book", "meal", "was", "and", "so", "very", *GOOD, *BAD)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")

_SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
# Wider than usual weights: with those of 0.02 nothing of a text would reach a random model's head.
_SIZES |= {"num_hidden_layers": 2, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.3}
_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_DECODES = {"num_key_value_heads": 2, "initializer_range": 0.1, "vocab_size": 384, "pad_token_id": 2}
# Family: the name of its configuration class in Transformers, and the settings that make it tiny.
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", _SIZES | _STILL),
    "roberta": ("RobertaConfig", _SIZES | _STILL | {"type_vocab_size": 1}),
    "distilbert": (
        "DistilBertConfig",
        {"vocab_size": 32, "dim": 32, "hidden_dim": 64, "n_heads": 4, "n_layers": 2, "max_position_embeddings": 64}
        | {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "pad_token_id": 0}
        | {"initializer_range": 0.3},
    ),
    "modernbert": (
        "ModernBertConfig",
        _SIZES | {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3},
    ),
    "deberta-v2": ("DebertaV2Config", _SIZES | _STILL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "llama": (
        "LlamaConfig",
        _SIZES | _DECODES,
    ),
    "qwen2": (
        "Qwen2Config",
        _SIZES | _DECODES,
    ),
}


def save_tiny_base(family: str, folder: Path, head: int | None = None, names: list[str] | None = None) -> Path:
    """Write a tiny random base with its tokenizer; `head`: with a head of so many labels, of these names."""
    import transformers

    name, settings = BASES[family]
    config = getattr(transformers, name)(**settings)
    if head is not None:
        config.num_labels = head
    if names is not None:
        config.id2label, config.label2id = dict(enumerate(names)), {label: n for n, label in enumerate(names)}
    torch.manual_seed(7)
    kind = transformers.AutoModel if head is None else transformers.AutoModelForSequenceClassification
    kind.from_config(config).save_pretrained(folder)
    tokenizer = tiny_tokenizer(chat=False) if family in ("llama", "qwen2") else word_tokenizer()
    tokenizer.save_pretrained(folder)
    return folder


def word_tokenizer() -> Any:
    """A tokenizer of whole words, with BERT's tokens around a text or a pair."""
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
    )


def some_texts(count: int = 48) -> list[dict[str, Any]]:
    """Rows of uneven length; every third is bad."""
    things = ("film", "book", "meal")
    return [
        {
            "text": f"the {things[n % 3]} was{' very' * (n % 5)} {(BAD if n % 3 == 0 else GOOD)[n // 3 % 3]}"
            + " and so" * (n // 15 % 4),
            "label": "bad" if n % 3 == 0 else "good",
        }
        for n in range(count)
    ]


def classify(base: Path, rows: list[dict[str, Any]], folder: Path, **sections: Any) -> veneer.Run:
    """A run of a few steps that classifies; `sections` override its settings."""
    folder.mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = {
        "model": {"task": "sequence-classification"},
        "data": {"max_length": 48, "validation": 0.25, "duplicates": "keep"},
        "train": {"max_steps": 40, "per_device_train_batch_size": 8, "learning_rate": 5e-3},
        "evaluate": {"max_new_tokens": 256},
    }
    for name, section in sections.items():
        given[name] = given.get(name, {}) | section
    return tiny_run(base, write_rows(folder / "rows.jsonl", rows), folder / "run", **given)
