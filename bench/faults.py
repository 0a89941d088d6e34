"""What strangers' files do to Veneer: 3,000 broken inputs, each with fixed seeds, and how each ends.

    python3 -m bench.faults                 # writes bench/results/faults.json
    python3 -m bench.faults --only rows     # one kind, printed alone

Five kinds: configurations, rows, templates, headers (safetensors and GGUF) and damages (a file of a base, a finished
run, a stopped run or a cache, cut, emptied, overwritten, or with other bytes or values in it). Each goes through the
product's own function or command (fault_calls.py) in a worker process that is used again, and ends as one of: works,
message (one clear error), class name (a traceback, or an error that names a class), silent (it works with other
numbers, and nothing tells), hang (over 10 s of the processor, or a minute), memory (over 1 GiB more than the idle
worker, its children among it), died.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import platform
import random
import shutil
import struct
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from bench.fault_calls import CALLS, Found

RESULTS = Path(__file__).parent / "results" / "faults.json"
COUNTS = {"configurations": 1000, "rows": 700, "templates": 200, "headers": 600, "damages": 500}
VERSIONS = ("veneer", "torch", "transformers", "tokenizers", "peft", "bitsandbytes", "safetensors", "gguf", "pyyaml")
HANG_SECONDS, WAIT_SECONDS, MOST_BYTES = 10, 60, 2**30
NASTY: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**31, 2**63, 10**40, 1e308, float("nan"), float("inf"), "", " ", "\0", "\x1b]52;c;x\x07"),
    *("\ud800", "é", "null", "1e999", "2024-13-45", "../../etc/passwd", "/dev/zero", "a" * 5000, [], {}, [[]], [{}]),
    *([None], {"a": None}, {"": ""}, [1, "a"], "{{ 1/0 }}", "<|im_end|>", "[/red]", "\u202egnp.exe"),
)


class Input(NamedTuple):
    """One broken input: what the worker calls, with what, what was done to it, and what the undamaged one gives."""

    call: str
    arguments: list[str]
    what: str
    good: Found | None = None


class End(NamedTuple):
    """How an input ended, what was said, its seconds of the processor and its bytes beyond the idle worker."""

    how: str
    told: str
    seconds: float
    peak_bytes: int


def main() -> None:
    """Make every input, let a worker take it, and count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", choices=COUNTS)
    parser.add_argument("--count", type=int)
    parser.add_argument("--workers", type=int, default=2, help="Kinds at a time.")
    options = parser.parse_args()
    started, kinds = time.monotonic(), [options.only] if options.only else list(COUNTS)
    with tempfile.TemporaryDirectory(prefix="veneer-faults-") as folder, ThreadPoolExecutor(options.workers) as pool:
        os.environ |= {"VENEER_CACHE": f"{folder}/cache", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        good = _good(Path(folder) / "good")

        def count(kind: str) -> dict[str, Any]:
            place = Path(folder) / kind
            place.mkdir()
            worker = Worker()
            found = _count(
                worker, itertools.islice(MAKERS[kind](good, place, random.Random(kind)), options.count or COUNTS[kind])
            )
            worker.stop()
            print(kind, json.dumps(found, indent=1), flush=True)
            return found

        found = dict(zip(kinds, pool.map(count, kinds), strict=True))
    if options.only is None and options.count is None:
        versions = {name: metadata.version(name) for name in VERSIONS}
        machine = {
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
        }
        about = {"command": "python3 -m bench.faults", "seconds": round(time.monotonic() - started), "seeds": "by kind"}
        totals = {"inputs": sum(COUNTS.values()), "wrong": sum(len(kind["wrong"]) for kind in found.values())}
        written = about | {"machine": machine, "python": platform.python_version(), "versions": versions}
        RESULTS.write_text(json.dumps(written | totals | {"kinds": found}, indent=2) + "\n")


def _count(worker: "Worker", inputs: Iterator[Input]) -> dict[str, Any]:
    ends: Counter[str] = Counter()
    wrong, most = [], 0
    slowest: dict[str, Any] = {"seconds": 0.0}
    for given in inputs:
        end = worker.take(given)
        ends[end.how] += 1
        most = max(most, end.peak_bytes)
        if end.seconds > slowest["seconds"]:
            slowest = {"seconds": round(end.seconds, 2), "end": end.how, "what": given.what[:200]}
        if end.how not in ("works", "message"):
            wrong.append({"end": end.how, "call": given.call, "what": given.what[:200], "told": end.told[:600]})
    counted = {"inputs": sum(ends.values()), **dict(sorted(ends.items()))}
    return counted | {"peak_bytes": most, "slowest": slowest, "wrong": wrong}


class Worker:
    """A process that takes inputs one after the other; made anew where an input ends it."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()  # it is warm
        self._watched = psutil.Process(self._process.pid)
        self._idle = self._bytes()

    def take(self, given: Input) -> End:
        """Let the process take an input, and watch it."""
        self._pipe.send(given)
        began, waited, most = self._seconds(), time.monotonic(), 0
        while not self._pipe.poll(0.02):
            most = max(most, self._bytes() - self._idle)
            if most > MOST_BYTES:
                return self._ended("memory", began, most)
            if self._seconds() - began > HANG_SECONDS or time.monotonic() - waited > WAIT_SECONDS:
                return self._ended("hang", began, most)
        try:
            how, told = self._pipe.recv()
        except EOFError:
            return self._ended("died", began, most)
        return End(str(how), str(told), self._seconds() - began, max(most, self._bytes() - self._idle))

    def _seconds(self) -> float:
        """Of the processor, by the process and its children; other work on this machine does not count."""
        seconds = 0.0
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                seconds += times.user + times.system + times.children_user + times.children_system
        return seconds

    def _bytes(self) -> int:
        total = 0
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total

    def _family(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return [self._watched, *self._watched.children(recursive=True)]
        return []

    def _ended(self, how: str, began: float, most: int) -> End:
        end = End(how, "", self._seconds() - began, most)
        self.stop()
        self._start()
        return end

    def stop(self) -> None:
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.join()


def _work(pipe: Connection) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)

    pipe.send("ready")
    while True:
        given = pipe.recv()
        try:
            pipe.send(_end_of(given))
        except BaseException as error:  # noqa: BLE001 - whatever comes out is what is counted
            pipe.send(("class name", _traceback(error)))


def _traceback(error: BaseException) -> str:
    """An error and the lines that led to it, in short."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    return f"{error!r}"[:200] + "".join(
        f"\n{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames
    )


