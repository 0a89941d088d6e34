"""A served batch on a GPU: recorded steps give the answers of launched ones, whatever adapters their rows have."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.adapters import save_adapter_of
from tests.support.certified import make_base
from tests.support.serving import client_of, few, service_of
from veneer.serving import batch, recorded_prompts

pytestmark = pytest.mark.gpu
KINDS = ("lora", "rslora", "patterns")


def test_recorded_steps_answer_as_launched_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_base(tmp_path / "base", 0)
    paths = [str(save_adapter_of(kind, tmp_path / "base", tmp_path / kind)) for kind in KINDS]
    asked = [(model, text) for text in ("the cat", "what does the owl say") for model in ("base", *KINDS)]
    found = []
    for steps, passes in ((10**9, 10**9), (batch.EAGER_STEPS, recorded_prompts.EAGER_PASSES)):
        monkeypatch.setattr(batch, "EAGER_STEPS", steps)
        monkeypatch.setattr(recorded_prompts, "EAGER_PASSES", passes)
        with service_of(paths, limits=few(max_tokens=64)) as service, client_of(service) as client:

            def ask(one: tuple[str, str], client: Any = client) -> Any:
                messages = [{"role": "user", "content": one[1]}]
                body = {"model": one[0], "messages": messages, "temperature": 0, "max_tokens": 64}
                return client.post("/v1/chat/completions", json=body).json()["choices"]

            alone = [ask(one) for one in asked]
            with ThreadPoolExecutor(len(asked)) as pool:
                mixed = list(pool.map(ask, asked))
            assert isinstance(service.scheduler.batch, batch.SlotBatch)
            assert bool(service.scheduler.batch.recorded_steps) == (steps < 10**9)
            prompts = service.scheduler.batch.recorded_prompts
            assert prompts is not None
            assert bool(prompts.passes) == (steps < 10**9)
            same = sum(one == other for one, other in zip(mixed, alone, strict=True))
            assert same >= len(asked) - 1, "other numbers of rows round otherwise, which a random model may notice once"
            found.append(alone)
    assert found[0] == found[1]
