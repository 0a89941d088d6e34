"""An Ollama Modelfile: the chat template in Ollama's own language, and the texts that end an answer.

Ollama does not run the Jinja template that a GGUF file carries; it wants the same in Go's template language. Most
templates are a chain of turns, each between two fixed texts, so those texts are read off renderings of the template,
written down in Go, and the result is checked: what it would render must equal what the template renders, on
conversations of several shapes. Where a template is no such chain, the Modelfile says so, and for how many of them
the two differ.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from veneer.data.conversation import BadRowError, Message
from veneer.data.drafts import shared_length
from veneer.data.render import Renderer
from veneer.data.template import Template, begin_ids

U, A, S = "qzUSERzq", "qzANSWERzq", "qzSYSTEMzq"
TRIALS = (
    (Message("user", U),),
    (Message("system", S), Message("user", U)),
    (Message("user", U), Message("assistant", A), Message("user", "more")),
    (Message("system", S), Message("user", U), Message("assistant", A), Message("user", "more")),
)


@dataclass(frozen=True)
class Chain:
    """A template as fixed texts around each turn.

    Attributes:
        start: Text before everything.
        unasked: Text at the beginning where there is no system turn.
        system, user, assistant: Text before and after a turn's own.
        prompt: Text that asks for the answer.
    """

    start: str
    unasked: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str

    def render(self, messages: Sequence[Message]) -> str:
        """Render a conversation."""
        around = {"system": self.system, "user": self.user, "assistant": self.assistant}
        turns = "".join(around[m.role][0] + m.content + around[m.role][1] for m in messages)
        lead = "" if messages[0].role == "system" else self.unasked
        return self.start + lead + turns + self.prompt

    def as_go(self) -> str:
        """Write the chain in Ollama's template language."""
        parts = [_literal(self.start)]
        if self.unasked:
            first = '{{ if or (not .Messages) (ne (index .Messages 0).Role "system") }}'
            parts.append(f"{first}{_literal(self.unasked)}{{{{ end }}}}")
        parts.append("{{ range .Messages }}")
        for n, (role, around) in enumerate(
            (("system", self.system), ("user", self.user), ("assistant", self.assistant))
        ):
            parts.append(f'{{{{ {"if" if n == 0 else "else if"} eq .Role "{role}" }}}}')
            parts.append(f"{_literal(around[0])}{{{{ .Content }}}}{_literal(around[1])}")
        parts.append("{{ end }}{{ end }}")
        parts.append(_literal(self.prompt))
        return "".join(parts)


def modelfile(file: str, renderer: Renderer, stops: Sequence[str], adapter_of: str | None = None) -> str:
    """Write the text of a Modelfile.

    Args:
        file: Name of the GGUF file beside it.
        renderer: The tokenizer and the template of the training.
        stops: Texts of the tokens at which an answer ends.
        adapter_of: The base's name, or its file beside this one, where the file is an adapter alone.
    """
    lines = [f"FROM {adapter_of}", f"ADAPTER ./{file}"] if adapter_of else [f"FROM ./{file}"]
    lines.insert(0, "# ollama create NAME -f Modelfile")
    if adapter_of:
        lines.insert(1, "# FROM names the base as Ollama finds it: a folder, a GGUF file, or a name in its library.")
    found = chain_of(renderer)
    bos = renderer.tokenizer.bos_token or ""
    if found is not None:
        wrong = unlike(found, renderer)
        if wrong:
            lines.append(
                f"# The model's template is more than a chain of turns: {wrong} of {len(TRIALS)} trials differ."
            )
            lines.append("# llama-server --jinja runs the template itself, which the GGUF file carries.")
        go = found.as_go()
        # The runner puts the begin token before every prompt by itself.
        go = go.removeprefix(_literal(bos)) if bos and begin_ids(renderer.tokenizer) else go
        lines.append(f'TEMPLATE """{go}"""')
    elif renderer.is_chat:
        lines.append("# The model's template cannot be written in Ollama's language;")
        lines.append("# llama-server --jinja runs the template itself, which the GGUF file carries.")
    else:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    if renderer.settings.system_prompt is not None:
        lines.append(f'SYSTEM """{renderer.settings.system_prompt}"""')
    lines += ["# Greedy, as the run was judged.", "PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    return "\n".join(lines) + "\n"


def chain_of(renderer: Renderer) -> Chain | None:
    """Find the fixed texts around the turns in renderings; None where the template has none."""
    one, system, more = (_rendered(renderer, trial) for trial in (TRIALS[0], TRIALS[1], TRIALS[2]))
    alone = _rendered(renderer, TRIALS[0], asks=False)
    if one is None or more is None or alone is None or one.count(U) != 1 or more.count(A) != 1:
        return None
    # A template may close a text that asks for nothing with one more token.
    shared = one[: shared_length(one, alone)]
    cut = len(shared) if one[len(shared) :].startswith("<") or "<" not in shared else shared.rindex("<")
    cut = max(cut, one.index(U) + len(U))
    prompt = one[cut:]
    before_user, after_user = one[:cut].split(U)
    middle = more[more.index(U) + len(U) :]
    if not middle.startswith(after_user + prompt + A) or not middle.endswith(after_user + prompt):
        return None
    # After the answer comes the next question: the part all questions share is what stands before one.
    gap = middle[len(after_user + prompt + A) : middle.rindex("more")]
    alike = shared_length(before_user[::-1], gap[::-1])
    user = _from_last(gap[len(gap) - alike :], prompt)
    after_answer = gap[: len(gap) - len(user)]
    lead = before_user[: len(before_user) - len(user)]
    bos = renderer.tokenizer.bos_token or ""
    start = bos if bos and lead.startswith(bos) and begin_ids(renderer.tokenizer) else ""
    chain = Chain(start, lead[len(start) :], ("", ""), (user, after_user), (prompt, after_answer), prompt)
    if system is None or system.count(S) != 1 or not system.startswith(start):
        return chain
    before, after = system[len(start) :].split(S)
    tail = user + U + after_user + prompt
    if not after.endswith(tail):
        return chain
    return Chain(start, chain.unasked, (before, after[: -len(tail)]), chain.user, chain.assistant, prompt)


def unlike(chain: Chain, renderer: Renderer) -> int:
    """Count the trials that a chain renders otherwise than the template."""
    expected = [_rendered(renderer, trial) for trial in TRIALS]
    return sum(text is not None and chain.render(trial) != text for trial, text in zip(TRIALS, expected))


def _rendered(renderer: Renderer, messages: Sequence[Message], asks: bool = True) -> str | None:
    if renderer.template is None:
        return None
    try:
        return Template(renderer.tokenizer, renderer.template, renderer.settings).text(messages, asks)
    except BadRowError:
        return None


def _from_last(shared: str, prompt: str) -> str:
    """Return the text before a lone question, from the last occurrence of the marker that turns begin with, if any."""
    sign = re.match(r"<[^<>]+>", prompt)
    at = shared.rfind(sign[0]) if sign else -1
    return shared[at:] if at > 0 else shared


def _literal(text: str) -> str:
    """Quote text for a Go template within a Modelfile's triple quotes."""
    return text.replace("{{", '{{ "{{" }}').replace('"""', '{{ "\\"\\"\\"" }}')
