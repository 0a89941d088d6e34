"""What ships against what was judged: rows in pairs, tokens beyond rounding, and the base that was trained on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer
from tests.support.certified import certificate, make_base, tickets
from tests.support.runs import losses, tiny_run, write_rows
from veneer.cli.main import main
from veneer.config import UserError
from veneer.data.conversation import Message
from veneer.release.certify.agreement import (
    ENOUGH,
    Measured,
    Noise,
    Tolerance,
    distribution_checks,
    noise_between,
)
from veneer.release.certify.prompts import Prompt
from veneer.release.certify.runtimes import Answer
from veneer.release.certify.verdict import verdict_of


def answers(text: list[str]) -> list[Answer]:
    return [Answer(each, None, True, []) for each in text]


def rows(count: int) -> list[Prompt]:
    return [Prompt(f"row {n}", (Message("user", "q"),), [1], "yes") for n in range(count)]


def test_rows_that_turn_are_counted_each_way_and_a_worse_model_fails() -> None:
    prompts = rows(120)
    judged = answers(["yes"] * 83 + ["no"] * 37)
    shipped = answers(["no"] * 20 + ["yes"] * 72 + ["perhaps"] * 28)
    verdict = verdict_of(prompts, judged, shipped, "samples.jsonl")
    assert verdict is not None
    found = verdict.as_dict()
    assert (found["wrong_to_right"], found["right_to_wrong"], found["rows"]) == (9, 20, 120)
    assert (found["verdict"], found["same_answers"]) == ("worse", 63)
    check = verdict.check()
    assert not check.passed
    assert (check.value, check.limit) == ("60.0% (72 of 120)", "not worse than 69.2% (83 of 120)")
    assert check.detail.startswith("worse: -9.2 points (-18.2 to -0.4), 9 from wrong to right, 20 from right to wrong")
    turned = verdict.turns()
    assert [turned.count(what) for what in ("right to wrong", "wrong to right")] == [20, 9]


def test_answers_that_are_json_are_right_by_their_values_as_in_evaluation() -> None:
    prompts = [Prompt(f"row {n}", (Message("user", "q"),), [1], '{"a": 1, "b": null}') for n in range(4)]
    shipped = answers(['{"b": null, "a": 1}', '{"a": 1, "b": 2}', "{}", '{"a": 1, "b": null}'])
    verdict = verdict_of(prompts, answers(['{"a": 1, "b": null}'] * 4), shipped, "samples.jsonl")
    assert verdict is not None
    assert verdict.turns() == ["still right", "right to wrong", "right to wrong", "still right"]
    assert verdict.same_answers == 1


def test_few_rows_say_what_they_can_show_and_no_right_row_says_so() -> None:
    few = verdict_of(rows(10), answers(["yes"] * 10), answers(["yes"] * 10), "answered again")
    assert few is not None
    assert few.check().passed
    assert few.check().detail.startswith("not shown with 10 rows (")
    none = verdict_of(rows(200), answers(["no"] * 200), answers(["no"] * 200), "answered again")
    assert none is not None
    assert "no row is answered exactly" in none.check().detail
    assert verdict_of([], [], [], "") is None


def test_fixed_text_does_not_dilute_agreement() -> None:
    """Of 1,000 tokens 900 are the keys of an object; of the 100 that are a choice 40 differ."""
    measured = [Measured([0.01] * 1000, counted=1000, same=960, choices=100, same_choices=60, finite=True)]
    _, agreement = distribution_checks(measured, Tolerance(0.02, 0.95), Noise(0.1, 0.05))
    assert not agreement.passed
    assert (agreement.value, agreement.unit) == (0.6, "share")
    assert agreement.detail == "60 of 100 tokens that are a choice and lead by more than 0.20 nats"
    few = [Measured([0.01] * 100, counted=100, same=98, choices=ENOUGH - 1, same_choices=ENOUGH - 3, finite=True)]
    assert distribution_checks(few, Tolerance(0.02, 0.95), Noise(0, 0))[1].value == 0.98


def test_noise_is_how_far_a_lead_moves_while_both_read_the_same() -> None:
    one = Answer("", [1, 2, 3], True, [{1: -0.1, 2: -2.1}, {2: -0.2, 3: -1.2}, {3: -0.1, 4: -9.0}])
    other = Answer("", [1, 9, 3], True, [{1: -0.1, 2: -2.4}, {2: -0.2, 3: -1.1}, {3: -0.1, 4: -1.0}])
    assert noise_between([one], [one]) == 0
    # The leads move by 0.3 and 0.1; behind the second token the texts differ, so the third says nothing.
    assert noise_between([one], [other]) == pytest.approx(0.28, abs=0.02)


@pytest.fixture(scope="module")
def qlora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A QLoRA run that learnt its rows by heart."""
    folder = tmp_path_factory.mktemp("qlora")
    make_base(folder / "base", 0)
    data = write_rows(folder / "rows", tickets())
    made = tiny_run(
        folder / "base",
        data,
        folder / "run",
        quantization={"bits": 4},
        adapter={"r": 16, "lora_alpha": 32},
        data={"validation": data, "duplicates": "keep"},
        evaluate={"max_new_tokens": 8, "rows": 8},
        train={"max_steps": 300, "learning_rate": 3e-3, "eval_steps": None},
    )
    veneer.train(made)
    assert losses(folder / "run", "eval")[-1] < 0.01, "it is sure of every answer, so that no rounding decides one"
    return folder / "run"


