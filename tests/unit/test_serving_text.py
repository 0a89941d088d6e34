"""Tokens are chosen as asked for, and become text and calls that are never taken back."""

import random
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit

from tests.support.adapters import save_adapter_of
from tests.support.certified import make_base
from tests.support.serving import client_of, few, service_of
from tests.support.tiny import metaspace_tokenizer, tiny_tokenizer
from veneer.config import UserError
from veneer.config.sampling import Sampling
from veneer.data.render import Renderer
from veneer.evaluation.decoding import TokenChoice
from veneer.model.tuned import find_tuned
from veneer.serving import mixed, vllm
from veneer.serving.adapters import Adapters
from veneer.serving.detokenize import TextOfTokens
from veneer.serving.metrics import Metrics
from veneer.serving.mixed import AdapterBank, Matrices
from veneer.serving.prefix_cache import BLOCK, PrefixCache
from veneer.serving.sampling import Decoding, Row, choose
from veneer.serving.scheduler import HELD_STEPS, Scheduler
from veneer.serving.tool_calls import CallForm, call_form
from veneer.serving.watch import WatchedFolder

TEXT = "Grüße 你好 🙂👩‍🚀  two  spaces,\n\nthree lines: the cat says \u200bplease, and the dog"


@pytest.mark.parametrize("make", [tiny_tokenizer, metaspace_tokenizer])
def test_pieces_make_up_the_decoded_text(make: Any) -> None:
    tokenizer, draw = make(), random.Random(0)
    for _ in range(60):
        start = draw.randrange(len(TEXT))
        ids = tokenizer(TEXT[start : start + 40], add_special_tokens=False)["input_ids"]
        ids = ids[: draw.randrange(1, len(ids) + 1)]
        whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text = TextOfTokens(tokenizer)
        assert "".join([*map(text.put, ids), text.end()]) == whole
        at = draw.randrange(len(whole) + 1)
        stop = whole[at : at + draw.randrange(1, 5)] or "never"
        text, pieces = TextOfTokens(tokenizer, ["#never#", stop]), []
        for token in ids:
            pieces.append(text.put(token))
            if text.stopped:
                break
        said = "".join([*pieces, text.end()])
        assert said == whole[: whole.find(stop)] if stop in whole else said == whole


def test_a_row_draws_what_generation_draws_whatever_stands_beside_it() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 300) * 3
    settings = [
        Decoding(temperature=0.7),
        Decoding(temperature=1.5, top_p=0.6),
        Decoding(temperature=1.0, top_k=4),
        Decoding(temperature=1.2, top_k=30, top_p=0.8),
        Decoding(),
    ]

    def rows(numbers: list[int]) -> list[Row]:
        return [Row(settings[n], [1], [], torch.Generator().manual_seed(n)) for n in numbers]

    together = [choice.token for choice in choose(logits, rows([0, 1, 2, 3, 4]))]
    alone = [choose(logits[n : n + 1], rows([n]))[0].token for n in range(5)]
    assert together == alone
    for number, one in enumerate(settings):
        sampling = Sampling(one.temperature, one.top_p, one.top_k)
        drawn = torch.rand(1, generator=torch.Generator().manual_seed(number)) if one.temperature else None
        assert TokenChoice(sampling)(logits[number : number + 1], drawn).item() == together[number]


def test_penalties_biases_masks_and_log_probabilities() -> None:
    logits = torch.tensor([[3.0, 2.9, 2.0, -1.0]])

    def token(decoding: Decoding, answer: list[int], allowed: int | None = None) -> int:
        mask = None if allowed is None else torch.tensor([allowed], dtype=torch.int32)
        (choice,) = choose(logits, [Row(decoding, [2], answer, torch.Generator(), 2, mask)])
        assert choice.logprob == pytest.approx(logits.log_softmax(-1)[0, choice.token].item()), "before they act"
        assert [likely for likely, _ in choice.likeliest] == [0, 1]
        return choice.token

    assert token(Decoding(), [0, 0]) == 0
    assert token(Decoding(presence_penalty=0.2), [0, 0]) == 1
    assert token(Decoding(frequency_penalty=0.08), [0, 0]) == 1
    assert token(Decoding(frequency_penalty=0.08), [0]) == 0
    assert token(Decoding(repetition_penalty=1.1), [0]) == 1
    assert token(Decoding(logit_bias={3: 5.0}), []) == 3
    assert token(Decoding(), [], allowed=0b1100) == 2
    draws = [token(Decoding(temperature=5.0, min_p=0.99), []) for _ in range(20)]
    assert set(draws) == {0}, "the runner-up has 0.98 of its probability at that temperature"


