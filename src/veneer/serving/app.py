"""The routes of the server.

Bodies are read by our own models (protocol.py), so that every fault is one message in OpenAI's form. A client that goes
away, whether it waits for a whole answer or reads a stream, gives its slot back at the next step.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from importlib import resources
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from veneer.config import UserError
from veneer.serving.adapters import Served
from veneer.serving.errors import ApiError
from veneer.serving.generation import Event, Piece
from veneer.serving.guard import Guard
from veneer.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    LoadRequest,
    TokenizeRequest,
    UnloadRequest,
    parse,
)
from veneer.serving.replies import DONE, CallStream, event, first_chunks
from veneer.serving.service import Job, Service
from veneer.serving.tool_calls import as_dicts

T = TypeVar("T")
# The page's own scripts and styles, and no others; it asks this server alone.
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
GONE = 499  # the client left: nobody reads this


def make_app(service: Service, key: str | None = None, hosts: tuple[str, ...] | None = None) -> Guard:
    """Return the application.

    Args:
        service: Models and scheduler.
        key: Key that requests need; None: none.
        hosts: Names that a request may be for; None: any.
    """
    app = FastAPI(title="veneer serve", docs_url=None, redoc_url=None, openapi_url=None)
    _add_routes(app, service)
    _add_models(app, service)
    _add_errors(app)
    paths = frozenset(str(getattr(route, "path", "")) for route in app.routes)
    return Guard(app, key, service.limits.body_bytes, hosts, service.metrics, paths)


def _add_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = parse(ChatRequest, await request.body())
        job = await service.chat(asked)
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return await _answered(service, request, job, bool(asked.stream), with_usage)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        asked = parse(CompletionRequest, await request.body())
        job = await service.complete(asked)
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return await _answered(service, request, job, bool(asked.stream), with_usage)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        asked = parse(TokenizeRequest, await request.body())
        return JSONResponse(await asyncio.to_thread(service.tokenize, asked))

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/")
    async def page() -> Response:
        html = resources.files("veneer.serving").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(html, headers={"Content-Security-Policy": PAGE_POLICY})


def _add_models(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> Response:
        listed = [_described(model, service) for model in service.adapters.models.values()]
        return JSONResponse({"object": "list", "data": listed})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(_described(service.adapters.get(name), service))

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Response:
        asked = parse(LoadRequest, await request.body())
        folder = await asyncio.to_thread(service.adapters.allowed_path, asked.lora_path)
        try:
            await asyncio.to_thread(service.adapters.load, asked.lora_name, str(folder), asked.load_inplace)
        except UserError as error:
            raise ApiError(400, " ".join(str(error).split()), "lora_path", "adapter_refused") from None
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Response:
        asked = parse(UnloadRequest, await request.body())
        service.adapters.unload(asked.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        what = "no such path" if error.status_code == 404 else str(error.detail)
        refusal = ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {what}")
        return JSONResponse(refusal.body, refusal.status, error.headers)


def _described(model: Served, service: Service) -> dict[str, Any]:
    """Return a model as the list of models has it, in vLLM's form; no path of this machine is in it."""
    base = service.adapters.base
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "veneer",
        "root": model.name,
        "parent": base.name if model is not base else None,
        "max_model_len": service.most_tokens,
        "adapter_sha256": model.sha256,
    }


async def _answered(service: Service, request: Request, job: Job, is_streamed: bool, with_usage: bool) -> Response:
    """Return the reply to a job; of a stream once its first event is there, so that a refusal has its own status."""
    is_handed_on = False
    try:
        if is_streamed:
            first = await _unless_gone(request, job.next())
            is_handed_on = True
            return StreamingResponse(
                _streamed(service, job, first, with_usage),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )
        while not job.is_ended:
            await _unless_gone(request, job.next())
        return JSONResponse(job.asked.whole(job.answers, job.cached))
    finally:
        if not is_handed_on:
            service.cancel(job)


async def _unless_gone(request: Request, awaited: Awaitable[T]) -> T:
    """Return what is awaited.

    Raises:
        ApiError: The client has gone away meanwhile.
    """
    result = asyncio.ensure_future(awaited)
    gone = getattr(request.state, "gone", None)
    if gone is None:
        gone = request.state.gone = asyncio.ensure_future(_is_gone(request))
    await asyncio.wait([result, gone], return_when=asyncio.FIRST_COMPLETED)
    if result.done():
        return result.result()
    result.cancel()
    raise ApiError(GONE, "the client went away")


async def _is_gone(request: Request) -> None:
    """Wait until the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _streamed(service: Service, job: Job, first: tuple[int, Event], with_usage: bool) -> AsyncIterator[str]:
    """Yield the events of a reply."""
    asked = job.asked
    calls = [CallStream(asked.calls) for _ in job.answers] if asked.calls is not None else []
    try:
        for chunk in first_chunks(asked, len(job.answers)):
            yield chunk
        number, found = first
        while True:
            for chunk in _chunks(job, calls, number, found):
                yield chunk
            if job.is_ended:
                break
            number, found = await job.next()
        if with_usage:
            yield asked.usage_chunk(job.answers, job.cached)
        yield DONE
    except ApiError as error:  # too late for a status
        yield event(error.body)
    finally:
        service.cancel(job)


def _chunks(job: Job, calls: list[CallStream], number: int, found: Event) -> list[str]:
    """Return the events that say what one answer has more."""
    asked = job.asked
    if isinstance(found, Piece):
        text = calls[number].put(found.text) if calls else found.text
        if not text and not found.tokens:
            return []
        delta = {"content": text} if asked.is_chat else text
        return [asked.chunk(number, delta, found.tokens, None)]
    reason, chunks = job.answers[number].reason, list[str]()
    if calls:
        text, made = calls[number].end()
        if made:
            reason = "tool_calls"
            chunks.append(asked.chunk(number, {"tool_calls": as_dicts(made, with_index=True)}, (), None))
        elif text:
            chunks.append(asked.chunk(number, {"content": text}, (), None))
    return [*chunks, asked.chunk(number, {} if asked.is_chat else "", (), reason)]
