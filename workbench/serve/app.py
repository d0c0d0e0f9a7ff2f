"""The HTTP of a server: FastAPI over a `Service`. Every error has OpenAI's shape; no bad input is a 5xx."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from workbench.serve.chat import Chat
from workbench.serve.completions import Completion
from workbench.serve.errors import ApiError, from_validation
from workbench.serve.guards import Counted, Guard
from workbench.serve.mailbox import Mailbox
from workbench.serve.openapi import describe, document
from workbench.serve.schema import (
    ChatAnswer,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    Health,
    ModelCard,
    ModelList,
)
from workbench.serve.service import Service
from workbench.serve.streaming import EventStream, as_events, begun, unless_gone

CLIENT_GONE = 499  # for the log alone: nobody reads it


def create_app(service: Service) -> FastAPI:
    """The application; its lifespan starts the scheduler and, at the end, lets what runs finish."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.scheduler.start()
        yield
        await run_in_threadpool(service.scheduler.stop, service.limits.drain_seconds)

    app = FastAPI(title="LLM-jp-4 workbench", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, api_key=service.identity.api_key, limits=service.limits)
    app.add_middleware(Counted, requests=service.metrics.requests)  # outermost: it counts refusals too
    _handle_errors(app)
    _add_models(app, service)
    _add_answers(app, service)
    _add_watching(app, service)
    app.openapi = lambda: document(app, service.identity.api_key is not None)  # type: ignore[method-assign]
    return app


def _add_models(app: FastAPI, service: Service) -> None:
    card = {
        "id": service.identity.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "workbench",
        "max_model_len": service.engine.n_ctx,
    }

    @app.get("/v1/models", responses=describe(ModelList, 401))
    async def models() -> Response:
        return _json({"object": "list", "data": [card]})

    @app.get("/v1/models/{model:path}", responses=describe(ModelCard, 401, 404))
    async def model(model: str) -> Response:
        _check_name(service, model)
        return _json(card)


def _add_answers(app: FastAPI, service: Service) -> None:
    refusals = (400, 401, 404, 408, 413, 429, 500, 503)

    @app.post("/v1/chat/completions", responses=describe(ChatAnswer, *refusals, stream=True))
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await _answer(service, Chat, body, request)

    @app.post("/v1/completions", responses=describe(CompletionAnswer, *refusals, stream=True))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _answer(service, Completion, body, request)


async def _answer(service: Service, kind: type[Chat] | type[Completion], body: Any, request: Request) -> Response:
    _check_name(service, body.model)
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: expected stream to be true beside it, got false.", "stream_options")
    asked: Chat | Completion = await run_in_threadpool(kind, service, body)  # long texts take time to tokenize
    mailbox = Mailbox(service.limits.buffer if body.stream else None, service.scheduler.wake)
    choices = asked.choices(mailbox)
    service.submit(choices)
    events = service.events(choices, mailbox)
    if body.stream:
        ready = await unless_gone(request, begun(events))
        if ready is None:
            return Response(status_code=CLIENT_GONE)
        return EventStream(as_events(asked.stream(choices, ready)), service.limits.stall_seconds)

    async def whole() -> dict[str, Any]:
        async with aclosing(events):  # type: ignore[type-var]
            return await asked.whole(choices, events)

    found = await unless_gone(request, whole())
    return Response(status_code=CLIENT_GONE) if found is None else _json(found)


def _add_watching(app: FastAPI, service: Service) -> None:
    scheduler = service.scheduler

    def health() -> dict[str, Any]:
        if scheduler.has_failed or not (scheduler.is_alive or scheduler.is_stopping):
            status = "failed"
        else:
            status = "stopping" if scheduler.is_stopping else "ok"
        return {"status": status, "running": scheduler.n_running, "waiting": scheduler.n_waiting}

    @app.get("/health", responses=describe(Health, also={503: Health}))
    async def alive() -> Response:
        """200 while the process can answer what it has taken on."""
        found = health()
        return _json(found, 503 if found["status"] == "failed" else 200)

    @app.get("/ready", responses=describe(Health, also={503: Health}))
    async def ready() -> Response:
        """200 while new work is taken."""
        found = health()
        return _json(found, 200 if found["status"] == "ok" else 503)

    @app.get(
        "/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **describe(None, 401)}
    )
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _handle_errors(app: FastAPI) -> None:
    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        # the text may quote what a client sent, half a surrogate pair too: ASCII holds all of it
        return Response(json.dumps(error.body()), error.status, error.headers(), "application/json")

    async def validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return await api_error(request, from_validation(error.errors()))

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        cause = error.__cause__ or error.__context__
        if isinstance(cause, ApiError):  # a body that grew too large while it was read
            return await api_error(request, cause)
        response = await api_error(request, ApiError(error.status_code, f"request: {error.detail}."))
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(HTTPException, http_error)


def _check_name(service: Service, name: str) -> None:
    if name != service.identity.name:
        raise ApiError(
            404, f"model: expected {service.identity.name!r}, got {name[:200]!r}.", "model", "model_not_found"
        )


def _json(content: Any, status: int = 200) -> Response:
    return Response(json.dumps(content, ensure_ascii=False, allow_nan=False), status, media_type="application/json")
