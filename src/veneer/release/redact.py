"""Redacts a run's files before they leave the machine: names instead of paths, counts instead of rows.

A path holds the user's name and tells how a machine is laid out; a ledger and a certificate quote rows, which are often
private. Files that ship therefore hold the last part of a path alone, and what `veneer push` sends of a ledger or a
certificate holds ids, counts and verdicts, with the SHA-256 of the whole file: its owner can show later that it is the
one. Single texts are not hashed, since a short answer can be guessed from its hash.
"""

import hashlib
import re
from pathlib import Path, PurePath
from typing import Any

from veneer.data.sources.find import HUB_ID
from veneer.data.template import names_file
from veneer.evaluation.metrics.exact_match import is_right

# A path of this machine within a sentence: of two parts at least, so that "prompt / completion" and "/" are none.
PATH = re.compile(r"(?<![\w:/.~])(?:(?:[A-Za-z]:)?(?:[/\\][\w.@+%=-]+){2,}|~[\w.-]*(?:[/\\][\w.@+%=-]+)+)[/\\]?")
# Folders before the place of a row, as in a/b.jsonl:12 or a/b.parquet[12].
FOLDERS_OF_PLACE = re.compile(r"[^\s,:'\"]+/(?=[^\s/,:'\"]+(?::\d|\[\d))")
ENDPOINT = "an OpenAI-compatible server"


def name_of(value: str) -> str:
    """Return the last part of a path; a hub id as it is; for a server's address only that it is one."""
    if value.startswith(("http://", "https://")):
        return ENDPOINT
    path = Path(value).expanduser()
    if HUB_ID.fullmatch(value) and not path.exists():
        return value
    return path.absolute().name or "root folder"


