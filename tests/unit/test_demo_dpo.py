"""veneer demo --dpo on a tiny model: it goes on from a run of the demo, and says what the pairs changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.support.runs import tiny_run, write_rows
from veneer.cli import demo as demo_module
from veneer.cli import demo_dpo as module
from veneer.config import Run, load_run

ROOT = Path(__file__).parents[2]
Call = Callable[..., tuple[int, str, str]]
MESSAGES = [f"the {animal} is {state}" for animal in ("cat", "dog", "owl") for state in ("wet", "dry", "gone", "here")]
WRONG, RIGHT = '{"a": 1}', '{"a": 2}'
RATE = 1e-2


@pytest.fixture
def tiny_demo(tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo's settings with a tiny model, which its own run teaches to answer wrongly."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model(), base)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] *= 10  # so that an adapter can make it sure of an answer
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    rows = write_rows(tmp_path / "train.jsonl", [{"prompt": m, "completion": WRONG} for m in MESSAGES])
    for name, messages in (("pairs", MESSAGES), ("dev_pairs", ["a hen is wet", "a hen is dry"])):
        pairs = [{"prompt": message, "chosen": RIGHT, "rejected": WRONG} for message in messages]
        write_rows(tmp_path / f"{name}.jsonl", pairs)
    write_rows(tmp_path / "rule_test.jsonl", [{"prompt": m, "completion": RIGHT} for m in MESSAGES[:8]])

    def demo_run(output_dir: Path) -> Run:
        train = {"max_steps": 40, "learning_rate": RATE}
        return tiny_run(base, rows, output_dir, train=train, evaluate={"max_new_tokens": 12})

    monkeypatch.setattr(demo_module, "demo_run", demo_run)
    monkeypatch.setattr(module, "bundled", lambda name: tmp_path / name)
    return tmp_path / "demo"


def with_changes(data: dict[str, Any], train: dict[str, Any]) -> Callable[[Path, Path], Run]:
    """The run on the pairs with other settings."""

    def run(sft: Path, output_dir: Path, made: Callable[[Path, Path], Run] = module.dpo_run) -> Run:
        settings = made(sft, output_dir).model_dump(mode="json", exclude_unset=True)
        return Run.model_validate(settings | {"data": settings["data"] | data, "train": settings["train"] | train})

    return run


def test_it_trains_the_demos_run_first_and_counts_its_wins_over_it(
    call: Call, tiny_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chosen answers are learnt here as they are: what a tiny random model learns from pairs is no answer."""
    right = write_rows(tmp_path / "right.jsonl", [{"prompt": m, "completion": RIGHT} for m in MESSAGES])
    train = {"objective": "sft", "dpo": None, "learning_rate": RATE}
    monkeypatch.setattr(module, "dpo_run", with_changes({"train": right, "validation": 0}, train))
    status, out, err = call("demo", "--dpo", "--output-dir", str(tiny_demo), "--json")
    assert status == 0, err
    result = json.loads(out)
    rate = result["win_rate"]
    assert (rate["wins"], rate["ties"], rate["losses"], rate["verdict"]) == (8, 0, 0, "better")
    assert rate["win_rate"]["value"] == 1
    assert rate["win_rate"]["low"] > 0.5
    assert result["compared"] == {"base": str(tiny_demo), "tuned": f"{tiny_demo}-dpo"}
    assert result["run_dir"] == f"{tiny_demo}-dpo"
    assert "is trained first" in err
    assert "win rate of dpo over sft 100%" in " ".join(err.split())
    assert load_run(Path(result["run_dir"]) / "run.yaml").model.adapter == str(tiny_demo)


def test_a_win_rate_that_shows_nothing_is_status_1(
    call: Call, tiny_demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "dpo_run", with_changes({}, {"learning_rate": 1e-12}))
    status, out, err = call("demo", "--dpo", "--output-dir", str(tiny_demo))
    assert status == 1
    assert "wins 0, ties 8, loses 0 of 8" in out
    assert "does not show" in out + err


def test_the_recipe_says_what_the_demo_does() -> None:
    recipe = load_run(ROOT / "recipes" / "smollm2-dpo.yaml").model_dump(mode="json")
    demo = module.dpo_run(Path("runs/smollm2-demo"), Path("runs/smollm2-dpo")).model_dump(mode="json")
    for run in (recipe, demo):
        for key in ("train", "validation"):
            run["data"][key] = Path(run["data"][key]).name
    assert recipe == demo
