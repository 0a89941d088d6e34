"""Answers of runs, checkpoints and adapters: how tokens are chosen, where an answer stops, its text as it grows."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from tests.support.runs import tiny_run, write_rows
from tests.support.tiny import tiny_tokenizer
from veneer.config import RunFolder, UserError
from veneer.config.names import find_adapter
from veneer.config.prompts import Question, read_prompts
from veneer.config.sampling import Sampling
from veneer.evaluation.decoding import StopAtText, TextStream, answer_text
from veneer.model.tuned import find_tuned

QUESTION = "what does the owl say please please"  # the third row; its answer is owlowlowl


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """The folder of a run that knows its sixteen rows by heart, with a checkpoint of its last step."""
    folder = tmp_path_factory.mktemp("known")
    animals = ["cat", "dog", "owl", "hen"]
    rows = [
        {
            "prompt": f"what does the {animals[n % 4]} say" + " please" * (n % 5),
            "completion": animals[n % 4] * (1 + n % 3),
        }
        for n in range(16)
    ]
    settings = tiny_run(
        tiny_model(),
        write_rows(folder / "rows.jsonl", rows),
        folder / "run",
        train={"max_steps": 120, "per_device_train_batch_size": 8},
        adapter={"r": 16, "lora_alpha": 32},
        data={"system_prompt": "the hen"},
    )
    veneer.train(settings)
    return folder / "run"


def answer(name: Path | str, **given: Any) -> str:
    (found,) = veneer.generate(str(name), [QUESTION], max_new_tokens=12, **given)
    return str(found["answer"])


def test_runs_checkpoints_and_adapters_answer_alike(run: Path, tmp_path: Path) -> None:
    assert answer(run) == "owlowlowl"
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert answer(checkpoint) == "owlowlowl"
    assert answer(run / "adapter") == "owlowlowl"
    # An adapter from elsewhere: PEFT's two files, and the base's own tokenizer.
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / "adapter" / name, plain)
    assert answer(plain, system="the hen") == "owlowlowl"
    base = json.loads((plain / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert answer(base) != "owlowlowl"
    (plain / "adapter_config.json").write_text(
        (plain / "adapter_config.json").read_text().replace(json.dumps(base), "null")
    )
    with pytest.raises(UserError, match="names a base"):
        answer(plain)
    assert answer(plain, system="the hen", base=base) == "owlowlowl"
    (both,) = veneer.generate(str(plain), [QUESTION], base=base, compare_with_base=True, max_new_tokens=12)
    assert both["base"] != "owlowlowl"


def test_a_loaded_model_is_called_again_and_again(run: Path) -> None:
    model = veneer.load(str(run))
    assert model(QUESTION, max_new_tokens=12) == "owlowlowl"
    asked: list[Question] = [QUESTION, [{"role": "user", "content": "what does the cat say"}]]
    assert model.generate(asked, max_new_tokens=12) == ["owlowlowl", "cat"]
    short = veneer.Sampling(stop=("lo",))
    assert model.generate(asked, max_new_tokens=12, sampling=short) == ["ow", "cat"]
    with model.model.disable_adapter():
        assert model(QUESTION, "the hen", max_new_tokens=12) != "owlowlowl"
    assert model.tuned is not None
    plain = veneer.load(model.tuned.model.base)
    assert plain.tuned is None
    assert plain(QUESTION, max_new_tokens=12) != "owlowlowl"


def test_a_checkpoint_is_of_its_run_and_renders_as_it_did(run: Path) -> None:
    (checkpoint,) = (run / "checkpoints").iterdir()
    tuned = find_tuned(str(checkpoint))
    assert tuned.is_checkpoint
    assert not find_tuned(str(run)).is_checkpoint
    assert tuned.run is not None
    for name in (checkpoint, run, run / "adapter"):
        assert find_tuned(str(name)).renderer.settings.system_prompt == "the hen"


def test_a_checkpoint_is_merged_and_its_proof_is_none_of_its_runs(run: Path, tmp_path: Path) -> None:
    (checkpoint,) = (run / "checkpoints").iterdir()
    veneer.merge(str(checkpoint), tmp_path / "merged", dtype="float32")
    certificate, folder = veneer.certify(str(tmp_path / "merged"), str(checkpoint), rows=0)
    assert certificate.passed
    assert folder == tmp_path / "merged"
    assert not (run / "certificate.json").exists()


def test_a_run_without_an_adapter_names_its_checkpoint(run: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    shutil.copytree(run, begun, ignore=shutil.ignore_patterns("adapter"))
    with pytest.raises(UserError, match=r"has no adapter yet\n.*name a checkpoint: .*step-000120"):
        find_adapter(str(begun))
    found = find_adapter(str(begun / "checkpoints" / "step-000120"))
    assert found is not None
    assert found.run == RunFolder(begun)


def test_each_way_of_sampling_has_its_effect(run: Path) -> None:
    hot = {"temperature": 50.0}
    assert answer(run, **hot) != "owlowlowl"
    assert answer(run, **hot) == answer(run, **hot)
    assert answer(run, **hot) != answer(run, **hot, seed=7)
    assert answer(run, **hot, top_k=1) == "owlowlowl"
    assert answer(run, **hot, top_p=1e-6) == "owlowlowl"
    assert answer(run, repetition_penalty=50.0) != "owlowlowl"


def test_an_answer_ends_before_a_stop_text(run: Path) -> None:
    assert answer(run, stop=["lo"]) == "ow"  # begins and ends within tokens
    assert answer(run, stop=["zebra"]) == "owlowlowl"
    assert answer(run, stop=["wlowl", "lowlo"]) == "o"
    # A row that is done waits for the others.
    answers = veneer.generate(str(run), [QUESTION, "what does the cat say"], max_new_tokens=12, stop=["lo"])
    assert [found["answer"] for found in answers] == ["ow", "cat"]


@pytest.mark.parametrize("stop", [(), ("lo",), ("wlowl",), ("owlx", "l x")])
def test_the_text_as_it_grows_is_the_answer(run: Path, stop: tuple[str, ...]) -> None:
    pieces: list[str] = []
    assert answer(run, stop=stop, on_text=pieces.append) == "".join(pieces)
    assert all(pieces)
    with pytest.raises(UserError, match="give a single prompt"):
        veneer.generate(str(run), ["a", "b"], on_text=pieces.append)


def streamed(text: str, *stop: str) -> tuple[list[str], str]:
    """The pieces of a text that comes token by token, and the whole answer."""
    tokenizer, pieces = tiny_tokenizer(), list[str]()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer, stop, pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    return pieces, answer_text(tokenizer, ids, stop)


def test_nothing_that_was_shown_is_taken_back() -> None:
    pieces, whole = streamed(" naïve 猫 🦉 \n\n the end \n")
    assert "".join(pieces) == whole == "naïve 猫 🦉 \n\n the end"
    assert len(pieces) > 5
    assert not any("\ufffd" in piece for piece in pieces)
    pieces, whole = streamed("a STO b STOP c", "STOP")
    assert "".join(pieces) == whole == "a STO b"
    assert streamed("half 猫"[:-1] + "\ufffd")[1] == "half \ufffd"


def test_a_stop_text_is_found_whatever_stands_before_it() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("猫" * 40 + " so STOP", add_special_tokens=False)["input_ids"]
    criterion = StopAtText(tokenizer, ("STOP",), start=0)
    assert criterion(torch.tensor([ids, [5, *ids[:-1]]]), None).tolist() == [True, False]
    # The prompt may hold it.
    assert StopAtText(tokenizer, ("STOP",), start=len(ids))(torch.tensor([[*ids, 5]]), None).tolist() == [False]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"temperature": -0.1}, "--temperature -0.1: should be 0 or more"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p 0.0: should be more than 0 and at most 1"),
        ({"temperature": 1.0, "top_p": 1.1}, "--top-p 1.1"),
        ({"temperature": 1.0, "top_k": -1}, "--top-k -1"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty 0.0"),
        ({"repetition_penalty": float("inf")}, "--repetition-penalty inf"),
        ({"seed": -1}, "--seed -1"),
        ({"stop": ("",)}, "an empty text would end every answer at once"),
        ({"top_p": 0.9}, "at temperature 0 nothing is sampled"),
        ({"top_k": 5}, "at temperature 0 nothing is sampled"),
    ],
)
def test_values_out_of_range_are_refused(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected.replace("(", r"\(")):
        Sampling(**given)


def test_a_file_of_prompts(tmp_path: Path) -> None:
    plain = tmp_path / "prompts.txt"
    plain.write_text("where is my order?\n\n  and my refund? \n", encoding="utf-8-sig")
    assert read_prompts(plain) == ["where is my order?", "and my refund?"]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    rows = tmp_path / "prompts.jsonl"
    write_rows(rows, [{"prompt": "a\nb"}, {"messages": turns, "id": 7}, {"prompt": turns}])
    assert read_prompts(rows) == ["a\nb", turns, turns]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("hello", "prompts.jsonl:1: not JSON"),
        ("3", "either `prompt` or `messages`"),
        ('{"text": "a"}', "either `prompt` or `messages`"),
        ('{"prompt": "a", "messages": []}', "either `prompt` or `messages`"),
        ('{"prompt": " "}', "`prompt` holds no text"),
        ('{"messages": "a"}', "`messages` holds no text"),
        ('{"messages": [{"role": "user"}]}', "`messages` holds no text"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "nothing is left to answer"),
        ("\n", "holds no prompt"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match=expected):
        read_prompts(path)


def test_a_file_of_prompts_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"\xff")
    for path in (tmp_path / "prompts.txt", tmp_path, tmp_path / "missing", Path("/dev/zero")):
        with pytest.raises(UserError, match=rf"{path}: (.|\n)*name a file"):
            read_prompts(path)


def test_a_conversation_is_answered_with_its_own_system_prompt(run: Path) -> None:
    asked = [{"role": "system", "content": "the hen"}, {"role": "user", "content": QUESTION}]
    (found,) = veneer.generate(str(run), [asked], system="the dog", max_new_tokens=12)
    assert found["answer"] == "owlowlowl"
    with pytest.raises(UserError, match="prompt: "):
        veneer.generate(str(run), [[{"role": "nobody", "content": "a"}]])
