"""Chat templates are rendered within limits; their date is the run's; what they leave out is found."""

import os
import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.support.rows import CHAT, conversation, jsonl, prepared, renderer, text_of
from veneer.config import UserError
from veneer.data.conversation import Message
from veneer.data.frozen import freeze_date
from veneer.data.leftout import left_out
from veneer.data.sandbox import Job, RefusedError, Sandbox, TemplateLimitError

HOSTILE = {
    "a loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a long text": "{{ 'a' * 6000000000 }}",
    "a wide format": "{{ '%06000000000d' % 1 }}",
    "white space": "{{ 'a b' | indent(6000000000) }}",
    "a wide date": "{{ strftime_now('%6000000000d') }}",
}


# The first two are below: each ends a child, and the next one loads for a second.
@pytest.mark.parametrize("name", ["a wide format", "white space", "a wide date"])
def test_a_template_without_end_is_one_message(name: str, tmp_path: Path) -> None:
    template = HOSTILE[name]
    path = tmp_path / "t.jinja"
    path.write_text(template)
    try:
        told = str(renderer(chat_template=str(path)).render([conversation(CHAT)])[0])  # refused by Python's own limits
    except UserError as error:
        told = str(error)
    assert re.search("chat template (takes|needs|ended|renders|refuses)", told)
    assert renderer().example(conversation(CHAT))  # rendered by the next child


def test_the_limits_are_named_with_the_row() -> None:
    sandbox = Sandbox()
    fine, slow = Job([{"role": "user"}], (), [(1, True)]), Job([{"role": "slow"}], (), [(1, False)])
    template = "{% if messages[0].role == 'slow' %}" + HOSTILE["a loop"] + "{% endif %}{{ messages[0].role }}"
    with pytest.raises(TemplateLimitError, match="longer than 2 s") as caught:
        sandbox.render(template, {}, [fine, slow, fine])
    assert caught.value.row == 1
    with pytest.raises(TemplateLimitError, match="more than 512 MiB"):
        sandbox.render(HOSTILE["a long text"], {}, [fine])
    (((text,), (refused,))) = sandbox.render("{{ raise_exception('no') if not tools else 'yes' }}", {}, [
        Job([], [{"type": "function"}], [(0, False)]), fine,
    ])  # fmt: skip
    assert text == "yes"
    assert isinstance(refused, RefusedError)
    assert str(refused) == "no"
    sandbox.stop()


def test_a_file_in_the_working_folder_is_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    sandbox = Sandbox()
    assert sandbox.render("a", {}, [Job([], (), [(0, False)])]) == [["a"]]
    sandbox.stop()
    assert os.listdir(tmp_path) == ["json.py"]


@pytest.mark.parametrize(("name", "told"), [("a loop", "longer than 2 s"), ("a long text", "more than 512 MiB")])
def test_workers_of_the_pool_have_the_same_limits(name: str, told: str, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    body = renderer().template
    template.write_text("{% if messages[0].content == 'row 3' %}" + HOSTILE[name] + "{% endif %}" + str(body))
    rows = [
        {"messages": [{"role": "user", "content": f"row {n}"}, {"role": "assistant", "content": "a"}]} for n in range(5)
    ]
    with pytest.raises(UserError, match=f"the chat template .*{told}"):
        prepared(jsonl(tmp_path, rows), chat_template=str(template), workers=2)


# The date


DATED = "{{ bos_token }}{{ strftime_now('%d %b %Y') }}"


def dated(tmp_path: Path, **settings: Any) -> Any:
    template = tmp_path / "t.jinja"
    body = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template.write_text(DATED + body + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    return renderer(chat_template=str(template), **settings)


def test_a_template_that_asks_for_today_gets_the_runs_date_on_every_day(tmp_path: Path) -> None:
    first = dated(tmp_path, template_date="2024-02-29")
    assert first.is_dated
    assert "29 Feb 2024" in text_of(first.example(conversation(CHAT)))
    assert date.today().strftime("%d %b %Y") in text_of(dated(tmp_path).example(conversation(CHAT)))
    # What ships renders that date whatever the day, and freezing it once more changes nothing.
    assert freeze_date(first.template, date(2030, 1, 1)) == first.template
    assert not renderer(template_date="2024-02-29").is_dated


def test_a_date_in_a_form_that_is_computed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text("{{ strftime_now('%' ~ 'Y') }}")
    (made,) = renderer(chat_template=str(path)).render([conversation(CHAT)])
    assert "asks for a date in a form that cannot be frozen: %Y" in str(made)


# What a template leaves out


def test_fields_are_found_where_a_template_puts_them() -> None:
    system, asked = Message("system", "yes"), Message("user", " say yes\n now ")
    assert left_out([system, asked], "[say yes now] yes") == ""
    assert left_out([system, asked], "[say yes now]") == "the system turn"
    assert left_out([Message("tool", 'a "b"\nc')], '"a \\"b\\"\\nc"') == ""
    call = {"name": "lamp", "arguments": {"where": ["hall"]}}
    said = Message("assistant", "Wait.", reasoning="Hm", tool_calls=(call,))
    assert left_out([said], "Hm Wait. lamp where hall") == ""
    assert left_out([said], "Wait. lamp where hall") == "the reasoning of the answer"
    assert left_out([said], "Hm Wait. lamp where") == "a call's name and arguments"
    assert left_out([said], "Hm lamp where hall") == "the answer"


NO_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_system_turn_that_a_template_leaves_out_is_refused_or_rendered_and_counted(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text(NO_SYSTEM)
    turns = [{"role": r, "content": c} for r, c in (("system", "be brief"), ("user", "hi"), ("assistant", "the cat"))]
    path = jsonl(tmp_path, [{"messages": turns}])
    with pytest.raises(UserError, match=r"has no place for a system turn.*data\.unrendered"):
        prepared(path, chat_template=str(template))
    for policy, note, text in (
        ("into-user", "system_into_user", "user\nbe brief\n\nhi<"),
        ("leave-out", "left_out_by_template", "user\nhi<"),
    ):
        data = prepared(path, chat_template=str(template), unrendered=policy)
        assert text in text_of(data.train[0])
        assert data.ledger.notes[note] == 1
        assert any("system turn" in told or "leaves something out" in told for told in data.ledger.warnings)
    # Generation puts it where training did.
    made = renderer(chat_template=str(template), unrendered="into-user")
    assert "be brief\n\nhi" in made.tokenizer.decode(
        made.prompt_ids([Message("system", "be brief"), Message("user", "hi")])
    )
