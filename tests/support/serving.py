"""A server on a tiny base with adapters, in the process of the test; and answers of the same models by plain PEFT."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from starlette.testclient import TestClient

from veneer.model.quiet import quiet
from veneer.serving.address import require_safe
from veneer.serving.app import make_app
from veneer.serving.limits import Limits
from veneer.serving.server import Wanted, listen, named, opened
from veneer.serving.service import Service


@contextmanager
def service_of(models: Sequence[str], **wanted: Any) -> Iterator[Service]:
    """What answers for models, in float32."""
    with opened(Wanted([named(model) for model in models], dtype=torch.float32, **wanted)) as service:
        yield service


@contextmanager
def client_of(service: Service, key: str | None = None, hosts: tuple[str, ...] | None = None) -> Iterator[TestClient]:
    """A client of a service's routes, whose requests share a loop and may overlap."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    with TestClient(make_app(service, key, hosts), raise_server_exceptions=False, headers=headers) as client:
        yield client


def few(**limits: Any) -> Limits:
    """Limits for a tiny server."""
    return Limits(**({"slots": 8, "queue": 64, "seconds": 60.0, "max_tokens": 16, "adapters": 4} | limits))


def answered_by_peft(base: Path, adapter: Path | None, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """Greedy answers of a base with or without an adapter, each prompt by itself, through Transformers and PEFT."""
    import peft
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        with quiet():
            model = peft.PeftModel.from_pretrained(model, str(adapter))
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=2
        )
        found.append(output[0, len(prompt) :].tolist())
    return found


@contextmanager
def server_of(service: Service, key: str | None = None) -> Iterator[str]:
    """A service behind a real socket of this machine, for a `with` block; gives its address."""
    import uvicorn

    app = make_app(service, key, require_safe("127.0.0.1", key))
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
