"""Strangers' files and answers: settings cost nothing, text does nothing, damage is told."""

import http.server
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytest

from tests.support.notices import notified
from tests.support.runs import write_rows
from veneer.cli.main import main
from veneer.cli.terminal import Terminal
from veneer.config import JobError, RunFolder, UserError, load_run
from veneer.config.files import own_files, read_json, read_json_lines, reading, visible
from veneer.config.folder import write_json
from veneer.config.load import yaml_values
from veneer.data.sources.find import find_sources
from veneer.data.tokens.corpus import is_sound
from veneer.model.fingerprint import config_sha256
from veneer.model.locate import BaseSource
from veneer.release.certify import transport
from veneer.release.certify.client import Client, NoAnswerError
from veneer.release.certify.servers import Endpoint
from veneer.report.data_page import data_page

SOURCE = Path(__file__).parents[2] / "src"
SMALLEST = "model: {base: a}\ndata: {train: b}\n"
Call = Callable[..., tuple[int, str, str]]


def refused(path: Path, text: str | None = None) -> str:
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_run(path)
    return str(caught.value)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
MERGES = "a0: &a0 {k: v}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BOMB, "run.yaml:5: more than 20,000 keys and values"),
        (MERGES, "run.yaml:5: more than 20,000 keys and values"),
        (f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 1000)}]\n", "more than 20,000 keys and values"),
        ("model: &a [*a]\n", "run.yaml:1: the anchor `a` stands within itself"),
        ("model: " + "[" * 100_000, "run.yaml:1: nested more than 20 deep"),
        (SMALLEST + "".join(f"key{n}: {n}\n" for n in range(50_000)), "more than 20,000 keys and values"),
        (SMALLEST + "".join(f"key{n}: {n}\n" for n in range(100_000)), "bytes, and at most 1,048,576 are read"),
        (SMALLEST + "train:\n" + "".join(f"  k{n}: {n}\n" for n in range(3000)), "... and perhaps more"),
        (SMALLEST + f"train: {{seed: {'9' * 5000}}}\n", "run.yaml:3: not valid YAML: `'9999"),
        (SMALLEST + f"train: {{seed: 0x{'f' * 5000}}}\n", "train.seed = a number of 20,000 bits: should be less than"),
        (SMALLEST + "train: {seed: 2024-13-45}\n", "run.yaml:3: not valid YAML: `'2024-13-45'` is no value"),
        (SMALLEST + "train: {seed: !!int x}\n", "run.yaml:3: not valid YAML"),
        (SMALLEST + 'train: {output_dir: "a\\0b"}\n', "train.output_dir = 'a\\x00b': holds NUL"),
    ],
)
def test_a_run_file_of_a_stranger_is_answered_in_a_moment(tmp_path: Path, text: str, expected: str) -> None:
    began = time.process_time()
    assert expected in refused(tmp_path / "run.yaml", text)
    assert time.process_time() - began < 1


def test_pipes_and_devices_are_no_run_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.yaml")
    for path in (tmp_path / "run.yaml", Path("/dev/zero")):
        assert "not a file but a pipe, a socket or a device" in refused(path)
    assert "not a file but a folder" in refused(tmp_path)


def test_numbers_of_any_length_are_answered_on_the_command_line_too(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(SMALLEST)
    for value in ("9" * 5000, "0x" + "f" * 4000, str(2**63)):
        with pytest.raises(UserError, match=r"train\.seed = "):
            load_run(tmp_path / "run.yaml", [f"train.seed={value}"])
    with pytest.raises(UserError, match="nested more than 20 deep"):
        load_run(tmp_path / "run.yaml", ["data.train=" + "[" * 5000])


def test_control_characters_are_shown_and_not_carried_out() -> None:
    assert visible("a\x1b]52;c;eA==\x07\r\x9b2J\u202eb\ud800\n\tż") == (
        "a\\x1b]52;c;eA==\\x07\\x0d\\x9b2J\\u202eb\\ud800\n\tż"
    )


def test_rows_and_errors_do_nothing_to_a_terminal(call: Call, tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    clip = "\x1b]52;c;eA==\x07"
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"say{clip} {n}", "completion": "cat"} for n in range(4)])
    page = tmp_path / "page.html"
    shown = ["data", rows, "--model", str(tiny_model()), "data.validation=0", "--html", str(page)]
    status, out, err = call(*shown)
    assert status == 0, err
    assert "\\x1b]52;c" in out
    assert "\\x1b]52;c" in page.read_text()
    assert "\x1b]" not in out + err + page.read_text()
    status, out, err = call("data", f"{tmp_path}/no{clip}.jsonl", "--model", str(tiny_model()))
    assert status == 2
    assert "no\\x1b]52;c;eA==\\x07.jsonl" in err
    status, out, _ = call(*shown[:-2], "--json")
    assert (status, "\x1b" in out) == (0, False)
    texts = ["".join(piece["text"] for piece in row["pieces"]) for row in json.loads(out)["samples"]]
    assert all(clip in text for text in texts)  # what JSON holds is what the row holds


