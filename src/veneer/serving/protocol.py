"""Requests in OpenAI's form, as far as they have an effect here; what has none is refused by name, not ignored.

Turns are read by the reader of training's rows (data/turns.py), so that both understand the same.
"""

import difflib
import secrets
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from veneer.serving.errors import ApiError
from veneer.serving.limits import CHOICES, LIKELIEST, STOP_CHARACTERS, STOPS, TOOLS
from veneer.serving.sampling import Decoding

# Fields that say nothing about the answer: about billing, storage, accounts or the transport.
WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier", "parallel_tool_calls"}
    | {"prompt_cache_retention", "add_generation_prompt", "return_token_ids"}
)

Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
StopText = Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS)]
Count = Annotated[int, Field(ge=1, le=2**31)]


class _Request(BaseModel):
    """What all requests have in common: unknown fields with a value are refused."""

    model_config = ConfigDict(extra="allow", strict=False)


R = TypeVar("R", bound=_Request)


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool = False


class JsonSchema(BaseModel):
    """A schema that an answer follows."""

    model_config = ConfigDict(extra="ignore")

    name: str = ""
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    """The form of an answer: text, JSON, or JSON of a schema."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class SampledRequest(_Request):
    """What chats and completions have in common."""

    model: str = Field(max_length=200)
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Share | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=STOPS)] | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    return_tokens_as_token_ids: bool | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def decoding(self, number: int, seed: int) -> Decoding:
        """Return how the tokens of an answer are chosen.

        Args:
            number: Number of the answer among the choices.
            seed: Seed of the request.

        Raises:
            ApiError: A bias is for no token.
        """
        try:
            bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        except ValueError:
            raise ApiError(400, "logit_bias: its keys are token ids", "logit_bias") from None
        return Decoding(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            logit_bias=bias,
            seed=(seed + number) % 2**63,
        )

    def seed_or_random(self) -> int:
        """Return the seed of the request; a random one where it names none."""
        return secrets.randbits(48) if self.seed is None else self.seed


class ChatRequest(SampledRequest):
    """A request to /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=4096)
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=LIKELIEST)] | None = None
    tools: list[dict[str, Any]] | None = Field(None, max_length=TOOLS)
    tool_choice: Any = None

    @property
    def likeliest(self) -> int | None:
        """Log-probabilities a token; None: none are asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most_tokens(self) -> int | None:
        """Tokens of an answer, where a number is named."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(SampledRequest):
    """A request to /v1/completions."""

    prompt: str | list[Any]
    logprobs: Annotated[int, Field(ge=0, le=LIKELIEST)] | None = None

    @property
    def likeliest(self) -> int | None:
        """Log-probabilities a token; None: none are asked for."""
        return self.logprobs

    @property
    def most_tokens(self) -> int | None:
        """Tokens of an answer, where a number is named."""
        return self.max_tokens


class TokenizeRequest(_Request):
    """A request to /tokenize, in vLLM's form: a conversation or a text."""

    model: str | None = Field(None, max_length=200)
    messages: list[dict[str, Any]] | None = Field(None, min_length=1, max_length=4096)
    tools: list[dict[str, Any]] | None = Field(None, max_length=TOOLS)
    prompt: str | None = None


class LoadRequest(_Request):
    """A request to /v1/load_lora_adapter, in vLLM's form."""

    lora_name: str = Field(min_length=1, max_length=100, pattern=r"^[\w.:-]+$")
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False


class UnloadRequest(_Request):
    """A request to /v1/unload_lora_adapter, in vLLM's form."""

    lora_name: str = Field(min_length=1, max_length=100)
    lora_int_id: int | None = None


def parse(kind: type[R], body: bytes) -> R:
    """Read a request's body.

    Raises:
        ApiError: It is no JSON, or not of this form; the message names the field.
    """
    try:
        request = kind.model_validate_json(body or b"null")
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("str", "function-wrap"))
        message = f"{where}: {first['msg']}" if where else f"the body: {first['msg']}"
        raise ApiError(400, message[:500], where[:200] or None) from None
    for name, value in (request.model_extra or {}).items():
        if value is None or value in ([], {}, "", False) or name in WITHOUT_EFFECT:
            continue
        near = difflib.get_close_matches(name, kind.model_fields, 1)
        hint = f"; is {near[0]} meant?" if near else ""
        raise ApiError(400, f"{name[:100]}: this server does not know it{hint}", name[:100], "unknown_field")
    return request
