"""Declares the settings of a sweep and reads them: a run, and which of its settings take which values.

    run: recipes/smollm2-demo.yaml
    grid: {adapter.r: [4, 8, 16, 32]}
    seeds: 3

`grid`, `trials` and `random` each make combinations of settings; where several are given, each combination of one is
tried with each of the others. Every combination is a whole run, checked as one before anything is loaded. Base and rows
are loaded once, so that only the adapter and the training vary.
"""

import itertools
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from veneer.config.errors import UserError
from veneer.config.files import read_text
from veneer.config.foreign import misspelt
from veneer.config.load import MOST_BYTES, Path_, dump_yaml, load_run, parse_mapping, validate
from veneer.config.names import anchored
from veneer.config.paths import require_path
from veneer.config.run import Run
from veneer.config.section import Section

VARIED = ("adapter", "train")  # sections whose settings a sweep may vary: the others decide what is loaded
# Settings of these sections that change no number of a training, or that the sweep sets itself.
FIXED = {
    **dict.fromkeys(
        (
            "gradient_checkpointing",
            "memory_budget",
            "shard",
            "engine",
            "logging_steps",
            "save_steps",
            "save_total_limit",
        ),
        "it changes no number of a training; set it in the run",
    ),
    "eval_steps": "it changes no number of a training; `rungs` says when trials are compared",
    "output_dir": "`output_dir` of the sweep names the folder of all trials",
    "seed": "`seeds` says with how many seeds each combination is trained",
}
MOST_TRIALS = 1000
HEADER = "# The sweep as it was carried out, with every default spelled out.\n"
Settings = dict[str, Any]


class Draw(Section):
    """A range from which values are drawn; whole numbers where both ends are."""

    low: int | float
    high: int | float
    scale: Literal["log", "linear"] = "log"

    @model_validator(mode="after")
    def _is_range(self) -> "Draw":
        if self.low >= self.high:
            raise ValueError(f"low = {self.low} should be less than high = {self.high}")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"low = {self.low} should be more than 0, or scale linear")
        return self

    def value(self, generator: random.Random) -> int | float:
        """Draw a value."""
        is_log = self.scale == "log"
        ends = (math.log(self.low), math.log(self.high)) if is_log else (self.low, self.high)
        drawn = generator.uniform(*ends)
        value = float(f"{math.exp(drawn) if is_log else drawn:.4g}")  # four digits say all there is to say of it
        return round(value) if isinstance(self.low, int) and isinstance(self.high, int) else value


Values = Annotated[tuple[Any, ...], Field(min_length=1)]


class RandomDraws(Section):
    """Combinations drawn at random."""

    trials: int = Field(ge=1, le=MOST_TRIALS, description="Number of combinations that are drawn.")
    seed: int = Field(0, ge=0, description="Seed of the draws.")
    settings: dict[str, Draw | Values] = Field(
        min_length=1, description="Settings, each with a range ({low, high, scale}) or a list to draw from."
    )


class Sweep(Section):
    """A sweep over settings of a run."""

    run: str | dict[str, Any] = Field(description="YAML file of the run, or its sections.")
    output_dir: Path = Field(description="The sweep's folder; sweeps/NAME by the file's name.")
    settings: Settings = Field({}, description="Settings of the run that are the same in all trials.")
    grid: dict[str, Values] = Field({}, description="Settings, each with its values: all combinations.")
    trials: tuple[Settings, ...] = Field((), description="Combinations that are written out, one an entry.")
    random: RandomDraws | None = Field(None, description="Combinations drawn at random.")
    seeds: int = Field(1, ge=1, le=100, description="Seeds of each combination: train.seed and those that follow it.")
    rungs: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="Optimizer steps after which trials are compared, and losers are stopped."
    )
    keep_runs: bool = Field(False, description="Keep the folder of each trial, and not of the best ones alone.")


@dataclass(frozen=True)
class Combination:
    """One combination of settings.

    Attributes:
        number: Its number in the sweep, from 1.
        settings: The settings that the sweep varies, by name.
        run: The whole run; its output_dir is the sweep's business.
    """

    number: int
    settings: Settings
    run: Run

    @property
    def name(self) -> str:
        """Its settings in one line."""
        return ", ".join(f"{name}={_text(value)}" for name, value in self.settings.items())


