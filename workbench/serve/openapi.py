"""The OpenAPI document: what each endpoint can answer, errors included."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from workbench.serve.schema import ErrorBody

MEANINGS = {
    400: "A field is wrong; `param` names it.",
    401: "No API key, or another.",
    404: "Another model's name.",
    408: "The server's time for one request is over.",
    413: "The body is too large.",
    429: "Too many wait. `Retry-After` tells when to try again.",
    500: "The server's fault.",
    503: "The server stops.",
}


def describe(
    answer: type[BaseModel] | None, *statuses: int, stream: bool = False, also: dict[int, type[BaseModel]] | None = None
) -> dict[int | str, dict[str, Any]]:
    """The `responses` of an endpoint."""
    found: dict[int | str, dict[str, Any]] = {}
    if answer is not None:
        found[200] = {"model": answer, "description": "The answer."}
        if stream:
            found[200]["content"] = {"text/event-stream": {"schema": {"type": "string"}}}
    for status in statuses:
        found[status] = {"model": ErrorBody, "description": MEANINGS[status]}
    for status, model in (also or {}).items():
        found[status] = {"model": model, "description": "The same, when it is not so."}
    return found


def document(app: FastAPI, has_key: bool) -> dict[str, Any]:
    """FastAPI's own, without the 422 that this server never gives, and with the key if there is one."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in made["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            made["components"]["schemas"].pop(name, None)
        if has_key:
            made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            made["security"] = [{"key": []}]
        app.openapi_schema = made
    return app.openapi_schema
