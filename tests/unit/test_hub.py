"""A hub that cannot be reached is known within seconds and told once; what its cache holds is used all the same."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest

import veneer
from tests.support.runs import tiny_run, write_rows
from veneer.config import Model, UserError, hub
from veneer.data.sources.find import find_sources
from veneer.data.sources.hub import open_dataset
from veneer.model.load import load_tokenizer
from veneer.model.locate import locate
from veneer.model.shapes import find_config

PROBE = hub._probe  # that of conftest.py asks nobody
Call = Callable[..., tuple[int, str, str]]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that takes a connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def refusing() -> str:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def answering() -> Iterator[tuple[str, Callable[[int], None], list[str]]]:
    """A server; what sets its answer's status; and the paths it was asked for."""
    asked: list[str] = []
    status = [404]

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(status[0])
            self.end_headers()

        def log_message(self, *given: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", lambda code: status.__setitem__(0, code), asked
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Puts the hub at an address, with an empty cache."""

    def put(address: str) -> None:
        PROBE.cache_clear()
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(hub, "_probe", PROBE)
        monkeypatch.setattr(hub, "SECONDS", 0.5)
        for name, value in (("ENDPOINT", address), ("HF_HUB_OFFLINE", False), ("HF_HUB_CACHE", str(tmp_path / "hub"))):
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")

    return put


def test_an_answer_of_any_kind_is_a_hub(answering: Any, at: Callable[[str], None]) -> None:
    address, set_status, asked = answering
    at(address)
    assert hub.unreachable() is None
    assert hub.unreachable() is None
    assert len(asked) == 1  # it is asked once
    set_status(503)
    PROBE.cache_clear()
    assert hub.unreachable() == "it answers 503"


def test_silence_and_refusal_are_none(silent: str, refusing: str, at: Callable[[str], None]) -> None:
    at(silent)
    started = time.monotonic()
    assert hub.unreachable() == "no answer within 0 s"
    assert hub.unreachable() is not None
    assert time.monotonic() - started < 2
    at(refusing)
    assert "refused" in (hub.unreachable() or "")


def test_the_limit_is_three_seconds() -> None:
    assert hub.SECONDS == 3


def test_a_hub_that_is_not_to_be_asked_is_not(
    answering: Any, at: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, _, asked = answering
    at(address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"x: not on this machine, and the hub is not asked: HF_HUB_OFFLINE is set"):
        hub.require_reachable("x")
    assert asked == []


def test_a_proxy_is_asked_instead(
    answering: Any, refusing: str, at: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import close_session

    address, _, asked = answering
    at("http://hub.invalid")
    monkeypatch.setenv("HTTP_PROXY", address)
    close_session()  # the client reads proxies when it is made
    try:
        assert hub.unreachable() is None
    finally:
        close_session()
    assert asked == ["http://hub.invalid"] or asked == ["http://hub.invalid/"]


@pytest.mark.parametrize("which", ["silent", "refusing"])
def test_every_way_to_the_hub_is_refused_in_one_message(
    which: str,
    at: Callable[[str], None],
    request: pytest.FixtureRequest,
    call: Call,
    tmp_path: Path,
    tiny_model: Callable[..., Path],
) -> None:
    at(request.getfixturevalue(which))
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    (tmp_path / "run.yaml").write_text(f"model: {{base: owner/name}}\ndata: {{train: {rows}}}\n")
    run = str(tmp_path / "run.yaml")
    for arguments in (
        ["train", run], ["verify", run], ["plan", run], ["data", run], ["generate", "owner/name", "-p", "x"],
    ):  # fmt: skip
        status, out, err = call(*arguments)
        assert (status, out) == (2, ""), err
        assert err.count("\n") == 2, err
        assert "not on this machine, and the hub (http://127.0.0.1:" in err
        assert "HF_HUB_OFFLINE" in err
    told = r"model\.base = o/n: .* cannot be fetched.*cannot be reached"
    with pytest.raises(UserError, match=told):
        load_tokenizer(locate(Model(base="o/n")))
    with pytest.raises(UserError, match=told):
        find_config(Model(base="o/n"))
    (source,) = find_sources("owner/rows", "data.train")
    with pytest.raises(UserError, match=r"data\.train = owner/rows: .*the hub cannot be reached"):
        open_dataset(source, "data.train")
    assert not datasets.config.HF_HUB_OFFLINE
    status, _, err = call("data", "owner/rows", "--model", str(tiny_model()))
    assert status == 2
    assert "data.train = owner/rows: " in err


def test_the_cache_serves_where_the_hub_does_not(
    refusing: str,
    at: Callable[[str], None],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    rows: list[dict[str, Any]],
) -> None:
    at(refusing)
    held = tmp_path / "hub" / "models--owner--name"
    (held / "refs").mkdir(parents=True)
    (held / "refs" / "main").write_text(COMMIT)
    (held / "snapshots").mkdir()
    (held / "snapshots" / COMMIT).symlink_to(tiny_model())
    base = tiny_model()
    settings = tiny_run(base, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run", train={"max_steps": 1})
    run = settings.model_copy(update={"model": Model(base="owner/name", dtype="float32")})
    assert veneer.plan(run).prediction.forecast.peak_bytes > 0
    veneer.train(run)
    (answer,) = veneer.generate(str(tmp_path / "run"), ["the cat"], max_new_tokens=3)
    assert isinstance(answer["answer"], str)
    veneer.merge(str(tmp_path / "run"), tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == "llama"


def test_an_adapter_is_named_by_its_hub_id(
    refusing: str,
    at: Callable[[str], None],
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    call: Call,
) -> None:
    at(refusing)
    run = tiny_run(tiny_model(), write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run", train={"max_steps": 1})
    veneer.train(run)
    held = tmp_path / "hub" / "models--owner--tuned"
    (held / "refs").mkdir(parents=True)
    (held / "refs" / "main").write_text(COMMIT)
    (held / "snapshots").mkdir()
    (held / "snapshots" / COMMIT).symlink_to(tmp_path / "run" / "adapter")
    by_folder, by_id = (
        veneer.generate(name, ["the cat"], max_new_tokens=3) for name in (str(tmp_path / "run"), "owner/tuned")
    )
    assert by_folder == by_id
    veneer.merge("owner/tuned", tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    for name in ("owner/none", "owner/none--such.git"):  # the second is no id that the hub's library takes
        status, _, err = call("merge", name, "--out", str(tmp_path / "none"))
        assert (status, f"{name}: no such folder" in err) == (2, True), err

    def fail(endpoint: str, period: int) -> str | None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "_probe", fail)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="runs/nmae: no such folder"):  # a typing mistake is refused here
        veneer.merge("runs/nmae", tmp_path / "none")


def test_nothing_is_asked_for_what_is_here(tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(endpoint: str, period: int) -> str | None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "_probe", fail)
    load_tokenizer(locate(Model(base=str(tiny_model()))))
    find_config(Model(base=str(tiny_model())))
