"""Answers in slots are those of Transformers' own generation, wherever a row stands and whatever stands beside it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.support.tiny import ARCHITECTURES, FAMILIES, save_tiny_model, tiny_tokenizer
from veneer.config import Adapter
from veneer.config.sampling import Sampling
from veneer.evaluation import kernel_norms
from veneer.evaluation.decoding import StopAtText, TokenChoice, draws_of, generation_config, row_seeds
from veneer.evaluation.generation import GREEDY, continue_prompts
from veneer.evaluation.kernel_norms import KernelNorm, norms_by_kernel
from veneer.evaluation.partial import KeptAnswers
from veneer.evaluation.prefill import _groups, read_prompts
from veneer.evaluation.prefix import SHORTEST, SharedPrefix
from veneer.evaluation.slot_attention import slot_attention
from veneer.evaluation.slot_cache import has_slots
from veneer.evaluation.slots import Row, SlotDecoder
from veneer.model.attach import attach
from veneer.planning.held_out import PREFILL_ROWS, prompts_at_a_time

SLOTTED = ("llama", "qwen2", "qwen3", "phi3", "gpt_neox", "mixtral", "deepseek_v3")
SPLIT = ("llama", "deepseek_v3")  # heads that share a key, and heads whose keys are wider than their values
STOPS = list(range(3, 43))
MARGIN = 2e-6  # between two logits: some times what another shape moves them in float32, and these are small


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def make(family: str) -> Any:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            save_tiny_model((FAMILIES | ARCHITECTURES)[family], folder)
            made[family] = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return made[family]

    return make


def drawn(count: int, seed: int = 0, shared: int = 0) -> tuple[list[list[int]], list[int]]:
    """Random prompts of unlike lengths, one of them a token long, and the room for each answer, once a token."""
    draw = torch.Generator().manual_seed(seed)

    def number(most: int) -> int:
        return int(torch.randint(1, most, (1,), generator=draw))

    begin = torch.randint(50, 380, (shared,), generator=draw).tolist()
    prompts = [begin + torch.randint(50, 380, (number(50),), generator=draw).tolist() for _ in range(count)]
    prompts[1] = prompts[1][: shared + 1]
    return prompts, [1, *(number(24) for _ in range(count - 1))]


def alone(model: Any, prompt: list[int], room: int, stops: Sequence[int] = STOPS) -> tuple[list[int], float]:
    """A greedy answer by Transformers, and how far the runner-up's logit ever was from the chosen one's."""
    config = generation_config(stops, 2, room, GREEDY)
    config.output_logits = config.return_dict_in_generate = True
    ids = torch.tensor([prompt])
    with torch.no_grad():
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    margins = [(top[0] - top[1]).item() for top in (logits[0].topk(2).values for logits in output.logits)]
    return output.sequences[0, len(prompt) :].tolist(), min(margins)


def in_slots(model: Any, prompts: list[list[int]], room: list[int], size: int, **more: Any) -> list[list[int]]:
    sampling = more.pop("sampling", GREEDY)
    config = generation_config(STOPS, 2, max(room), sampling)
    found = continue_prompts(model, tiny_tokenizer(), prompts, config, size, room, sampling=sampling, **more)
    return [continuation.ids for continuation in found]


@pytest.mark.parametrize(
    ("family", "attention"),
    [*((family, "sdpa") for family in SLOTTED), *((name, how) for name in SPLIT for how in ("eager", "kernels"))],
)
def test_answers_are_those_of_transformers(
    family: str, attention: str, model_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(family)
    if attention == "kernels":  # their twins
        for module in ("slot_attention", "slot_cache"):
            monkeypatch.setattr(f"veneer.evaluation.{module}.compiles", lambda device: True)
    else:
        monkeypatch.setattr(model.config, "_attn_implementation_internal", attention)
    assert has_slots(model)
    for shared in (0, SHORTEST + 3):
        prompts, room = drawn(11, shared=shared)
        wanted = [alone(model, prompt, most) for prompt, most in zip(prompts, room, strict=True)]
        assert min(margin for _, margin in wanted) > MARGIN
        ends = [ids[-1] in STOPS for ids, _ in wanted]
        assert any(ends), "some end by themselves"
        assert not all(ends), "some at the limit"
        for size in (1, 3, 16):
            assert in_slots(model, prompts, room, size) == [ids for ids, _ in wanted]


@pytest.mark.parametrize("family", ["gpt2", "opt", "mistral", "gemma2", "gpt_oss", "qwen3_next", "jamba", "llama4"])
def test_models_of_other_caches_or_positions_have_no_slots(family: str, model_of: Callable[[str], Any]) -> None:
    assert not has_slots(model_of(family))


def test_rotations_that_depend_on_the_longest_row_have_no_slots() -> None:
    name, settings = FAMILIES["llama"]
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = getattr(transformers, name)(**settings | {"rope_parameters": rope})
    assert not has_slots(transformers.AutoModelForCausalLM.from_config(config))


def decoder_of(model: Any, rows: list[Row], slots: int, **more: Any) -> tuple[dict[int, list[int]], SlotDecoder]:
    decoder = SlotDecoder(model, rows, slots, STOPS, TokenChoice(more.pop("sampling", GREEDY)), **more)
    prompts, found = [row.prompt for row in rows], dict[int, list[int]]()
    with torch.no_grad():
        for answers in decoder.answers(read_prompts(model, SharedPrefix(model, prompts), prompts, (), slots)):
            assert not found.keys() & answers.keys()
            found |= answers
    return found, decoder


def test_a_row_that_has_ended_makes_room_at_once(model_of: Callable[[str], Any]) -> None:
    prompts, _ = drawn(9)
    rows = [Row(prompt, limit, None) for prompt, limit in zip(prompts, [20, 2, 2, 2, 2, 2, 2, 2, 2], strict=True)]
    lengths = [len(alone(model_of("llama"), row.prompt, row.limit)[0]) for row in rows]
    found, decoder = decoder_of(model_of("llama"), rows, 2)
    assert [len(found[n]) for n in range(9)] == lengths
    assert decoder.steps < sum(lengths), "two at a time"
    assert decoder.steps <= 20 + 8, "no row waits for a batch"


def test_looking_at_the_rows_every_few_steps_changes_no_answer(
    model_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: a slot whose row has ended runs on for some steps."""
    model, (prompts, room) = model_of("qwen3"), drawn(12, seed=4)
    ended = StopAtText(tiny_tokenizer(), ["e", "th"], 0).is_ended
    rows = [Row(prompt, limit, None) for prompt, limit in zip(prompts, room, strict=True)]
    for stop_text in (None, ended):
        each, _ = decoder_of(model, rows, 4, is_ended=stop_text)
        few = SlotDecoder(model, rows, 4, STOPS, TokenChoice(GREEDY), stop_text)
        monkeypatch.setattr(few, "_window", 5)
        found: dict[int, list[int]] = {}
        with torch.no_grad():
            for answers in few.answers(read_prompts(model, SharedPrefix(model, prompts), prompts, (), 4)):
                found |= answers
        assert found == each