class EmbeddedBase(torch.nn.Module):
    """A base as a bank of adapters asks for it; what its layers compute is `run`."""

    run: Any

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(2, width)

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        return self.run(self.embedding(input_ids))

    def get_input_embeddings(self) -> Any:
        return self.embedding


@pytest.mark.parametrize(
    ("by_kernels", "width", "sizes", "bias"),
    [(False, 6, (10, 3), True), (True, 6, (10, 3), True), (True, 64, (128, 64), False)],
)
def test_ways_to_add_deltas_agree(
    by_kernels: bool, width: int, sizes: tuple[int, int], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Base(EmbeddedBase):
        def __init__(self) -> None:
            super().__init__(width)
            self.first, self.second, self.last = (
                torch.nn.Linear(width, size, bias) for size in (sizes[0], width, sizes[1])
            )

        def run(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.first(x), self.last(self.second(x))

    torch.manual_seed(0)
    monkeypatch.setattr(mixed, "compiles", lambda device: by_kernels)
    base = Base()
    bank = AdapterBank(base, 3, torch.float32)
    layers = {"first": base.first, "last": base.last, "second": base.second}
    own = {
        n: {
            path: Matrices(torch.randn(r, width) / width, torch.randn(layer.out_features, r))
            for path, layer in layers.items()
        }
        for n, r in {1: 2, 2: 11, 3: 1}.items()
    }
    del own[3]["first"]
    for number, matrices in own.items():
        bank.put(number, matrices)
    bank.put(3, own[3])  # again, in place of itself

    def alone(x: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        def of(path: str, x: torch.Tensor) -> torch.Tensor:
            one = own.get(number, {}).get(path)
            plain = torch.nn.functional.linear(x, layers[path].weight, layers[path].bias)
            return plain if one is None else plain + x @ one.a_RI.T @ one.b_OR.T

        return of("first", x), of("last", of("second", x))

    with torch.no_grad():
        for numbers in ([2, 0, 1, 3, 2], [2, 2], [1], [0]):
            for tokens in (1, 2, 40):
                x = torch.randn(len(numbers), tokens, width)
                wanted = [torch.cat(both) for both in zip(*(alone(x[n : n + 1], own) for n, own in enumerate(numbers)))]
                for way in ("rows", "device"):
                    with bank.rows(numbers, tokens) if way == "rows" else bank.device_rows(torch.tensor(numbers)):
                        for found, right in zip(base.run(x), wanted, strict=True):
                            torch.testing.assert_close(found, right, atol=2e-5, rtol=1e-5)
        with bank.device_rows(None):
            torch.testing.assert_close(base.run(x)[1], alone(x, 0)[1])
        torch.testing.assert_close(base.run(x)[1], alone(x, 0)[1])
    assert (len(bank._groups) == 2) == by_kernels, "two layers read one tensor"
    assert all(group.is_whole(1) != bias for group in bank._groups.values()), "kernels multiply by plain weights"


def test_layers_in_four_bits_are_dequantized_once_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Base(EmbeddedBase):
        def __init__(self) -> None:
            super().__init__(64)
            self.one, self.other = (Linear4bit(64, size, False, torch.float32, quant_type="nf4") for size in (64, 192))

        def run(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.one(x), self.other(x)], -1)

    torch.manual_seed(0)
    monkeypatch.setattr(mixed, "compiles", lambda device: True)
    monkeypatch.setattr(mixed, "dequantizes", lambda device: True)
    monkeypatch.setattr(mixed, "few_rows", lambda shape: 32)
    base = Base().to("cpu")  # which quantizes
    layers = {"one": base.one, "other": base.other}
    dense = torch.cat([dequantize_4bit(layer.weight, layer.weight.quant_state) for layer in layers.values()])
    bank = AdapterBank(base, 2, torch.float32)
    a, b = torch.randn(3, 4, 64) / 64, torch.randn(3, 256, 4)
    monkeypatch.setattr(bank, "_leaders", {"other": "one"})  # without a pass, which changes a CPU's packed weights
    for number in (1, 2):
        bank.put(
            number, {path: Matrices(a[number], part) for path, part in zip(layers, torch.split(b[number], [64, 192]))}
        )
    for tokens in (20, 70):
        x = torch.randn(3, tokens, 64)
        wanted = [row @ dense.T + (row @ a[n].T @ b[n].T if n else 0) for n, row in zip((2, 0, 1), x)]
        with torch.no_grad(), bank.rows([2, 0, 1], tokens):
            torch.testing.assert_close(base.run(x), torch.stack(wanted), atol=2e-5, rtol=1e-5)
    (group,) = bank._groups.values()
    assert group.is_whole(64)
    assert not group.is_whole(32)


def test_four_bits_stay_where_bitsandbytes_keeps_them() -> None:
    assert list(map(mixed.few_rows, [(3072, 1024), (4096, 4096), (28672, 8192)])) == [512, 32, 64]


def test_what_layers_share_is_of_their_input_as_each_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Base(EmbeddedBase):
        def __init__(self) -> None:
            super().__init__(64)
            self.readers: Any = torch.nn.ModuleList(torch.nn.Linear(64, 64, False) for _ in range(5))
            self.added = 0.0

        def run(self, x: torch.Tensor) -> torch.Tensor:
            first = self.readers[0](x)
            x += self.added
            return torch.cat([first, *(layer(x) for layer in list(self.readers)[1:])], -1)

    torch.manual_seed(0)
    monkeypatch.setattr(mixed, "compiles", lambda device: True)
    base = Base()
    bank = AdapterBank(base, 1, torch.float32)
    a, b = torch.randn(4, 64) / 64, torch.randn(64, 4)
    with torch.no_grad():
        bank.put(1, {f"readers.{number}": Matrices(a, b) for number in range(5)})
        assert [len(group) for group in bank._groups.values()] == [3, 2], "as many as a kernel takes"
        base.added = 1.0
        for tokens in (2, 70):
            x = torch.randn(2, tokens, 64)
            read = [x, *[x + 1] * 4]
            wanted = [one @ layer.weight.T + one @ a.T @ b.T for one, layer in zip(read, base.readers, strict=True)]
            with bank.device_rows(torch.ones(2, dtype=torch.int64)):
                torch.testing.assert_close(base.run(x.clone()), torch.cat(wanted, -1), atol=2e-5, rtol=1e-5)


def test_only_a_layer_as_it_was_made_is_computed_by_kernels() -> None:
    layer, biased, wrapped = (torch.nn.Linear(4, 4, bias) for bias in (False, True, False))
    wrapped.forward = partial(wrapped.forward)  # type: ignore[method-assign]
    assert list(map(mixed.is_plain_linear, (layer, biased, wrapped))) == [True, False, False]


def test_memory_that_is_short_leaves_a_bank_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.ModuleDict({"one": torch.nn.Linear(4, 4), "other": torch.nn.Linear(4, 4)})
    monkeypatch.setattr(model, "get_input_embeddings", lambda: model["one"], raising=False)
    bank = AdapterBank(model, 1, torch.float32)
    bank.put(1, {path: Matrices(torch.ones(1, 4), torch.ones(4, 1)) for path in ("one", "other")})
    pad, calls = torch.nn.functional.pad, []

    def short(*given: Any) -> torch.Tensor:
        calls.append(given)
        if len(calls) == 3:
            raise torch.OutOfMemoryError
        return pad(*given)

    before = [(group.a_NMRI, group.b_NRP) for group in bank._groups.values()]
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch.nn.functional, "pad", short)
        bank.put(1, {"one": Matrices(torch.ones(9, 4), torch.ones(4, 9))})
    assert all(
        found is kept
        for group, both in zip(bank._groups.values(), before)
        for found, kept in zip((group.a_NMRI, group.b_NRP), both)
    )
    bank.put(1, {"one": Matrices(torch.ones(9, 4), torch.ones(4, 9))})
    assert {group.a_NMRI.shape[2] for group in bank._groups.values()} == {16}


def test_blocks_of_prompts_are_found_by_owner_and_tokens_and_the_oldest_go() -> None:
    prompt = list(range(3 * BLOCK + 5))
    layers = [(torch.randn(2, len(prompt), 4), torch.randn(2, len(prompt), 4))]
    size = 2 * 2 * BLOCK * 4 * 4
    cache = PrefixCache(4 * size)
    cache.keep("one", prompt, layers, 0)
    found = cache.find("one", prompt)
    assert torch.equal(torch.cat([block.layers()[0][0] for block in found], 1), layers[0][0][:, : 3 * BLOCK])
    assert cache.find("two", prompt) == []
    assert len(cache.find("one", prompt[: 2 * BLOCK] + [7] * BLOCK + [1])) == 2
    assert len(cache.find("one", prompt[: 2 * BLOCK])) == 1, "a prompt's last token is read anew"
    cache.keep("two", prompt, layers, 0)
    assert cache.bytes <= 4 * size
    assert len(cache.find("two", prompt)) == 3
    assert len(cache.find("one", prompt)) == 1, "its last blocks were of no use without the first"


HERMES, BARE = CallForm("<tool_call>", "</tool_call>"), CallForm("", "")
ONE = '<tool_call>\n{"name": "a", "arguments": {"x": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("form", "text", "said", "calls"),
    [
        (HERMES, f"Well.\n{ONE}", "Well.", [("a", '{"x": 1}')]),
        (HERMES, f'{ONE}\n<tool_call>{{"name": "b"}}</tool_call>', "", [("a", '{"x": 1}'), ("b", "{}")]),
        (HERMES, ONE[:30], ONE[:30], []),
        (BARE, '{"name": "a", "parameters": {"x": "é"}}', "", [("a", '{"x": "é"}')]),
        (BARE, "It is {not} a call", "It is {not} a call", []),
    ],
)
def test_calls_are_read_in_the_form_of_the_template(
    form: CallForm, text: str, said: str, calls: list[tuple[str, str]]
) -> None:
    left, found = form.read(text)
    assert (left, [(call.name, call.arguments) for call in found]) == (said, calls)