@dataclass(frozen=True)
class PlannedSweep:
    """A sweep that was read and checked.

    Attributes:
        sweep: The settings, with the run's sections spelled out.
        run: The run with the settings that are the same in all trials.
        combinations: All combinations, without repetitions.
    """

    sweep: Sweep
    run: Run
    combinations: tuple[Combination, ...]

    def to_yaml(self) -> str:
        """Return the content of the folder's sweep.yaml, which `load_sweep` reads back."""
        return HEADER + dump_yaml(self.sweep.model_dump(mode="json"))


def load_sweep(path: str | Path) -> PlannedSweep:
    """Read a sweep from a YAML file, and check each of its runs.

    Raises:
        UserError: Every mistake of the sweep, or of the first run that has one, each with its line.
    """
    require_path(str(path), "sweep")
    path = Path(path)
    text = read_text(path, MOST_BYTES, "name an existing YAML file of a sweep")
    values, places = parse_mapping(text, path, "a sweep is a mapping of keys (run:, grid:, ...)", "run and grid")
    values.setdefault("output_dir", f"sweeps/{path.stem}")
    sweep = _validated(values, places, path)
    run = _base_run(sweep, places, path)
    if sweep.rungs != tuple(sorted(set(sweep.rungs))):
        raise UserError(f"{_place(places, path, 'rungs')}: rungs = {list(sweep.rungs)}: should rise", "sort them")
    if run.train.learning_rate == "auto" and not _varies(sweep, "train.learning_rate"):
        raise UserError(
            f"{path}: train.learning_rate = auto: each trial would search for a rate of its own",
            "name a rate under `settings`, or several under `grid`",
        )
    combinations = tuple(_combinations(sweep, run, places, path))
    recorded = anchored(run).model_dump(mode="json")
    return PlannedSweep(sweep.model_copy(update={"run": recorded, "settings": {}}), run, combinations)


def _validated(values: dict[str, Any], places: dict[Path_, str], path: Path) -> Sweep:
    try:
        return Sweep.model_validate(values)
    except ValidationError as error:
        lines = dict.fromkeys(_describe(problem, places, path) for problem in error.errors())
    raise UserError(
        f"{path}: {len(lines)} mistake{'s' if len(lines) > 1 else ''} in the sweep\n  " + "\n  ".join(lines)
    )


def _describe(problem: Any, places: dict[Path_, str], path: Path) -> str:
    """Return one mistake in one line: place, setting, what it should be."""
    location = tuple(str(part) for part in problem["loc"])
    place = next((places[location[:n]] for n in range(len(location), 0, -1) if location[:n] in places), str(path))
    # Alternatives of a union carry their class's name at the end.
    name = ".".join(part for part in location if part not in ("Draw", "str") and "[" not in part)
    if problem["type"] == "missing":
        return f"{place}: `{name}` is missing"
    if problem["type"] == "extra_forbidden":
        fields = list((RandomDraws if location[0] == "random" else Sweep).model_fields)
        near = misspelt(location[-1], fields)
        return f"{place}: unknown key `{name}`; " + (
            f"did you mean `{near}`?" if near else f"known: {', '.join(fields)}"
        )
    message = problem["msg"].replace("Input should", "should").removeprefix("Value error, ")
    if problem["type"] == "too_short":
        message = "is empty: name at least one value"
    return f"{place}: {name}: {message}"


def _base_run(sweep: Sweep, places: dict[Path_, str], path: Path) -> Run:
    """Return the run with the settings that all trials share."""
    if isinstance(sweep.run, str):
        file = Path(sweep.run).expanduser()
        values = load_run(file if file.exists() else path.parent / file).model_dump(mode="json")
        within: dict[Path_, str] = {}
    else:
        values = sweep.run
        within = {where[1:]: place for where, place in places.items() if where[:1] == ("run",) and len(where) > 1}
    return _changed(values, sweep.settings, within, places, ("settings",), path)


