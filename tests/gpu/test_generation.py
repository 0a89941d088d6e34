"""Answers in slots on a GPU: recorded steps give the tokens of eager ones, and the same ones twice."""

from typing import Any

import pytest
import torch

from tests.support.engines import model_of
from tests.support.notices import notified
from veneer.config.sampling import Sampling
from veneer.evaluation.decoding import TokenChoice, draws_of
from veneer.evaluation.prefill import read_prompts
from veneer.evaluation.prefix import SharedPrefix
from veneer.evaluation.recordings import Recordings
from veneer.evaluation.slots import Row, SlotDecoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
SAMPLED = Sampling(temperature=1.5, top_k=20, top_p=0.9, seed=3)


def in_nf4(model: Any) -> None:
    """Put adapted layers on 4-bit weights, in place."""
    import bitsandbytes as bnb

    for layer in [module for module in model.modules() if hasattr(module, "base_layer")]:
        plain = layer.base_layer
        packed = bnb.nn.Linear4bit(
            plain.in_features, plain.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        packed.weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4")
        layer.base_layer = packed


@torch.no_grad()
def answers(model: Any, rows: list[Row], slots: int, sampling: Sampling, graphs: bool) -> tuple[list[list[int]], int]:
    """Answers by row, and how many steps were recorded."""
    decoder = SlotDecoder(model, rows, slots, [7, 8, 9], TokenChoice(sampling), graphs=graphs)
    prompts, found = [row.prompt for row in rows], dict[int, list[int]]()
    for ended in decoder.answers(read_prompts(model, SharedPrefix(model, prompts), prompts, (), slots)):
        found |= ended
    return [found[n] for n in range(len(rows))], len(decoder.recorded)


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
def test_recorded_steps_are_eager_steps_to_the_bit(kind: str, sampling: Sampling) -> None:
    sizes = {"hidden_size": 128, "max_position_embeddings": 1024, "attn_implementation": "sdpa"}
    model = model_of("llama", changes=sizes).bfloat16()
    if kind == "nf4":
        in_nf4(model)
    model.cuda().eval()
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 300, (11,), generator=draw).tolist()
    prompts = [torch.randint(10, 380, (n,), generator=draw).tolist() for n in lengths]
    limits = torch.randint(1, 90, (11,), generator=draw).tolist()
    rows = [Row(*row) for row in zip(prompts, limits, draws_of(prompts, limits, sampling), strict=True)]
    eager, none = answers(model, rows, 4, sampling, graphs=False)
    recorded, widths = answers(model, rows, 4, sampling, graphs=True)
    assert none == 0
    assert widths > 0
    assert recorded == eager
    assert answers(model, rows, 4, sampling, graphs=True)[0] == recorded
    order = torch.randperm(len(rows), generator=draw).tolist()
    shuffled, _ = answers(model, [rows[n] for n in order], 4, sampling, graphs=True)
    assert [shuffled[order.index(n)] for n in range(len(rows))] == recorded


def test_a_pass_that_reads_a_value_is_launched_and_others_are_still_captured() -> None:
    x = torch.ones(2**20, device="cuda")

    def reads() -> torch.Tensor:
        return x * 2 if x.sum().item() > 0 else x

    spoiled, sound = Recordings(1), Recordings(1)
    with notified("launched each time"):
        for _ in range(3):
            assert torch.equal(spoiled.run("one", reads), x * 2)
    torch.cuda.empty_cache()
    for _ in range(3):
        assert torch.equal(sound.run("one", lambda: x * 3), x * 3)
    assert (list(spoiled), list(sound)) == ([], ["one"])
