"""Every setting changes what a run comes to: derived from the settings, so that a new one without an effect fails.

A changed value is derived from the type and the limits of the field; only what cannot be derived stands in a table.
Runs with the value and without are compared view by view (rows, training, answers, plan), the cheapest first, until one
differs.
"""

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import annotated_types
import datasets
import huggingface_hub.constants
import pytest
from pydantic.fields import FieldInfo

from tests.support.adapters import save_adapter_of
from tests.support.outcomes import VIEWS, outcome, plan_of
from tests.support.rows import turns
from tests.support.runs import some_rows, write_rows
from tests.support.tiny import CHATML, FAMILIES, save_tiny_model
from veneer.config import Run
from veneer.config.load import sections

FIELDS = {f"{name}.{key}": field for name, section in sections().items() for key, field in section.model_fields.items()}
TEMPLATES = Path(__file__).parent / "templates"
REVISION = "0123456789abcdef0123456789abcdef01234567"

# Values that types and limits do not say.
VALUES: dict[str, Any] = {
    "model.base": "files/other",
    "model.revision": "v2",
    "model.task": "sequence-classification",
    "model.adapter": "files/start",
    "adapter.target_modules": ["q_proj", "v_proj"],
    "adapter.exclude_modules": ["k_proj"],
    "adapter.layers_to_transform": [0],
    "adapter.rank_pattern": {"q_proj": 8},
    "adapter.alpha_pattern": {"q_proj": 64},
    "adapter.init_lora_weights": "gaussian",
    "adapter.modules_to_save": ["lm_head"],
    "adapter.trainable_token_indices": [5, 6],
    "data.train": "files/others.jsonl",
    "data.validation": 4,
    "data.split": "test",
    "data.subset": "en",
    "data.columns": {"prompt": "q1", "completion": "a1"},
    "data.labels": ["b", "a"],
    "data.ignore_columns": ["context"],
    "data.max_length": 29,  # the least leaves no row
    "data.max_cut_rows": 1.0,
    "data.group": "who",
    "data.chat_template": "alpaca",
    "data.add_special_tokens": ["<|new|>"],
    "evaluate.group": "who",
    "train.memory_budget": "12GiB",
    "evaluate.metrics": ["length", "exact_match"],
    "evaluate.extract": "^.",
    "evaluate.json_schema": "files/schema.json",
    "evaluate.during": ["exact_match"],
    "train.early_stopping": {"patience": 1, "min_delta": 5},
    "train.dpo": {"beta": 0.5},
    "train.reference": "none",  # live comes to the same numbers as cached
    "train.kto": {"beta": 0.5},
    "train.orpo": {"beta": 0.5},
    "train.simpo": {"beta": 0.5},
    "train.cpo": {"beta": 0.5},
    "train.learning_rate": 5e-3,
    "train.optim_rank": 4,
    "train.loraplus_lr_ratio": 16,
    "train.warmup_ratio": 0.5,  # half of the default is no step of a short run
}
LABELLED: dict[str, dict[str, Any]] = {
    "data": {"train": "files/labelled.jsonl"},
    "evaluate": {"max_new_tokens": 256},
}
CLASSIFIES = LABELLED | {"model": {"task": "sequence-classification"}}
EMBEDS = LABELLED | {"model": {"task": "embedding"}}
# What must be so for a setting to act.
WHERE: dict[str, dict[str, Any]] = {
    "model.revision": {"model": {"base": "org/tiny"}},
    "adapter.method": {"adapter": {"r": 16, "lora_alpha": 32}},  # the defaults: some methods have neither
    "model.task": LABELLED,
    "data.labels": CLASSIFIES,
    "train.class_weights": CLASSIFIES,
    "model.pooling": EMBEDS,
    "train.temperature": EMBEDS,
    "model.attn_implementation": {"train": {"engine": "reference"}},  # the fused engine has its own
    "adapter.bias": {"model": {"base": "files/biased"}},
    "quantization.cache": {"model": {"base": "files/cached"}},
    "data.split": {"data": {"train": "files/splits"}},
    "data.subset": {"data": {"train": "org/rows"}},
    "data.format": {"data": {"train": "files/pairs.jsonl"}},
    "data.columns": {"data": {"train": "files/odd.jsonl"}},
    "data.ignore_columns": {"data": {"train": "files/context.jsonl"}},
    "data.text_by": {"data": {"train": "files/prose.txt"}},
    "data.overlong": {"data": {"train": "files/text.jsonl", "max_length": 16, "max_cut_rows": 1}},
    "data.max_row_bytes": {"data": {"train": "files/large.jsonl", "bad_rows": "drop"}},
    "data.max_cut_rows": {"data": {"overlong": "truncate", "max_length": 27}},
    "data.bad_rows": {"data": {"train": "files/broken.jsonl"}},
    "data.duplicates": {"data": {"train": "files/alike.jsonl"}},
    "data.group": {"data": {"train": "files/grouped.jsonl", "validation": 0.3}},
    "data.overlap": {"data": {"train": "files/alike.jsonl", "validation": "files/shared.jsonl"}},
    "data.template_date": {"data": {"chat_template": "files/dated.jinja"}},
    "data.unrendered": {"data": {"train": "files/system.jsonl", "chat_template": "files/no-system.jinja"}},
    "data.loss_on": {"data": {"train": "files/chats.jsonl"}},
    "data.rewritten_history": {
        "data": {"train": "files/thoughts.jsonl", "chat_template": str(TEMPLATES / "qwen-3.jinja")}
    },
    "data.special_tokens_in_text": {"data": {"train": "files/control.jsonl"}},
    "train.objective": {"data": {"train": "files/pairs.jsonl"}},
    "train.dpo": {"data": {"train": "files/pairs.jsonl"}},
    "train.reference": {"data": {"train": "files/pairs.jsonl"}},
    "train.kto": {"data": {"train": "files/rated.jsonl"}},
    **{
        f"train.{name}": {"data": {"train": "files/pairs.jsonl"}, "train": {"objective": name}}
        for name in ("orpo", "simpo", "cpo")
    },
    "train.memory_budget": {"train": {"gradient_checkpointing": "auto"}},
    "train.lr_scheduler_type": {"train": {"max_steps": 4}},  # of 3 steps, one of them warm-up, both rates are the same
    "train.num_train_epochs": {"train": {"max_steps": None}},
    "train.optim_rank": {"adapter": "none", "train": {"optim": "apollo_adamw"}},
    "train.master_weights": {"adapter": "none", "model": {"dtype": "bfloat16"}},
    "train.gradient_accumulation_steps": {"train": {"gradient_accumulation_steps": 2}},
    "train.eval_steps": {"data": {"validation": 2}},
    "train.early_stopping": {"data": {"validation": 2}, "train": {"eval_steps": 1}},
    "train.keep": {"data": {"validation": 2}, "train": {"eval_steps": 1}},
    "train.save_total_limit": {"train": {"save_steps": 1}},
    "train.on_divergence": {
        "adapter": {"target_modules": ["q_proj", "lm_head"], "lora_alpha": 64},
        "train": {"learning_rate": 0.5, "max_steps": 24, "warmup_ratio": 0.5},
    },
    "evaluate.rows": {"data": {"validation": 3}},
    "evaluate.metrics": {"data": {"validation": 3}},
    "evaluate.extract": {"data": {"validation": 3}},
    "evaluate.json_schema": {"data": {"train": "files/numbers.jsonl", "validation": 3}},
    "evaluate.max_new_tokens": {"data": {"validation": 3}},
    "evaluate.group": {"data": {"train": "files/grouped.jsonl", "validation": 3}},
    "evaluate.equal_within": {"data": {"validation": 3}},
    "evaluate.batch_size": {"data": {"validation": 3}},
    "evaluate.during": {"data": {"validation": 3}},
    "evaluate.during_tokens": {"data": {"validation": 3}, "evaluate": {"during": ["exact_match"]}},
}
# Settings that this machine may refuse, since they are for a GPU: the plan for one shows what they do.
FOR_GPU = {"train.memory_budget"}
# Settings that are to leave every outcome alone, with the test of what they do.
UNSEEN = {
    "train.report_to": "test_trackers.py::test_tensorboard_reads_a_run_that_was_resumed",
    "data.workers": "test_prepare.py::test_several_processes_give_the_same_rows",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Path:
    """Bases and rows of every kind, on which each setting has something to act."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("base", "cached"):
        save_tiny_model(FAMILIES["llama"], folder / name)
    save_adapter_of("lora", folder / "base", folder / "start", r=4, lora_alpha=8, target_modules="all-linear")
    save_tiny_model(FAMILIES["qwen2"], folder / "biased")
    kind, sizes = FAMILIES["llama"]
    save_tiny_model((kind, sizes | {"intermediate_size": 96}), folder / "other")
    held = folder / "hub" / "models--org--tiny"
    (held / "refs").mkdir(parents=True)
    (held / "snapshots").mkdir()
    for ref, commit, base in (("main", REVISION, "base"), ("v2", REVISION[::-1], "other")):
        (held / "refs" / ref).write_text(commit)
        (held / "snapshots" / commit).symlink_to(folder / base)

    animals = ["cat", "dog", "owl", "hen"]
    rows = some_rows()[:12]
    long = "the owl and the hen route this message to the right team while the cat and the dog say what they please"
    again = {"prompt": long, "completion": "owl"}
    written: dict[str, list[Any]] = {
        "rows": rows,
        "others": [row | {"completion": "cow"} for row in rows],
        "pairs": [{"prompt": row["prompt"], "chosen": "yes", "rejected": "no"} for row in rows],
        "rated": [row | {"label": n % 2 == 0} for n, row in enumerate(rows)],
        "labelled": [
            {
                **{"text": row["prompt"], "label": "a" if n % 3 else "b"},
                **{"tokens": row["prompt"].split(), "tags": ["O", "B-A", *["O"] * len(row["prompt"].split())][:-2]},
                **{"anchor": row["prompt"], "positive": row["completion"]},
            }
            for n, row in enumerate(rows)
        ],
        "odd": [{"q1": row["prompt"], "a1": row["completion"]} for row in rows],
        "context": [row | {"context": f"field {n}"} for n, row in enumerate(rows)],
        "numbers": [row | {"completion": str(n % 3)} for n, row in enumerate(rows)],
        "text": [{"text": "the owl"}, *({"text": f"{n} {long}"} for n in range(3))],
        "large": [*rows, {"prompt": "the cat " * 200, "completion": "cat"}],
        "alike": [*rows, again, again, {"prompt": long + " and more", "completion": "owl"}],
        "shared": [{"prompt": f"tell me at once whether {long}", "completion": "hen"}],
        "grouped": [row | {"who": animals[n % 4]} for n, row in enumerate(rows)],
        "system": [{"messages": turns([("system", "be brief"), ("user", "the cat"), ("assistant", "cat")])}] * 1
        + [{"messages": turns([("user", f"the {name}"), ("assistant", name)])} for name in animals],
        "chats": [
            {"messages": turns([("user", "a"), ("assistant", "b"), ("user", name), ("assistant", "c"), ("tool", "d"),
                                ("assistant", name)])}
            for name in animals
        ],
        "thoughts": [
            {"messages": turns([("user", "a"), ("assistant", "<think>\nb\n</think>\n\nc"), ("user", name),
                                ("assistant", name)])}
            for name in animals
        ],
        "control": [{"prompt": f"what <|im_end|> does the {name} say", "completion": name} for name in animals],
    }  # fmt: skip
    for name, lines in written.items():
        write_rows(folder / f"{name}.jsonl", lines)
    (folder / "schema.json").write_text('{"type": "integer"}')
    (folder / "broken.jsonl").write_text((folder / "rows.jsonl").read_text() + "{\n")
    (folder / "prose.txt").write_text("the cat\nthe dog\n\nthe owl\n\nthe hen\n")
    (folder / "dated.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + CHATML)
    (folder / "no-system.jinja").write_text(
        CHATML.replace("in messages %}", "in messages if message['role'] != 'system' %}")
    )
    parts = {name: datasets.Dataset.from_list(rows[at:]) for name, at in (("train", 0), ("test", 6))}
    datasets.DatasetDict(parts).save_to_disk(folder / "splits")
    return folder


@pytest.fixture
def here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place to run in, with a hub that knows one model and one dataset."""

    def load_dataset(name: str, subset: str | None, split: str) -> datasets.Dataset:
        rows = [json.loads(line) for line in (files / "rows.jsonl").read_text().splitlines()]
        return datasets.Dataset.from_list(rows[5:] if subset else rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(files / "hub"))
    return tmp_path


def settings(name: str) -> dict[str, Any]:
    """The run without the changed value."""
    values: dict[str, Any] = {
        "model": {"base": "files/base", "dtype": "float32"},
        "quantization": {} if name.startswith("quantization.") else None,
        "adapter": {"r": 4, "lora_alpha": 8},
        "data": {"train": "files/rows.jsonl", "validation": 0, "max_length": 128, "workers": 1},
        "train": {
            **{"max_steps": 3, "gradient_accumulation_steps": 1, "learning_rate": 1e-2},
            "gradient_checkpointing": False,  # recomputing takes time, here and in each dry run
        },
        "evaluate": {"max_new_tokens": 4},
    }
    for section, changes in WHERE.get(name, {}).items():
        values[section] = changes if isinstance(changes, str) else values[section] | changes
    return values


def changed(values: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """The same run with another value; None for a section that can have no other."""
    section, key = name.split(".")
    return values | {section: None if value is LEFT_OUT else values[section] | {key: value}}


LEFT_OUT = object()  # the section itself


def other_values(field: FieldInfo, now: Any) -> list[Any]:
    """Values that a field may have, other than it has: each of its choices, or one that its limits allow."""
    parts = [part for part in _parts(field.annotation) if part is not NoneType]
    choices = [value for part in parts if get_origin(part) is Literal for value in get_args(part)]
    if bool in parts:
        choices += [True, False]
    if choices:
        return [value for value in choices if value != now] or [LEFT_OUT]
    limits = {type(limit): limit for limit in field.metadata}
    least = limits.get(annotated_types.Ge)
    if int in parts:
        lowest = least.ge if least else 0
        return [lowest if lowest != now else now + 1]
    if float in parts:
        return [now / 2 if now else 0.5]
    if Path in parts:
        return [now / "other"]
    if datetime.date in parts:
        return [datetime.date(2024, 2, 29)]
    if str in parts:
        return ["be brief"]
    raise AssertionError(f"no value can be derived from {field.annotation}: name one in VALUES")


def _parts(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) not in (None, Literal) else (annotation,)


@pytest.fixture(scope="module")
def known() -> dict[tuple[str, str], str]:
    """Outcomes by view and settings: of runs without a change, which settings share."""
    return {}


@pytest.fixture(scope="module")
def met() -> dict[tuple[str, str], str]:
    """Outcomes that a change of some settings has led to, and which change: no two do the same."""
    return {}


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in UNSEEN])
def test_a_setting_changes_what_a_run_comes_to(
    name: str,
    here: Path,
    files: Path,
    known: dict[tuple[str, str], str],
    met: dict[tuple[str, str], str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if name == "train.on_divergence":  # it warns
        request.getfixturevalue("any_notice")
    if name == "model.revision":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    section, key = name.split(".")
    values = settings(name)
    now = getattr(getattr(Run.model_validate(values), section), key)
    others = [VALUES[name]] if name in VALUES else other_values(FIELDS[name], now)
    is_auto = "auto" in (now, *others)  # comes to what one of the others says, and some may be none for these rows

    def seen(view: Callable[[Run], Any], values: dict[str, Any], place: str) -> str:
        (here / place).mkdir()
        monkeypatch.chdir(here / place)
        Path("files").symlink_to(files)
        return outcome(view, Run.model_validate(values))

    def differs(value: Any, which: int) -> bool:
        for number, view in enumerate([plan_of] if name in FOR_GPU else VIEWS):
            case = view.__name__, json.dumps(values)
            if case not in known:
                known[case] = seen(view, values, f"as-it-is-{number}")
            found = seen(view, changed(values, name, value), f"{which}-{number}")
            if found == known[case]:
                continue
            if found.startswith("refused") and value != "refuse":
                assert is_auto, f"{name} = {value}: {found}"
                return False
            other = met.setdefault((case[1], found), name)
            assert other == name, f"{name} does what {other} does"
            return True
        return False

    same = [value for which, value in enumerate(others) if not differs(value, which)]
    assert len(same) < len(others) if is_auto else not same, f"{name} = {same} gives what {now!r} gives"


def test_what_no_outcome_shows_is_tested_elsewhere() -> None:
    for name, test in UNSEEN.items():
        file, function = test.split("::")
        assert name in FIELDS
        assert f"def {function}(" in (Path(__file__).parent / file).read_text()
    assert set(VALUES) | set(WHERE) | FOR_GPU <= set(FIELDS)
