"""Says which of two sets of answers to the same rows is better: by a judge model, or by a person's blind votes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.api.judge_client import JudgeClient
from veneer.api.live_page import renew_page
from veneer.config import RunFolder, UserError
from veneer.config.files import file_sha256, read_json, read_text
from veneer.config.folder import write_json, write_text
from veneer.config.names import require_run
from veneer.config.notify import notify_on_error
from veneer.config.paths import fault_of, require_path
from veneer.evaluation.win_rate.blind import Ballot
from veneer.evaluation.win_rate.judging import KeptJudgments, judge_pairs, missing_questions
from veneer.evaluation.win_rate.pairs import Pair, digest, pairs_digest, read_pairs
from veneer.evaluation.win_rate.prompt import CRITERION, TEMPLATE, judge_prompt
from veneer.evaluation.win_rate.win_rate import WinRate, win_rate
from veneer.report.vote_page import vote_page

ANSWERS = "base,tuned"
BETWEEN_RUNS = "tuned,tuned"
AT_ONCE = 8
MAX_NEW_TOKENS = 1024
TIMEOUT_SECONDS = 120.0
PERSON = "a person"
IN_RECORD = ("by", "first", "second", "win_rate", "rows", "wins", "ties", "losses", "verdict", "file")
LONGEST_CRITERION = 20_000  # bytes


@dataclass(frozen=True)
class WhichAnswers:
    """The two sets of answers that are compared.

    Attributes:
        samples: file of answers; None: the run's samples.jsonl.
        answers: keys of the first and of the second answer in a line, with a comma between; None: `base,tuned`, or
            `tuned,tuned` with `against`.
        against: another run, or its file of answers, that the first answers are read from; None: the same file.
        rows: largest number of rows, the first ones; None: all.
    """

    samples: str | None = None
    answers: str | None = None
    against: str | None = None
    rows: int | None = None

    def read(self, folder: RunFolder) -> tuple[list[Pair], dict[str, Any]]:
        """Return the pairs, and what says which they are."""
        first, _, second = (self.answers or (BETWEEN_RUNS if self.against else ANSWERS)).partition(",")
        if not first.strip() or not second.strip() or "," in second:
            raise UserError(f"--answers {self.answers}: not two names", f"write two with a comma, as {ANSWERS}")
        keys = first.strip(), second.strip()
        samples = folder.samples if self.samples is None else _path(self.samples, "--samples")
        against = None if self.against is None else _path(self.against, "--against")
        if against is not None and against.is_dir():
            against = require_run(str(against)).samples
        if (against or samples).absolute() == samples.absolute() and keys[0] == keys[1]:
            raise UserError(f"--answers {','.join(keys)}: both are the same answers", "name two that differ")
        pairs = read_pairs(samples, keys, against, self.rows)
        names = [f"{self.against} {keys[0]}" if self.against else keys[0], keys[1]]
        facts = {
            "first": names[0],
            "second": names[1],
            "samples": str(samples),
            "samples_sha256": file_sha256(samples),
            "against": against and str(against),
            "pairs": pairs_digest(pairs),
        }
        return pairs, facts


@dataclass(frozen=True)
class Judged:
    """A win rate and where it was written.

    Attributes:
        rate: the win rate of the second answers.
        facts: which answers they are, who judged, and how consistently.
        file: file in the run's folder.
    """

    rate: WinRate
    facts: dict[str, Any]
    file: Path

    def as_dict(self) -> dict[str, Any]:
        return self.rate.as_dict() | self.facts | {"file": str(self.file)}


def judge(
    run_dir: str | Path,
    endpoint: str,
    model: str | None = None,
    criterion: str | None = None,
    which: WhichAnswers | None = None,
    *,
    with_reference: bool = False,
    at_once: int = AT_ONCE,
    max_new_tokens: int = MAX_NEW_TOKENS,
    timeout: float = TIMEOUT_SECONDS,
    on_begin: Callable[[int], None] = lambda questions: None,
    on_done: Callable[[int], None] = lambda done: None,
) -> Judged:
    """Have a judge model say which of a run's answers are better, each pair in both positions.

    Example:
        judged = veneer.judge("runs/tickets", "http://localhost:8000")

    Each judgment is kept in the run's evaluations/ as it comes: the same call goes on where an earlier one ended. A key
    is read from the environment variable OPENAI_API_KEY.

    Args:
        run_dir: Folder of a run that was evaluated.
        endpoint: Address of an OpenAI-compatible server.
        model: Name of the judge; None: the server's only model.
        criterion: Text, or name of a file, that says what makes an answer the better one; None: a general one.
        which: The answers; None: base against tuned.
        with_reference: Whether the judge is shown the right answer as well.
        at_once: Number of concurrent requests.
        max_new_tokens: Longest reply of the judge.
        timeout: Seconds that a reply may take.
        on_begin: Callback that gets the number of questions to come.
        on_done: Callback that gets the number of questions just answered.

    Raises:
        UserError: No such run, answers, server, model or criterion. JobError: The server fails, or more than a tenth
            of its judgments hold no verdict; what was judged is kept.
    """
    folder = require_run(str(run_dir))
    text = read_criterion(criterion)
    pairs, facts = (which or WhichAnswers()).read(folder)
    client = JudgeClient(endpoint, model, max_new_tokens, timeout)
    settings = client.facts | {"criterion": text, "template": TEMPLATE, "with_reference": with_reference}
    # A judgment is of one pair: other rows or answers, asked about later, find those that are the same.
    kept = KeptJudgments(_file(folder, "judgments", client.model, settings).with_suffix(".jsonl"))
    on_begin(len(missing_questions(pairs, kept)))

    def ask(pair: Pair, is_swapped: bool) -> str:
        return client.ask(judge_prompt(pair, is_swapped, text, with_reference))

    judged = judge_pairs(pairs, ask, kept, at_once, on_done)
    file = _file(folder, "win-rate", client.model, [settings, facts["pairs"]])
    by = {"by": client.model, "judge": settings, "judgments_file": str(kept.path)}
    return _saved(folder, Judged(win_rate(judged.outcomes), facts | judged.facts | by, file))


def count_votes(run_dir: str | Path, votes: str | Path, which: WhichAnswers | None = None, seed: int = 0) -> Judged:
    """Compute the win rate of a person's votes on a page that `write_vote_page` made.

    Args:
        run_dir: Folder of the run.
        votes: File that the page saved.
        which: The answers, as for the page.
        seed: Seed of the page.

    Raises:
        UserError: No such run or answers, or the votes are not on these answers.
    """
    folder = require_run(str(run_dir))
    pairs, facts = (which or WhichAnswers()).read(folder)
    path = _path(str(votes), "--votes")
    found = Ballot(pairs, seed).read(path)
    by = {"by": PERSON, "votes_file": str(path), "votes_sha256": file_sha256(path), "seed": seed}
    file = _file(folder, "win-rate", "votes", [facts["pairs"], by["votes_sha256"], seed])
    return _saved(folder, Judged(win_rate(found.outcomes), facts | found.facts | by, file))


def write_vote_page(
    run_dir: str | Path,
    page: str | Path,
    which: WhichAnswers | None = None,
    criterion: str | None = None,
    seed: int = 0,
) -> int:
    """Write a page on which a person votes blindly, and return its number of pairs.

    Args:
        run_dir: Folder of a run that was evaluated.
        page: HTML file to be written.
        which: The answers; None: base against tuned.
        criterion: Argument of `judge`.
        seed: Seed of the order and the sides.

    Raises:
        UserError: No such run or answers, or all pairs hold equal answers.
    """
    folder = require_run(str(run_dir))
    text = read_criterion(criterion)
    pairs, facts = (which or WhichAnswers()).read(folder)
    ballot = Ballot(pairs, seed)
    shown = ballot.shown()
    if not shown:
        raise UserError(f"{facts['samples']}: both answers are the same text on all {len(pairs)} rows", "nothing to do")
    write_text(Path(page), vote_page(folder.path.absolute().name, text, ballot.id, shown))
    return len(shown)


def read_criterion(given: str | None) -> str:
    """Return the criterion that a user gave as text or as the name of a file.

    Raises:
        UserError: It is empty, or the file cannot be read.
    """
    if given is None:
        return CRITERION
    is_name = fault_of(given) is None
    if is_name and Path(given).expanduser().exists():
        given = read_text(Path(given).expanduser(), LONGEST_CRITERION, "shorten it")
    elif is_name and given.lower().endswith((".txt", ".md")) and " " not in given:
        raise UserError(f"--criterion {given}: no such file", "name a file that exists, or write the criterion itself")
    if not given.strip() or len(given) > LONGEST_CRITERION:
        raise UserError(f"--criterion: {len(given.strip()):,} characters", f"write 1 to {LONGEST_CRITERION:,}")
    return given.strip()


def _saved(folder: RunFolder, judged: Judged) -> Judged:
    """Write a result, and name it in the run's record where it is about the answers of that record."""
    result = judged.as_dict()
    write_json(judged.file, result)
    if folder.evaluation.is_file() and result["samples_sha256"] == file_sha256(folder.samples):
        line = {key: result[key] for key in IN_RECORD}

        def add() -> None:
            record = read_json(folder.evaluation)
            win_rates = record.get("win_rates", {}) | {judged.file.stem: line}
            write_json(folder.evaluation, record | {"win_rates": win_rates})

        notify_on_error("the win rate in evaluation.json", add)
        renew_page(folder)
    return judged


def _file(folder: RunFolder, kind: str, name: str, key: Any) -> Path:
    """Return a file that is named for its kind and who judged, and by a hash of all that decides what is in it."""
    plain = "".join(sign if sign.isascii() and (sign.isalnum() or sign in "-_") else "-" for sign in name)[-60:]
    return folder.other_evaluations / f"{kind}-{plain}-{digest(key)}.json"


def _path(name: str, option: str) -> Path:
    require_path(name, option)
    return Path(name).expanduser()
