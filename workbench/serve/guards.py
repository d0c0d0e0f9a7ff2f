"""What stands before the endpoints: who may ask, and how much they may send. Plain ASGI, no body is kept here."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

from workbench.serve.errors import ApiError
from workbench.serve.limits import Limits

OPEN_PATHS = ("/health", "/ready")  # for whoever watches the process

COUNTED_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics", *OPEN_PATHS)

App = Callable[[dict[str, Any], Any, Any], Awaitable[None]]


class Guard:
    """Refuses requests without the API key, and bodies above the limit or that do not come, however they are sent."""

    def __init__(self, app: App, api_key: str | None, limits: Limits) -> None:
        self.app, self.limits = app, limits
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if not self._may_ask(scope["path"], headers.get(b"authorization", b"")):
            await refuse(send, ApiError(401, "api key: expected 'Authorization: Bearer KEY' with this server's key."))
            return
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self.limits.body_bytes:
            await refuse(send, self._too_large())
            return
        n_received, complete = 0, False
        deadline = time.monotonic() + self.limits.seconds

        async def counted() -> dict[str, Any]:
            nonlocal n_received, complete
            patience = min(self.limits.stall_seconds, deadline - time.monotonic())
            try:  # after the body only the end of the connection is waited for, which has its time
                message: dict[str, Any] = await asyncio.wait_for(receive(), None if complete else max(patience, 0.0))
            except TimeoutError:
                raise ApiError(408, "body: expected all of it within the server's limit, got a part.") from None
            n_received += len(message.get("body", b""))
            complete = complete or not message.get("more_body", False)
            if n_received > self.limits.body_bytes:
                raise self._too_large()
            return message

        await self.app(scope, counted, send)

    def _may_ask(self, path: str, header: bytes) -> bool:
        if self._key is None or path in OPEN_PATHS:
            return True
        scheme, _, given = header.partition(b" ")
        return hmac.compare_digest(given.strip(), self._key) and scheme.lower() == b"bearer"

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"body: expected at most {self.limits.body_bytes} bytes, got more. Send less.", code="too_large"
        )


class Counted:
    """Counts requests by path and status."""

    def __init__(self, app: App, requests: Any) -> None:
        self.app, self.requests = app, requests

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in COUNTED_PATHS else "other"  # as many series as there are endpoints

        async def seen(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, seen)


async def refuse(send: Any, error: ApiError) -> None:
    """Answer with the error; its text is ASCII, whatever a client sent."""
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers()}
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
