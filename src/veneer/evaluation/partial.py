"""Answers are kept as they come, so that an evaluation that was interrupted goes on with the rows that are left.

A file in the run's folder gets a line for each answer, once its batch is done; the evaluation that is whole deletes it.
Its name is a hash of all that decides the answers, so another evaluation has another file. Prompts are read in the
groups, and answered in as many slots, as if nothing were known; or in the same batches, of which those that are known
are left out. So an evaluation that goes on computes the rest in the shapes of one that was not interrupted, and its
answers are the same to the bit.

Each rank of several has a file of its own; the first reads them all, and what it has read is known to every one.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veneer.config import Evaluate, UserError
from veneer.config.files import read_json_lines
from veneer.config.folder import make_folder, write_text
from veneer.config.notify import notify_on_error
from veneer.data.pipeline import HeldOut
from veneer.machine.device import find_machine
from veneer.machine.environment import environment
from veneer.machine.ranks import ALONE, Ranks
from veneer.model.fingerprint import fingerprint
from veneer.model.tuned import TunedModel


@dataclass
class KeptAnswers:
    """The answers of one model, as tokens by the number of their prompt.

    Attributes:
        path: File that they are appended to.
        model: Name of the model in the file.
        known: Answers that are known.
    """

    path: Path
    model: str
    known: dict[int, list[int]] = field(default_factory=dict)

    def holds(self, numbers: Sequence[int]) -> bool:
        """Whether all these prompts are answered."""
        return all(number in self.known for number in numbers)

    def keep(self, answers: Mapping[int, list[int]]) -> None:
        """Append answers; a disk that takes none costs only the going on."""
        self.known |= answers
        lines = [json.dumps({"model": self.model, "row": row, "ids": ids}) + "\n" for row, ids in answers.items()]
        notify_on_error("answers to go on from", lambda: self._append("".join(lines)))

    def _append(self, text: str) -> None:
        make_folder(self.path.parent)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)


class PartialAnswers:
    """The answers of base and tuned model to an evaluation that is not whole.

    Args:
        folder: Folder of the file.
        facts: All that decides the answers.
        ranks: This process among those that answer.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], ranks: Ranks = ALONE) -> None:
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self._folder, self._name, self._ranks = folder, f"partial-{key}", ranks
        self.path = folder / f"{self._name}{'' if ranks.is_first else f'-rank-{ranks.rank}'}.jsonl"
        self._lines = ranks.first(self._read)

    def _read(self) -> list[dict[str, Any]]:
        """Read the lines of all files, and leave one."""
        lines = []
        for path in (files := sorted(self._folder.glob(f"{self._name}*.jsonl"))):
            with suppress(UserError):  # damaged: it is answered anew
                lines += read_json_lines(path, "model", "row", "ids", is_appended=True)
        if files:
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
            for path in files:
                if path != self.path:
                    path.unlink()
        return lines

    @classmethod
    def of_rows(
        cls,
        folder: Path,
        model: Mapping[str, Any],
        held_out: Sequence[HeldOut],
        settings: Evaluate,
        ranks: Ranks = ALONE,
    ) -> "PartialAnswers":
        """Return what an evaluation with these rows and settings has left; rows at a time do not matter.

        Args:
            folder: Folder of the file.
            model: Facts that identify the model.
            held_out: The rows.
            settings: max_new_tokens.
            ranks: This process among those that answer.
        """
        rows = hashlib.sha256()
        for row in held_out:
            rows.update(f"{row.conversation} {row.example.ids.tolist()} {row.example.trained}\n".encode())
        facts = {
            "rows": rows.hexdigest(),
            "max_new_tokens": settings.max_new_tokens,
            **model,
            "machine": find_machine().as_dict()["name"],
            **environment(),
        }
        return cls(folder, facts, ranks)

    def of(self, model: str) -> KeptAnswers:
        """Return those of a model."""
        known = {line["row"]: line["ids"] for line in self._lines if line["model"] == model}
        return KeptAnswers(self.path, model, known)

    def remove(self) -> None:
        """Delete the files, once the evaluation is written; the folder too, where nothing else is in it."""
        folder = self._folder
        for path in folder.glob(f"{self._name}*.jsonl"):
            path.unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def facts_of(tuned: TunedModel) -> dict[str, Any]:
    """Return what identifies an adapter on its base."""
    return {
        "adapter": tuned.weights_sha256,
        "base": fingerprint(tuned.source) or tuned.source.reference,
        "quantization": tuned.quantization.model_dump() if tuned.quantization else None,
        "dtype": tuned.dtype_name,
    }
