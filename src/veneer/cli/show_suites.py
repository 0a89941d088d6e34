"""Prints what was measured beside the held-out rows: suites, forgetting, memorisation, personal data in answers."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from veneer.cli import show


def show_suites(out: Console, result: dict[str, Any], called: Mapping[str, str] | None = None) -> None:
    """Print the parts that an evaluation has.

    Args:
        out: The console to print on.
        result: evaluation.json.
        called: argument of `show_scores`.
    """
    if found := result.get("suites"):
        show.show_scores(out, "suites, 95% intervals", found["scores"], ("base", "tuned"), called)
        if lost := found["forgetting"]:
            out.print(lost["line"])
            if weak := lost["little_to_lose"]:
                say = "the base has hardly any item right, so that no loss can show"
                show.say(out, f"         {', '.join(weak)}: {say}")
    if found := result.get("memorisation"):
        show.say(out, _memorisation(found))
    if found := result.get("personal"):
        counts = [f"{(called or {}).get(name, name)} {_counts(found[name])}" for name in ("base", "tuned")]
        show.say(out, f"personal data in {found['answers']} answers: {', '.join(counts)}")


def _memorisation(found: dict[str, Any]) -> str:
    begins = f"memorisation: of {found['rows']} training rows"
    if not found["measured"]:
        return f"{begins} none is long enough to say anything"
    shares = {name: show.interval("share", found[name]) for name in ("base", "tuned", "held_out") if name in found}
    control = f"; of held-out rows, as a control, {shares['held_out']}" if "held_out" in shares else ""
    return (
        f"{begins} {found['measured']} are long enough, of which {shares['tuned']} come back word for word "
        f"(from the base {shares['base']}){control}"
    )


def _counts(counts: dict[str, int]) -> str:
    return " ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"
