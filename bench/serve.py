"""What `veneer serve` promises: speed of mixed adapters, exact answers, latency and memory on a CPU, no broken request.

    python3 -m bench.serve gpu                # an H100: 8B shapes, 8 adapters of r=16, 64 clients
    python3 -m bench.serve gpu --nf4          # the same on a base in 4 bits
    python3 -m bench.serve gpu --cases base one 8 --profile    # and where the time of a step goes
    python3 -m bench.serve cpu --minutes 5    # two cores: SmolLM2 and two adapters, 32 clients
    python3 -m bench.serve exact              # tiny random models in float32, 1,000 requests
    python3 -m bench.serve fuzz               # 2,000 malformed requests to a tiny server

`gpu` asks the scheduler itself, since HTTP is not what it measures: 64 answers at a time of prompts with 64 to 512
tokens and answers of 128 to 384, of the base alone, of one adapter, and of 8 adapters mixed; and half of these requests
through Transformers' own continuous batching, of the base and with one adapter. Counted are generated tokens over all
the time, after the same prompts with short answers, for which passes are recorded. `--cases` takes those whose names
begin with one of the words; `--profile` prints the time of a step of 64 rows and of a prompt's pass, and the kernels of
a step by their time. `cpu` starts the command as a user does and asks over HTTP. `exact` compares the answers of all
adapters in mixed batches, with prompts that share a prefix, with those of Transformers and PEFT, each prompt by itself.
Prints a JSON line a case and merges it into bench/results/serve.json.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

RESULTS = Path(__file__).parent / "results" / "serve.json"
WORDS = ("what", "does", "the cat", "say please", "and", "the dog", "or the owl", "the hen", "route this", "now")


# An H100: the scheduler with 64 answers at a time.


def adapter_matrices(model: Any, seed: int, rank: int) -> dict[str, Any]:
    """Random matrices on all linear layers of the blocks, small enough to change little."""
    from veneer.serving.mixed import Matrices

    draw = torch.Generator("cuda").manual_seed(seed)
    found = {}
    for path, module in model.named_modules():
        if hasattr(module, "in_features") and "lm_head" not in path:
            a = torch.randn(rank, module.in_features, device="cuda", generator=draw, dtype=torch.bfloat16) * 0.01
            b = torch.randn(module.out_features, rank, device="cuda", generator=draw, dtype=torch.bfloat16) * 0.01
            found[path] = Matrices(a, b)
    return found


def requests_of(count: int, vocabulary: int) -> list[tuple[list[int], int]]:
    """Random prompts, and the tokens of each answer."""
    draw = random.Random(0)
    sizes = [(draw.randint(64, 512), draw.randint(128, 384)) for _ in range(count)]
    return [([draw.randrange(3, vocabulary) for _ in range(n)], limit) for n, limit in sizes]


class NoText:
    """A text that nobody reads, in the place of a tokenizer's."""

    stopped = False

    def put(self, token: int) -> str:
        return ""

    def end(self) -> str:
        return ""


