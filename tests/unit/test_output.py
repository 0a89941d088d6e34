"""What a person sees: no control codes in a log file, no line beyond 80 columns on a terminal, no noise."""

import io
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tests.support.runs import write_rows
from veneer.cli import show, show_plan
from veneer.cli.progress import Answering, LiveProgress, Status, answer_progress, byte_progress, clock

Call = Callable[..., tuple[int, str, str]]
STEP = {"kind": "train", "loss": 1.5, "tokens_per_second": 123456.0, "peak_bytes": 79 * 2**30}


def console(width: int, is_terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, width=width, force_terminal=is_terminal, highlight=False, soft_wrap=True), file


def lines(text: str) -> list[str]:
    """What stood on the lines of a terminal, each state of a line that redraws itself by itself."""
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    return [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


def train(progress: LiveProgress, steps: int) -> None:
    with progress:
        for step in range(1, steps + 1):
            progress(STEP | {"step": step})
        progress({"kind": "eval", "step": steps, "loss": 1.25})


def test_training_in_a_log_file_is_ten_lines_without_control_codes() -> None:
    out, file = console(80, is_terminal=False)
    train(LiveProgress(out, 100, step_seconds=30.0), 100)
    told = file.getvalue()
    assert "\x1b" not in told
    assert "\r" not in told
    first, *steps, last = told.splitlines()
    assert first == "  100 steps to train, about 50:00 as predicted"
    assert [line.split(":")[0].strip() for line in steps] == [f"step {n}" for n in range(10, 101, 10)]
    assert all(" left" in line for line in steps[:-1])
    assert last == "  step 100: held-out loss 1.2500"


def test_a_step_on_pairs_tells_their_margin_and_the_share_that_is_right() -> None:
    out, file = console(120, is_terminal=False)
    with LiveProgress(out, 1) as progress:
        progress(STEP | {"step": 1, "rewards/margins": 0.1234, "rewards/accuracies": 0.75})
    assert "  margin 0.123  right 75%  " in file.getvalue()


def test_slow_steps_are_told_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    out, file = console(80, is_terminal=False)
    with LiveProgress(out, 1000) as progress:
        for step in range(1, 4):
            now[0] += 61
            progress(STEP | {"step": step})
    told = file.getvalue().splitlines()
    assert len(told) == 4
    assert told[1].endswith("16:55:39 left")  # 999 x 61 s


@pytest.mark.parametrize("width", [80, 120])
def test_training_stays_within_the_terminal(width: int) -> None:
    out, file = console(width, is_terminal=True)
    with LiveProgress(out, 12000, step_seconds=30.0) as progress:
        progress._progress.refresh()
        drawn = lines(file.getvalue())
        assert any("first step" in line and "of about 100:00:00 predicted" in line for line in drawn)
        progress(STEP | {"step": 11000})
        progress._progress.refresh()
    drawn = lines(file.getvalue())
    assert any("11000/12000 loss 1.5000  123,456 tok/s  79.00 GiB" in line and " left" in line for line in drawn)
    assert max(map(len, drawn)) <= width


def test_bars_and_states_are_not_drawn_into_a_file(capfd: pytest.CaptureFixture[str]) -> None:
    out, file = console(80, is_terminal=False)
    with answer_progress(out, 4, "answering") as move, byte_progress(out, "merging") as move_bytes:
        move(2)
        move_bytes(2)
    with Status(out, "loading") as status:
        status.update("checking")
    assert file.getvalue() == ""
    assert capfd.readouterr() == ("", "")


def test_a_long_state_is_told_once_a_minute(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    out, _ = console(80, is_terminal=False)
    with Status(out, "answering") as status:
        for answers in range(20):
            now[0] += 10
            status.update(f"{answers} answers")
    plain, told = capfd.readouterr()
    assert plain == ""  # results alone stand there
    assert told.splitlines() == ["  5 answers, 1:00", "  11 answers, 2:00", "  17 answers, 3:00"]


def test_a_state_shows_the_time_it_takes() -> None:
    out, file = console(80, is_terminal=True)
    with Status(out, "loading [base]") as status:
        status._progress.refresh()
    assert any("loading [base] 0:00:00" in line for line in lines(file.getvalue()))


def test_rows_that_are_answered_after_a_task_are_counted_anew() -> None:
    said: list[str] = []
    told = Answering(SimpleNamespace(update=said.append))  # type: ignore[arg-type]
    told.begin_task("gsm8k, base", 2)
    told.add(2)
    told.begin(4)
    told.add(1)
    assert said[0].startswith("gsm8k, base: 2 of 2 answers")
    assert said[1].startswith("1 of 4 answers")


def test_long_sentences_are_wrapped_on_a_terminal_alone() -> None:
    sentence = "  [yellow]warning:[/yellow] " + "a word and another " * 12
    out, file = console(80, is_terminal=True)
    show.say(out, sentence, 4)
    drawn = lines(file.getvalue())
    assert len(drawn) > 2
    assert max(map(len, drawn)) <= 80
    assert all(line.startswith("    ") for line in drawn[1:])
    out, file = console(80, is_terminal=False)
    show.say(out, sentence, 4)
    assert len(file.getvalue().splitlines()) == 1


def test_methods_stand_side_by_side_in_80_columns_with_whole_names() -> None:
    sizes = ("16GiB", "24GiB", "48GiB", "80GiB")
    found = {
        "peak_bytes": 2**30,
        "fits": dict.fromkeys(sizes, True),
        "largest": dict.fromkeys(sizes, "meta-llama/Llama-3.1-70B"),
        "longest_row": 131072,
        "smallest_card": "rtx 4060 ti 16gb",
    }
    methods = dict.fromkeys(("full", "lora"), found) | {"qlora": found | {"longest_row": 0, "smallest_card": None}}
    compared = {"base": "x", "max_length": 2048, "r": 16, "target": "NVIDIA H100, 78.5 of 79.6 GiB free"}
    for is_terminal in (True, False):
        out, file = console(80, is_terminal)
        show_plan.show_comparison(out, compared | {"methods": methods})
        assert file.getvalue().count("Llama-3.1-70B") == 12
        shown = [" ".join(line.split()) for line in lines(file.getvalue())]
        assert "longest row 131,072 131,072 -" in shown
        assert "smallest card rtx 4060 ti 16gb rtx 4060 ti 16gb -" in shown
        assert "the plan: NVIDIA H100, 78.5 of 79.6 GiB free" in " ".join(shown)
        assert max(map(len, lines(file.getvalue()))) <= 80


def test_bases_that_stream_their_weights_are_marked() -> None:
    model = {"base": "Qwen/Qwen2.5-7B", "parameters": 7.6e9, "peak_bytes": {"qlora": 9 * 2**30}, "best": "qlora"}
    streamed = model | {"streamed_bytes": {"qlora": 3 * 2**30}}
    out, file = console(80, is_terminal=False)
    trains = [model | {"streamed": [], "streamed_bytes": {}}, streamed | {"streamed": ["qlora"]}]
    show_plan._show_bases(out, {"budget_bytes": 4 * 2**30, "trains": trains})
    shown = [" ".join(line.split()).replace(" │ ", " ") for line in lines(file.getvalue())]
    rows = [line for line in shown if "Qwen2.5-7B" in line]
    assert ["streamed" in row for row in rows] == [False, True]
    assert "9.00 GiB" in rows[0]
    assert "3.00 GiB streamed" in rows[1]


def test_training_that_fits_where_answers_do_not_is_said() -> None:
    out, file = console(80, is_terminal=False)
    peaks = {"backward": {"bytes": 3 * 2**30}, "generation": {"bytes": 6 * 2**30}}
    plan = {"verdict": "does not fit", "peak_bytes": 6 * 2**30, "budget_bytes": 4 * 2**30, "phases": peaks}
    show_plan.show_verdict(out, plan | {"margin_bytes": -2 * 2**30})
    assert "training fits, with 3.00 GiB" in file.getvalue()
    peaks["backward"]["bytes"] = 5 * 2**30
    out, file = console(80, is_terminal=False)
    show_plan.show_verdict(out, plan | {"margin_bytes": -2 * 2**30})
    assert "training fits" not in file.getvalue()


def test_times_are_clocks() -> None:
    assert [clock(seconds) for seconds in (0, 59.6, 61, 3600, 360000)] == [
        "0:00",
        "1:00",
        "1:01",
        "1:00:00",
        "100:00:00",
    ]


def test_the_command_is_called_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/veneer/__main__.py"])
    assert show.command_name() == "python -m veneer"


def test_libraries_are_silent(
    call: Call, tiny_model: Callable[..., Path], tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    """GPT-2's pad token is its end token, of which Transformers warns in every forward pass without a mask."""
    from transformers.utils import logging as transformers_logging

    once = transformers_logging.warning_once
    once.cache_clear()  # it may have been said in another test
    data, run = write_rows(tmp_path / "rows.jsonl", rows), str(tmp_path / "run")
    quick = ("train.max_steps=1", "data.max_length=128", "train.gradient_checkpointing=true", "quantization={bits: 4}")
    commands = (
        ("train", "--model", str(tiny_model("gpt2")), "--data", data, "-o", run, "evaluate.max_new_tokens=4", *quick),
        ("evaluate", run, "--rows", "1"),
        ("generate", run, "-p", "the cat", "--max-new-tokens", "3", "--temperature", "1", "--top-p", "0.5"),
        ("merge", run, "--out", str(tmp_path / "merged"), "--rows", "1"),
    )
    for arguments in commands:
        _, out, err = call(*arguments)
        assert err == "", arguments[0]
        assert "\x1b" not in out
        assert out.strip()


def test_a_warning_is_a_sentence_without_code(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back afterwards
    assert call("--version")[0] == 0
    told = warnings.formatwarning(RuntimeWarning("fewer rows at a time"), RuntimeWarning, "memory.py", 7)
    assert told == "warning: fewer rows at a time\n"


@pytest.mark.parametrize("name", ["transformers.modeling_utils", "bitsandbytes.backends.cpu.ops"])
def test_errors_of_libraries_are_not_silenced(name: str) -> None:
    assert not logging.getLogger(name).isEnabledFor(logging.WARNING)
    assert logging.getLogger(name).isEnabledFor(logging.ERROR)
