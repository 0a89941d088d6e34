"""Requests that a server must refuse in one message, or answer; drawn at random, for tests and benchmarks."""

import json
import random
from typing import Any

PATHS = (
    *("/v1/chat/completions",) * 6,
    *("/v1/completions",) * 3,
    *("/tokenize", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/models", "/v1/models/../../etc/passwd"),
    *("/v1/nothing", "/%00", "/..%2f..%2fetc%2fpasswd", "/metrics", "/health", "/"),
)
STRANGE: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**30, 1.5, float("nan"), float("inf"), "", "a", "\ud800", "\0", "<|im_end|>", "é" * 50),
    *([], [[]], {}, {"a": {"b": {}}}, [None], ["a"] * 40, {"role": "user"}, [{"role": "user", "content": "a"}]),
    [{"role": "user", "content": [{"type": "image_url", "image_url": "file:///etc/passwd"}]}],
    [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": 1}}]}],
)
FIELDS = (
    *("model", "messages", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "stop", "seed"),
    *("stream", "stream_options", "logprobs", "top_logprobs", "logit_bias", "response_format", "tools", "tool_choice"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "lora_name", "lora_path", "nonsense"),
)
WHOLE: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "base", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2},
    "/v1/completions": {"model": "base", "prompt": "a", "max_tokens": 2},
    "/tokenize": {"model": "base", "prompt": "a"},
    "/v1/load_lora_adapter": {"lora_name": "x", "lora_path": "nothing"},
    "/v1/unload_lora_adapter": {"lora_name": "x"},
}


def malformed(draw: random.Random) -> tuple[str, str, bytes, dict[str, str]]:
    """Return method, path, body and headers of a request."""
    method = draw.choice(("POST",) * 9 + ("GET", "PUT", "DELETE"))
    path = draw.choice(PATHS)
    headers = {"Content-Type": draw.choice(("application/json",) * 12 + ("text/plain",))}
    kind = draw.randrange(10)
    if kind == 0:
        body = bytes(draw.randrange(256) for _ in range(draw.randrange(200)))
    elif kind == 1:
        body = b"[" * draw.choice((10, 1000, 15_000))
    elif kind == 2:
        body = b'{"messages": "' + b"a" * 25_000 + b'"}'
    else:
        value = dict(WHOLE.get(path, {"model": "base"}))
        for _ in range(draw.randrange(4)):
            value[draw.choice(FIELDS)] = draw.choice(STRANGE)
        for _ in range(draw.randrange(2)):
            value.pop(draw.choice(list(value)), None)
            if not value:
                break
        body = json.dumps(value).encode()
        if kind == 3:
            body = body[: draw.randrange(len(body) + 1)]
    return method, path, body, headers
