"""Writes what a user should know of their data, from the ledger's counts alone."""

from veneer.config import Data
from veneer.data.formats import OF_TASKS
from veneer.data.ledger import Ledger


def warnings_of(ledger: Ledger, data: Data, is_written: bool = True) -> list[str]:
    """Sentences for everything in the ledger that is not as one would hope.

    Args:
        ledger: counts.
        data: settings.
        is_written: whether answers are written, and not rewarded: then they have to end.
    """
    rows, notes = ledger.rows, ledger.notes
    cut, inside = notes["all_cut"], notes["in_held_out_file"]
    counted = [
        (rows["unreadable"], "cannot be read: left out"),
        (rows["refused"] - notes["same_answers"] - notes["other_prompts"], "cannot be right: left out"),
        (notes["same_answers"], "whose chosen and rejected answers are the same: left out"),
        (notes["other_prompts"], "whose chosen and rejected conversations have different prompts: left out"),
        (rows["overlong"] - cut - notes["overlong_pairs"], "longer than data.max_length: left out"),
        (notes["overlong_pairs"], "with an answer beyond data.max_length: the pair is left out whole"),
        (cut, "without a trained token within data.max_length: left out"),
        (notes["truncated"], "longer than data.max_length: the end is cut off"),
        (notes["chunked"], "of text longer than data.max_length: cut into pieces, all of them learnt"),
        (notes["ignored_columns"], "with something in a column that data.ignore_columns names: it is left out"),
        (notes["control_tokens_stripped"], "of which control tokens at the end of a turn are taken off"),
        (rows["empty"], "with an empty answer: left out"),
        (rows["duplicate"] - (inside if data.duplicates != "keep" else 0), "equal to an earlier one: left out"),
        (notes["duplicate_kept"], "equal to an earlier one: kept"),
        (
            notes["near_duplicate_kept"],
            "nearly equal to another: kept on its side of the split (data.duplicates=drop-near leaves them out)",
        ),
        (notes["left_out_by_template"], "of which the chat template leaves something out: learnt without it"),
        (notes["system_into_user"], "with a system turn that stands in the user turn behind it"),
        (notes["tools_spelled"], "with tools in Veneer's form (`<tool_call>`): the chat template has none of its own"),
        (notes["reasoning_spelled"], "with reasoning as `<think>` in the text: the chat template has no place for it"),
        (notes["ends_without_answer"], "with more after the last answer: that end is left off"),
        (notes["orphan_tags"], "with a tag such as I-PER behind none of its kind: it begins an entity, as in IOB1"),
        (notes["words_without_tokens"], "with words that are no token of the tokenizer: their tags are not learnt"),
        (notes["in_held_out_group"], "to train on, of a group that the held-out files have too"),
        (
            inside,
            "to train on that the held-out files have too: "
            + ("kept, so these measure memory" if data.duplicates == "keep" else "left out"),
        ),
    ]
    found = [f"{count:,} {'row' if count == 1 else 'rows'} {what}" for count, what in counted if count]
    if shared := ledger.overlap.get("rows"):
        places = ", ".join(ledger.overlap["places"][:3])
        found.append(
            f"{shared} of {ledger.overlap['of']} held-out rows share 13 words in a row with training rows: {places} ..."
        )
    if bool(notes["rated_good"]) != bool(notes["rated_bad"]):
        found.append(f"all rated rows are rated {'good' if notes['rated_good'] else 'bad'}: kto learns from both")
    if ledger.personal:
        kinds = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in sorted(ledger.personal.items()))
        done = "left as it is; data.pii=redact replaces it" if data.pii == "report" else "redacted"
        found.append(f"personal data: {kinds} ({done})")
    are_labels = all(known["format"] in OF_TASKS for known in ledger.formats.values())
    if not ledger.tokens["end_of_turn"] and is_written and not are_labels:
        found.append("no end-of-turn token is trained: the model would never learn to stop")
    if not rows["validation"]:
        found.append("no row is held out: nothing will show whether the model got better")
    return found