def _end_of(given: Input) -> tuple[str, str]:
    from veneer.config import JobError, UserError

    if given.call == "command":
        return _command(given.arguments)
    try:
        found = CALLS[given.call](*given.arguments)
    except (UserError, JobError) as error:
        return "message", str(error)
    is_silent = given.good and found.numbers != given.good.numbers and found.known_by == given.good.known_by
    return ("silent", "other numbers than the undamaged one gives") if is_silent else ("works", "")


def _command(arguments: list[str]) -> tuple[str, str]:
    """A command line in this process."""
    from veneer.cli.main import main as veneer

    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            veneer(arguments)
        except SystemExit as end:
            status = end.code
        if "run it again with --debug" in errors.getvalue():
            try:
                veneer([*arguments, "--debug"])
            except Exception as error:  # noqa: BLE001 - it is what is counted
                return "class name", _traceback(error)
    told = errors.getvalue()[-500:]
    if "Traceback" in errors.getvalue():
        return "class name", told
    if status == 0:
        lost = arguments[0] == "data" and _lost_rows(json.loads(out.getvalue())["rows"], Path(arguments[1]))
        return ("silent", f"rows without an account: {out.getvalue()[:300]}") if lost else ("works", told)
    return ("message" if "error: " in errors.getvalue() else "class name"), told


def _lost_rows(counts: dict[str, int], file: Path) -> bool:
    """Whether the ledger leaves rows of a file out, or does not say what became of one."""
    lines = sum(bool(line.strip()) for line in file.read_bytes().split(b"\n"))
    fates = sum(counts[fate] for fate in ("used", "unreadable", "empty", "duplicate", "overlong", "refused"))
    return not lines == counts["read"] == fates


