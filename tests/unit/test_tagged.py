"""Words with tags: how rows are read, how words are aligned with tokens, how entities are counted."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from veneer.data.alignment import first_tokens
from veneer.data.conversation import BadRowError
from veneer.data.sources.find import find_sources
from veneer.data.sources.read import read_blocks
from veneer.data.tagged import count_orphans, tagged, word_spans
from veneer.evaluation.entities import Entity, EntityScores, find_entities

SENTENCES = ["In New York , Zoë's naïve café burned .", "O'Brien left AC/DC in 1999 !", "東京 is big"]


def test_rows_and_sentences_of_conll_files_are_read_alike(tmp_path: Path) -> None:
    words, tags = ["EU", "rejects", "German", "call"], ["B-ORG", "O", "B-MISC", "O"]
    columns = "".join(f"{word} NNP B-NP {tag}\n" for word, tag in zip(words, tags))
    tabs = "".join(f"{word}\t{tag}\n" for word, tag in zip(words, tags))
    (tmp_path / "a.conll").write_text(f"-DOCSTART- -X- -X- O\n\n{columns}\n{columns}")
    (tmp_path / "b.bio").write_text(tabs)
    (source,) = find_sources(str(tmp_path / "a.conll"), "data.train")
    (block,) = read_blocks(source, "data.train")
    assert [block.place(n) for n in range(3)] == ["a.conll:1", "a.conll:3", "a.conll:8"]
    begin, *sentences = [tagged(row) for row in block.rows if isinstance(row, dict)]
    assert begin.is_empty
    (source,) = find_sources(str(tmp_path / "b.bio"), "data.train")
    (block,) = read_blocks(source, "data.train")
    sentences += [tagged(row) for row in block.rows if isinstance(row, dict)]
    assert all(found == tagged({"tokens": words, "ner_tags": tags}) for found in sentences)
    assert [sentences[0].messages[0].content, sentences[0].reference()] == [" ".join(words), " ".join(tags)]


def test_a_space_within_a_word_does_not_part_it() -> None:
    found = tagged({"words": ["+49 30", "rings"], "tags": [3, 0]})
    text = found.messages[0].content
    assert [text[start:end] for start, end in word_spans(text)] == ["+49\u00a030", "rings"]
    assert found.reference() == "3 0"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 words and 1 tags"),
        ({"tokens": ["a", ""], "tags": ["O", "O"]}, "word 2 is empty"),
        ({"tokens": ["a", 5], "tags": ["O", "O"]}, "word 2 is no text"),
        ({"tokens": ["a"], "tags": [True]}, "tag 1 is neither a name nor an id"),
        ({"tokens": ["a"], "tags": ["B PER"]}, "has a space within"),
        ({"tokens": ["a"]}, "none of the fields tags, ner_tags, labels"),
        ({"tags": ["O"]}, "none of the fields tokens, words"),
        ({"text": "a O"}, "files of CoNLL's columns end in .conll"),
        ({"tokens": "a b", "tags": ["O", "O"]}, "`tokens` is no list, but str"),
        ({"conll": "a O\nb"}, "line 2 of the sentence (`b`) has no word and tag"),
        ({"conll": "a X O\nb O"}, "line 2 of the sentence has 2 columns, the first 3"),
    ],
)
def test_rows_that_cannot_be_right(row: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRowError) as told:
        tagged(row)
    assert message in str(told.value)


def _tokenizer(kind: str) -> Tokenizer:
    model: Any
    trainer: Any
    model, trainer = {
        "wordpiece": (models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(special_tokens=["[UNK]"])),
        "bytes": (models.BPE(), trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet())),
        "unigram": (models.Unigram(), trainers.UnigramTrainer(unk_token="<unk>", special_tokens=["<unk>"])),
    }[kind]
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = {
        "wordpiece": pre_tokenizers.BertPreTokenizer(),
        "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "unigram": pre_tokenizers.Metaspace(),
    }[kind]
    if kind == "wordpiece":
        tokenizer.normalizer = normalizers.BertNormalizer()
    trainer.vocab_size = 300
    trainer.show_progress = False
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return tokenizer


@pytest.mark.parametrize("kind", ["wordpiece", "bytes", "unigram"])
def test_a_word_begins_with_its_first_token(kind: str) -> None:
    tokenizer = _tokenizer(kind)
    for text in SENTENCES:
        offsets = tokenizer.encode(text).offsets
        spans = word_spans(text)
        firsts = first_tokens(offsets, spans)
        assert None not in firsts
        for (start, end), first in zip(spans, firsts, strict=True):
            assert first is not None
            begin, stop = offsets[first]
            assert begin < end
            assert stop > start
            assert first == 0 or offsets[first - 1][1] <= start  # the token before is of another word


def test_words_without_a_token_of_their_own_have_none() -> None:
    spans = [(0, 1), (2, 4), (5, 6), (7, 8)]
    assert first_tokens([(0, 0), (0, 1), (2, 6), (7, 8), (0, 0)], spans) == [1, 2, None, 3]  # one token for two words
    assert first_tokens([(0, 1), (7, 8)], spans) == [0, None, None, 1]  # dropped by the normalizer
    assert first_tokens([], spans) == [None] * 4


def test_entities_begin_where_schemes_say() -> None:
    assert find_entities(["B-A", "I-A", "O", "B-A", "B-A", "I-B"]) == [
        *(Entity("A", 0, 2), Entity("A", 3, 4), Entity("A", 4, 5), Entity("B", 5, 6))
    ]
    assert find_entities(["I-A", "I-A", "B-A"]) == [Entity("A", 0, 2), Entity("A", 2, 3)]  # the older IOB
    assert find_entities(["B-A", "E-A", "I-A", "S-A", "I-A"]) == [
        *(Entity("A", 0, 2), Entity("A", 2, 3), Entity("A", 3, 4), Entity("A", 4, 5))
    ]
    assert count_orphans([["I-A", "O", "B-A", "I-A", "I-B"], ["B-A", "I-A"]]) == 2


def test_scores_are_those_of_seqeval() -> None:
    """The figures are what seqeval 1.2.2's classification_report gave for these tags."""
    expected = json.loads((Path(__file__).parent / "seqeval.json").read_text())
    for case in expected:
        scores = EntityScores.of(case["predicted"], case["right"])
        assert sorted(scores.counts) == sorted(case["report"]["types"])
        for score in ("precision", "recall", "f1"):
            assert scores.score(score).value == pytest.approx(case["report"]["all"][score], abs=1e-12)
            for name, values in case["report"]["types"].items():
                assert scores.score(score, name).value == pytest.approx(values[score], abs=1e-12)
                assert scores.support(name) == values["support"]


def test_intervals_hold_the_value_and_no_entities_score_zero() -> None:
    right = [["B-A", "O"], ["O", "B-B"], ["B-A", "I-A"]] * 20
    predicted = [["B-A", "O"], ["O", "O"], ["B-A", "O"]] * 20
    interval = EntityScores.of(predicted, right).score("f1").interval
    assert interval.value == pytest.approx(2 * 20 / (40 + 60))
    assert interval.low < interval.value < interval.high
    assert EntityScores.of([["O"]], [["O"]]).score("f1").interval.value == 0
