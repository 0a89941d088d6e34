"""The checks of a certificate that need no second model: tokens of prompts, weights, stops.

settings.py has those of configuration and decoding, agreement.py and verdict.py those against the judged model.
"""

from collections.abc import Sequence

from veneer.config.results import Check
from veneer.data.render import Renderer
from veneer.release.certify.artifact import Artifact
from veneer.release.certify.compare_weights import STRENGTH, Compared
from veneer.release.certify.diagnose import diagnose_prompt
from veneer.release.certify.prompts import Prompt
from veneer.release.certify.runtimes import Answer, Runtime


def unmade(checks: Sequence[Check], has_rows: bool) -> dict[str, str]:
    """Return the checks that could not be made, by name, with the reason."""
    made = {check.id for check in checks}
    reasons = {
        "prompt_tokens": ("prompt tokens", "the server does not report them"),
        "stop_tokens": ("stop tokens", "the server does not report them"),
        "weights": ("weights", "a server does not show them"),
        "strength": ("strength of the adapter", "it changes no weight that can be seen"),
        "settings": ("architecture settings", "a server does not show them"),
        "decoding": ("decoding settings", "they are the caller's"),
        "distributions": ("next-token distributions", "the server names no tokens by their ids"),
    }
    if "weights" not in made:
        reasons["strength"] = (reasons["strength"][0], reasons["weights"][1])
    if has_rows:
        reasons["stops"] = ("answers that end by themselves", "those of the judged model run on to the limit")
    return {name: why for check, (name, why) in reasons.items() if check not in made}


def prompt_checks(runtime: Runtime, renderer: Renderer, prompts: Sequence[Prompt], artifact: Artifact) -> list[Check]:
    """Compare the artifact's tokens of each prompt with those of training."""
    same = known = 0
    wrong = ""
    for prompt in prompts:
        found = runtime.prompt_ids(prompt.messages)
        if found is None:
            count = runtime.prompt_count(prompt.messages)
            if count is not None:
                known += 1
                same += count == len(prompt.ids)
                if count != len(prompt.ids) and not wrong:
                    wrong = f"{prompt.id}: {count} tokens, in training {len(prompt.ids)}"
            continue
        known += 1
        same += found == prompt.ids
        if found != prompt.ids and not wrong:
            wrong = f"{prompt.id}: {diagnose_prompt(renderer, prompt.ids, found, artifact.path)}"
    if not known:
        return []
    return [Check("prompt_tokens", same == known, f"{same} of {known} identical", "all", "prompt tokens", wrong)]


def weight_checks(compared: Compared | None) -> list[Check]:
    if compared is None:
        return []
    strength = compared.strength
    weak = strength is not None and abs(strength - 1) > STRENGTH
    # Where the adapter's strength is what is wrong, that check has the name for it.
    detail = compared.diagnosis
    whole = f"{compared.tensors - len(compared.wrong)} of {compared.tensors} within their precision"
    checks = [Check("weights", not compared.wrong, whole, "all", "weights", detail if compared.wrong else "")]
    if strength is not None:
        name, limit = "strength of the adapter", f"1 ± {STRENGTH}"
        checks.append(Check("strength", not weak, round(strength, 4), limit, name, detail if weak else ""))
    return checks


def stop_checks(answers: Sequence[Answer], expected: Sequence[Answer], prompts: Sequence[Prompt]) -> list[Check]:
    rows = [n for n, prompt in enumerate(prompts) if prompt.reference is not None and expected[n].stopped]
    if not rows:
        return []
    ended = sum(answers[n].stopped for n in rows)
    # One answer in fifty may run on: a different word early can lead anywhere.
    least = len(rows) - len(rows) // 50
    detail = "" if ended >= least else "its answers run on where those of the judged model end"
    name, value = "answers that end by themselves", f"{ended} of {len(rows)}"
    return [Check("stops", ended >= least, value, least, name, detail, "at least")]