class Good(NamedTuple):
    """What is not broken yet: a folder for each kind of damage, by its call, what each gives, and a GGUF file."""

    homes: dict[str, Path]
    gives: dict[str, Found]
    gguf: Path

    @property
    def base(self) -> Path:
        return self.homes["base"]


def _good(folder: Path) -> Good:
    """A tiny base, a run on it, one that was stopped, a cache, and a GGUF file of the base."""
    from tests.support.runs import tiny_run, write_rows
    from tests.support.tiny import FAMILIES, save_tiny_model

    import veneer
    from veneer.config.load import to_yaml

    folder.mkdir()
    base = folder / "base"
    save_tiny_model(FAMILIES["llama"], base)
    rows = [{"prompt": f"name {n}", "completion": "cat" * (n % 3 + 1)} for n in range(12)]
    data = write_rows(folder / "rows.jsonl", rows)
    veneer.train(tiny_run(base, data, folder / "run", data={"validation": 2}))
    veneer.evaluate(folder / "run")
    veneer.export(str(folder / "run"), folder / "gguf", quant="f16")
    asked_for: dict[str, dict[str, Any]] = {
        "resume": {"train": {"save_steps": 2}},
        "cache": {"quantization": {"cache": True}},
    }
    for call, sections in asked_for.items():
        home = folder / call
        home.mkdir()
        asked = tiny_run(base, data, home / "run", data={"validation": 2}, **sections)
        (home / "asked.yaml").write_text(to_yaml(asked))
        shutil.copytree(base, home / "base")
    stopped = folder / "resume" / "run"
    veneer.train(veneer.load_run(stopped.parent / "asked.yaml"))
    shutil.rmtree(stopped / "checkpoints" / "step-000006")
    shutil.rmtree(stopped / "adapter")
    homes = {call: folder / call for call in ("base", "run", "resume", "cache")}
    gives = {}
    for call, home in homes.items():  # the cache's is filled with that
        copy = home if call == "cache" else Path(shutil.copytree(home, folder / "copy"))
        gives[call] = CALLS[call](str(copy))
        shutil.rmtree(folder / "copy", ignore_errors=True)
    gives["weights"] = gives["merge"] = CALLS["weights"](str(base / "model.safetensors"))
    return Good(homes, gives, next((folder / "gguf").glob("*.gguf")))


def _configurations(good: Good, folder: Path, chance: random.Random) -> Iterator[Input]:
    """Run files: nasty values and keys, YAML's own constructs, flipped and repeated characters."""
    from veneer.config.load import sections

    names = [f"{section}.{key}" for section, kind in sections().items() for key in kind.model_fields]
    constructs = (
        *(
            "&a [*a]",
            "!!python/object:os.system {}",
            "!!binary x",
            "!!timestamp x",
            "!!int x",
            "? [a]: b",
            "|",
            "- - -",
        ),
        *("*none", "%YAML 9.9", "0x" + "f" * 4000, "9" * 5000, "[" * 2000, "{a: " * 500, "<<: *a", "1:1:1", "0b2", "@"),
    )
    while True:
        lines = [f"model: {{base: {good.base}}}", "data: {train: rows.jsonl}"]
        for _ in range(chance.randint(0, 3)):
            section, key = chance.choice(names).split(".")
            value = chance.choice(constructs) if chance.random() < 0.4 else json.dumps(chance.choice(NASTY))
            lines.append(chance.choice((f"{section}: {{{key}: {value}}}", f"{key}: {value}", f"{value}: {key}", value)))
        text = "\n".join(lines)
        for _ in range(chance.choice((0, 0, 0, 1, 3))):
            at = chance.randrange(len(text))
            text = (
                text[:at] + chance.choice(("\t", "\n", ":", "{", "]", "&a ", "*a", "\x07", "#", "'")) + text[at + 1 :]
            )
        path = folder / "run.yaml"
        path.write_bytes(text.encode(errors="surrogatepass"))
        command = Input("command", ["plan", str(path), "--no-data"], text)
        yield command if chance.random() < 0.1 else Input("config", [str(path)], text)


