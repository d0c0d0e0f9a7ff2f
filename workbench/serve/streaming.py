"""Server-sent events: one JSON document each, "[DONE]" last. A reader that takes nothing for too long is cut off."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse

from workbench.serve.choice import Ended, Written
from workbench.serve.errors import ApiError

log = logging.getLogger(__name__)


class EventStream(StreamingResponse):
    """A stream whose every write must be taken within `stall_seconds`; what is under way is then cancelled."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[str], stall_seconds: float) -> None:
        super().__init__(content, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._content, self._stall_seconds = content, stall_seconds

    async def stream_response(self, send: Any) -> None:
        async def patient(message: Any) -> None:
            await asyncio.wait_for(send(message), self._stall_seconds)

        try:
            await super().stream_response(patient)
        except TimeoutError:
            log.warning("a reader took nothing for %s seconds: its connection is closed", self._stall_seconds)
        finally:
            await self._content.aclose()  # type: ignore[attr-defined]


async def as_events(documents: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """An error ends the stream with a document {"error": ...}."""
    try:
        async for document in documents:
            yield f"data: {json.dumps(document, ensure_ascii=False)}\n\n"
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
    finally:
        await documents.aclose()  # type: ignore[attr-defined]


async def begun(events: AsyncIterator[Written | Ended]) -> AsyncIterator[Written | Ended]:
    """The same events once the first is there, so that what fails at once still gets an error status."""
    first = await anext(events)

    async def rest() -> AsyncIterator[Written | Ended]:
        try:
            yield first
            async for event in events:
                yield event
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    return rest()


async def unless_gone(request: Request, work: Any) -> Any:
    """The result of `work`, which is cancelled when the client leaves; then None."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue
