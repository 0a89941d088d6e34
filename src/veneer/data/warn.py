"""What a user should know of their data, in sentences: from the ledger's counts alone."""

from veneer.config import Data
from veneer.data.ledger import Ledger


def warnings_of(ledger: Ledger, data: Data) -> list[str]:
    """Sentences for everything in the ledger that is not as one would hope."""
    rows, notes = ledger.rows, ledger.notes
    cut = notes["all_cut"]
    found = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in sorted(ledger.personal.items()))
    done = {"report": "left as they are; data.pii=redact replaces them", "redact": "redacted"}.get(data.pii, "")
    says = {
        f"{rows['unreadable']} rows cannot be read and were left out": rows["unreadable"],
        f"{rows['refused']} rows cannot be right and were left out": rows["refused"],
        f"{rows['overlong'] - cut} rows are longer than data.max_length and were left out": rows["overlong"] - cut,
        f"{cut} rows have no trained token within data.max_length and were left out": cut,
        f"{notes['truncated']} rows are longer than data.max_length; their end was cut off": notes["truncated"],
        f"{rows['empty']} rows have an empty answer and were left out": rows["empty"],
        f"{rows['duplicate']} rows repeat an earlier one and were left out": rows["duplicate"]
        - notes["in_held_out_file"],
        f"{notes['duplicate_kept']} rows repeat an earlier one (kept)": notes["duplicate_kept"],
        f"{notes['near_duplicate_kept']} rows nearly repeat another; they stand on its side of the split"
        " (data.duplicates=drop-near leaves them out)": notes["near_duplicate_kept"],
        f"{notes['ends_without_answer']} conversations go on after the last answer; that end was left off": notes[
            "ends_without_answer"
        ],
        f"{notes['in_held_out_group']} training rows are of a group that the held-out files have too": notes[
            "in_held_out_group"
        ],
        f"personal data: {found} ({done})": len(ledger.personal),
        "no end-of-turn token is trained: the model would never learn to stop": not ledger.tokens["end_of_turn"],
        "no row is held out: nothing will show whether the model got better": not rows["validation"],
    }
    if notes["in_held_out_file"]:
        kept = "kept: they measure memory" if data.duplicates == "keep" else "left out of the training"
        says[f"{notes['in_held_out_file']} training rows stand in the held-out files too ({kept})"] = True
    if ledger.overlap.get("rows"):
        share = f"{ledger.overlap['rows']} of {ledger.overlap['of']} held-out rows share 13 words in a row"
        says[f"{share} with training rows ({', '.join(ledger.overlap['places'][:3])}, ...)"] = True
    return [sentence for sentence, holds in says.items() if holds]
