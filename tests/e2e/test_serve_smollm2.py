"""The official client of OpenAI against `veneer serve` on the real SmolLM2, as a user starts it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError, OpenAI

pytestmark = pytest.mark.e2e
NAME = "smollm2-135m-instruct"
ASKED = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple["subprocess.Popen[str]", Any]]:
    command = [sys.executable, "-m", "veneer.cli.main", "serve", NAME, "--port", "0", "--dtype", "float32"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[0]
        yield process, OpenAI(base_url=f"{address}/v1", api_key="none", timeout=300, max_retries=0)
        process.kill()


def test_the_official_client_is_answered(server: tuple["subprocess.Popen[str]", Any]) -> None:
    _, client = server
    assert [model.id for model in client.models.list()] == [NAME]
    asked = {"model": NAME, "messages": ASKED, "temperature": 0, "max_tokens": 16}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    text = whole.choices[0].message.content
    assert "Paris" in text
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole.choices[0].logprobs.content[0].top_logprobs[0].token == whole.choices[0].logprobs.content[0].token
    streamed = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema | {"additionalProperties": False}}}
    forced = client.chat.completions.create(**asked | {"max_tokens": 32}, response_format=form)
    assert json.loads(forced.choices[0].message.content).keys() == {"city"}
    prompt = "Once upon a time"
    drawn = [client.completions.create(model=NAME, prompt=prompt, max_tokens=8, seed=1, n=2) for _ in range(2)]
    assert [choice.text for choice in drawn[0].choices] == [choice.text for choice in drawn[1].choices]
    assert drawn[0].choices[0].text != drawn[0].choices[1].text
    with pytest.raises(NotFoundError, match="nobody"):
        client.chat.completions.create(model="nobody", messages=ASKED)
    with pytest.raises(BadRequestError, match="room for"):
        client.chat.completions.create(**asked | {"max_tokens": 10**6})


def test_sigterm_finishes_what_is_being_answered(server: tuple["subprocess.Popen[str]", Any]) -> None:
    process, client = server
    stream = client.chat.completions.create(model=NAME, messages=ASKED, temperature=0, max_tokens=24, stream=True)
    next(iter(stream))
    os.kill(process.pid, signal.SIGTERM)
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("stop", "length")
    assert process.wait(60) == 0
