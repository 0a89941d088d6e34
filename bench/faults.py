"""What strangers' files do to Veneer: 3,000 broken inputs, each with fixed seeds, and how each ends.

    python3 -m bench.faults                 # writes bench/results/faults.json
    python3 -m bench.faults --only rows     # one kind, printed alone

Five kinds: configurations, rows, templates, headers (safetensors and GGUF) and damages (files of a base, an adapter and
a run, cut, emptied, overwritten or made of other JSON). Each goes through the product's own function or command in a
worker process that is used again, and ends as one of: works, message (one clear error), class name (a traceback, or an
error that names a class), hang (over 10 s of the processor, or a
minute), memory (over 1 GiB more than the idle worker), died.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil

RESULTS = Path(__file__).parent / "results" / "faults.json"
COUNTS = {"configurations": 1000, "rows": 700, "templates": 200, "headers": 600, "damages": 500}
HANG_SECONDS, WAIT_SECONDS, MOST_BYTES = 10, 60, 2**30
NASTY: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**31, 2**63, 10**40, 1e308, float("nan"), float("inf"), "", " ", "\0", "\x1b]52;c;x\x07"),
    *("\ud800", "é", "null", "1e999", "2024-13-45", "../../etc/passwd", "/dev/zero", "a" * 5000, [], {}, [[]], [{}]),
    *([None], {"a": None}, {"": ""}, [1, "a"], "{{ 1/0 }}", "<|im_end|>", "[/red]", "\u202egnp.exe"),
)


class Input(NamedTuple):
    """One broken input: what the worker calls, with what, and what was done to it."""

    call: str
    arguments: list[str]
    what: str


def main() -> None:
    """Make every input, let a worker take it, and count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", choices=COUNTS)
    parser.add_argument("--count", type=int)
    options = parser.parse_args()
    started, found = time.monotonic(), {}
    with tempfile.TemporaryDirectory(prefix="veneer-faults-") as folder:
        os.environ |= {"VENEER_CACHE": f"{folder}/cache", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        good = _good(Path(folder) / "good")
        worker = Worker()
        for kind, count in COUNTS.items():
            if options.only in (None, kind):
                place = Path(folder) / kind
                place.mkdir()
                inputs = MAKERS[kind](good, place, random.Random(kind))
                found[kind] = _count(worker, (next(inputs) for _ in range(options.count or count)))
                print(kind, json.dumps(found[kind], indent=1), flush=True)
        worker.stop()
    if options.only is None:
        versions = {name: metadata.version(name) for name in ("veneer", "transformers", "tokenizers", "gguf", "pyyaml")}
        about = {"command": "python3 -m bench.faults", "seconds": round(time.monotonic() - started), "seeds": "by kind"}
        RESULTS.write_text(json.dumps(about | {"versions": versions, "kinds": found}, indent=2) + "\n")


def _count(worker: "Worker", inputs: Iterator[Input]) -> dict[str, Any]:
    ends: Counter[str] = Counter()
    wrong = []
    for given in inputs:
        end, told = worker.take(given)
        ends[end] += 1
        if end not in ("works", "message"):
            wrong.append({"end": end, "call": given.call, "what": given.what[:200], "told": told[:300]})
    return {"inputs": sum(ends.values()), **dict(sorted(ends.items())), "wrong": wrong[:20]}


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
        self._idle = self._watched.memory_info().rss

    def take(self, given: Input) -> tuple[str, str]:
        """How an input ends, and what was said."""
        self._pipe.send(given)
        began, waited = self._seconds(), time.monotonic()
        while not self._pipe.poll(0.02):
            with contextlib.suppress(psutil.Error):
                if self._watched.memory_info().rss - self._idle > MOST_BYTES:
                    return self._ended("memory")
                if self._seconds() - began > HANG_SECONDS or time.monotonic() - waited > WAIT_SECONDS:
                    return self._ended("hang")
        try:
            end, told = self._pipe.recv()
        except EOFError:
            return self._ended("died")
        return str(end), str(told)

    def _seconds(self) -> float:
        """Of the processor; other work on this machine does not count."""
        times = self._watched.cpu_times()
        return float(times.user + times.system)

    def _ended(self, how: str) -> tuple[str, str]:
        self._process.kill()
        self._process.join()
        self._start()
        return how, ""

    def stop(self) -> None:
        self._process.kill()
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
            pipe.send(("class name", f"{type(error).__name__}: {error!r}"[:500]))


def _end_of(given: Input) -> tuple[str, str]:
    from veneer.config import JobError, UserError

    if given.call == "command":
        return _command(given.arguments)
    try:
        CALLS[given.call](*given.arguments)
    except (UserError, JobError) as error:
        return "message", str(error)
    return "works", ""


def _command(arguments: list[str]) -> tuple[str, str]:
    """A command line in this process."""
    from veneer.cli.main import main as veneer

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            veneer(arguments)
        except SystemExit as end:
            status = end.code
    told = said.getvalue()
    if "Traceback" in told or "run it again with --debug" in told:
        return "class name", told[-500:]
    if status == 0:
        return "works", ""
    return ("message" if "error: " in told else "class name"), told[-500:]


def _config(path: str) -> None:
    from veneer.config import load_run
    from veneer.config.load import to_yaml

    to_yaml(load_run(path))


def _weights(path: str) -> None:
    from veneer.config import UserError
    from veneer.model.shards import DamagedError, UnknownTypeError, read_header
    from veneer.release.weights import read_header as read_for_merge

    read_for_merge(Path(path))
    try:
        read_header(Path(path))
    except (DamagedError, UnknownTypeError) as error:
        raise UserError(str(error)) from None


def _gguf(path: str) -> None:
    from veneer.model.gguf import config_of, weight_type

    weight_type(Path(path))
    config_of(Path(path))


def _base(path: str) -> None:
    import torch

    from veneer.config import Model
    from veneer.model import load_tokenizer, locate
    from veneer.model.shapes import build, find_config

    build(find_config(Model(base=path)), torch.bfloat16)
    load_tokenizer(locate(Model(base=path)))


def _run(path: str) -> None:
    import veneer
    from veneer.config import RunFolder
    from veneer.release.origin import find_origin
    from veneer.release.push import pack
    from veneer.report.run_page import write_run_page

    write_run_page(RunFolder(Path(path)))
    find_origin(path).renderer()
    pack(path, "me/name", True)
    veneer.load(path)


CALLS: dict[str, Callable[..., None]] = {
    "config": _config, "weights": _weights, "gguf": _gguf, "base": _base, "run": _run
}  # fmt: skip


class Good(NamedTuple):
    """What is not broken yet."""

    base: Path
    run: Path
    gguf: Path


def _good(folder: Path) -> Good:
    """A tiny base, a run on it, and a GGUF file of it."""
    from tests.runs import tiny_run, write_rows
    from tests.tiny import FAMILIES, save_tiny_model

    import veneer

    folder.mkdir()
    save_tiny_model(FAMILIES["llama"], folder / "base")
    rows = [{"prompt": f"name {n}", "completion": "cat" * (n % 3 + 1)} for n in range(12)]
    data = write_rows(folder / "rows.jsonl", rows)
    veneer.train(tiny_run(folder / "base", data, folder / "run", data={"validation": 2}))
    veneer.evaluate(folder / "run")
    veneer.export(str(folder / "run"), folder / "gguf", quant="f16")
    return Good(folder / "base", folder / "run", next((folder / "gguf").glob("*.gguf")))


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
        settings = ["--model", str(good.base), "--rows", "2", "data.validation=0", "data.workers=1"]
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
    number = 0
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"a {n}", "completion": "b"}) + "\n" for n in range(4)))
    while True:
        number += 1
        text = "".join(chance.sample(pieces, chance.randint(1, 2)))
        path = folder / f"{number}.jinja"
        path.write_text(text)
        settings = ["--model", str(good.base), "data.validation=0", "data.workers=1", f"data.chat_template={path}"]
        yield Input("command", ["data", str(rows), *settings], text)


