"""A preference run is merged, exported, certified and described as any other."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import veneer
from tests.support.runs import some_pairs, tiny_run, write_rows
from veneer.config.files import file_sha256


@pytest.fixture(scope="module")
def run(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on pairs on top of a supervised one, in folders `dpo` and `sft`."""
    folder = tmp_path_factory.mktemp("preference")
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in some_pairs()]
    file = write_rows(folder / "rows.jsonl", rows)
    train = {"learning_rate": 1e-2, "max_steps": 120}
    veneer.train(tiny_run(tiny_model(), file, folder / "sft", train=train, adapter={"r": 16}))
    pairs = write_rows(folder / "pairs.jsonl", some_pairs())
    dpo = tiny_run(
        tiny_model(),
        pairs,
        folder / "dpo",
        model={"adapter": str(folder / "sft")},
        data={"validation": pairs, "duplicates": "keep"},
        train={"learning_rate": 1e-3, "max_steps": 10, "dpo": {"beta": 0.3}},
        adapter={"r": 16},
        evaluate={"max_new_tokens": 8, "rows": 8},
    )
    veneer.train(dpo)
    return folder / "dpo"


@pytest.mark.parametrize("kind", ["merged", "gguf"])
def test_what_ships_is_certified_against_the_run(kind: str, run: Path, tmp_path: Path) -> None:
    if kind == "merged":
        veneer.merge(str(run), tmp_path / "out", "float32")
    else:
        veneer.export(str(run), tmp_path / "out", quant="f16")
    certificate, _ = veneer.certify(str(tmp_path / "out"), str(run), rows=4)
    assert certificate.passed, certificate.as_dict()["first_difference"]
    assert {check.id for check in certificate.checks} >= {"agreement", "score", "stops"}
    assert "Passed" in (run / "adapter" / "README.md").read_text()


def test_an_importance_matrix_is_measured_on_pairs(run: Path, tmp_path: Path) -> None:
    exported = veneer.export(str(run), tmp_path / "out", quant="q4_k_m")
    assert (tmp_path / "out" / exported.file).is_file()


def test_passport_and_card_name_objective_and_reference(run: Path) -> None:
    start = run.parent / "sft" / "adapter"
    told = json.loads((run / "adapter" / "passport.json").read_text())["preference"]
    assert told["objective"] == "dpo"
    assert told["settings"] == {"beta": 0.3, "loss_type": "sigmoid", "label_smoothing": 0, "rpo_alpha": 0}
    weights, passport = (file_sha256(start / name) for name in ("adapter_model.safetensors", "passport.json"))
    assert told["reference"] == {
        "computed": "cached",
        "adapter": {
            "name": "sft",
            "adapter_sha256": weights,
            "passport_sha256": passport,
            "run_sha256": json.loads((start / "passport.json").read_text())["run_sha256"],
        },
    }
    card = (run / "adapter" / "README.md").read_text()
    assert "| objective | dpo: beta 0.3, loss_type sigmoid, label_smoothing 0, rpo_alpha 0 |" in card
    assert f"`sft` (SHA-256 `{str(weights)[:16]}`)" in card
    assert f"whose passport has the SHA-256 `{str(passport)[:16]}`" in card
    assert str(run.parent) not in card
    assert "objective" not in (start / "README.md").read_text(), "a supervised run compares with nothing"


@pytest.mark.parametrize(
    ("reference", "row"), [("cached", "| reference | the base, without an adapter |"), ("none", "| reference | none |")]
)
def test_a_card_says_where_the_reference_is_no_adapter(
    reference: str, row: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", some_pairs())
    veneer.train(tiny_run(tiny_model(), pairs, tmp_path / "run", train={"max_steps": 1, "reference": reference}))
    assert row in (tmp_path / "run" / "adapter" / "README.md").read_text()
