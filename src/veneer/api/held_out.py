"""Finds the rows of an evaluation: a file's, or those that a run held out."""

from veneer.config import Run, RunFolder, UserError
from veneer.config.files import read_json
from veneer.data.pipeline import HeldOut, Prepared, prepare, read_held_out
from veneer.data.render import Renderer


def held_out_rows(
    folder: RunFolder, run: Run, renderer: Renderer, data: str | None, limit: int | None
) -> list[HeldOut]:
    """Return the first rows of `data`, or of those that the run held out."""
    if data is not None:
        return read_held_out(data, "--data", run.data, renderer, limit, run.evaluate.group)
    prepared = prepared_as_trained(
        folder,
        run,
        renderer,
        "held-out rows may have been trained on",
        "restore the data, or name a file of other rows with --data",
    )
    held_out = prepared.held_out(limit, run.evaluate.group)
    if not held_out:
        share = run.data.validation
        why = f"data.validation = {share}" + (", which is less than one of its rows" if share else "")
        raise UserError(f"the run holds no rows out ({why})", "name a file with --data")
    return held_out


def prepared_as_trained(folder: RunFolder, run: Run, renderer: Renderer, so: str, fix: str) -> Prepared:
    """Prepare a run's data again, and make sure that they are those of training.

    Args:
        folder, run, renderer: The run.
        so, fix: consequence where they are not, and advice.

    Raises:
        UserError: They are not.
    """
    prepared = prepare(run.data, renderer, run.train.seed)
    if read_json(folder.ledger, "sha256")["sha256"] != prepared.ledger.sha256:
        raise UserError(f"{run.data.train}: its rows are not those of training, so {so}", fix)
    return prepared