def _rows(good: Good, folder: Path, chance: random.Random) -> Iterator[Input]:
    """JSONL files of six rows, of which some have nasty fields, other shapes, or broken bytes."""
    shapes: tuple[Callable[[Any], Any], ...] = (
        lambda x: {"messages": [{"role": "user", "content": x}, {"role": "assistant", "content": "b"}]},
        lambda x: {"messages": [{"role": x, "content": "a"}, {"role": "assistant", "content": x}]},
        lambda x: {"messages": x},
        lambda x: {"messages": [x, x]},
        lambda x: {"prompt": x, "completion": "b"},
        lambda x: {"prompt": "a", "completion": x},
        lambda x: {"instruction": "a", "input": x, "output": "b"},
        lambda x: {"conversations": [{"from": "human", "value": x}, {"from": "gpt", "value": x}]},
        lambda x: {"text": x},
        lambda x: {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": x}], "tools": x},
        lambda x: {"prompt": "a", "chosen": x, "rejected": "b"},
        lambda x: {str(x): x},
        lambda x: x,
    )
    number = 0
    while True:
        number += 1
        shape, nasty = chance.choice(shapes), chance.choice(NASTY)
        rows = [json.dumps(shape(f"word {n}")) for n in range(5)] + [json.dumps(shape(nasty))]
        text = "\n".join(chance.sample(rows, len(rows))).encode()
        if chance.random() < 0.3:
            at = chance.randrange(len(text))
            text = text[:at] + chance.choice((b"\xff", b"\0", b"\xef\xbb\xbf", b"[" * 3000, b"")) + text[at + 1 :]
        path = folder / f"{number}.jsonl"
        path.write_bytes(text)
        more = chance.choice(([], ["data.bad_rows=drop"], ["data.format=messages"], ["data.loss_on=all"]))
        settings = ["--json", "--model", str(good.base), "--rows", "2", "data.validation=0", "data.workers=1"]
        yield Input("command", ["data", str(path), *settings, *more], repr(text[-200:]))


def _templates(good: Good, folder: Path, chance: random.Random) -> Iterator[Input]:
    """Jinja files: pieces that loop, allocate, reach for attributes, fail or leave a tag open."""
    pieces = (
        *(
            "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}",
            "{{ messages }}",
            "{% if x %}",
            "{{ 1/0 }}",
        ),
        *("{{ 'a' * 6000000000 }}", "{% for a in range(99999999) %}x{% endfor %}", "{{ messages.__class__ }}", "{{"),
        *(
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{% include '/etc/passwd' %}",
            "{{ range(10)|list|length }}",
        ),
        *("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ raise_exception('no') }}", "{{ '%99999999d' % 1 }}"),
        *(
            "{{ messages|tojson(indent=2) }}",
            "{{ bos_token }}",
            "{% generation %}x{% endgeneration %}",
            "\x1b[2J",
            "\0",
        ),
        *(
            "{{ strftime_now('%9999999d') }}",
            "{{ 'x'|center(999999999) }}",
            "{{ messages[99].content }}",
            "{% set a = a %}",
        ),
    )
    from tests.support.tiny import CHATML

    number = 0
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"a {n}", "completion": "b"}) + "\n" for n in range(4)))
    while True:
        number += 1
        text = chance.choice(("", CHATML)) + "".join(chance.sample(pieces, chance.randint(1, 2)))
        path = folder / f"{number}.jinja"
        path.write_text(text)
        settings = [
            "--json",
            "--model",
            str(good.base),
            "data.validation=0",
            "data.workers=1",
            f"data.chat_template={path}",
        ]
        yield Input("command", ["data", str(rows), *settings], text)


