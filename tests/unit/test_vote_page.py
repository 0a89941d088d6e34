"""The page on which a person votes blindly: it tells nothing, loads nothing, and its votes come back as a win rate."""

import base64
import hashlib
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.support.judge_server import answers_folder

Call = Callable[..., tuple[int, str, str]]
HOSTILE = "</script><script>alert(1)</script><img src=http://example.org/a> \x1b[2J \u202e {{ 7 * 7 }}"
PAIRS = [(f"old {n}", f"new {n} {'and more ' * (n % 3)}") for n in range(30)] + [("same", "same")] * 10
NODE = shutil.which("node")
# A document of the elements that the script asks for, a store, and a link that says what it would save.
BROWSER = """
const elements = {}, kept = {}, saved = [], listeners = [];
const made = (dataset = {}) => ({ dataset, setAttribute() {}, click() { saved.push(this.href); } });
const buttons = ["left", "right", "tie", "skip"].map((vote) => made({ vote }));
globalThis.document = {
  getElementById: (id) => (elements[id] ??= made()),
  querySelectorAll: () => buttons,
  createElement: () => made(),
  addEventListener: (name, listener) => listeners.push(listener),
};
globalThis.window = { scrollTo() {} };
globalThis.localStorage = { getItem: (key) => kept[key] ?? null, setItem: (key, text) => { kept[key] = text; } };
globalThis.Blob = class { constructor(parts) { this.text = parts.join(""); } };
globalThis.URL = { createObjectURL: (blob) => blob.text, revokeObjectURL() {} };
const press = (key) => listeners.forEach((listener) => listener({ key, preventDefault() {} }));
elements.data = { textContent: DATA };
"""