def test_the_form_of_calls_is_the_templates_own() -> None:
    assert call_form(Renderer(tiny_tokenizer())) == CallForm("<tool_call>", "</tool_call>"), "spelled into the text"
    assert call_form(Renderer(tiny_tokenizer(chat=False))) is None


def test_a_watched_folder_is_served_as_it_changes(tmp_path: Path, notices: Any, any_notice: None) -> None:
    make_base(tmp_path / "base", 0)
    (tmp_path / "watched").mkdir()
    with service_of([str(tmp_path / "base")], limits=few()) as service:
        watched = WatchedFolder(tmp_path / "watched", service.adapters)

        def names() -> set[str]:
            watched.look()
            return set(service.adapters.models) - {"base"}

        assert names() == set()
        save_adapter_of("lora", tmp_path / "base", tmp_path / "watched" / "one")
        assert names() == {"one"}
        first = service.adapters.get("one").sha256
        save_adapter_of("rslora", tmp_path / "base", tmp_path / "watched" / "one", r=2)
        assert names() == {"one"}
        assert service.adapters.get("one").sha256 != first
        save_adapter_of("dora", tmp_path / "base", tmp_path / "watched" / "two")
        assert names() == {"one"}
        assert any("DoRA" in event["message"] for event in notices.events)
        (tmp_path / "watched" / "one" / "adapter_config.json").unlink()
        assert names() == set()


