"""JSON and JSON schemas: before each token, which tokens can still become such a text (by llguidance).

A grammar ends where the text is whole; the only tokens allowed then are those that end an answer.
"""

import importlib.util
import json
import threading
from typing import Any

import torch

from veneer.data.render import Renderer
from veneer.serving.errors import ApiError
from veneer.serving.limits import SCHEMA_CHARACTERS

MOST_TOKENIZERS = 8  # whose tables are held; one takes a second to make
# As `json.dumps` writes: a model that may choose among white space gets lost in it.
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ANY_OBJECT: dict[str, Any] = {"type": "object"}


class Matcher:
    """The state of a grammar along one answer.

    Args:
        matcher: llguidance's.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def is_ended(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> torch.Tensor:
        """Return packed bits of the tokens that may follow, int32."""
        return torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.int32)

    def consume(self, token: int) -> None:
        """Go on by a token that was allowed."""
        self._matcher.consume_token(token)


class Grammars:
    """Makes matchers; the tables of a tokenizer are made once.

    Args:
        vocabulary: Logits a token.
    """

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary, self._lock = vocabulary, threading.Lock()
        self._tokenizers: dict[tuple[str, frozenset[int]], Any] = {}

    def matcher(self, renderer: Renderer, stop_ids: frozenset[int], schema: dict[str, Any]) -> Matcher:
        """Return a matcher of JSON texts that follow a schema.

        Raises:
            ApiError: The schema is too large, or says what cannot be enforced.
        """
        if importlib.util.find_spec("llguidance") is None:
            raise ApiError(400, "response_format needs llguidance: pip install 'veneer[serve]'", "response_format")
        from llguidance import LLMatcher

        text = json.dumps(schema)
        if len(text) > SCHEMA_CHARACTERS:
            raise ApiError(400, f"the schema has more than {SCHEMA_CHARACTERS:,} characters", "response_format")
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, defaults=SPACING)
            matcher = LLMatcher(self._tokenizer(renderer, stop_ids), grammar)
            wrong = matcher.get_error()
        except ValueError as error:
            wrong = str(error)
        if wrong:
            raise ApiError(400, f"the schema cannot be followed: {str(wrong)[:300]}", "response_format")
        return Matcher(matcher)

    def _tokenizer(self, renderer: Renderer, stop_ids: frozenset[int]) -> Any:
        from llguidance.hf import from_tokenizer

        key = renderer.fingerprint, stop_ids
        with self._lock:
            if key not in self._tokenizers:
                if len(self._tokenizers) >= MOST_TOKENIZERS:
                    self._tokenizers.pop(next(iter(self._tokenizers)))
                ends = sorted(stop_ids)
                self._tokenizers[key] = from_tokenizer(renderer.tokenizer, n_vocab=self._vocabulary, eos_token=ends)
            return self._tokenizers[key]
