"""Alarms about the rows that a step is given: what is trained of them, and which come twice or are held out."""

from veneer.training.alarms.alarm import Alarm, JobFacts, WatchedStep, hash_of

FIRST_STEPS = 20  # steps whose masks are looked at
LEAST_ROWS = 8
MOST_ROWS = 200_000  # rows of an epoch, and held-out rows, that are remembered: some 20 MB
REPEATED = 0.01  # share of the rows seen


class MaskingOff(Alarm):
    """Tells that prompts are trained though the data says that only answers are.

    It looks at the batches that the engine gets, in the first steps: at whether the first token that can be trained at
    all is, in more than half of the documents. It cannot see a mask that is off by a few tokens, nor one that covers
    too much of an answer (`veneer data` shows the mask of rows), and is silent for plain text and `data.loss_on: all`.
    """

    where = "data.loss_on"

    def __init__(self, facts: JobFacts) -> None:
        self._is_on = facts.masks_prompts
        self._documents = self._unmasked = 0

    def after(self, step: WatchedStep) -> str | None:
        if not self._is_on or step.in_process > FIRST_STEPS:
            return None
        for batch in step.batches:
            start = 0
            for length in batch.lengths:
                self._unmasked += length > 1 and bool(batch.targets_T[start] >= 0)
                self._documents += 1
                start += length
        if self._documents < LEAST_ROWS or self._unmasked <= self._documents / 2:
            return None
        share = step.record["trained_tokens"] / step.record["tokens"]
        return (
            f"prompts are trained: {self._unmasked} of {self._documents} rows are trained from their first token on, "
            f"{share:.0%} of the tokens of step {step.number}, though data.loss_on says answers alone\n  fix: look at "
            "the rows with `veneer data`, and name their format in data.format and their prompt in data.columns"
        )


class RowsRepeated(Alarm):
    """Tells that rows come more than once within a pass over the data.

    It compares the tokens of the rows that the engine gets, so that it sees a fault of the order as well as equal rows
    in the files, beyond those that the ledger counts (`data.duplicates: keep`). Pieces of a long text count as rows. It
    sees the rows of an epoch since the process began, the first 200,000 of them. It cannot see rows that are nearly
    equal.
    """

    where = "data.duplicates"

    def __init__(self, facts: JobFacts) -> None:
        self._per_epoch, self._known = facts.steps_per_epoch, facts.known_duplicates
        self._epoch, self._seen, self._again = -1, set[int](), 0

    def after(self, step: WatchedStep) -> str | None:
        epoch = (step.number - 1) // self._per_epoch
        if epoch != self._epoch:
            self._epoch, self._seen, self._again = epoch, set(), 0
        if len(self._seen) >= MOST_ROWS:
            return None
        for found in step.row_hashes:
            self._again += found in self._seen
            self._seen.add(found)
        rows = len(self._seen) + self._again
        if self._again - self._known <= max(1, REPEATED * rows):
            return None
        return (
            f"rows come more than once in a pass over the data: {self._again} of {rows} by step {step.number}, and the "
            f"ledger counts {self._known} equal rows\n  fix: set data.duplicates to drop, or look for equal passages "
            "in long texts that are cut into pieces"
        )


class HeldOutTrained(Alarm):
    """Tells that held-out rows are trained, so that the held-out loss flatters.

    It compares tokens, so it sees rows that are equal once they are cut to `data.max_length`, beyond those that the
    ledger counts. It cannot see rows that share a passage: the ledger reports those before training (`data.overlap`).
    """

    where = "data.validation"

    def __init__(self, facts: JobFacts) -> None:
        held_out, size = facts.held_out, facts.documents_per_row
        last = min(len(held_out), MOST_ROWS)
        self._held_out = {
            hash_of([held_out[n + k].ids.astype("int64") for k in range(size)]) for n in range(0, last - size + 1, size)
        }
        self._known = facts.known_held_out
        self._found: set[int] = set()

    def after(self, step: WatchedStep) -> str | None:
        if not self._held_out:
            return None
        self._found |= self._held_out.intersection(step.row_hashes)
        if len(self._found) <= self._known:
            return None
        return (
            f"{len(self._found)} held-out rows were trained by step {step.number}: the held-out loss flatters the run\n"
            "  fix: take them out of either side; data.duplicates=drop leaves out training rows that are held out"
        )
