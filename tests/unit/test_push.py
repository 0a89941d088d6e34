"""What a push sends holds no row of the data, no path and no user name, unless its owner asks for the rows."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import veneer
from tests.support.runs import tiny_run, write_rows
from tests.support.tiny import CHATML, FAMILIES, save_tiny_model
from tests.support.vocabularies import family_vocabulary
from veneer.cli.main import main
from veneer.config import RunFolder, UserError
from veneer.model.tuned import find_tuned
from veneer.release.publish.card import renew_card
from veneer.release.publish.push import Parcel, pack
from veneer.release.redact import name_of, without_paths
from veneer.report.certificate_page import certificate_page

SECRET, USER, REPO = "xyzzysecret", "qzuser", "me/tickets"


def chat(question: str, answer: str, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's home with a base, data that is private, and a run: trained, evaluated, merged, certified."""
    folder = tmp_path_factory.mktemp("home") / USER
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        patch.setenv("USER", USER)
        name, settings = FAMILIES["llama"]
        tokenizer = family_vocabulary("llama")
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
        save_tiny_model((name, settings | ids), folder / "base")
        tokenizer.save_pretrained(folder / "base")
        (folder / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
        (folder / "our.jinja").write_text(CHATML.replace("<|im_end|>", "<|eot_id|>").replace("<|im_start|>", "> "))
        rows = [chat(f"{SECRET} {n % 5} says what", f"{SECRET} {n % 3}") for n in range(12)]
        (folder.parent / "guest").mkdir()
        files = [
            write_rows(folder / "rows.jsonl", [*rows, chat("a", "b", role=SECRET)]),
            write_rows(folder.parent / "guest" / "rows.jsonl", [chat("what does the cat say", "the hen")]),
        ]
        held_out = write_rows(folder / "held.jsonl", [chat(f"{SECRET} or {n}", SECRET) for n in range(3)])
        run = tiny_run(
            folder / "base",
            "",
            folder / "runs" / "tickets",
            data={
                "train": files,
                "validation": held_out,
                "bad_rows": "drop",
                "chat_template": str(folder / "our.jinja"),
                "system_prompt": "Route it.",
            },
            train={"max_steps": 2},
        )
        veneer.train(run)
        veneer.evaluate(folder / "runs" / "tickets")
        veneer.merge(str(folder / "runs" / "tickets"), folder / "merged", "float32")
        veneer.certify(str(folder / "merged"), str(folder / "runs" / "tickets"), rows=3)
        yield folder


def content(parcel: Parcel) -> dict[str, bytes]:
    return {name: it if isinstance(it, bytes) else it.read_bytes() for name, it in parcel.contents.items()}


def found(sent: dict[str, bytes], text: str) -> list[str]:
    """The files that hold a text, or are named by it."""
    return [name for name, it in sent.items() if text.encode() in it or text in name]


def hashes(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_the_files_of_the_user_do_hold_what_is_looked_for(home: Path) -> None:
    """What the tests below find nothing of is there to be found."""
    run = home / "runs" / "tickets"
    for file in ("ledger.json", "adapter/ledger.json", "samples.jsonl", "certificate.json", "certificate.html"):
        assert SECRET in (run / file).read_text(), file
    assert USER in (run / "run.yaml").read_text()
    assert USER in (run / "adapter" / "adapter_config.json").read_text()
    assert USER in (home / "merged" / "certificate.json").read_text()
    assert USER in (run / "ledger.json").read_text(), "two files of one name are told apart by their folders"


def test_passport_and_card_name_no_path_and_no_row(home: Path) -> None:
    adapter = home / "runs" / "tickets" / "adapter"
    for file in ("passport.json", "README.md"):
        text = (adapter / file).read_text()
        for told in (SECRET, USER, str(home.parent)):
            assert told not in text, (file, told)
    passport = json.loads((adapter / "passport.json").read_text())
    assert passport["settings"]["model"]["base"] == passport["base"]["name"] == "base"
    assert passport["settings"]["data"]["train"] == ["rows.jsonl", "rows.jsonl"]
    assert passport["settings"]["data"]["validation"] == "held.jsonl"
    assert passport["settings"]["data"]["chat_template"] == "our.jinja"
    assert passport["settings"]["train"]["output_dir"] == "tickets"
    assert len(passport["base"]["weights_sampled_sha256"]) == 64


@pytest.mark.parametrize("what", ["runs/tickets", "runs/tickets/adapter", "merged"])
def test_a_push_sends_no_row_no_path_and_no_name(
    what: str, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sent: dict[str, bytes] = {}

    class Hub:
        """A hub that takes all it is given."""

        def create_repo(self, repo: str, private: bool, exist_ok: bool) -> None:
            assert (repo, private) == (REPO, True)

        def create_commit(self, repo: str, operations: list[Any], commit_message: str) -> str:
            for operation in operations:
                with operation.as_file() as file:
                    sent[operation.path_in_repo] = file.read()
            return f"https://hub/{repo}"

    before = hashes(home)
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    with pytest.raises(SystemExit) as caught:
        main(["push", str(home / what), "--repo", REPO, "--json"])
    told = json.loads(capfd.readouterr().out)
    assert (caught.value.code, told["sent"], told["address"]) == (0, True, f"https://hub/{REPO}")
    assert {name: len(it) for name, it in sent.items()} == told["files"]
    for text in (SECRET, USER, str(home.parent)):
        assert found(sent, text) == [], text
    assert not any("home folder" in warning for warning in told["warnings"])
    assert hashes(home) == before, "the user's own files are as they were"
    kept = {"merged": {"model.safetensors", "merge.json", "certificate.json", "certificate.html"}}
    assert set(sent) >= kept.get(what, {"adapter_model.safetensors", "passport.json", "ledger.json", "README.md"})


def test_counts_and_verdicts_travel_with_a_fingerprint_of_the_whole(home: Path) -> None:
    run = home / "runs" / "tickets"
    sent = content(pack(str(run), REPO, True, page=certificate_page))
    whole, ledger = json.loads((run / "adapter" / "ledger.json").read_text()), json.loads(sent["ledger.json"])
    assert list(ledger["files"]) == ["rows.jsonl", "rows.jsonl (2)", "held.jsonl"]
    for key in ("rows", "tokens", "sha256", "lengths", "notes"):
        assert ledger[key] == whole[key]
    assert [(row["place"], row["fate"]) for row in ledger["problems"]] == [("rows.jsonl:13", "refused")]
    digest = hashlib.sha256((run / "adapter" / "ledger.json").read_bytes()).hexdigest()
    assert ledger["rows_left_out"]["sha256_of_the_whole_file"] == digest
    sent = content(pack(str(home / "merged"), REPO, True, page=certificate_page))
    whole = json.loads((home / "merged" / "certificate.json").read_text())
    certificate = json.loads(sent["certificate.json"])
    assert [(c["id"], c["passed"], c["value"]) for c in certificate["checks"]] == [
        (c["id"], c["passed"], c["value"]) for c in whole["checks"]
    ]
    assert (certificate["artifact"]["name"], certificate["against"]["name"]) == ("merged", "tickets")
    assert certificate["against"]["base"] == "base"
    for row, full in zip(certificate["prompts"], whole["prompts"], strict=True):
        assert row["id"] == full["id"].rpartition("/")[2]
        for key in ("tokens", "mean_kl", "agreement", "adapter_stopped", "artifact_stopped"):
            assert row[key] == full[key]
        assert row["same_answer"] == (full["adapter"] == full["artifact"])
        assert not any(isinstance(value, str) for key, value in row.items() if key not in ("id", "turn"))
    page = sent["certificate.html"].decode()
    assert f"{len(whole['prompts'])} prompts, " in page
    assert ("Passed." in page) == whole["passed"]


def test_what_a_failed_check_quotes_stays_here(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "runs" / "tickets", tmp_path / "tickets")
    run = tmp_path / "tickets"
    for folder in (run, run / "adapter"):
        kept = json.loads((home / "merged" / "certificate.json").read_text())
        kept["checks"][0] |= {"passed": False, "detail": f"the chat template differs: {SECRET!r} in training"}
        kept |= {"passed": False, "first_difference": f"prompt tokens: {SECRET}"}
        (folder / "certificate.json").write_text(json.dumps(kept))
    renew_card(RunFolder(run))
    card = (run / "adapter" / "README.md").read_text()
    assert "**Failed** at: prompt tokens: `merged`" in card
    assert SECRET not in card
    sent = content(pack(str(run), REPO, True))
    assert json.loads(sent["certificate.json"])["first_difference"] == "prompt tokens"
    assert found(sent, SECRET) == []


def test_with_samples_rows_are_sent_and_paths_are_not(home: Path) -> None:
    run = home / "runs" / "tickets"
    parcel = pack(str(run), REPO, True, with_samples=True)
    sent = content(parcel)
    assert sent["samples.jsonl"] == (run / "samples.jsonl").read_bytes()
    assert set(found(sent, SECRET)) == {"samples.jsonl", "ledger.json"}
    assert any("word for word" in warning for warning in parcel.warnings)
    merged = content(pack(str(home / "merged"), REPO, True, with_samples=True, page=certificate_page))
    assert set(found(merged, SECRET)) == {"certificate.json", "certificate.html"}
    whole = json.loads((home / "merged" / "certificate.json").read_text())
    assert [row["prompt"] for row in json.loads(merged["certificate.json"])["prompts"]] == [
        row["prompt"] for row in whole["prompts"]
    ]
    for name, it in (sent | merged).items():
        assert str(home.parent).encode() not in it, name


def test_files_of_earlier_versions_are_sent_without_their_paths(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "runs" / "tickets" / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "passport.json"
    passport = json.loads(path.read_text())
    passport["base"]["name"] = passport["settings"]["model"]["base"] = str(home / "base")
    passport["settings"]["train"]["output_dir"] = str(home / "runs")
    passport["environment"]["platform"] = f"Linux-5.15.0-{USER}-x86_64-with-glibc2.31"
    path.write_text(json.dumps(passport))
    card = tmp_path / "adapter" / "README.md"
    card.write_text(card.read_text().replace("`base`", f"`{home / 'base'}`"))
    (tmp_path / "adapter" / "samples.jsonl").write_text(SECRET)
    assert USER in card.read_text()
    sent = content(pack(str(tmp_path / "adapter"), REPO, True))
    assert found(sent, USER) == found(sent, SECRET) == []
    assert "| base | `base`, " in sent["README.md"].decode()
    own = card.read_text().splitlines()[:-1]  # without the last line it is its owner's
    card.write_text("\n".join(own))
    parcel = pack(str(tmp_path / "adapter"), REPO, True)
    assert content(parcel)["README.md"] == card.read_bytes()
    assert "README.md names your home folder" in parcel.warnings


def test_an_adapter_finds_its_base_here_and_says_what_it_needs_elsewhere(home: Path, tmp_path: Path) -> None:
    run = home / "runs" / "tickets"
    assert find_tuned(str(run / "adapter")).base_folder == home / "base"
    (tmp_path / "pulled").mkdir()
    for name, it in content(pack(str(run), REPO, True)).items():
        (tmp_path / "pulled" / name).write_bytes(it)
    with pytest.raises(UserError, match=r"its base is not here(.|\n)*--base"):
        find_tuned(str(tmp_path / "pulled"))
    tuned = find_tuned(str(tmp_path / "pulled"), base=str(home / "base"))
    assert tuned.base_folder == home / "base"


def test_exported_files_name_no_path(home: Path, tmp_path: Path) -> None:
    run = str(home / "runs" / "tickets")
    veneer.export(run, tmp_path / "lora", adapter_only=True)
    assert "FROM ./base\n" in (tmp_path / "lora" / "Modelfile").read_text()
    files = {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()}
    for text in (SECRET, USER, str(home.parent)):
        assert found(files, text) == []


def test_paths_in_sentences_are_cut_and_all_else_is_left() -> None:
    for text, expected in (
        ("cannot read /home/me/data/rows.jsonl: gone", "cannot read rows.jsonl: gone"),
        ("'/home/me/x y' and ~/a/b.csv, C:\\Users\\me\\c.txt", "'x y' and b.csv, c.txt"),
        ("me/rows.jsonl:12, you/rows.parquet[3] ...", "rows.jsonl:12, rows.parquet[3] ..."),
        ("prompt / completion and/or 3/4, https://a.org/b/c.html", None),
        ("<tool_call></tool_call> 1/2/3", None),
    ):
        assert without_paths(text) == (text if expected is None else expected)
    assert name_of("owner/name") == "owner/name"
    assert name_of("~/models/base/") == "base"
    assert name_of("http://box.example:8000") == "an OpenAI-compatible server"