def _headers(good: Good, folder: Path, chance: random.Random) -> Iterator[Input]:
    """Safetensors and GGUF files with other lengths, offsets, types and bytes in their headers."""
    weights, gguf = (good.base / "model.safetensors").read_bytes(), good.gguf.read_bytes()
    length = int.from_bytes(weights[:8], "little")
    while True:
        if chance.random() < 0.5:
            header = json.loads(weights[8 : 8 + length])
            names = [name for name in header if name != "__metadata__"]
            entry = header[chance.choice(names)]
            key, other = chance.choice(("dtype", "shape", "data_offsets")), header[chance.choice(names)]
            shaped: list[Any] = [
                [0.0, 4],
                [4, 0],
                [-1, 3],
                [0, 2**60],
                [2**62, 2**62],
                ["a", "b"],
                "F99",
                [True, False],
            ]
            entry[key] = chance.choice((chance.choice(NASTY), chance.choice(shaped), other[key]))
            if chance.random() < 0.2:  # two tensors of one place
                entry |= other
            text = json.dumps(header, allow_nan=True).encode(errors="surrogatepass")
            size = chance.choice((len(text), len(text), len(text) + 5, 0, 2**63, 1, len(text) - 1))
            path, call = folder / "model.safetensors", chance.choice(("weights", "merge"))
            broken = struct.pack("<Q", size) + text + weights[8 + length :]
            what = text[:200].decode(errors="replace")
        else:
            path, call = folder / "m.gguf", "gguf"
            data = bytearray(gguf)
            for _ in range(chance.randint(1, 3)):
                at = chance.choice((8, 16, chance.randrange(24, 400), chance.randrange(24, 2000)))
                number = chance.choice((0, 1, 255, 2**31, 2**60, 2**63, 2**64 - 1))
                data[at : at + 8] = struct.pack("<Q", number)
            broken = bytes(data[: chance.choice((len(data), len(data), 30, 500, 2000))])
            what = broken[:120].hex()
        path.write_bytes(broken)
        yield Input(call, [str(path)], what, good.gives.get(call))


# What is damaged of a folder: of a stopped run not what was asked, of a cache only what it keeps.
DAMAGED = {
    "base": ("*",),
    "run": ("**/*",),
    "resume": ("run/**/*", "base/*"),
    "cache": ("cache/**/*", "base/.veneer/**/*"),
}


def _damages(good: Good, folder: Path, chance: random.Random) -> Iterator[Input]:
    """A folder with one file cut, emptied, overwritten, with flipped bytes, or with another value in its JSON."""
    number = 0
    while True:
        number += 1
        call = chance.choice(list(good.homes))
        copy = folder / str(number)
        shutil.copytree(good.homes[call], copy, ignore=shutil.ignore_patterns("*.lock"))
        found = {file for pattern in DAMAGED[call] for file in copy.glob(pattern) if file.is_file()}
        file = chance.choice(sorted(file for file in found if file.suffix not in (".png", ".md")))
        how, content = _damaged(file, chance)
        file.write_bytes(content)
        yield Input(call, [str(copy)], f"{call}/{file.relative_to(copy)}: {how}", good.gives[call])
        shutil.rmtree(copy)


def _damaged(file: Path, chance: random.Random) -> tuple[str, bytes]:
    content = file.read_bytes()
    how = chance.choice(("cut", "empty", "flipped", "zeroed", "nested", "other", "value", "value", "value"))
    if how == "value" and file.suffix == ".json":
        found = json.loads(content)
        owner = found
        while True:  # down to a value
            key = chance.choice(list(owner)) if isinstance(owner, dict) else chance.randrange(len(owner))
            inside = owner[key]
            if not (isinstance(inside, dict | list) and inside) or chance.random() < 0.3:
                break
            owner = inside
        owner[key] = chance.choice(NASTY)
        return f"{how} {key!r} = {owner[key]!r}"[:150], json.dumps(found).encode(errors="surrogatepass")
    if how == "flipped" and content:
        data = bytearray(content)
        reach = min(len(data), chance.choice((3000, len(data))))
        for _ in range(5):
            data[chance.randrange(reach)] ^= 1 << chance.randrange(8)
        return how, bytes(data)
    others: dict[str, bytes] = {
        "empty": b"", "zeroed": bytes(len(content)), "nested": b"[" * 100_000, "cut": content[: len(content) // 2],
    }  # fmt: skip
    return how, others.get(how, chance.choice((b"[]", b"null", b"1", b'{"a": 1}', b"\xff\xfe", b"[{}]")))


MAKERS: dict[str, Callable[[Good, Path, random.Random], Iterator[Input]]] = {
    "configurations": _configurations, "rows": _rows, "templates": _templates, "headers": _headers,
    "damages": _damages,
}  # fmt: skip

if __name__ == "__main__":
    main()