class Page(HTMLParser):
    """What stands in a page: scripts by their type, and all attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: dict[str, str] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self._kind: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._kind = dict(attrs).get("type") or "code" if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        self._kind = None

    def handle_data(self, data: str) -> None:
        if self._kind is not None:
            self.scripts[self._kind] = self.scripts.get(self._kind, "") + data

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts["application/json"])
        return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return answers_folder(tmp_path / "run", PAIRS)


def page_of(call: Call, run: Path, *given: str) -> Page:
    path = run.parent / "vote.html"
    status, out, err = call("judge", str(run), "--page", str(path), *given)
    assert (status, err) == (0, "")
    assert f"{path}: " in out
    return Page(path.read_text())


def votes_file(run: Path, page: Page, votes: dict[str, str]) -> str:
    path = run.parent / "votes.json"
    path.write_text(json.dumps({"ballot": page.data["ballot"], "votes": votes}))
    return str(path)


def side_of(pair: dict[str, str], word: str) -> str:
    return "left" if pair["left"].startswith(word) else "right"


def test_a_page_loads_nothing_and_runs_its_own_script_alone(call: Call, tmp_path: Path) -> None:
    run = answers_folder(tmp_path / "<b>run", [(HOSTILE, "a"), ("b", HOSTILE)])
    page = page_of(call, run, "--criterion", "<i>brief")
    assert set(page.scripts) == {"application/json", "code"}
    assert not [one for one in page.attributes if one[1] in ("src", "href", "action") or one[1].startswith("on")]
    (policy,) = [value for _, name, value in page.attributes if name == "content" and "default-src" in value]
    hashed = base64.b64encode(hashlib.sha256(page.scripts["code"].encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{hashed}'" in policy
    texts = {text for pair in page.data["pairs"] for text in (pair["left"], pair["right"])}
    assert HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e") in texts
    assert "&lt;i&gt;brief" in (tmp_path / "vote.html").read_text()
    assert not re.search(r"innerHTML|fetch|XMLHttp|eval|import", page.scripts["code"])


def test_a_page_does_not_say_which_answer_is_whose(call: Call, run: Path) -> None:
    data = page_of(call, run).data
    assert len(data["pairs"]) == 30
    assert {key for pair in data["pairs"] for key in pair} == {"id", "prompt", "left", "right"}
    sides = [side_of(pair, "new") for pair in data["pairs"]]
    assert 8 <= sides.count("left") <= 22
    prompts = [int(pair["prompt"].split()[-1]) for pair in data["pairs"]]
    assert prompts != sorted(prompts)
    assert {int(pair["id"], 16) & 1 for pair in data["pairs"] if side_of(pair, "new") == "left"} == {0, 1}
    assert page_of(call, run).data == data
    other = page_of(call, run, "--seed", "1").data
    assert other["ballot"] != data["ballot"]
    assert [side_of(pair, "new") for pair in sorted(other["pairs"], key=lambda pair: pair["prompt"])] != [
        side_of(pair, "new") for pair in sorted(data["pairs"], key=lambda pair: pair["prompt"])
    ]


def test_votes_come_back_as_a_win_rate(call: Call, run: Path) -> None:
    page = page_of(call, run, "--seed", "7")
    votes = {pair["id"]: side_of(pair, "new") for pair in page.data["pairs"]}
    first, second, third, *_ = votes
    votes |= {first: "tie", second: "skip", third: "left" if votes[third] == "right" else "right"}
    file = votes_file(run, page, votes)
    status, out, _ = call("judge", str(run), "--votes", file, "--seed", "7", "--json")
    result = json.loads(out)
    assert status == 0
    assert (result["wins"], result["ties"], result["losses"], result["skipped"]) == (27, 11, 1, 1)
    assert result["verdict"] == "better"
    assert result["by"] == "a person"
    assert json.loads(Path(result["file"]).read_text()) == result
    assert "27 won, 11 tied, 1 lost" in call("judge", str(run), "--votes", file, "--seed", "7")[1]


def test_equal_answers_do_not_outweigh_a_vote_that_ended_early(call: Call, run: Path) -> None:
    page = page_of(call, run)
    votes = {pair["id"]: side_of(pair, "new") for pair in page.data["pairs"][:12]}
    result = json.loads(call("judge", str(run), "--votes", votes_file(run, page, votes), "--json")[1])
    assert (result["wins"], result["losses"], result["open"]) == (12, 0, 18)
    assert 0 < result["ties"] < 10


@pytest.mark.parametrize(
    ("change", "given", "told"),
    [
        (lambda found: found | {"ballot": "other"}, (), "on other answers"),
        (lambda found: found, ("--seed", "1"), "with another seed than 1"),
        (lambda found: found, ("--rows", "12"), "on other answers"),
        (lambda found: {"votes": {}}, (), "it lacks `ballot`"),
        (lambda found: found | {"votes": {"a": "left"}}, (), "pairs that the page does not hold"),
        (lambda found: found | {"votes": ["left"]}, (), "pairs that the page does not hold"),
        (lambda found: found | {"votes": dict.fromkeys(found["votes"], "both")}, (), 'is "both"'),
        (lambda found: found | {"votes": {key: ["left"] for key in found["votes"]}}, (), 'is ["left"]'),
        (lambda found: found | {"votes": {}}, (), "a win rate needs two"),
    ],
)
def test_votes_that_are_none_are_refused(
    call: Call, run: Path, change: Callable[[dict[str, Any]], Any], given: tuple[str, ...], told: str
) -> None:
    page = page_of(call, run)
    path = Path(votes_file(run, page, {pair["id"]: "left" for pair in page.data["pairs"]}))
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    status, _, err = call("judge", str(run), "--votes", str(path), *given)
    assert status == 2
    assert told in err


def test_votes_on_answers_that_were_made_anew_are_refused(call: Call, run: Path) -> None:
    file = votes_file(run, page_of(call, run), {})
    (run / "samples.jsonl").write_text((run / "samples.jsonl").read_text().replace("old 3", "older 3"))
    status, _, err = call("judge", str(run), "--votes", file)
    assert status == 2
    assert "make a new page" in err


def test_the_next_command_can_be_pasted(call: Call, tmp_path: Path) -> None:
    run = answers_folder(tmp_path / "my runs" / "run", PAIRS)
    samples = shutil.copy(run / "samples.jsonl", run / "other samples.jsonl")
    out = call("judge", str(run), "--page", str(tmp_path / "vote.html"), "--samples", str(samples))[1]
    words = shlex.split(out.partition("next   ")[2])
    assert words[-5:] == [str(run), "--samples", str(samples), "--votes", "FILE.json"]


def test_a_page_is_not_written_over_another_file(call: Call, run: Path) -> None:
    before = (run / "samples.jsonl").read_bytes()
    assert call("judge", str(run), "--page", str(run / "samples.jsonl"))[0] == 2
    assert (run / "samples.jsonl").read_bytes() == before


def test_pairs_that_are_all_equal_are_no_page(call: Call, tmp_path: Path) -> None:
    run = answers_folder(tmp_path / "run", [("same", "same")] * 3)
    status, _, err = call("judge", str(run), "--page", str(tmp_path / "vote.html"))
    assert status == 2
    assert "the same text on all 3 rows" in err


@pytest.mark.skipif(NODE is None, reason="runs the page's script, which needs node")
def test_the_script_keeps_votes_and_saves_what_the_command_reads(call: Call, run: Path) -> None:
    page = page_of(call, run)
    script = page.scripts["code"]
    data = json.dumps(page.scripts["application/json"])
    keys = ["ArrowLeft", "2", "T", "s", "1", "Backspace", "ArrowRight"]
    steps = f"{json.dumps(keys)}.forEach(press);\n" + "elements.save.onclick();\nconsole.log(saved[0]);\n"
    again = "console.log(elements.count.textContent);"
    program = BROWSER.replace("DATA", data) + script + steps + again
    assert NODE is not None
    done = subprocess.run([NODE, "-"], input=program, capture_output=True, text=True, timeout=60, check=True)
    saved, _, count = done.stdout.rstrip().rpartition("\n")
    found = json.loads(saved)
    ids = [pair["id"] for pair in page.data["pairs"]]
    assert found["votes"] == dict(zip(ids, ["left", "right", "tie", "skip", "right"], strict=False))
    assert count == "Pair 6 of 30, 5 voted on"
    (run.parent / "saved.json").write_text(saved)
    result = json.loads(call("judge", str(run), "--votes", str(run.parent / "saved.json"), "--json")[1])
    assert (result["votes"], result["skipped"], result["open"]) == (5, 1, 25)