def test_a_merge_keeps_what_was_judged_and_is_compared_with_it(qlora: Path, tmp_path: Path) -> None:
    for name in ("evaluation.json", "samples.jsonl"):
        (qlora / name).unlink(missing_ok=True)
    again = _certified(qlora, tmp_path / "first")
    assert (again["artifact"]["on"], again["against"]["on"]) == ("nf4", "nf4")
    assert again["score"]["judged_answers"] == "answered again"
    assert again["passed"], again["first_difference"]
    assert again["score"]["judged"]["value"] == again["score"]["artifact"]["value"] == 1
    assert again["date"][:2] == "20"
    assert len(again["artifact"]["sha256"]) == len(again["against"]["adapter_sha256"]) == 64

    veneer.evaluate(qlora)
    recorded = _certified(qlora, tmp_path / "second")
    assert recorded["score"]["judged_answers"] == "samples.jsonl"
    assert recorded["score"]["rows"] == 8

    # A record of another adapter, or of other lengths, is none of this one.
    record = json.loads((qlora / "evaluation.json").read_text())
    for key, value in (("adapter_sha256", "0" * 64), ("max_new_tokens", 99), ("quantization", None)):
        changed = record | {"judged": record["judged"] | {key: value}}
        (qlora / "evaluation.json").write_text(json.dumps(changed))
        found = veneer.certify(str(tmp_path / "second"), str(qlora))[0]
        assert found.score is not None
        assert found.score["judged_answers"] == "answered again", key
    (qlora / "evaluation.json").write_text(json.dumps(record))


def _certified(run: Path, out: Path, **options: Any) -> dict[str, Any]:
    veneer.merge(str(run), out, "float32", **options)
    return veneer.certify(str(out), str(run))[0].as_dict()


def test_the_16_bit_base_is_by_choice_and_measured_against_what_was_judged(qlora: Path, tmp_path: Path) -> None:
    found = _certified(qlora, tmp_path / "out", on="base")
    assert (found["artifact"]["on"], found["against"]["on"]) == ("base", "nf4")
    limits = {check["id"]: check["limit"] for check in found["checks"]}
    assert limits["distributions"] == 0.2, "as far as 4 bits may move it"
    assert next(check for check in found["checks"] if check["id"] == "weights")["passed"], "it is what was asked for"


def test_best_measures_both_and_keeps_what_was_judged_unless_the_other_is_shown_to_be_better(
    qlora: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    veneer.evaluate(qlora)
    with pytest.raises(SystemExit) as caught:
        main(["merge", str(qlora), "--out", str(tmp_path / "out"), "--on", "best", "--no-certify", "--json"])
    assert caught.value.code == 0
    choice = json.loads(capfd.readouterr().out)["choice"]
    assert (choice["on"], choice["judged"], choice["rows"]) == ("nf4", 1.0, 8)
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["choice"] == choice

    run = tmp_path / "bad"  # answers recorded as wrong: then the 16-bit base, which has them right, is better
    shutil.copytree(qlora, run)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    (run / "samples.jsonl").write_text("".join(json.dumps(row | {"tuned": "wrong"}) + "\n" for row in samples))
    report = veneer.merge(str(run), tmp_path / "other", on="best")
    assert report.choice is not None
    assert (report.on, report.choice["judged"]) == ("base", 0.0)
    with pytest.raises(UserError, match="no held-out rows"):
        veneer.merge(str(run / "adapter"), tmp_path / "none", on="best")
    assert not (tmp_path / "none").exists()


def test_best_of_one_base_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is only one"):
        veneer.merge(str(run), tmp_path / "out", on="best")


def test_a_model_without_its_adapter_is_told_by_its_score_where_weights_are_not_seen(run: Path, tmp_path: Path) -> None:
    """A server of the base alone: no weights to compare, but no row is right any more."""
    from veneer.release.certify.servers import llama_server

    adapter = tmp_path / "nothing"
    shutil.copytree(run / "adapter", adapter)
    (adapter / "passport.json").unlink()
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, file)
    report = veneer.export(str(adapter), tmp_path / "out", quant="f16", base=str(run.parent / "base"))
    with llama_server(tmp_path / "out" / report.file, True, set(), 512) as server:
        found = certificate(server.address, run)
    assert not found["passed"]
    assert found["first_difference"].startswith("held-out rows right: worse: -100.0 points")