def by_scheduler(
    model: Any, bank: Any, requests: Sequence[tuple[list[int], int]], adapters: Sequence[int], slots: int
) -> dict[str, Any]:
    """Answer all requests, the first adapter for the first of them and so on around."""
    from veneer.serving.batch import make_batch, ready
    from veneer.serving.generation import Ended, Generation
    from veneer.serving.metrics import Metrics
    from veneer.serving.prefix_cache import PrefixCache
    from veneer.serving.sampling import Decoding
    from veneer.serving.scheduler import Scheduler

    done = threading.Semaphore(0)
    made: list[int] = []

    def tell(event: Any) -> None:
        if isinstance(event, Ended):
            made.append(event.tokens)
        if not hasattr(event, "text"):
            done.release()

    torch.cuda.reset_peak_memory_stats()
    with ready(model):
        batch = make_batch(model, bank, slots, slots * 1024, 8192, PrefixCache(0))
        scheduler = Scheduler(batch, len(requests), Metrics(), overlaps=True)
        scheduler.start()

        def submit(some: Sequence[tuple[list[int], int]]) -> float:
            began = time.perf_counter()
            for number, (prompt, limit) in enumerate(some):
                text: Any = NoText()
                row = Generation(
                    prompt, adapters[number % len(adapters)], "", limit, frozenset(), text, Decoding(), tell, 1e12
                )
                scheduler.submit([row])
            for _ in some:
                done.acquire()
            return time.perf_counter() - began

        try:
            submit([(prompt, limit // 8) for prompt, limit in requests])  # records the steps, and passes over prompts
            made.clear()
            seconds = submit(requests)
        finally:
            scheduler.stop()
    expected = sum(limit for _, limit in requests)
    return {
        "tokens_per_second": round(sum(made) / seconds, 1),
        "seconds": round(seconds, 2),
        "whole": sum(made) == expected,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def by_transformers(model: Any, requests: Sequence[tuple[list[int], int]]) -> dict[str, Any]:
    """Half of the requests through Transformers' continuous batching; each answer has its own limit."""
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=384, do_sample=False, eos_token_id=-1, pad_token_id=0)
    model.set_attn_implementation("paged|sdpa")
    manager = model.init_continuous_batching(generation_config=config)
    manager.start()
    half = requests[: len(requests) // 2]
    try:
        seconds = 0.0
        made = 0
        for some in (half[: len(half) // 2], half):
            began = time.perf_counter()
            for prompt, limit in some:
                manager.add_request(prompt, max_new_tokens=limit)
            outputs = [manager.get_result(timeout=300) for _ in some]
            seconds = time.perf_counter() - began
            made = sum(len(output.generated_tokens) for output in outputs if output is not None)
    finally:
        manager.stop(block=True)
        model.set_attn_implementation("sdpa")
    return {"tokens_per_second": round(made / seconds, 1), "seconds": round(seconds, 2), "requests": len(half)}


@torch.no_grad()
def profiled(
    model: Any, bank: Any, requests: Sequence[tuple[list[int], int]], adapters: Sequence[int], slots: int
) -> dict[str, Any]:
    """Milliseconds of a prompt's pass and of a step with all slots in use; prints a step's kernels by their time."""
    from torch.profiler import ProfilerActivity, profile

    from veneer.serving.batch import make_batch, ready
    from veneer.serving.generation import Generation
    from veneer.serving.prefix_cache import PrefixCache
    from veneer.serving.sampling import Decoding, Row, choose

    text: Any = NoText()
    rows = [
        Generation(
            prompt, adapters[n % len(adapters)], "", limit, frozenset(), text, Decoding(), lambda event: None, 1e12
        )
        for n, (prompt, limit) in enumerate(requests[:slots])
    ]
    with ready(model):
        batch: Any = make_batch(model, bank, slots, slots * 1024, 8192, PrefixCache(0))

        def read(some: Sequence[Any]) -> int:
            """Read prompts together; return how many."""
            reading = batch.begin(some)
            while not reading.advance():
                pass
            return len(reading.generations)

        def recorded_ms(count: int, tokens: int) -> float | None:
            """Milliseconds of a recorded pass over prompts."""
            ids, owners = [[1] * tokens] * count, [adapters[number % len(adapters)] for number in range(count)]
            if batch.recorded_prompts is None:
                return None
            for _ in range(4):
                batch.recorded_prompts.read(ids, owners)
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(10):
                batch.recorded_prompts.read(ids, owners)
            torch.cuda.synchronize()
            return round(100 * (time.perf_counter() - began), 2)

        def step() -> None:
            chosen = choose(batch.step(), [Row(row.decoding, row.prompt, row.ids, row.generator) for row in batch.rows])
            for row, choice in zip(batch.rows, chosen, strict=True):
                row.take(choice)

        waiting = list(rows)
        while waiting:
            del waiting[: read(waiting[:8])]
        for _ in range(8):
            step()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(20):
            step()
        milliseconds = 1000 * (time.perf_counter() - began) / 20
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            for _ in range(10):
                step()
            torch.cuda.synchronize()
        with torch.no_grad():
            prompts = {
                f"{count} x {tokens}": recorded_ms(count, tokens) for count, tokens in ((1, 256), (1, 512), (4, 256))
            }
    kernels = sorted(recorded.key_averages(), key=lambda one: -one.self_device_time_total)
    busy = sum(one.self_device_time_total for one in kernels) / 10_000
    for one in kernels[:25]:
        print(
            f"{one.self_device_time_total / 10_000:8.3f} ms  {one.count / 10:6.1f} times  {one.key[:110]}", flush=True
        )
    return {
        "step_ms": round(milliseconds, 2),
        "step_ms_of_kernels": round(busy, 2),
        "kernels_of_a_step": round(sum(one.count for one in kernels) / 10),
        "ms_of_prompts": prompts,
    }


def gpu_cases(a: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Cases on a model of random weights, which is made once."""
    from bench.engine import random_base
    from veneer.serving.mixed import AdapterBank

    model = random_base(a.shape, a.layers, quantized=a.nf4).eval()
    model.requires_grad_(False)
    bank = AdapterBank(model, 8, torch.bfloat16)
    for number in range(1, 9):
        bank.put(number, adapter_matrices(model, number, 16))
    requests = requests_of(a.requests, model.config.vocab_size)

    def with_one_adapter() -> dict[str, Any]:
        """Transformers' batching runs the base's own modules, so the hooks add adapter 1 there as well."""
        with bank.rows([1], 1):
            return by_transformers(model, requests)

    slots = partial(by_scheduler, model, bank, requests, slots=a.clients)
    everyone = list(range(1, 9))

    profiles: dict[str, Callable[[], dict[str, Any]]] = {
        "profile of the base": lambda: profiled(model, bank, requests, [0], a.clients),
        "profile of 8 adapters mixed": lambda: profiled(model, bank, requests, everyone, a.clients),
    }
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "base": lambda: slots(adapters=[0]),
        "one adapter": lambda: slots(adapters=[1]),
        "8 adapters mixed": lambda: slots(adapters=everyone),
        "base again": lambda: slots(adapters=[0]),
        "8 adapters mixed again": lambda: slots(adapters=everyone),
        "transformers, base": lambda: by_transformers(model, requests),
        "transformers, one adapter": with_one_adapter,
    }
    chosen = {name: case for name, case in cases.items() if name.startswith(tuple(a.cases))}
    return (profiles if a.profile else {}) | chosen


# A CPU: the command over HTTP.


def post(address: str, body: dict[str, Any], first: list[float] | None = None) -> str:
    """Ask for a streamed answer; the seconds until its first token are appended to `first`."""
    data = json.dumps(body | {"stream": True}).encode()
    request = urllib.request.Request(f"{address}/v1/chat/completions", data, {"Content-Type": "application/json"})
    began, text = time.perf_counter(), ""
    with urllib.request.urlopen(request, timeout=600) as reply:
        for line in reply:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                more = event["choices"][0]["delta"].get("content")
                if more and first is not None and not text:
                    first.append(time.perf_counter() - began)
                text += more or ""
    return text


def save_adapters(folder: Path, base: str, count: int) -> list[str]:
    """Write random adapters of r=16 on a built-in base, with its tokenizer."""
    from veneer.config import Adapter, Model
    from veneer.machine.device import find_machine
    from veneer.model.attach import attach, save_adapter
    from veneer.model.load import load_model, load_tokenizer
    from veneer.model.locate import locate

    source = locate(Model(base=base))
    tokenizer = load_tokenizer(source)
    for number in range(count):
        model = attach(load_model(source, Model(base=base), None, find_machine()), Adapter(r=16, lora_alpha=32), number)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.002)
        save_adapter(model, tokenizer, tokenizer.chat_template, source, folder / f"adapter-{number}")
    return [str(folder / f"adapter-{number}") for number in range(count)]


def on_cpu(a: argparse.Namespace) -> dict[str, Any]:
    """Start the command, ask one short prompt at a time, then from 32 clients for some minutes."""
    with tempfile.TemporaryDirectory() as folder:
        models = ["smollm2-135m-instruct", *save_adapters(Path(folder), "smollm2-135m-instruct", 2)]
        command = [sys.executable, "-m", "veneer.cli.main", "serve", *models, "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            address = server.stdout.readline().split()[0]
            try:
                return _asked(a, address, psutil.Process(server.pid))
            finally:
                server.terminate()


def _asked(a: argparse.Namespace, address: str, process: psutil.Process) -> dict[str, Any]:
    names = [model["id"] for model in json.load(urllib.request.urlopen(f"{address}/v1/models"))["data"]]
    draw = random.Random(0)

    def body(words: int, tokens: int) -> dict[str, Any]:
        text = " ".join(draw.choice(WORDS) for _ in range(words))
        message = {"role": "user", "content": text}
        return {"model": draw.choice(names), "messages": [message], "max_tokens": tokens, "temperature": 0}

    first: list[float] = []
    for _ in range(22):
        post(address, body(8, 4), first)
    idle = sorted(first[2:])
    ends = time.monotonic() + 60 * a.minutes
    errors, answers, resident = list[str](), 0, list[tuple[int, int]]()

    def client(_: int) -> int:
        count = 0
        while time.monotonic() < ends:
            try:
                post(address, body(draw.randint(4, 60), draw.randint(4, 32)))
                count += 1
            except Exception as error:  # noqa: BLE001 - it is counted
                errors.append(repr(error))
        return count

    with ThreadPoolExecutor(a.clients) as pool:
        running = [pool.submit(client, number) for number in range(a.clients)]
        while time.monotonic() < ends:
            time.sleep(min(5.0, 6 * a.minutes))
            resident.append((process.memory_info().rss, _kept_bytes(address)))
        answers = sum(one.result() for one in running)
    half = len(resident) // 2
    return {
        "first_token_seconds_idle": {"median": round(idle[len(idle) // 2], 3), "largest": round(idle[-1], 3)},
        "clients": a.clients,
        "minutes": a.minutes,
        "answers": answers,
        "errors": errors[:5],
        "error_count": len(errors),
        "resident_mib": {"after_half": _mib(resident[half - 1][0]), "at_end": _mib(resident[-1][0])},
        "of_it_kept_prompts_mib": {"after_half": _mib(resident[half - 1][1]), "at_end": _mib(resident[-1][1])},
        "load_of_the_machine": round(psutil.getloadavg()[0], 1),
    }


def _kept_bytes(address: str) -> int:
    """Return the bytes of prompts that the server keeps, up to a limit of its own."""
    lines = urllib.request.urlopen(f"{address}/metrics").read().decode().splitlines()
    return int(float(next(line for line in lines if "prefix_cache_bytes" in line and line[0] != "#").split()[-1]))


def _mib(count: int) -> int:
    return round(count / 2**20)


# Tiny models: exact answers, and malformed requests.


def exact(a: argparse.Namespace) -> dict[str, Any]:
    """Answers of three adapters and the base in mixed batches, against each alone by Transformers and PEFT."""
    from tests.support.adapters import save_adapter_of
    from tests.support.certified import make_base
    from tests.support.serving import answered_by_peft, client_of, few, service_of

    from veneer.serving.protocol import TokenizeRequest

    kinds = ("lora", "rslora", "patterns")
    draw = random.Random(1)
    shared = "the dog and the owl and the hen " * 8
    texts = [
        (shared if draw.random() < 0.5 else "") + " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 12)))
        for _ in range(a.requests // 4)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_base(folder / "base", 0)
        paths = [save_adapter_of(kind, folder / "base", folder / kind) for kind in kinds]
        models = ["base", *kinds]
        with service_of(list(map(str, paths)), limits=few(slots=16, queue=a.requests)) as service:
            stops = service.adapters.base.stop_ids

            def ask(one: tuple[str, str]) -> list[int]:
                model, text = one
                body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0}
                body |= {"max_tokens": 12, "logprobs": True, "return_tokens_as_token_ids": True}
                content = client.post("/v1/chat/completions", json=body).json()["choices"][0]["logprobs"]["content"]
                return [int(entry["token"].removeprefix("token_id:")) for entry in content]

            asked = [(model, text) for text in texts for model in models]
            draw.shuffle(asked)
            with client_of(service) as client, ThreadPoolExecutor(32) as pool:
                found = dict(zip(asked, pool.map(ask, asked)))
            cached = service.metrics.cached_tokens.value
            turns = [[{"role": "user", "content": text}] for text in texts]
            prompts = [service.tokenize(TokenizeRequest(messages=turn))["tokens"] for turn in turns]
        same = 0
        for model, path in zip(models, (None, *paths)):
            for text, ids in zip(texts, answered_by_peft(folder / "base", path, prompts, 12)):
                wanted = next((ids[:at] for at, token in enumerate(ids) if token in stops), ids)
                same += found[model, text] == wanted
    return {"requests": len(asked), "same": same, "cached_prompt_tokens": cached}


def fuzz(a: argparse.Namespace) -> dict[str, Any]:
    """Malformed requests to a tiny server: statuses, and the longest time of one."""
    from collections import Counter

    from tests.support.certified import make_base
    from tests.support.malformed import malformed
    from tests.support.serving import client_of, few, service_of

    draw, statuses, longest, not_json = random.Random(2), Counter[int](), 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        make_base(Path(folder) / "base", 0)
        limits = few(body_bytes=20_000)
        with service_of([f"{folder}/base"], limits=limits) as service, client_of(service) as client:
            for _ in range(2 * a.requests):
                method, path, body, headers = malformed(draw)
                began = time.perf_counter()
                reply = client.request(method, path, content=body, headers=headers)
                longest = max(longest, time.perf_counter() - began)
                statuses[reply.status_code] += 1
                not_json += reply.status_code >= 400 and "error" not in reply.json()
    return {
        "requests": 2 * a.requests,
        "statuses": dict(sorted(statuses.items())),
        "errors_of_the_server": sum(count for status, count in statuses.items() if status >= 500),
        "refusals_without_json": not_json,
        "longest_seconds": round(longest, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=("gpu", "cpu", "exact", "fuzz"))
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--nf4", action="store_true", help="gpu: the base in 4 bits")
    parser.add_argument("--cases", nargs="*", default=[""], help="gpu: beginnings of cases' names; without one: none")
    parser.add_argument("--profile", action="store_true", help="gpu: the kernels of a step, before the cases")
    parser.add_argument("--requests", type=int, help="gpu: 256; exact: 1000, fuzz: 1000 twice")
    parser.add_argument("--clients", type=int, help="gpu: 64; cpu: 32")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    a = parser.parse_args()
    a.requests = a.requests or (256 if a.group == "gpu" else 1000)
    a.clients = a.clients or (64 if a.group == "gpu" else 32)
    alone = {"cpu": on_cpu, "exact": exact, "fuzz": fuzz}
    cases = gpu_cases(a) if a.group == "gpu" else {a.group: partial(alone[a.group], a)}
    where = f"gpu {a.shape}{' NF4' if a.nf4 else ''}" if a.group == "gpu" else a.group
    found = json.loads(a.out.read_text()) if a.out.exists() else {}
    for name, case in cases.items():
        try:
            result = case()
        except Exception:  # noqa: BLE001 - the next case may go well, and device time is short
            result = {"failed": traceback.format_exc(limit=-4)}
        print("RESULT " + json.dumps({"on": where, "case": name} | result), flush=True)
        entry = found.setdefault(where, {})
        entry[name] = result
        entry["on"] = {
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "cores": psutil.cpu_count(),
            "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft")},
            "date": time.strftime("%Y-%m-%d"),
        }
        a.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