def _headers(good: Good, folder: Path, chance: random.Random) -> Iterator[Input]:
    """Safetensors and GGUF files with other lengths, offsets, types and bytes in their headers."""
    weights, gguf = (good.base / "model.safetensors").read_bytes(), good.gguf.read_bytes()
    length = int.from_bytes(weights[:8], "little")
    while True:
        if chance.random() < 0.5:
            header = json.loads(weights[8 : 8 + length])
            entry = header[chance.choice([name for name in header if name != "__metadata__"])]
            entry[chance.choice(("dtype", "shape", "data_offsets"))] = chance.choice(
                (*NASTY, [0.0, 4], [4, 0], [-1, 3], [0, 2**60], [2**62, 2**62], ["a", "b"], "F99", [True, False])
            )
            text = json.dumps(header, allow_nan=True).encode(errors="surrogatepass")
            size = chance.choice((len(text), len(text), len(text) + 5, 0, 2**63, 1, len(text) - 1))
            path, call = folder / "w.safetensors", "weights"
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
        yield Input(call, [str(path)], what)


def _damages(good: Good, folder: Path, chance: random.Random) -> Iterator[Input]:
    """A base or a run with one file cut, emptied, overwritten, with flipped bytes, or with other JSON in it."""
    homes = {"base": good.base, "run": good.run}
    number = 0
    while True:
        number += 1
        call = chance.choice(("base", "run"))
        copy = folder / str(number)
        shutil.copytree(homes[call], copy, ignore=shutil.ignore_patterns("checkpoints"))
        files = sorted(file for file in copy.rglob("*") if file.is_file() and file.suffix not in (".png", ".md"))
        file = chance.choice(files)
        how, content = _damaged(file, chance)
        file.write_bytes(content)
        yield Input(call, [str(copy)], f"{file.relative_to(copy)}: {how}")
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
    if how == "flipped":
        data = bytearray(content)
        for _ in range(5):
            data[chance.randrange(min(len(data), 3000))] ^= 1 << chance.randrange(8)
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
