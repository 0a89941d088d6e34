"""The encoder from PyPI learns to route messages, far better than the majority label, in a part of its recipe's run."""

from pathlib import Path

import pytest

import veneer
from veneer.config import load_run

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).parents[2]


def test_the_recipe_of_routing_learns_in_its_first_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    short = [f"train.output_dir={tmp_path / 'run'}", "train.max_steps=40", "train.eval_steps=null"]
    veneer.train(load_run(ROOT / "recipes" / "minilm-routing.yaml", short))
    accuracy = veneer.evaluate_classifier(tmp_path / "run").judged.metrics["accuracy"]
    assert accuracy["base"]["value"] == 0.2  # five teams with equally many messages
    assert accuracy["difference"]["low"] > 0.3
    (row,) = veneer.predict(tmp_path / "run", [{"text": "I was charged twice for the same order, refund me"}])
    assert row.label == "billing"
