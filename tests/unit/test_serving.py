"""A server answers for many adapters at a time as plain PEFT does for each alone."""

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient

from tests.support.adapters import save_adapter_of
from tests.support.certified import make_base
from tests.support.serving import answered_by_peft, client_of, few, service_of
from tests.support.tiny import FAMILIES, save_tiny_model
from veneer.serving.service import Service

KINDS = ("lora", "rslora", "patterns")  # ranks of 4 and 8, scales by pattern
PROMPTS = ["what does the cat say", "the owl", "route this message to the right team please " * 8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and an adapter of each kind."""
    folder = tmp_path_factory.mktemp("serving")
    make_base(folder / "base", 0)
    for kind in KINDS:
        save_adapter_of(kind, folder / "base", folder / "adapters" / kind)
    return folder


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    models = [str(folder / "adapters" / kind) for kind in KINDS]
    with service_of(models, limits=few(), folders=(folder / "adapters",)) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    with client_of(service) as client:
        yield client


def chat(client: TestClient, model: str, text: str, **more: Any) -> dict[str, Any]:
    asked = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12}
    reply = client.post("/v1/chat/completions", json=asked | more)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def ids_of(reply: dict[str, Any]) -> list[int]:
    content = reply["choices"][0]["logprobs"]["content"]
    return [int(entry["token"].removeprefix("token_id:")) for entry in content]


def test_answers_in_a_mixed_batch_are_those_of_each_adapter_alone(
    folder: Path, service: Service, client: TestClient
) -> None:
    models = ["base", *KINDS]
    asked = [(model, prompt) for prompt in PROMPTS for model in models] * 2
    more: dict[str, Any] = {"logprobs": True, "return_tokens_as_token_ids": True}
    with ThreadPoolExecutor(len(asked)) as pool:
        replies = list(pool.map(lambda one: chat(client, *one, **more), asked))
    prompts = {text: service.tokenize(_tokenize(text))["tokens"] for text in PROMPTS}
    for model in models:
        adapter = None if model == "base" else folder / "adapters" / model
        alone = answered_by_peft(folder / "base", adapter, [prompts[text] for text in PROMPTS], 12)
        for text, ids in zip(PROMPTS, alone, strict=True):
            stops = service.adapters.get(model).stop_ids
            wanted = next((ids[:at] for at, token in enumerate(ids) if token in stops), ids)
            found = [ids_of(reply) for one, reply in zip(asked, replies, strict=True) if one == (model, text)]
            assert found == [wanted] * 2, (model, text)
    assert len({json.dumps(reply["choices"][0]["message"]) for reply in replies}) > 4, "adapters differ"


def _tokenize(text: str) -> Any:
    from veneer.serving.protocol import TokenizeRequest

    return TokenizeRequest(messages=[{"role": "user", "content": text}])


def test_telling_while_the_next_step_is_computed_changes_no_answer(
    service: Service, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: a stop text is found once another token was made, and prompts wait for each other."""
    texts = [chat(client, model, PROMPTS[0])["choices"][0]["message"]["content"] for model in KINDS]
    stops = [text[len(text) // 2 :][:2] for text in texts]
    asked = [(model, stop) for model, text_stop in zip(KINDS, stops, strict=True) for stop in (None, text_stop)]

    def ask(one: tuple[str, str | None]) -> Any:
        return chat(client, one[0], PROMPTS[0], stop=one[1])["choices"]

    before = [ask(one) for one in asked]
    monkeypatch.setattr(service.scheduler, "_overlaps", True)
    with ThreadPoolExecutor(3 * len(asked)) as pool:  # more than there are slots
        assert list(pool.map(ask, 3 * asked)) == 3 * before


def test_a_prompt_of_one_token_is_answered_as_any(client: TestClient) -> None:
    def complete(prompts: list[list[int]]) -> list[str]:
        asked = {"model": "lora", "prompt": prompts, "temperature": 0, "max_tokens": 8}
        reply = client.post("/v1/completions", json=asked)
        assert reply.status_code == 200, reply.text
        return [choice["text"] for choice in reply.json()["choices"]]

    one, long = [5], list(range(5, 60))
    assert complete([one, one, long]) == [*complete([one]) * 2, *complete([long])]


def test_an_adapter_that_is_not_finite_is_refused(folder: Path, client: TestClient) -> None:
    """Its NaN, times 0, would reach the rows beside its own."""
    broken = folder / "adapters" / "broken"
    shutil.copytree(folder / "adapters" / "lora", broken)
    weights = load_file(broken / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, broken / "adapter_model.safetensors", {"format": "pt"})
    load = {"lora_name": "broken", "lora_path": str(broken)}
    reply = client.post("/v1/load_lora_adapter", json=load)
    assert reply.status_code == 400
    assert "holds NaN or infinite numbers in float32" in reply.json()["error"]["message"]


def test_a_stream_is_the_whole_answer_in_pieces(client: TestClient) -> None:
    asked = {"model": "lora", "messages": [{"role": "user", "content": PROMPTS[0]}], "temperature": 0, "n": 2}
    whole = client.post("/v1/chat/completions", json=asked).json()
    asked |= {"stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", "/v1/chat/completions", json=asked) as reply:
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert events[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for choice in whole["choices"]:
        deltas = [event["choices"][0] for event in events[:-1] if event["choices"][0]["index"] == choice["index"]]
        assert "".join(one["delta"].get("content", "") for one in deltas) == choice["message"]["content"]
        assert deltas[-1]["finish_reason"] == choice["finish_reason"]


def test_a_shared_prefix_is_read_once_for_an_adapter_and_never_for_another(client: TestClient) -> None:
    text = "the dog and the owl and the hen " * 12 + "now"
    first = {model: chat(client, model, text) for model in ("base", *KINDS)}
    assert all(reply["usage"]["prompt_tokens_details"]["cached_tokens"] <= 64 for reply in first.values()), "a template"
    again = {model: chat(client, model, text) for model in ("base", *KINDS)}
    assert all(reply["usage"]["prompt_tokens_details"]["cached_tokens"] > 128 for reply in again.values())
    assert [reply["choices"] for reply in first.values()] == [reply["choices"] for reply in again.values()]


def test_adapters_come_and_go_while_it_serves(folder: Path, service: Service, client: TestClient) -> None:
    prompt = PROMPTS[0]
    before = chat(client, "lora", prompt)["choices"]
    load = {"lora_name": "guest", "lora_path": str(folder / "adapters" / "patterns")}
    stops = threading.Event()

    def ask_on() -> list[Any]:
        found = []
        while not stops.is_set():
            found.append(chat(client, "lora", prompt)["choices"])
        return found

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask_on)
        try:
            assert client.post("/v1/load_lora_adapter", json=load).text.startswith("Success")
            as_guest = chat(client, "guest", prompt)["choices"]
            replaced = load | {"lora_path": "rslora", "load_inplace": True}
            assert client.post("/v1/load_lora_adapter", json=replaced).text.startswith("Success")
            as_other = chat(client, "guest", prompt)["choices"]
            assert client.post("/v1/load_lora_adapter", json=load).status_code == 400, "the name is taken"
            assert client.post("/v1/unload_lora_adapter", json={"lora_name": "guest"}).text.startswith("Success")
        finally:
            stops.set()
        assert all(choices == before for choices in asking.result())
    assert as_guest == chat(client, "patterns", prompt)["choices"]
    assert as_other == chat(client, "rslora", prompt)["choices"]
    assert as_other != as_guest
    gone = client.post("/v1/chat/completions", json={"model": "guest", "messages": [{"role": "user", "content": "a"}]})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["base", *KINDS]


@pytest.mark.parametrize("family", ["gpt2", "mistral", "qwen3"])
def test_other_families_are_served_too(family: str, tmp_path: Path) -> None:
    """GPT-2 has learned positions and transposed weights, Mistral a window: neither has slots."""
    save_tiny_model(FAMILIES[family], tmp_path / "base")
    targets = {"target_modules": ["c_attn"]} if family == "gpt2" else {}
    adapter = save_adapter_of("lora", tmp_path / "base", tmp_path / "one", **targets)
    text = "the cat and the dog and the owl and the hen and the cat"
    with service_of([str(adapter)], limits=few()) as service, client_of(service) as client:
        ids = service.tokenize(_tokenize(text))["tokens"]
        more = {"logprobs": True, "return_tokens_as_token_ids": True, "logit_bias": {"2": -100}}
        with ThreadPoolExecutor(4) as pool:
            asked = ["base", "one", "base", "one"]
            found = [ids_of(reply) for reply in pool.map(lambda model: chat(client, model, text, **more), asked)]
    for model, answer in zip(asked, found, strict=True):
        (alone,) = answered_by_peft(tmp_path / "base", adapter if model == "one" else None, [ids], 12)
        assert answer[: len(alone) - 1] == alone[: len(answer)][: len(alone) - 1]