def without_paths(value: Any) -> Any:
    """Cut each path in the strings and keys of a JSON value to its last part."""
    if isinstance(value, dict):
        return {without_paths(key): without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if not isinstance(value, str):
        return value
    text = PATH.sub(lambda found: PurePath(found.group().replace("\\", "/")).name, value)
    return FOLDERS_OF_PLACE.sub("", text)


def public_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a run's settings with names in the place of paths.

    Args:
        settings: Settings as `Run.model_dump(mode="json")` gives them.
    """
    model, data, train = (dict(settings[section]) for section in ("model", "data", "train"))
    model["base"] = name_of(model["base"])
    if model.get("adapter"):
        model["adapter"] = name_of(model["adapter"])
    for key in ("train", "validation"):
        if isinstance(data.get(key), str):
            data[key] = name_of(data[key])
        elif isinstance(data.get(key), list):
            data[key] = [name_of(file) for file in data[key]]
    if names_file(data.get("chat_template", "auto")):
        data["chat_template"] = name_of(data["chat_template"])
    if "output_dir" in train:
        train["output_dir"] = name_of(train["output_dir"])
    found = settings | {"model": model, "data": data, "train": train}
    if (settings.get("evaluate") or {}).get("json_schema"):
        found["evaluate"] = settings["evaluate"] | {"json_schema": name_of(settings["evaluate"]["json_schema"])}
    return found


def public_passport(passport: dict[str, Any]) -> dict[str, Any]:
    """Return a passport without paths; those of earlier versions held some."""
    kept = dict(passport)
    if isinstance(kept.get("settings"), dict):
        kept["settings"] = public_settings(kept["settings"])
    if isinstance(kept.get("base"), dict) and kept["base"].get("name"):
        kept["base"] = kept["base"] | {"name": name_of(str(kept["base"]["name"]))}
    if isinstance(kept.get("environment"), dict):
        kept["environment"] = public_environment(kept["environment"])
    return kept


def public_environment(environment: dict[str, Any]) -> dict[str, Any]:
    """Return versions of Python and libraries, and the kind of system: a kernel's release can carry a host name."""
    kept = {key: environment[key] for key in ("python", "libraries") if key in environment}
    system = str(environment.get("platform", ""))
    return kept | {"platform": system.partition("-")[0] if re.search(r"-\d", system) else system}


def public_merge(merge: dict[str, Any]) -> dict[str, Any]:
    """Return merge.json with the adapter's name alone."""
    kept: dict[str, Any] = dict(merge)
    if isinstance(kept.get("adapter"), str):
        kept["adapter"] = name_of(kept["adapter"])
    if isinstance(kept.get("passport"), dict):
        kept["passport"] = public_passport(kept["passport"])
    return kept


def public_ledger(ledger: dict[str, Any], whole: bytes, with_rows: bool) -> dict[str, Any]:
    """Return a ledger without paths, and without quoted rows.

    Args:
        ledger: Content of `ledger.json`.
        whole: The file.
        with_rows: Leave in what is quoted of rows.
    """
    kept: dict[str, Any] = without_paths(ledger) | {"files": _by_name(ledger.get("files", {}))}
    if with_rows:
        return kept
    # Why a file is taken for its format names its columns, which of a table without a head are its first row.
    kept["files"] = {name: {"format": known["format"]} for name, known in kept["files"].items()}
    kept["problems"] = [{key: row[key] for key in ("place", "fate")} for row in kept.get("problems", [])]
    return kept | {"rows_left_out": _left_out(whole)}


def public_certificate(certificate: dict[str, Any], whole: bytes, with_rows: bool) -> dict[str, Any]:
    """Return a certificate without paths, and without the texts of its prompts and answers.

    Args:
        certificate: Content of `certificate.json`.
        whole: The file.
        with_rows: Leave the texts in.
    """
    kept: dict[str, Any] = dict(certificate)
    for part, keys in (("artifact", ("name",)), ("against", ("name", "base"))):
        values = dict(kept.get(part) or {})
        kept[part] = values | {key: name_of(str(values[key])) for key in keys if values.get(key)}
    if isinstance(kept.get("environment"), dict):
        kept["environment"] = public_environment(kept["environment"])
    prompts = [row | {"id": without_paths(row.get("id"))} for row in kept.pop("prompts", [])]
    kept = dict(without_paths(kept))
    if with_rows:
        return kept | {"prompts": prompts}
    kept["prompts"] = [_verdicts(row) for row in prompts]
    # Details quote the text in which a difference was found.
    kept["checks"] = [check | {"detail": ""} for check in kept.get("checks", [])]
    kept["first_difference"] = failed_check(kept)
    return kept | {"rows_left_out": _left_out(whole)}


def _by_name(files: dict[str, Any]) -> dict[str, Any]:
    """Return values by file name; files of the same name are told apart by a number."""
    found: dict[str, Any] = {}
    for path, value in files.items():
        name, number = PurePath(path).name, 1
        while (key := name if number == 1 else f"{name} ({number})") in found:
            number += 1
        found[key] = without_paths(value)
    return found


def failed_check(certificate: dict[str, Any]) -> str | None:
    """Return the name of the first check that failed, without what it quotes."""
    return next((check["name"] for check in certificate.get("checks", []) if not check["passed"]), None)


def _verdicts(row: dict[str, Any]) -> dict[str, Any]:
    """Return a prompt's id, numbers and verdicts; its other texts are the data's."""
    kept = {key: value for key, value in row.items() if key in ("id", "turn") or _is_verdict(value)}
    for key in ("adapter", "artifact"):
        if isinstance(row.get(key), str) and isinstance(row.get("reference"), str):
            # Word for word, whatever metric the run has: its own verdict on the row is the row's `turn`.
            kept[f"{key}_right"] = is_right(row[key], row["reference"])
    if isinstance(row.get("adapter"), str) and isinstance(row.get("artifact"), str):
        kept["same_answer"] = row["adapter"] == row["artifact"]
    return kept


def _is_verdict(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_verdict, value.values()))
    if isinstance(value, list):
        return all(map(_is_verdict, value))
    return value is None or isinstance(value, bool | int | float)


def _left_out(whole: bytes) -> dict[str, str]:
    return {
        "why": "texts of rows stay with their owner; `veneer push --with-samples` sends them",
        "sha256_of_the_whole_file": hashlib.sha256(whole).hexdigest(),
    }
