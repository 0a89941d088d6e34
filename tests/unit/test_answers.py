"""Texts of a server: several prompts at once, in the order in which they were asked."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from veneer.config import JobError, UserError
from veneer.data.conversation import Message
from veneer.release.certify.servers import Endpoint, llama_server

AT_ONCE = 3


class Echo(BaseHTTPRequestHandler):
    """Answers with the last message; waits until as many are asking as may ask at once."""

    waiting = threading.Barrier(AT_ONCE, timeout=20)
    asked: list[dict[str, Any]] = []  # noqa: RUF012, one server a test

    def do_GET(self) -> None:
        self._reply({"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        self.waiting.wait()
        text = f" {body['messages'][-1]['content']}! "
        self._reply({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})

    def _reply(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_texts_come_in_order_several_at_once_and_without_what_is_not_needed(server: str) -> None:
    done: list[int] = []
    prompts = [[Message("system", "s"), Message("user", f"message {n}")] for n in range(2 * AT_ONCE)]
    texts = Endpoint(server, True).texts(prompts, 7, AT_ONCE, done.append)
    assert texts == [f"message {n}!" for n in range(2 * AT_ONCE)]
    assert sum(done) == len(prompts)
    for body in Echo.asked:
        assert body["max_tokens"] == 7
        assert body["temperature"] == 0
        assert "logprobs" not in body


ABORTING = """
import http.server, json, os, sys, threading
from types import SimpleNamespace

common_reasoning_format = SimpleNamespace(COMMON_REASONING_FORMAT_NONE=0)
CommonParams = lambda: SimpleNamespace(model=SimpleNamespace())


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        told = json.dumps({"data": [{"id": "m"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def do_POST(self):
        print("GGML_ASSERT(n > 0) failed", file=sys.stderr, flush=True)
        os.abort()

    def log_message(self, *told):
        pass


def Server(settings):
    if "load" in settings.model.path:
        Handler.do_POST(None)
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return SimpleNamespace(listening_address=f"http://127.0.0.1:{server.server_port}")
"""


@pytest.mark.parametrize(
    ("file", "kind", "expected"),
    [("load.gguf", UserError, "llama.cpp does not load it"), ("ask.gguf", JobError, "llama.cpp ended")],
)
def test_a_llama_cpp_that_aborts_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, kind: type[Exception], expected: str
) -> None:
    (tmp_path / "xllamacpp.py").write_text(ABORTING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    told = rf"{file}: {expected}: it was ended by SIGABRT; GGML_ASSERT\(n > 0\) failed"
    with pytest.raises(kind, match=told), llama_server(tmp_path / file, True, set(), 64) as server:
        server.texts([[Message("user", "a")]], 4)