def test_tables_show_escapes_in_every_cell() -> None:
    from rich.table import Table

    out = Terminal()
    table = Table("\x1b[2J")
    table.add_row("\x1b]0;title")
    with out.capture() as caught:
        out.print(table)
        out.print("\x1b[31mred", markup=False)
    assert "\x1b" not in caught.get()
    assert caught.get().count("\\x1b") == 3


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_an_encoding_does_not_have_is_escaped(
    tmp_path: Path, tiny_model: Callable[..., Path], encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"mów {n} 猫", "completion": "ą"} for n in range(4)])
    arguments = ["data", rows, "--model", str(tiny_model()), "data.validation=0"]
    if encoding == "ascii":  # as a user's locale sets it; the other is set on the stream, which takes seconds less
        told = {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "veneer", *arguments]
        done = subprocess.run(command, capture_output=True, env=os.environ | told, check=False)
        assert done.returncode == 0, done.stderr
        text = done.stdout.decode(encoding)
    else:
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        sys.stdout.flush()
        text = written.getvalue().decode(encoding)
    assert "\\u732b" in text
    assert "####" in text  # bars, where blocks are not to be had


def test_names_that_are_not_utf_8_are_written_as_their_escapes(tmp_path: Path) -> None:
    write_json(tmp_path / "ledger.json", {"file": "caf\udce9.jsonl"})
    assert json.loads((tmp_path / "ledger.json").read_text(encoding="utf-8")) == {"file": "caf\udce9.jsonl"}


def test_markup_in_a_name_is_a_name(call: Call, run_file: Path) -> None:
    folder = run_file.parent / "a [bold] run [/x]"
    status, out, err = call("train", str(run_file), f"train.output_dir={folder}")
    assert status == 0, err
    assert f"evaluate '{folder}'" in out  # quoted, as a shell takes it


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 200_000, b"9" * 5000, b'{"a": 1}', b"null"])
def test_a_damaged_file_is_named_in_one_message(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(path, "step", fix="delete it")
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).endswith("fix: delete it")
    assert "Error" not in str(caught.value)


def test_of_an_appended_file_only_the_last_line_may_be_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_json_lines(path, "step", is_appended=True) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: damaged: not JSON"):
        read_json_lines(path, "step", is_appended=True)


class PanicException(BaseException):
    pass


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (KeyError("vocab"), "it: it lacks 'vocab'"),
        (RecursionError("maximum"), "it: nested too deeply"),
        (PanicException("index out of bounds"), "it: damaged: index out of bounds"),
        (TypeError(""), "it: it is not what its name says"),
    ],
)
def test_whatever_a_parser_raises_is_a_message(error: BaseException, expected: str) -> None:
    with pytest.raises(UserError) as caught, reading("it", "mend it"):
        raise error
    assert str(caught.value) == f"{expected}\n  fix: mend it"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), JobError("x"), OSError(28, "full"), MemoryError()])
def test_what_no_file_is_to_blame_for_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, reading("it"):
        raise error
    assert caught.value is error


def test_records_that_nest_too_deeply_count_as_damaged(tmp_path: Path) -> None:
    for name in ("checksums.json", "config.json", "source.json"):
        (tmp_path / name).write_bytes(b"[" * 100_000)
    with notified("damaged; the rows are tokenized again"):
        assert not is_sound(tmp_path)
    assert config_sha256(BaseSource("folder", str(tmp_path), "nested")) is None
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "environment.json").write_bytes(b"[" * 100_000)
    assert RunFolder(tmp_path / "run").holds_run()


@pytest.mark.parametrize("name", ["dataset_dict.json", "train/dataset_info.json"])
def test_a_damaged_record_of_an_arrow_folder_is_named(tmp_path: Path, name: str) -> None:
    rows = datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}])
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "data")
    (tmp_path / "data" / name).write_bytes(b"[" * 100_000)
    with pytest.raises(UserError, match=Path(name).name):
        [source.fingerprint() for source in find_sources(str(tmp_path / "data"), "data.train")]


