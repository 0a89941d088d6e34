"""A run's YAML: defaults, overrides, and every mistake told with its line."""

from pathlib import Path

import pytest
from tools.settings_page import settings_page

from veneer.config import Run, UserError, load_run
from veneer.config.load import to_yaml

SMALLEST = "model: {base: smollm2-135m-instruct}\ndata: {train: tickets.jsonl}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "tickets.yaml"
    path.write_text(text)
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_run(path, overrides)
    return str(caught.value)


def test_the_smallest_file_names_base_and_data(tmp_path: Path) -> None:
    run = load_run(write(tmp_path, SMALLEST))
    assert run.train.output_dir == Path("runs/tickets")
    assert run.quantization is None
    assert run.adapter is not None
    assert run.adapter.target_modules == "all-linear"


def test_numbers_may_be_written_without_a_dot(tmp_path: Path) -> None:
    run = load_run(write(tmp_path, SMALLEST + "train: {learning_rate: 2e-4}\n"))
    assert run.train.learning_rate == 2e-4


def test_overrides_win_and_can_drop_a_section(tmp_path: Path) -> None:
    path = write(tmp_path, SMALLEST + "quantization: {bits: 4}\ntrain: {seed: 1}\n")
    run = load_run(path, ["train.seed=7", "quantization=null", "adapter.target_modules=[q_proj, v_proj]"])
    assert (run.train.seed, run.quantization) == (7, None)
    assert run.adapter is not None
    assert run.adapter.target_modules == ("q_proj", "v_proj")


def test_overrides_of_text_are_taken_as_typed(tmp_path: Path) -> None:
    path = write(tmp_path, SMALLEST)
    run = load_run(path, ["data.train=rows #1.jsonl", "data.system_prompt=Answer: briefly", "model.revision=123"])
    assert (run.data.train, run.data.system_prompt) == ("rows #1.jsonl", "Answer: briefly")
    assert run.model.revision == "123"
    assert load_run(path, ["data.validation=7"]).data.validation == 7
    assert load_run(path, ["data.validation=held out.jsonl"]).data.validation == "held out.jsonl"
    assert load_run(path, ['data.system_prompt="a\\nb"', "model.revision=null"]).data.system_prompt == "a\nb"


def test_text_that_looks_like_a_number_stays_text_in_the_resolved_file(tmp_path: Path) -> None:
    run = load_run(write(tmp_path, SMALLEST), ["model.revision=7e12345"])
    assert load_run(write(tmp_path, to_yaml(run))).model.revision == "7e12345"


def test_the_resolved_file_reads_back_equal(tmp_path: Path) -> None:
    run = load_run(write(tmp_path, SMALLEST + "quantization: {}\nadapter: {target_modules: [q_proj]}\n"))
    assert load_run(write(tmp_path, to_yaml(run))) == run


def test_all_mistakes_are_told_at_once_with_their_lines(tmp_path: Path) -> None:
    text = (
        "model:\n  base: x\n  dtyp: float32\ndata:\n  train: t.jsonl\n  packing: perhaps\n"
        "quantization:\n  bits: 3\ntrain:\n  learning_rate: -1\n"
    )
    told = message(write(tmp_path, text))
    assert "4 mistakes" in told
    assert "tickets.yaml:3: unknown key `model.dtyp`; did you mean `dtype`?" in told
    assert "tickets.yaml:6: data.packing = 'perhaps'" in told
    assert "tickets.yaml:8: quantization.bits = 3: should be 4; fix: write `bits: 4`" in told
    assert "tickets.yaml:10: train.learning_rate = -1: should be greater than 0" in told


def test_a_key_in_the_wrong_section_is_sent_to_its_own(tmp_path: Path) -> None:
    told = message(write(tmp_path, SMALLEST + "train: {r: 8}\n"))
    assert "unknown key `train.r`; it belongs in the section `adapter`" in told


def test_a_missing_section_and_a_missing_key_are_named(tmp_path: Path) -> None:
    told = message(write(tmp_path, "model: {dtype: float32}\n"))
    assert "tickets.yaml:1: `model.base` is missing" in told
    assert "`data` is missing" in told


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the file is empty"),
        ("model: \x00\n", "not valid YAML"),
        ("- a\n", "a run is a mapping of sections"),
        ("model: {base: [}\n", "tickets.yaml:1: not valid YAML"),
        ("model: {base: a}\nmodel: {base: b}\n", "tickets.yaml:2: `model` is set twice (first at"),
        (SMALLEST + "train: 3\n", "train = 3: should be a section"),
        (SMALLEST + "lora: {r: 8}\n", "tickets.yaml:3: unknown key `lora`"),
        (SMALLEST + "adapter: {target_modules: all}\n", "fix: write `all-linear` or a list"),
        (SMALLEST + "adapter: {lora_dropout: 1.0}\n", "should be less than 1"),
        (SMALLEST + "train: {learning_rate: .nan}\n", "train.learning_rate = nan: should be a finite number"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in message(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "no such file" in message(tmp_path / "none.yaml")


def test_a_wrong_override_says_that_it_is_one(tmp_path: Path) -> None:
    path = write(tmp_path, SMALLEST)
    assert "override `train.sed=1`: unknown key `train.sed`; did you mean `seed`?" in message(path, "train.sed=1")
    assert "not of the form section.key=value" in message(path, "seed")


def test_a_run_is_frozen() -> None:
    run = Run.model_validate({"model": {"base": "x"}, "data": {"train": "y"}})
    with pytest.raises(ValueError, match="frozen"):
        run.train.seed = 1  # type: ignore[misc]


def test_the_page_of_settings_is_what_the_settings_are() -> None:
    page = Path(__file__).parents[2] / "docs" / "settings.md"
    assert page.read_text() == settings_page(), "run `make docs`"