def test_the_order_of_the_rows_changes_no_bit_of_their_logits(model_of: Callable[[str], Any]) -> None:
    model, (prompts, room) = model_of("llama"), drawn(13, seed=2)
    prompts = [prompt[: 3 * (len(prompt) // 3) or None] for prompt in prompts]  # some of one length
    assert len({len(prompt) for prompt in prompts}) < len(prompts)
    rows = [Row(prompt, limit, None) for prompt, limit in zip(prompts, room, strict=True)]

    def logits(order: list[int]) -> dict[int, torch.Tensor]:
        seen: dict[int, list[torch.Tensor]] = {}

        def choose(scores_SV: torch.Tensor, drawn: Any) -> torch.Tensor:
            for slot, n in decoder._busy.items():
                seen.setdefault(order[n], []).append(scores_SV[slot].clone())
            return scores_SV.argmax(-1)

        decoder = SlotDecoder(model, [rows[n] for n in order], 4, STOPS, choose)
        asked = [prompts[n] for n in order]
        with torch.no_grad():
            list(decoder.answers(read_prompts(model, SharedPrefix(model, asked), asked, (), 4)))
        return {n: torch.stack(steps) for n, steps in seen.items()}

    straight = logits(list(range(13)))
    for order in (list(range(13))[::-1], [*range(6, 13), *range(6)]):
        found = logits(order)
        assert found.keys() == straight.keys()
        assert all(torch.equal(found[n], straight[n]) for n in found)


def test_the_first_token_may_end_an_answer_and_every_row_may_be_a_token(model_of: Callable[[str], Any]) -> None:
    model = model_of("llama")
    prompts = [[n] for n in range(50, 61)]
    first = [alone(model, prompt, 1, [])[0][0] for prompt in prompts]
    config = generation_config(first, 2, 9, GREEDY)
    found = continue_prompts(model, tiny_tokenizer(), prompts, config, 3)
    assert [continuation.ids for continuation in found] == [[token] for token in first]


def test_draws_are_those_of_transformers_own_loop(model_of: Callable[[str], Any]) -> None:
    """One prompt, or one whose text is shown, is answered by `generate`: with the same random numbers."""
    model, (prompts, room) = model_of("llama"), drawn(7, seed=3)
    sampling = Sampling(temperature=2.0, top_k=5, top_p=0.9, seed=11)
    together = in_slots(model, prompts, room, 3, sampling=sampling)
    for prompt, most, ids in zip(prompts, room, together, strict=True):
        assert in_slots(model, [prompt], [most], 1, sampling=sampling) == [ids]
    assert together == in_slots(model, prompts, room, 16, sampling=sampling)
    assert together != in_slots(model, prompts, room, 16)
    (numbers,) = draws_of([[1, 2]], [40], sampling)
    assert numbers is not None
    generator = torch.Generator().manual_seed(row_seeds([[1, 2]], 11)[0])
    assert torch.equal(numbers, torch.cat([torch.rand(1, generator=generator) for _ in range(40)]))


def test_a_stop_text_ends_an_answer_where_it_does_in_transformers_loop(model_of: Callable[[str], Any]) -> None:
    model, (prompts, room) = model_of("llama"), drawn(7, seed=5)
    sampling = Sampling(stop=("e", "o"))
    together = in_slots(model, prompts, room, 4, sampling=sampling)
    assert together == [in_slots(model, [p], [r], 1, sampling=sampling)[0] for p, r in zip(prompts, room, strict=True)]
    assert together != in_slots(model, prompts, room, 4)


def test_base_and_tuned_model_are_answered_for_on_one_loaded_model() -> None:
    name, settings = FAMILIES["llama"]
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings)).eval()
    prompts, room = drawn(8)
    plain = in_slots(base, prompts, room, 3)
    model = attach(base, Adapter(r=4), 0).eval()
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    tuned = in_slots(model, prompts, room, 3)
    assert tuned != plain
    with model.disable_adapter():
        assert in_slots(model, prompts, room, 3) == plain
    assert in_slots(model, prompts, room, 3) == tuned


def test_what_is_known_is_left_out_and_the_rest_comes_out_to_the_bit(
    model_of: Callable[[str], Any], tmp_path: Path
) -> None:
    model, (prompts, room) = model_of("llama"), drawn(3 * PREFILL_ROWS)
    whole = in_slots(model, prompts, room, 5)
    for known in ({}, {0: [5], 3: [6, 6]}, {n: [5] for n in range(0, 24, 2)}):
        kept = KeptAnswers(tmp_path / "kept", "base", dict(known))
        done: list[int] = []
        found = in_slots(model, prompts, room, 5, kept=kept, on_done=done.append)
        assert sum(done) == len(prompts)
        assert found == [known.get(n, ids) for n, ids in enumerate(whole)]
        assert kept.known == dict(enumerate(found))


def test_prompts_are_read_in_groups_and_a_known_group_is_not_read(model_of: Callable[[str], Any]) -> None:
    model, (prompts, _) = model_of("llama"), drawn(2 * PREFILL_ROWS + 1)
    order = sorted(range(len(prompts)), key=lambda n: (len(prompts[n]), prompts[n]))
    rows: list[int] = []
    hook = model.register_forward_pre_hook(lambda m, a, given: rows.append(len(given["input_ids"])), with_kwargs=True)
    try:
        known = set(order[:PREFILL_ROWS])
        with torch.no_grad():
            found = [read.number for read in read_prompts(model, SharedPrefix(model, prompts), prompts, known, 99)]
    finally:
        hook.remove()
    assert found == order[PREFILL_ROWS:]
    assert rows == [PREFILL_ROWS, 1]


def test_long_prompts_are_read_in_smaller_groups_as_the_plan_counts_them() -> None:
    assert [prompts_at_a_time(16, n) for n in (1, 512, 513, 2048, 4096, 9999)] == [8, 8, 7, 2, 1, 1]
    assert [prompts_at_a_time(n, 10) for n in (1, 3, 99)] == [1, 3, PREFILL_ROWS]
    lengths = [500] * 6 + [1500] * 5 + [5000] * 2
    groups = list(_groups([[1] * n for n in lengths], 16))
    assert [len(group) for group in groups] == [6, 2, 2, 1, 1, 1]
    assert sorted(n for group in groups for n in group) == list(range(13))


def test_rows_go_on_in_fewer_slots_once_memory_is_short(
    model_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that had ended are not answered again."""
    model, (prompts, room) = model_of("llama"), drawn(14)
    whole = in_slots(model, prompts, room, 8)
    forward, passes = type(model).forward, 0

    def short_of_memory(self: Any, input_ids: torch.Tensor, **more: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes > 12 and len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, input_ids, **more)

    monkeypatch.setattr(type(model), "forward", short_of_memory)
    done: list[int] = []
    assert in_slots(model, prompts, room, 8, on_done=done.append) == whole
    assert sum(done) == len(prompts)


@pytest.mark.parametrize(("heads", "keys", "scaling"), [(8, 2, None), (4, 4, 0.3), (6, 1, None)])
def test_attention_over_slots_is_attention(heads: int, keys: int, scaling: float | None) -> None:
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(3, heads, 1, 16, generator=draw)
    buffers = torch.randn(2, 3, keys, 40, 16, generator=draw)  # longer than what is read of them
    key, value = buffers[0][:, :, :29], buffers[1][:, :, :29]
    mask = torch.zeros(3, 1, 1, 29)
    for slot, seen in enumerate((1, 12, 29)):
        mask[slot, ..., seen:] = torch.finfo(torch.float32).min
    found, _ = slot_attention(None, query, key, value, mask, scaling)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
    )
    torch.testing.assert_close(found, wanted.transpose(1, 2), atol=2e-6, rtol=0)
    positions = torch.tensor([0, 11, 28])[:, None, None, None]
    found, _ = slot_attention(None, query, key, value, positions, scaling)
    torch.testing.assert_close(found, wanted.transpose(1, 2), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("family", "per_block"), [("llama", 2), ("qwen3", 4), ("mixtral", 2), ("gpt_neox", 0), ("gemma2", 0)]
)
def test_norms_by_the_kernel_are_the_models_own(
    family: str, per_block: int, model_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer norms, and norms whose weights are differences from 1, stay as they are."""
    model, ids = model_of(family), torch.tensor([[5, 6, 7]])
    plain, names = model(ids).logits, list(model.state_dict())
    monkeypatch.setattr(kernel_norms, "compiles", lambda device: True)
    with norms_by_kernel(model):
        count = sum(isinstance(module, KernelNorm) for module in model.modules())
        assert count == (per_block * model.config.num_hidden_layers + 1 if per_block else 0)
        assert list(model.state_dict()) == names
        torch.testing.assert_close(model(ids).logits, plain, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(ids).logits, plain)