def _combinations(sweep: Sweep, run: Run, places: dict[Path_, str], path: Path) -> list[Combination]:
    """Return all combinations as runs; each mistake of the first that has one is told with its line."""
    grid = [dict(zip(sweep.grid, chosen, strict=True)) for chosen in itertools.product(*sweep.grid.values())]
    count = len(grid) * max(1, len(sweep.trials)) * (sweep.random.trials if sweep.random else 1)
    if not (sweep.grid or sweep.trials or sweep.random):
        raise UserError(
            f"{path}: the sweep is empty: it varies no setting", "name settings under `grid`, as adapter.r: [8, 16]"
        )
    if count * sweep.seeds > MOST_TRIALS:
        raise UserError(
            f"{path}: {count * sweep.seeds:,} trials, at most {MOST_TRIALS:,} are allowed",
            "shorten `grid`, or draw with `random`",
        )
    values = run.model_dump(mode="json")
    found: list[Combination] = []
    for parts in itertools.product(grid, sweep.trials or ({},), _drawn(sweep.random)):
        settings: Settings = {}
        for part in parts:
            for name in part:
                _require_varied(name, settings, _place_of(name, places, path))
            settings |= part
        if any(settings == one.settings for one in found):
            continue
        made = _changed(values, settings, {}, places, ("grid", "trials", "random"), path)
        found.append(Combination(len(found) + 1, settings, made))
    return found


def _drawn(draws: RandomDraws | None) -> list[Settings]:
    if draws is None:
        return [{}]
    generator = random.Random(draws.seed)
    return [
        {
            name: range_.value(generator) if isinstance(range_, Draw) else generator.choice(range_)
            for name, range_ in draws.settings.items()
        }
        for _ in range(draws.trials)
    ]


def _changed(
    values: dict[str, Any],
    settings: Settings,
    within: dict[Path_, str],
    places: dict[Path_, str],
    keys: tuple[str, ...],
    path: Path,
) -> Run:
    """Return the run of plain values with some settings changed.

    Args:
        values: Sections of the run.
        settings: Changes, by name.
        within: Lines of the values.
        places: Lines of the sweep's file.
        keys: Keys of the sweep below which the changes stand.
        path: File of the sweep.
    """
    values = {name: dict(section) if isinstance(section, dict) else section for name, section in values.items()}
    lines = dict(within)
    for name, value in sorted(settings.items()):  # `adapter` comes before settings of it
        section, _, key = name.partition(".")
        where = _place_of(name, places, path, keys)
        if name == "adapter" and value == "none":  # full fine-tuning, beside adapters
            values[name] = value
            continue
        if values.get(section) == "none" and section == "adapter":
            raise UserError(f"{where}: `{name}`: there is no adapter (`adapter: none`)", "leave one of the two out")
        if not key or "." in key:
            raise UserError(f"{where}: `{name}` is not of the form section.key", "for example adapter.r: [8, 16]")
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values[section][key] = value
        lines[section, key] = where
    return validate(values, lines, str(path))


def _require_varied(name: str, others: Settings, where: str) -> None:
    section, _, key = name.partition(".")
    if name in others:
        raise UserError(f"{where}: `{name}` is varied twice", "name it in one of `grid`, `trials` and `random`")
    if section not in VARIED and section in Run.model_fields:
        raise UserError(
            f"{where}: `{name}`: base and rows are loaded once for all trials, which share the section `{section}`",
            "set it under `settings`, and sweep each of its values in a sweep of its own",
        )
    if key in FIXED and section == "train":
        raise UserError(f"{where}: `{name}`: {FIXED[key]}", "leave it out of the sweep")


def _varies(sweep: Sweep, name: str) -> bool:
    drawn = sweep.random.settings if sweep.random else {}
    return name in sweep.grid or name in drawn or (bool(sweep.trials) and all(name in one for one in sweep.trials))


def _place_of(
    name: str, places: dict[Path_, str], path: Path, keys: tuple[str, ...] = ("grid", "trials", "random")
) -> str:
    """Return the line of a setting, or of the key below which it stands."""
    for where, place in places.items():
        if where[0] in keys and where[-1] == name:
            return place
    return next((places[key,] for key in keys if (key,) in places), str(path))


def _place(places: dict[Path_, str], path: Path, key: str) -> str:
    return places.get((key,), str(path))


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
