"""Texts of a server: several prompts at once, in the order in which they were asked."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from veneer.data import Message
from veneer.release.servers import Endpoint

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
        thread = threading.Thread(target=running.serve_forever)
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