def test_what_is_more_than_low_rank_is_served_alone(tmp_path: Path) -> None:
    make_base(tmp_path / "base", 0)
    dora = str(save_adapter_of("dora", tmp_path / "base", tmp_path / "dora"))
    lora = str(save_adapter_of("lora", tmp_path / "base", tmp_path / "lora"))
    with pytest.raises(UserError, match="cannot share a base"), service_of([lora, dora], limits=few()):
        pass
    with service_of([dora], limits=few()) as service, client_of(service) as client:
        assert list(service.adapters.models) == ["dora"]
        asked = {"model": "dora", "prompt": "the cat", "temperature": 0, "max_tokens": 4}
        assert client.post("/v1/completions", json=asked).json()["usage"]["completion_tokens"] == 4
        assert isinstance(service.adapters, Adapters)


def test_vllm_gets_a_command_or_the_reason_why_not(tmp_path: Path) -> None:
    make_base(tmp_path / "base", 0)
    made = {
        kind: find_tuned(str(save_adapter_of(kind, tmp_path / "base", tmp_path / kind)))
        for kind in ("lora", "dora", "rslora")
    }
    words = vllm.command([(kind, made[kind]) for kind in ("lora", "rslora")], "127.0.0.1", 8000, tmp_path / "t.jinja")
    assert words[:3] == ["vllm", "serve", str(tmp_path / "base")]
    assert words[words.index("--max-lora-rank") + 1] == "8"
    assert f"lora={tmp_path / 'lora'}" in words
    assert vllm.refusals([("a", made["lora"])]) == []
    assert any("DoRA" in one for one in vllm.refusals([("a", made["lora"]), ("b", made["dora"])]))


def test_a_prompt_waits_some_steps_for_the_one_behind_it_where_slots_are_short() -> None:
    class Slots:
        """A batch with room for one more prompt, but not for a prompt that is too long."""

        rows = ("an answer",)

        def __init__(self, reads_together: bool) -> None:
            self.reads_together = reads_together

        def fits(self, coming: list[str]) -> bool:
            return len(coming) <= 1 and "too long" not in coming

    def held(*waiting: str, reads_together: bool = True) -> list[bool]:
        scheduler = Scheduler(cast(Any, Slots(reads_together)), 8, Metrics(), overlaps=True)
        scheduler._waiting.extend(cast(Any, waiting))
        return [scheduler._holds() for _ in range(HELD_STEPS + 1)]

    assert held("one", "other") == [True] * HELD_STEPS + [False]
    assert not any(held("one", "too long")), "it may never have room"
    assert not any(held("one"))
    assert not any(held("one", "other", reads_together=False)), "nothing is won by it"
