"""A real OpenAI-compatible server on this machine whose judge follows a rule, and a run's folder with answers."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Rule = Callable[[str, str], str]  # the answers shown as A and B to the judge's reply


class JudgeServer(ThreadingHTTPServer):
    """The server.

    Attributes:
        rule: what the judge says of two answers.
        before: what happens before a question is answered; it may send a reply itself and return True.
        asked: bodies of all questions, in their order.
        headers: headers of all requests.
        paths: paths of all requests.
    """

    request_queue_size = 64  # connections that wait, so that none is turned away and tried again a second later

    def __init__(self, rule: Rule) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.rule = rule
        self.before: Callable[[Handler], bool] = lambda handler: False
        self.asked: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.paths: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay silent where the client has gone away."""


class Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_GET(self) -> None:
        self._note()
        if not self.server.before(self):
            self.send({"data": [{"id": "rule-judge"}]})

    def do_POST(self) -> None:
        self._note()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        if not self.server.before(self):
            self.send({"choices": [{"message": {"content": self.server.rule(*shown(body))}, "finish_reason": "stop"}]})

    def _note(self) -> None:
        self.server.paths.append(self.path)
        self.server.headers.append(self.headers)

    def send(self, value: Any, status: int = 200, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """Return the answers shown as A and as B."""
    text = body["messages"][-1]["content"]
    found = [re.search(rf"<answer_{name}>\n(.*)\n</answer_{name}>", text, re.DOTALL) for name in "AB"]
    assert found[0] is not None
    assert found[1] is not None
    return found[0][1], found[1][1]


def longer(a: str, b: str) -> str:
    """The rule of a judge that prefers the longer answer."""
    verdict = "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
    return f"I counted.\n\n**verdict: {verdict}**"


@contextmanager
def judge_server(rule: Rule = longer) -> Iterator[JudgeServer]:
    """Run a server for a `with` block."""
    with JudgeServer(rule) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def answers_folder(folder: Path, pairs: list[tuple[str, str]], groups: list[str] | None = None) -> Path:
    """Write what an evaluation leaves in a run's folder: answers of base and tuned model to each row."""
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text("model: {base: smollm2-135m-instruct}\ndata: {train: rows.jsonl}\n")
    (folder / "evaluation.json").write_text(json.dumps({"metrics": {}, "rows": len(pairs)}))
    lines = [
        {"place": f"rows.jsonl:{n}", "prompt": f"question {n}", "reference": f"right {n}", "base": base, "tuned": tuned}
        | {"base_right": False, "tuned_right": True}
        | ({"group": groups[n - 1]} if groups else {})
        for n, (base, tuned) in enumerate(pairs, 1)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
