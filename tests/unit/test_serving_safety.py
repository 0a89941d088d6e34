"""What a server refuses, how it says so, and what becomes of clients that ask nonsense, too much, or go away."""

import json
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import veneer
from tests.support.adapters import save_adapter_of
from tests.support.certified import make_base
from tests.support.malformed import malformed
from tests.support.serving import client_of, few, server_of, service_of
from veneer.config import UserError
from veneer.serving.address import require_safe
from veneer.serving.service import Service

KEY = "a-key-of-tests"
ASKED = {"model": "base", "messages": [{"role": "user", "content": "the cat"}], "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("safety")
    make_base(folder / "base", 0)
    save_adapter_of("lora", folder / "base", folder / "adapters" / "one")
    save_adapter_of("lora", folder / "base", folder / "elsewhere" / "two")
    (folder / "adapters" / "link").symlink_to(folder / "elsewhere" / "two")
    return folder


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    limits = few(slots=2, queue=2, body_bytes=20_000)
    with service_of([str(folder / "base")], limits=limits, folders=(folder / "adapters",)) as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    with client_of(service, KEY) as client:
        yield client


def test_no_malformed_request_breaks_it(client: TestClient, capfd: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    seen = set()
    for number in range(400):
        method, path, body, headers = malformed(draw)
        reply = client.request(method, path, content=body, headers=headers)
        seen.add(reply.status_code)
        assert reply.status_code < 500, (number, method, path, body[:200], reply.text)
        if reply.status_code >= 400:
            error = reply.json()["error"]
            assert error["message"], (number, path)
            assert error.keys() == {"message", "type", "param", "code"}
    assert {200, 400, 404, 405, 413, 415} <= seen
    assert "Traceback" not in capfd.readouterr().err
    assert client.post("/v1/chat/completions", json=ASKED).status_code == 200


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"model": "nobody"}, 404, "nobody"),
        ({"max_tokens": 100_000}, 400, "room for"),
        ({"temprature": 1}, 400, "is temperature meant"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, 400, "wizard"),
        ({"n": 3}, 400, "n:"),
        ({"messages": [{"role": "user", "content": "a" * 30_000}]}, 413, "bytes"),
        ({"tool_choice": "required", "tools": [{"name": "a"}]}, 400, "tool_choice"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}}, 400, "schema"),
    ],
)
def test_a_refusal_says_what_is_wrong(change: dict[str, Any], status: int, said: str, client: TestClient) -> None:
    reply = client.post("/v1/chat/completions", json=ASKED | change)
    assert reply.status_code == status
    assert said in reply.json()["error"]["message"]


def test_the_key_is_asked_for_and_never_repeated(
    service: Service, client: TestClient, capfd: pytest.CaptureFixture[str]
) -> None:
    for wrong in ("", "Bearer", f"Bearer {KEY}x", f"Basic {KEY}", "Bearer é"):
        reply = client.get("/v1/models", headers={b"Authorization": wrong.encode("latin-1")})
        assert reply.status_code == 401
        assert KEY not in reply.text
    assert client.get("/health", headers={"Authorization": ""}).status_code == 200
    assert KEY not in "".join(capfd.readouterr())


def test_only_this_machine_is_answered_without_a_key(service: Service) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.4", "example.org"):
        with pytest.raises(UserError, match="api-key-file"):
            require_safe(host, None)
        assert require_safe(host, KEY) is None
    with client_of(service, hosts=require_safe("127.0.0.1", None)) as client:
        assert client.get("/v1/models", headers={"Host": "localhost:8000"}).status_code == 200
        assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 421, "a rebound name"
        body = json.dumps(ASKED)
        reply = client.post("/v1/chat/completions", content=body, headers={"Host": "localhost"})
        assert reply.status_code == 415, "what a form of another page can send"


def test_no_path_beyond_the_named_folders_is_read(folder: Path, client: TestClient) -> None:
    def load(path: str) -> tuple[int, str]:
        reply = client.post("/v1/load_lora_adapter", json={"lora_name": "two", "lora_path": path})
        return reply.status_code, reply.text

    outside = folder / "elsewhere" / "two"
    for path in (
        str(outside),
        "../elsewhere/two",
        "link",
        "/etc",
        "~",
        ".",
        "one/../../elsewhere/two",
        "\0",
        "a" * 4000,
    ):
        status, said = load(path)
        assert status == 403, path
        assert str(folder) not in said
    assert load("one")[0] == 200
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "two"}).status_code == 200
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "base"}).status_code == 400


def test_what_does_not_fit_the_queue_is_asked_to_come_again(client: TestClient) -> None:
    def ask(_: int) -> Any:
        return client.post("/v1/chat/completions", json=ASKED | {"max_tokens": 100, "logit_bias": {"2": -100}})

    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(ask, range(12)))
    statuses = [reply.status_code for reply in replies]
    assert set(statuses) == {200, 429}
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"


def test_clients_that_go_away_free_their_slots(service: Service) -> None:
    asked = json.dumps(
        ASKED | {"max_tokens": 150, "logit_bias": {str(token): -100 for token in service.adapters.base.stop_ids}}
    )
    with server_of(service) as address:
        for stream in (False, True):
            body = json.dumps(json.loads(asked) | {"stream": stream})
            command = [
                "curl",
                "-sN",
                "-H",
                "Content-Type: application/json",
                "-d",
                body,
                f"{address}/v1/chat/completions",
            ]
            before = service.metrics.cancelled.value
            with subprocess.Popen(command, stdout=subprocess.DEVNULL) as client:
                _until(lambda: service.scheduler.running > 0)
                client.kill()
            _until(lambda: service.scheduler.running == 0)
            assert service.metrics.cancelled.value == before + 1


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_served_run_is_certified(run: Path) -> None:
    """The run's own rows, and edge cases with control strings, which reach the model as in training."""
    with service_of([f"tickets={run}"], limits=few()) as service, server_of(service) as address:
        found = veneer.certify(address, str(run), rows=4, model="tickets")[0].as_dict()
    assert found["passed"], found["checks"]
    checks = {check["id"]: check for check in found["checks"]}
    assert checks["prompt_tokens"]["value"].startswith("10 of 10")
    assert {"score", "agreement", "distributions", "stops"} <= checks.keys()


def test_another_base_is_refused(run: Path) -> None:
    other = str(run.parent / "other-base")
    with pytest.raises(UserError, match="does not belong"), service_of([other, str(run)], limits=few()):
        pass