def test_links_out_of_a_folder_do_not_ship(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    base = tmp_path / "base"
    base.mkdir()
    (base / "NOTICE").write_text("mine")
    (base / "LICENSE").symlink_to(base / "NOTICE")
    assert [path.name for path in own_files(base, "LICENSE*", "NOTICE*")] == ["LICENSE", "NOTICE"]
    (base / "LICENSE.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"LICENSE\.txt: a link that leads out of its folder"):
        own_files(base, "LICENSE*", "NOTICE*")


def test_the_links_of_a_hubs_cache_are_its_own(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--o--n" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--o--n" / "blobs").mkdir()
    (tmp_path / "models--o--n" / "blobs" / "1").write_text("free")
    (snapshot / "LICENSE").symlink_to("../../blobs/1")
    assert own_files(snapshot, "LICENSE*") == [snapshot / "LICENSE"]


def test_front_matter_is_bounded_as_a_run_file_is() -> None:
    assert yaml_values("license: mit", "README.md") == {"license": "mit"}
    for text in (BOMB, "date: 2024-13-45"):
        with pytest.raises(UserError, match=r"README\.md"):
            yaml_values(text, "README.md")


class EndlessHandler(http.server.BaseHTTPRequestHandler):
    """A server that answers with what a test wants."""

    answer: ClassVar[Callable[["EndlessHandler"], None]] = lambda self: None
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        type(self).answer(self)

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def address() -> Iterator[str]:
    EndlessHandler.asked.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), EndlessHandler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_rows_go_to_the_address_that_was_named_and_to_no_other(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setattr(EndlessHandler, "answer", lambda self: self.send(b'{"ok": 1}'))
    asked = Client(address).ask
    assert asked("/", {"a": 1}, 10) == {"ok": 1}
    monkeypatch.setattr(EndlessHandler, "answer", lambda self: self.send(b"{}", 302, Location=f"{address}/elsewhere"))
    with pytest.raises(NoAnswerError, match=f"redirects to {address}/elsewhere"):
        asked("/", {"a": 1}, 10)
    assert "/elsewhere" not in EndlessHandler.asked


def test_an_endless_answer_ends(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def drip(self: EndlessHandler) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"[" * 1000)
                time.sleep(0.01)
        except OSError:
            pass

    monkeypatch.setattr(EndlessHandler, "answer", drip)
    monkeypatch.setattr(transport, "ANSWER_BYTES", 10_000)
    with pytest.raises(JobError, match="the server's answer is larger than"):
        Client(address).ask("/", None, 10)
    monkeypatch.setattr(transport, "ANSWER_BYTES", 10**9)
    with pytest.raises(NoAnswerError, match=r"no answer within 0\.3 seconds"):
        Client(address, is_own=True).ask("/", None, 0.3)


@pytest.mark.parametrize(
    "answer",
    [{}, {"choices": []}, {"choices": [3]}, {"choices": [{"message": None}]}, {"choices": [{"text": "a"}]}, [], "x"],
)
def test_an_answer_of_another_form_is_a_message(address: str, monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    from veneer.data.conversation import Message

    def send(self: EndlessHandler) -> None:
        listed = {"data": [{"id": "m"}]}
        self.send(json.dumps(listed if self.path.endswith("models") else answer).encode())

    monkeypatch.setattr(EndlessHandler, "answer", send)
    endpoint = Endpoint(address, True)
    for ask in (
        lambda: endpoint.answer([[Message("user", "a")]], 1),
        lambda: endpoint.texts([[Message("user", "a")]], 1),
    ):
        with pytest.raises(JobError, match=r"http://127\.0\.0\.1"):
            ask()
    assert endpoint.prompt_ids([Message("user", "a")]) is None


def test_a_page_is_never_written_over_an_input(call: Call, tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"a {n}", "completion": "b"} for n in range(4)])
    before = Path(rows).read_bytes()
    common = ["data", rows, "--model", str(tiny_model()), "data.validation=0", "--html"]
    (tmp_path / "link.html").symlink_to(rows)
    for target in (rows, str(tmp_path / "link.html"), str(tmp_path)):
        status, _, err = call(*common, target)
        assert status == 2
        assert f"--html {target}: exists" in err
    assert Path(rows).read_bytes() == before
    for _ in range(2):  # a page of its own is replaced
        assert call(*common, str(tmp_path / "page.html"))[0] == 0


def test_a_page_escapes_what_its_rows_hold() -> None:
    lengths: dict[str, Any] = {"percentiles": {}, "histogram": []}
    counts = dict.fromkeys(
        ("read", "used", "unreadable", "empty", "duplicate", "overlong", "refused", "training", "validation"), 1
    )
    page = data_page(
        "<b>\x1b[2J",
        "base\ud800",
        {
            "format": "text", "files": {}, "rows": counts, "tokens": {"total": 1, "trained": 1, "end_of_turn": 1},
            "lengths": lengths, "packing": {"used": False, "packs": 1, "efficiency": 1.0}, "warnings": ["\x07"],
            "problems": [], "samples": [], "notes": {}, "personal": {}, "overlap": {},
        },
    )  # fmt: skip
    assert "&lt;b&gt;\\x1b[2J" in page
    assert "base\\ud800" in page
    page.encode("utf-8")
